"""Several processes: the same losses however 8 devices are divided, on other meshes and counts after a resume, after a
notice to end; one that ends early ends all."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from train_tiny import make_cache

from minisora_jax.bundled import CODEC
from minisora_jax.io.model_dir import load_model
from minisora_jax.models.codec import Codec
from minisora_jax.parallel.processes import distributed_arguments

LAUNCHER = Path(__file__).parent.parent / "launch" / "local_cpu.py"
STEPS = 6
CONFIG = """
from ml_collections import ConfigDict

def get_config(arg):
    return ConfigDict(dict(
        data=dict(path=arg),
        # Little to compile, which every process does by itself.
        dit=dict(latent_channels=4, patch=(1, 2, 2), width=32, depth=1, heads=2, text_width=64, text_depth=0,
                 dtype="float32", positions="none", qk_norm="none", cross_norm=False, micro_conditioning=False),
        pack=dict(tokens=16, text_tokens=128, slots=8, rows=8),
        run=dict(steps=STEPS, log_every=1, save_every=3, sample_every=0, keep=9, mesh=dict(data=2, ring=4),
                 optim=dict(warmup=2, name="adamw")),
    ))
""".replace("STEPS", str(STEPS))


# The processes of a job compile each program once: the first hands it to the others, and to later jobs. jax's key of a
# program has the process in it, by which the others would not know it.
ONCE = """
import jax._src.cache_key as key
key._hash_accelerator_config = key._hash_devices
"""

VERB = ONCE + "import sys; from minisora_jax.cli import main; sys.exit(main())"

# Each job is "WORKDIR --config.flag ...": several in one start, for starting and importing are most of such a run. One
# called "halted" gets batches slowly after the second, so that a notice to end reaches all processes before the last.
TRAINING = (
    ONCE
    + """
import argparse, sys, time
from minisora_jax.cli import _run
from minisora_jax.commands import train
from minisora_jax.training import diffusion_task

def slowly(*args, **options):
    for n, batch in enumerate(packed_batches(*args, **options)):
        if n >= 2:
            print("waiting", flush=True)
            time.sleep(5)
        yield batch

packed_batches = diffusion_task.packed_batches

class Jobs:
    ON_SEVERAL_PROCESSES = True
    def run(args, flags):
        for job in sys.argv[2:]:
            workdir, *flags = job.split()
            diffusion_task.packed_batches = slowly if workdir.endswith("halted") else packed_batches
            args = argparse.Namespace(workdir=workdir, codec=None, init=None, lora=None, list_config=False)
            train.run(args, [sys.argv[1], *flags])

sys.exit(_run(Jobs, argparse.Namespace(), []))
"""
)


def processes(count: int, *command, devices=None, timeout=300, compiled=None) -> subprocess.Popen:
    flags = ["--devices", str(devices)] if devices else []
    launcher = [sys.executable, LAUNCHER, "-n", str(count), *flags, "--timeout", str(timeout), "--"]
    return subprocess.Popen(
        [*launcher, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(compiled),
    )


def environment(compiled: Path | None = None) -> dict[str, str]:
    """compiled: a folder for programs that processes share, which only those that begin with `ONCE` may."""
    cache = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    if compiled:
        cache = {"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        cache |= {"JAX_SHARE_BINARY_BETWEEN_HOSTS": "true"}
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": str(LAUNCHER.parent.parent)}
    return os.environ | flags | cache


def ended(process: subprocess.Popen) -> tuple[int, str]:
    out, _ = process.communicate(timeout=300)
    return process.returncode, out


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("processes")
    make_cache(directory / "latents", codec_hash=Codec.load(CODEC).latents)
    (directory / "config.py").write_text(CONFIG)
    return directory


def losses(workdir: Path) -> np.ndarray:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, STEPS + 1))  # one process writes, and it writes each once
    return np.array([(r["loss"], r["grad_norm"]) for r in rows])


@pytest.fixture(scope="module")
def workdirs(files):
    """Runs of 1 x 8, 2 x 4 and 4 x 2 processes x devices, on the config's mesh, where a row's tokens lie on two of four
    processes; the 2 x 4 run once more, ended by SIGTERM and gone on with; and its second half, gone on with by one and
    by four on other meshes.
    """
    config, compiled = f"--config={files}/config.py:{files}/latents", files / "compiled"
    training = processes(2, sys.executable, "-c", TRAINING, config, files / "run2", files / "halted", compiled=compiled)
    said = []
    for line in training.stdout:
        if "waiting" in line and not any("waiting" in earlier for earlier in said):
            training.send_signal(signal.SIGTERM)
        said.append(line)
    assert training.wait() == 0, "".join(said)  # that of every process
    (files / "said").write_text("".join(said))
    verb = [sys.executable, "-c", VERB, "train", config, f"--workdir={files}/halted"]
    code, out = ended(processes(2, *verb, compiled=compiled))
    assert code == 0 and "[0] 2 processes, 8 devices" in out and out.count("model exported to") == 1, out
    (files / "said again").write_text(out)
    for count, mesh in ((1, "fsdp=4 ring=2"), (4, "ring=4 ulysses=2")):
        half = files / f"resumed{count}"
        shutil.copytree(files / "run2", half, ignore=shutil.ignore_patterns("export", str(STEPS)))
        flags = [f"--config.run.mesh.{size}" for size in ("data=1", *mesh.split())]
        jobs = [f"{files}/run{count}", " ".join([str(half), *flags])]
        code, out = ended(processes(count, sys.executable, "-c", TRAINING, config, *jobs, compiled=compiled))
        assert code == 0 and out.count("model exported to") == 2, out
    return files


@pytest.mark.slow
def test_the_same_losses_and_model_however_8_devices_are_divided(workdirs):
    one = losses(workdirs / "run1")
    for count in (2, 4):
        several = losses(workdirs / f"run{count}")
        np.testing.assert_allclose(several[:, 0], one[:, 0], rtol=1e-6)
        np.testing.assert_allclose(several[:, 1], one[:, 1], rtol=1e-5)  # a norm over sums in another order
        ours, theirs = (load_model(workdirs / f"run{n}" / "export")[0] for n in (count, 1))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), ours, theirs)


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_with_one_and_with_four_on_other_meshes(workdirs):
    whole = (workdirs / "run2" / "metrics.jsonl").read_text().splitlines()
    for count in (1, 4):
        resumed = (workdirs / f"resumed{count}" / "metrics.jsonl").read_text().splitlines()
        same = [ours == theirs for ours, theirs in zip(resumed, whole)]  # to the last digit of the clock
        assert same == [True] * (STEPS // 2) + [False] * (STEPS // 2)
        np.testing.assert_allclose(losses(workdirs / f"resumed{count}"), losses(workdirs / "run2"), rtol=1e-5)


@pytest.mark.slow
def test_sigterm_has_every_process_save_and_the_run_goes_on_bit_for_bit(workdirs):
    said = (workdirs / "said").read_text()
    (step,) = {int(n) for n in re.findall(r"Preempted: ended at step (\d+), which is saved", said)}
    assert step < STEPS and all(f"[{i}] minisora: Preempted: ended at step {step}" in said for i in range(2)), said
    assert f"[0] diffusion: resumed at step {step} of {STEPS}" in (workdirs / "said again").read_text()
    np.testing.assert_array_equal(losses(workdirs / "halted"), losses(workdirs / "run2"))
    ours, theirs = (load_model(workdirs / name / "export")[0] for name in ("halted", "run2"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


FAILING = """
import os, signal, sys, time
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from minisora_jax.parallel.processes import barrier, started
with started():
    for i in range(100):
        barrier(str(i))
        if i == 3 and jax.process_index() == 1:
            if sys.argv[1] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("lower the number of frogs")
    time.sleep(1000)
"""


@pytest.mark.parametrize("how", ["killed", "error"])
def test_one_process_that_ends_early_ends_all(how):
    code, out = ended(processes(2, sys.executable, "-c", FAILING, how, devices=1, timeout=60))
    if how == "killed":
        assert code == 128 + signal.SIGKILL and "process 1 was killed by SIGKILL: ending the other 1" in out, out
    else:
        assert code == 2 and "[1] minisora: ValueError: lower the number of frogs" in out, out
        assert "process 1 failed with exit code 2: ending the other 1" in out, out


GATHERING = """
import jax, numpy as np
import minisora_jax.parallel.processes as processes
from jax.sharding import NamedSharding, PartitionSpec as P
from minisora_jax.io.model_dir import export_model, load_model
from minisora_jax.parallel.mesh import MeshConfig, make_mesh
import sys
processes.PART_BYTES = 64
with processes.started():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, ring=2))
    whole = {"rows": np.arange(24.0).reshape(8, 3), "columns": np.arange(40).reshape(5, 8), "one": np.float32(3)}
    whole |= {"layers": np.arange(5 * 4 * 4, dtype=np.float32).reshape(5, 4, 4)}
    specs = {"rows": P(("fsdp", "ring")), "columns": P(None, "ring"), "one": P(), "layers": P(None, "ring", "fsdp")}
    make = lambda x, spec: jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])
    tree = jax.tree.map(make, whole, specs)
    got = processes.gathered(tree)
    if processes.is_main():
        jax.tree.map(np.testing.assert_array_equal, got, whole)
    else:
        assert jax.tree.leaves(got) == []
    export_model(sys.argv[1], tree, {})
    processes.barrier("export")
    jax.tree.map(np.testing.assert_array_equal, load_model(sys.argv[1])[0], whole)
    print("process", jax.process_index(), "of", jax.process_count())
"""


def test_slurm_tasks_find_each_other_and_gather_what_they_hold(tmp_path):
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1"}
    slurm |= {"SLURM_NTASKS": "2", "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", GATHERING, tmp_path / "export"],
            env=environment() | slurm | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    for i, task in enumerate(tasks):
        code, out = ended(task)
        assert code == 0 and f"process {i} of 2" in out, out


def test_what_the_environment_asks_for():
    slurm = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    ours = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    assert distributed_arguments({}) is None
    assert distributed_arguments(ours) == {"coordinator_address": "h:1", "num_processes": 4, "process_id": 3}
    assert distributed_arguments(ours | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) is None
    assert distributed_arguments(ours | {"MINISORA_DISTRIBUTED": "off"}) is None
    assert distributed_arguments({"MINISORA_DISTRIBUTED": "auto"}) == {}
    assert distributed_arguments(slurm) is None  # a batch script, outside any step
    assert distributed_arguments(slurm | {"SLURM_STEP_NODELIST": "n[1-2]"}) == {}
    assert distributed_arguments(slurm | {"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"}) is None
    assert distributed_arguments({"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert distributed_arguments({"TPU_WORKER_HOSTNAMES": "a,b"}) == {}
    assert distributed_arguments({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}) == {}
    with pytest.raises(ValueError, match="JAX_COORDINATOR_ADDRESS is not set"):
        distributed_arguments({"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"})
    with pytest.raises(
        ValueError, match="JAX_PROCESS_ID=4 must be a number from 0 to JAX_NUM_PROCESSES - 1, with JAX_NUM_PROCESSES=4"
    ):
        distributed_arguments(ours | {"JAX_PROCESS_ID": "4"})
    with pytest.raises(ValueError, match="MINISORA_DISTRIBUTED='on' must be"):
        distributed_arguments({"MINISORA_DISTRIBUTED": "on"})


def test_the_launcher_prefixes_lines_passes_codes_and_signals_on_and_gives_up_in_time():
    say = "import os; print(os.environ['JAX_PROCESS_ID'], os.environ['JAX_NUM_CPU_DEVICES'], os.environ['XLA_FLAGS'])"
    code, out = ended(processes(4, sys.executable, "-c", say))
    flag = environment()["XLA_FLAGS"]
    assert code == 0 and sorted(out.splitlines()) == [f"[{i}] {i} 2 {flag}" for i in range(4)]
    assert ended(processes(2, sys.executable, "-c", "import sys; sys.exit(7)"))[0] == 7
    code, out = ended(processes(2, sys.executable, "-c", "import time; time.sleep(60)", timeout=0.5))
    assert code == 124 and "not done after 0.5 s: ending all" in out
    code, out = ended(processes(1, "no-such-program"))
    assert code == 2 and "there is no program 'no-such-program'" in out
    waiting = "import time\ntry:\n print('up'); time.sleep(60)\nexcept KeyboardInterrupt:\n print('farewell')"
    process = processes(2, sys.executable, "-c", waiting)
    assert {process.stdout.readline() for _ in range(2)} == {"[0] up\n", "[1] up\n"}
    process.send_signal(signal.SIGINT)
    code, out = ended(process)
    assert code == 128 + signal.SIGINT and sorted(out.splitlines()) == ["[0] farewell", "[1] farewell"]

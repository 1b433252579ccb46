"""The files of launch/: that they parse, lint, hold the fields their systems need, and name only what exists."""

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from needs import needs

yaml = needs("yaml")
pytestmark = pytest.mark.slow
LAUNCH = Path(__file__).parent.parent / "launch"
SCRIPTS = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*/*.sh"), *LAUNCH.glob("*/*.sbatch")]
JOBSETS = [*LAUNCH.glob("gke/*.yaml")]
DOCKERFILES = [*LAUNCH.glob("docker/*.Dockerfile")]


def tool(name: str) -> str:
    """A linter of the group `slow`, beside this Python or on the path."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        pytest.skip(f"{name} is not installed: uv run --group slow pytest -m slow")
    return found


def test_every_file_says_what_has_been_run_and_the_readme_knows_it():
    files = [*SCRIPTS, *JOBSETS, *DOCKERFILES, LAUNCH / "local_cpu.py"]
    assert len(files) == 10
    readme = (LAUNCH / "README.md").read_text()
    for path in files:
        head = " ".join(path.read_text()[:2000].replace("#", " ").split())
        assert "Run by us:" in head and ("Not run by us:" in head or path.name == "local_cpu.py"), path
        assert path.name in readme or f"({path.parent.name})" in readme, path
    for link in re.findall(r"\]\(([^)]+)\)", readme):
        assert (LAUNCH / link).exists(), link


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_clean(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    if "env" not in path.parts:  # those are sourced
        assert "set -euo pipefail" in path.read_text()
    linted = subprocess.run([tool("shellcheck"), "-x", path], cwd=LAUNCH.parent, capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_dockerfiles_are_clean_and_copy_what_exists(path):
    linted = subprocess.run([tool("hadolint"), "--no-color", path], capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout
    for line in re.findall(r"^COPY (.*)", path.read_text(), re.MULTILINE):
        for source in line.split()[:-1]:
            assert (LAUNCH.parent / source).exists(), source
    setup = (LAUNCH.parent / "setup.py").read_text()
    for extra in re.findall(r'"\.\[(\w+)\]"', path.read_text()):
        assert f'"{extra}":' in setup


@pytest.mark.parametrize("path", JOBSETS, ids=lambda p: p.name)
def test_jobsets_have_what_gke_needs_for_a_slice(path):
    [spec] = yaml.safe_load_all(path.read_text())
    assert (spec["apiVersion"], spec["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert spec["metadata"]["annotations"][key] == "cloud.google.com/gke-nodepool"
    [group] = spec["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"]
    assert job["backoffLimit"] == 0 and spec["spec"]["failurePolicy"]["maxRestarts"] > 0  # one fails: all restart
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    [container] = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    x, y = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"
    assert job["parallelism"] * chips == x * y  # all hosts of a slice
    assert {port["containerPort"] for port in container["ports"]} >= {8471, 8482}
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    slices, command = group["replicas"], container["command"][-1]
    data = int(re.search(r"mesh\.data=(\d+)", command + "mesh.data=1").group(1))
    assert (slices > 1) == (path.stem == "jobset_multislice") and data % slices == 0
    config = re.search(r"--config=([^:]+):", command).group(1)
    assert (LAUNCH.parent / "configs" / f"{config}.py").exists() and (LAUNCH.parent / "launch/env/tpu.sh").exists()


def test_flags_are_put_before_those_of_the_user():
    for name, variable in (("gpu", "XLA_FLAGS"), ("tpu", "LIBTPU_INIT_ARGS")):
        script = f"set -eu; . {LAUNCH}/env/{name}.sh; echo ${variable}"
        out = subprocess.run(["bash", "-c", script], env=os.environ | {variable: "--mine=1"}, capture_output=True)
        flags = shlex.split(out.stdout.decode())
        assert flags[-1] == "--mine=1" and len(flags) > 5
        assert len({f.split("=")[0] for f in flags}) == len(flags)


def test_the_gpu_flags_exist_in_this_jaxlib():
    script = f". {LAUNCH}/env/gpu.sh; exec {sys.executable} -c 'import jax; print(jax.devices())'"
    clean = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    out = subprocess.run(["bash", "-c", script], env=clean, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


@pytest.fixture
def gcloud(tmp_path):
    """A stand-in for gcloud that writes down its arguments and tells of a request that waits once, then is there."""
    fake = tmp_path / "bin" / "gcloud"
    fake.parent.mkdir()
    fake.write_text(
        f'#!/usr/bin/env bash\ncd {tmp_path}; call=$(printf "%q " "$@"); echo "$call" >> calls\n'
        "if [[ $* == *describe* ]]; then\n"
        "  if [ -e asked ]; then echo ${STATE:-ACTIVE}; else touch asked; echo WAITING; fi\nfi\n"
        '[[ "$*" != *"${FAILS:-nothing fails}"* ]]\n'
    )
    fake.chmod(fake.stat().st_mode | stat.S_IEXEC)

    def run(*arguments, **settings):
        (tmp_path / "calls").write_text("")
        environment = os.environ | {"PATH": f"{fake.parent}:{os.environ['PATH']}", "POLL": "0", "ZONE": "z"} | settings
        out = subprocess.run([LAUNCH / "tpu_vm.sh", *arguments], env=environment, capture_output=True, text=True)
        return out, (tmp_path / "calls").read_text().splitlines()

    return run


def test_a_tpu_request_is_made_waited_for_and_given_back(gcloud):
    out, calls = gcloud("create", NAME="mine", TYPE="v5litepod-16", KIND="--spot")
    assert out.returncode == 0 and "WAITING" in out.stdout and "ACTIVE" in out.stdout
    asked = "compute tpus queued-resources create mine --zone=z --node-id=mine --spot --accelerator-type=v5litepod-16"
    assert calls[0].startswith(asked + " --runtime-version=") and len(calls) == 3
    out, calls = gcloud("wait", STATE="FAILED")
    assert out.returncode == 1 and "create it anew" in out.stderr
    _, calls = gcloud("delete", NAME="mine", PROJECT="p")
    assert calls == ["compute tpus queued-resources delete mine --zone=z --project=p --force --quiet "]
    assert gcloud()[0].returncode == 2 and gcloud("--help")[0].returncode == 0


def test_a_command_runs_on_every_slice_and_fails_where_one_does(gcloud):
    run = ("run", "minisora", "train", "--workdir=/a b")
    out, calls = gcloud(*run, NAME="two", SLICES="2")
    assert out.returncode == 0
    assert sorted(c.split()[4] for c in calls) == ["two-0", "two-1"] and all("--worker=all" in c for c in calls)
    [command] = {shlex.split(call)[-1] for call in calls}
    assert shlex.split(command)[-3:] == ["minisora", "train", "--workdir=/a b"]
    assert gcloud(*run, NAME="two", SLICES="2", FAILS="two-1")[0].returncode == 1
    out, calls = gcloud("install", NAME="one")
    assert out.returncode == 0 and " scp " in calls[0] and "one:minisora.tar.gz" in calls[0] and " ssh one " in calls[1]


def test_the_workflow_of_github_fits_its_schema_and_runs_the_same_script():
    workflow = LAUNCH.parent / ".github/workflows/ci.yml"
    check = tool("check-jsonschema")
    done = subprocess.run([check, "--builtin-schema", "vendor.github-workflows", str(workflow)], capture_output=True)
    assert done.returncode == 0, done.stdout.decode()
    steps = yaml.safe_load(workflow.read_text())["jobs"]["ci"]["steps"]
    assert steps[-1]["run"] == "bash .ci/run"


@pytest.mark.parametrize("flags, code", [(["--list-config"], 0), (["--config=no_such_config", "--workdir=w"], 2)])
def test_a_slurm_job_has_the_exit_code_of_its_run(tmp_path, flags, code):
    """With an srun that runs one task here."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text('#!/usr/bin/env bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n')
    minisora = tmp_path / ".venv" / "bin" / "minisora"
    minisora.parent.mkdir(parents=True)
    minisora.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" -m minisora_jax.cli "$@"\n')
    for file in (srun, minisora):
        file.chmod(0o755)
    (tmp_path / "launch").symlink_to(LAUNCH)
    env = os.environ | {"SLURM_SUBMIT_DIR": str(tmp_path), "PYTHONPATH": str(LAUNCH.parent), "JAX_PLATFORMS": "cpu"}
    env["PATH"] = f"{srun.parent}{os.pathsep}{env['PATH']}"
    script = LAUNCH / "slurm" / "train.sbatch"
    run = subprocess.run(["bash", script, *flags], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == code, run.stderr


def test_the_slurm_script_states_the_exit_code_of_a_preempted_run():
    from minisora_jax.parallel.processes import Preempted

    text = " ".join((LAUNCH / "slurm" / "train.sbatch").read_text().replace("#", " ").split())
    assert f"sends SIGTERM, and the run saves and ends with exit code {Preempted.exit_code}" in text

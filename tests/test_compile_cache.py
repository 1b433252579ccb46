"""A command that runs again compiles nothing: programs are kept on disk, for this user and this kind of processor."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from train_tiny import make_cache

from minisora_jax.bundled import CODEC
from minisora_jax.models.codec import Codec
from minisora_jax.parallel import programs

COUNTING = """
import sys
from minisora_jax.parallel.programs import keep_compiled_programs
if sys.argv.pop(1) == "late":
    import jax
    jax.numpy.ones(3).sum()  # the process has compiled before
keep_compiled_programs()
import jax
from jax import monitoring
events = []
monitoring.register_event_listener(lambda event, **more: events.append(event))
"""
ENDING = "\nprint(*(sum(e.endswith(end) for e in events) for end in ('cache_hits', 'cache_misses')))"
SMALL = "\nimport jax.numpy as jnp\njax.jit(lambda x: jnp.sin(x) * 3)(jnp.arange(5.0)).block_until_ready()"
TRAINING = """
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from train_tiny import run
run(sys.argv[2], sys.argv[3], 6)
"""


def counts(home: Path, program: str, *arguments: object, when: str = "early", **more: str) -> tuple[int, int]:
    """(programs found, programs compiled) of a process."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    environment |= {"XDG_CACHE_HOME": str(home), "JAX_PLATFORMS": "cpu", **more}
    command = [sys.executable, "-c", COUNTING + program + ENDING, when, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    hits, misses = done.stdout.splitlines()[-1].split()
    return int(hits), int(misses)


def test_a_program_is_compiled_once(tmp_path):
    assert counts(tmp_path, SMALL)[1] > 0
    for when in ("early", "late"):
        hits, misses = counts(tmp_path, SMALL, when=when)
        assert hits > 0 and misses == 0
    [directory] = (tmp_path / "minisora").iterdir()
    assert (tmp_path / "minisora").stat().st_mode & 0o777 == 0o700 and directory.name.startswith("compiled-")


def test_another_place_or_none_may_be_named(tmp_path):
    counts(tmp_path, SMALL, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
    counts(tmp_path, SMALL, JAX_ENABLE_COMPILATION_CACHE="false")
    assert not (tmp_path / "minisora").exists() or not any((tmp_path / "minisora").rglob("*-cache"))


def test_a_folder_that_others_may_write_or_nobody_is_not_used(tmp_path):
    home = tmp_path / "minisora"
    home.mkdir()
    home.chmod(0o777)
    assert counts(tmp_path, SMALL) == (0, 0) and not list(home.iterdir())
    (tmp_path / "file").touch()
    assert counts(tmp_path / "file", SMALL) == (0, 0)  # a home that is no folder


@pytest.mark.slow
def test_a_training_that_goes_on_compiles_nothing(tmp_path):
    make_cache(tmp_path / "latents")
    arguments = Path(__file__).parent, tmp_path / "run", tmp_path / "latents"
    assert counts(tmp_path, TRAINING, *arguments)[1] > 0
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir(), key=lambda path: path.name.rjust(9, "0"))
    assert [path.name for path in checkpoints] == ["3", "6"]
    shutil.rmtree(checkpoints[-1])  # as if it had been killed before its end
    hits, misses = counts(tmp_path, TRAINING, *arguments)
    assert hits > 0 and misses == 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="memory maps are counted on Linux")
def test_any_number_of_sizes_stays_within_the_memory_maps(monkeypatch):
    """Linux gives a process 65,530 maps, XLA takes some for each kernel, and jaxlib dies where it gets no more."""
    maps = lambda: len(Path("/proc/self/maps").read_text().splitlines())
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    codec, counts = Codec.load(CODEC), []
    for side in (16, 32, 48, 64):
        monkeypatch.setattr(programs, "MOST_MAPS", (maps() - 1 if side == 64 else most) / most)
        codec.encode(np.zeros((1, 1, 16, side, 3), np.uint8))
        counts.append(maps())
    assert all(later > earlier for earlier, later in zip(counts[:3], counts[1:3])) and counts[3] < counts[1], counts

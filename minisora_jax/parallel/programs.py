"""Compiled programs: their memory, their number, and their cache.

They are kept on disk, so that a command that runs again, or a run that goes on, compiles nothing.
They lie in ~/.cache/minisora (or $XDG_CACHE_HOME/minisora), which this user alone may read and write: jax trusts what
it finds there. $JAX_COMPILATION_CACHE_DIR names another place, such as a bucket that all hosts of a pod share, and
JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import sys
from pathlib import Path
from typing import Any

MOST_BYTES = 4 * 2**30  # then the programs that were not used for longest are removed
MOST_MAPS = 0.5  # share of the memory maps that Linux allows a process; the next programs fit into the rest

log = logging.getLogger(__name__)


def keep_compiled_programs() -> None:
    """Let jax keep its programs. Settings that the user or the process made before hold.

    Nothing is kept where the folder cannot be written, or others may write it.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or (directory := _directory()) is None:
        return
    settings = {
        "jax_compilation_cache_dir": str(directory),
        "jax_compilation_cache_max_size": MOST_BYTES,
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    if "jax" not in sys.modules:  # it reads them when it is imported, which takes a second
        os.environ |= {name.upper(): str(value) for name, value in settings.items()}
        return
    import jax
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    if jax.config.jax_compilation_cache_dir is None:
        for name, value in settings.items():
            jax.config.update(name, value)
        reset_cache()  # a process that has compiled before does not look for a cache again


def make_room() -> bool:
    """Forget the process's compiled programs where they hold over half of its memory maps; whether they did.

    To be called before work whose sizes vary. XLA maps each kernel of a program for the CPU by itself: a sampling of
    one size takes 1,000 maps. Linux allows a process 65,530 (vm.max_map_count), and jaxlib 0.12.0 dies of a
    segmentation fault where it gets no more. What is needed again is read from the cache on disk, or compiled.
    """
    if not _crowded():
        return False
    import jax

    log.info("compiled programs hold over half of the memory maps of this process: they are forgotten")
    jax.clear_caches()
    return True


def _crowded() -> bool:
    try:
        most = int(Path("/proc/sys/vm/max_map_count").read_text(encoding="ascii"))
        with open("/proc/self/maps", "rb") as maps:
            return sum(1 for _ in maps) > MOST_MAPS * most
    except (OSError, ValueError):  # no Linux, or not to be read
        return False


def memory_of(compiled: Any) -> Any:
    """The compiler's memory statistics of a program.

    Raises:
        RuntimeError: The backend has none.
    """
    memory = compiled.memory_analysis()
    if memory is None:
        raise RuntimeError("this backend reports no memory statistics of a compiled program")
    return memory


def _directory() -> Path | None:
    """The folder of this kind of processor: programs for another one may use instructions that it has not.

    None: there is none that this user alone may write.
    """
    flags = Path("/proc/cpuinfo")
    lines = flags.read_text(encoding="utf-8", errors="replace").splitlines() if flags.exists() else []
    kind = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    name = f"compiled-{hashlib.sha256(f'{platform.machine()} {kind}'.encode()).hexdigest()[:12]}"
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minisora"
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = home.stat()
    except (OSError, RuntimeError):  # the latter for a user without a home
        return None
    own = status.st_uid == os.geteuid() and not status.st_mode & 0o022
    return home / name if own and os.access(home, os.W_OK) else None

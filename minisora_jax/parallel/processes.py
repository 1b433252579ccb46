"""Several processes, one program: multi-controller JAX, started from what the environment says.

Every host of a pod runs the same command, and each process holds a part of every array. `started()` is entered by the
verbs that train, before any device is touched. It joins the processes where the environment says that there are
several, and does nothing on a plain machine:

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID    all three: launch/local_cpu.py, or your own launcher
    MINISORA_DISTRIBUTED=auto    argument-less jax.distributed.initialize(): TPU VMs and GKE (launch/ sets it)
    SLURM, Open MPI, TPU workers    the same, wherever their variables name more than one process

Only the main process, number 0, writes metrics, samples and exports; all of them write checkpoints. So a workdir lies
on a file system that all processes see.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

log = logging.getLogger("minisora")

PART_BYTES = 2**28  # of a parameter that is gathered at a time


def asked_for(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """The arguments of jax.distributed.initialize() that the environment asks for; None for a process by itself.

    Raises ValueError where the environment says half of it.
    """
    wanted = environ.get("MINISORA_DISTRIBUTED", "")
    if wanted not in ("", "auto", "off"):
        raise ValueError(f"MINISORA_DISTRIBUTED={wanted!r} must be 'auto', 'off' or unset")
    if wanted == "off":
        return None
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, count, index = (environ.get(name) for name in names)
    if count is not None or index is not None:
        missing = [name for name in names if name not in environ]
        if missing:
            raise ValueError(f"several processes need {', '.join(names)}: {', '.join(missing)} is not set")
        if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
            raise ValueError(f"JAX_PROCESS_ID={index} must be one of 0 .. JAX_NUM_PROCESSES={count} less 1")
        if int(count) == 1:
            return None
        return {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}
    if wanted == "auto" or any(count > 1 for count in _counts(environ)):
        return {}
    return None


def _counts(environ: Mapping[str, str]) -> Iterator[int]:
    """How many processes each kind of cluster that jax knows says that there are."""
    step = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environ for name in step):  # a job's batch script has no step and is one process
        yield int(environ.get("SLURM_NTASKS", 1))
    if "OMPI_MCA_orte_hnp_uri" in environ:
        yield int(environ.get("OMPI_COMM_WORLD_SIZE", 1))
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
    yield len(hosts.split(",")) * int(environ.get("MEGASCALE_NUM_SLICES") or 1)


class Preempted(RuntimeError):
    """The system is taking the machine back, and the run is saved: not a failure."""

    exit_code = 0


_preemption_requested = threading.Event()


@contextlib.contextmanager
def preemption_handler() -> Iterator[None]:
    """Within it SIGTERM does not end a lone process: `end_asked()` says that it came. Of several, jax heeds it."""
    if several() or threading.current_thread() is not threading.main_thread():
        yield
        return
    _preemption_requested.clear()
    before = signal.signal(signal.SIGTERM, lambda *_: _preemption_requested.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def preemption_requested() -> bool:
    """Has SIGTERM come, within `heeding_sigterm`?"""
    return _preemption_requested.is_set()


@contextlib.contextmanager
def started() -> Iterator[None]:
    """Joins the processes that the environment speaks of; on the way out waits for all, or ends all.

    SIGTERM is not the end of one of several processes: jax passes it on as a notice, on which the training loop saves
    and all raise AskedToEnd, which goes on from here when all have said farewell.
    An error in one of several processes is printed, and that process ends at once, without the farewell that the others
    would wait for: jax ends them when they next speak to it, or when its heartbeat is missed, and launchers sooner.
    """
    arguments = asked_for(os.environ)
    if arguments is None:
        yield
        return
    asked = None
    try:
        jax.distributed.initialize(**arguments)
        if is_main():
            log.info("%d processes, %d devices", jax.process_count(), jax.device_count())
        else:
            log.setLevel(logging.WARNING)  # what all would say, one says
        try:
            yield
        except Preempted as error:
            asked = error
        barrier("the end")
        jax.distributed.shutdown()
    except BaseException as error:
        if os.environ.get("MINISORA_TRACEBACK") or not isinstance(error, (ValueError, OSError, RuntimeError)):
            traceback.print_exc()
        else:
            print(f"minisora: {type(error).__name__}: {error}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if is_main():
            time.sleep(1)  # jax's coordinator dies with it, and whoever fails for the same reason has said so by then
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 2)
    if asked:
        raise asked


def several() -> bool:
    """Is this one of several processes? Touches no device."""
    return jax.distributed.is_initialized()


def is_main() -> bool:
    """Is this the process that writes what is written once? Touches no device where there is only one."""
    return not several() or jax.process_index() == 0


def require_started() -> None:
    """RuntimeError on a host of a pod that has not joined the others."""
    if jax.process_count() > 1 and not several():
        raise RuntimeError(
            f"this host has {len(jax.local_devices())} of the {len(jax.devices())} devices of a slice of "
            f"{jax.process_count()} hosts: set MINISORA_DISTRIBUTED=auto and start the same command on all of them"
        )


def barrier(name: str) -> None:
    """Returns when every process has called it."""
    if several():
        multihost_utils.sync_global_devices(name)


def parts_of(x: jax.Array) -> Iterator[np.ndarray]:
    """The array in NumPy parts, along its first axis, on the main process; nothing on others, which must call it too.

    What is not whole on the devices of this process is gathered, on each device at most `PART_BYTES` or, of an array
    that is cut along its first axis, all of it at a time.
    """
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        yield np.asarray(jax.device_get(x))
        return
    spec, mesh = x.sharding.spec, x.sharding.mesh
    whole = NamedSharding(mesh, P())
    if x.ndim < 2 or (len(spec) > 0 and spec[0] is not None):
        cuts = [(0, x.shape[0] if x.ndim else 1)]
    else:
        step = max(1, PART_BYTES * x.shape[0] // max(x.nbytes, 1))
        cuts = [(at, min(at + step, x.shape[0])) for at in range(0, x.shape[0], step)]
    for first, last in cuts:
        with jax.set_mesh(mesh):
            part = jax.device_put(x if len(cuts) == 1 else _rows(x, first, last - first), whole)
        if is_main():
            yield np.asarray(part)
        part.block_until_ready()


@functools.partial(jax.jit, static_argnums=2)
def _rows(x: jax.Array, first: int, count: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, first, count, axis=0)


def gathered(tree: Any) -> Any:
    """A tree of NumPy arrays on the main process, of None on others, which must call it too."""

    def gather(x):
        parts = list(parts_of(x))
        return np.concatenate(parts) if len(parts) > 1 else parts[0] if parts else None

    return jax.tree.map(gather, tree) if several() else jax.device_get(tree)

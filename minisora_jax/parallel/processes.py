"""Several processes that run one program: multi-controller JAX, configured by the environment.

Every host of a pod runs the same command, and each process holds a part of every array. The training commands enter
`started()` before they touch a device. It joins the processes if the environment names several, and does nothing
otherwise:

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID    all three: launch/local_cpu.py, or your own launcher
    MINISORA_DISTRIBUTED=auto    jax.distributed.initialize() without arguments: TPU VMs and GKE (launch/ sets it)
    SLURM, Open MPI, TPU workers    the same, if their variables name more than one process

Only the main process, number 0, writes metrics, samples and exports. All processes write checkpoints. So a work
directory must be on a file system that all processes share.
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

PART_BYTES = 2**28  # the most bytes of a parameter that are gathered at once


def distributed_arguments(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """The arguments for jax.distributed.initialize() that the environment gives; None for a single process.

    Raises:
        ValueError: Some of the variables are missing or contradict each other.
    """
    mode = environ.get("MINISORA_DISTRIBUTED", "")
    if mode not in ("", "auto", "off"):
        raise ValueError(f"MINISORA_DISTRIBUTED={mode!r} must be 'auto', 'off' or unset")
    if mode == "off":
        return None
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, count, index = (environ.get(name) for name in names)
    if count is not None or index is not None:
        if address is None or count is None or index is None:
            missing = [name for name in names if name not in environ]
            raise ValueError(f"several processes need {', '.join(names)}: {', '.join(missing)} is not set")
        if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
            raise ValueError(f"JAX_PROCESS_ID={index} must be a number from 0 to JAX_NUM_PROCESSES - 1, with "
                             f"JAX_NUM_PROCESSES={count}")  # fmt: skip
        if int(count) == 1:
            return None
        return {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}
    if mode == "auto" or any(count > 1 for count in _process_counts(environ)):
        return {}
    return None


def _process_counts(environ: Mapping[str, str]) -> Iterator[int]:
    """The number of processes by the variables of SLURM, Open MPI and TPU workers."""
    step = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environ for name in step):  # the batch script of a job has no step and is one process
        yield int(environ.get("SLURM_NTASKS", 1))
    if "OMPI_MCA_orte_hnp_uri" in environ:
        yield int(environ.get("OMPI_COMM_WORLD_SIZE", 1))
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
    yield len(hosts.split(",")) * int(environ.get("MEGASCALE_NUM_SLICES") or 1)


class Preempted(RuntimeError):
    """The machine is being preempted, and the run is saved. The exit code is 0."""

    exit_code = 0


_preemption_requested = threading.Event()


@contextlib.contextmanager
def preemption_handler() -> Iterator[None]:
    """A context in which SIGTERM sets `preemption_requested()` and does not end a single process.

    With several processes jax handles SIGTERM itself.
    """
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
    """Whether SIGTERM arrived within `preemption_handler`."""
    return _preemption_requested.is_set()


@contextlib.contextmanager
def started() -> Iterator[None]:
    """A context in which all processes of the environment are joined. At its end each waits for the others.

    With several processes SIGTERM is a preemption notice: all processes save at the same step, then raise `Preempted`.
    `Preempted` leaves this context after all processes have reached its end.

    If a process raises another error, it prints the error and exits at once with code 2, without waiting. jax ends the
    other processes when they next contact the coordinator or miss its heartbeat. Launchers end them sooner.
    """
    arguments = distributed_arguments(os.environ)
    if arguments is None:
        yield
        return
    preempted = None
    try:
        jax.distributed.initialize(**arguments)
        if is_main():
            log.info("%d processes, %d devices", jax.process_count(), jax.device_count())
        else:
            log.setLevel(logging.WARNING)  # the main process alone logs what all would log
        try:
            yield
        except Preempted as error:
            preempted = error
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
            time.sleep(1)  # jax's coordinator ends with this process; others that fail too print their errors first
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 2)
    if preempted:
        raise preempted


def several() -> bool:
    """Whether this is one of several processes. Touches no device."""
    return jax.distributed.is_initialized()


def is_main() -> bool:
    """Whether this is process 0, which writes files that are written once. A single process touches no device."""
    return not several() or jax.process_index() == 0


def require_started() -> None:
    """Check that a host of a pod has joined the others.

    Raises:
        RuntimeError: It has not.
    """
    if jax.process_count() > 1 and not several():
        raise RuntimeError(
            f"this host has {len(jax.local_devices())} of the {len(jax.devices())} devices of a slice of "
            f"{jax.process_count()} hosts: set MINISORA_DISTRIBUTED=auto and start the same command on all of them"
        )


def barrier(name: str) -> None:
    """Wait until every process has called it with this name."""
    if several():
        multihost_utils.sync_global_devices(name)


def any_process(here: bool) -> bool:
    """Whether it is true on any process. All processes must call it."""
    return bool(np.any(multihost_utils.process_allgather(np.array(here)))) if several() else here


def parts_of(x: jax.Array | np.ndarray) -> Iterator[np.ndarray]:
    """Yields the array in NumPy parts along its first axis, on the main process. Other processes yield nothing.

    All processes must call it. An array that is not whole on this process is gathered, at most `PART_BYTES` at a time
    on each device. An array that is sharded along its first axis is gathered at once.
    """
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        yield np.asarray(jax.device_get(x))
        return
    if not isinstance(x.sharding, NamedSharding) or not isinstance(x.sharding.mesh, jax.sharding.Mesh):
        raise TypeError(f"an array on several processes has sharding {x.sharding}, and only NamedSharding is gathered")
    spec, mesh = x.sharding.spec, x.sharding.mesh
    replicated = NamedSharding(mesh, P())
    if x.ndim < 2 or (len(spec) > 0 and spec[0] is not None):
        ranges = [(0, x.shape[0] if x.ndim else 1)]
    else:
        step = max(1, PART_BYTES * x.shape[0] // max(x.nbytes, 1))
        ranges = [(at, min(at + step, x.shape[0])) for at in range(0, x.shape[0], step)]
    for first, end in ranges:
        with jax.set_mesh(mesh):
            part = jax.device_put(x if len(ranges) == 1 else _rows(x, first, end - first), replicated)
        if is_main():
            yield np.asarray(part)
        part.block_until_ready()


@functools.partial(jax.jit, static_argnums=2)
def _rows(x: jax.Array, first: int, count: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, first, count, axis=0)


def whole(x: jax.Array) -> np.ndarray:
    """The array on the host of every process. All processes must call it."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))


def gathered(tree: Any) -> Any:
    """The tree as NumPy arrays on the main process, and as None on the others. All processes must call it."""

    def gather(x):
        parts = list(parts_of(x))
        return np.concatenate(parts) if len(parts) > 1 else parts[0] if parts else None

    return jax.tree.map(gather, tree) if several() else jax.device_get(tree)

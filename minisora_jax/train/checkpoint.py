"""Checkpoints of a run: Orbax, asynchronous, atomic.

A checkpoint is a step directory under WORKDIR/checkpoints, visible only once whole, of which every process writes its
part. It restores onto any mesh and any number of processes. The data state is the step number, so nothing else is
stored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import absl.logging
import jax
import orbax.checkpoint as ocp

from minisora_jax.parallel.mesh import with_shardings
from minisora_jax.parallel.processes import preemption_requested, several
from minisora_jax.types import TrainState


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read; those before it are as they were."""


class Checkpoints:
    """Saves and restores a TrainState under `directory`, keeping the newest `keep`."""

    def __init__(self, directory: Path, *, keep: int = 3):
        # Orbax cuts what several devices hold alike, so that each writes a piece, and compiles a program for every cut:
        # 4 s of a tiny run, for nothing below this size.
        whole_below = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
        level = absl.logging.get_verbosity()
        absl.logging.set_verbosity(absl.logging.ERROR)  # that a handler is replaced is no news
        ocp.type_handlers.register_type_handler(jax.Array, whole_below, override=True)
        absl.logging.set_verbosity(level)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True, create=True)
        self._directory = Path(directory).absolute()
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        if step not in self._manager.all_steps():
            with self._failures_named("written"):
                self._manager.save(step, args=ocp.args.StandardSave(state))

    def preempted(self, step: int) -> bool:
        """Was SIGTERM sent to this process, or any of several? Each asks at every step; all say yes at the same one."""
        return self._manager.reached_preemption(step) if several() else preemption_requested()

    def restore(self, abstract: TrainState, mesh: jax.sharding.Mesh, step: int | None = None) -> TrainState:
        """The newest state (or that of `step`), laid out on `mesh` as `abstract`'s types say."""
        target = with_shardings(abstract, mesh)
        step = self.latest() if step is None else step
        with self._failures_named("read", step):
            return self._manager.restore(step, args=ocp.args.StandardRestore(target))

    def wait(self) -> None:
        with self._failures_named("written"):
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _failures_named(self, what: str, step: int | None = None) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of many types, and of a save perhaps at the next
            said = " ".join(str(error).split())[:500]
            if what == "read":
                others = [s for s in self._manager.all_steps() if s != step]
                fix = f"delete {self._directory / str(step)} to go on from step {max(others, default=0)}"
            else:
                newest = max((int(p.name) for p in self._directory.glob("*") if p.name.isdigit()), default=None)
                kept = "there is none before it" if newest is None else f"the newest whole one is of step {newest}"
                fix = f"{kept}; make room or mend the disk, and start the same command again"
            raise CheckpointError(f"a checkpoint under {self._directory} could not be {what}: {said}. {fix}") from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, error, *_) -> None:
        # Of several processes, one that fails does not wait for the others, who would wait for it.
        if error is None or not several():
            self.close()

    def close(self) -> None:
        with self._failures_named("written"):
            self._manager.wait_until_finished()
            self._manager.close()

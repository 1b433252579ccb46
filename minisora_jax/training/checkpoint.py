"""Checkpoints of a run: Orbax, asynchronous, atomic.

A checkpoint is a directory WORKDIR/checkpoints/STEP. Every process writes its part, and the directory appears only when
it is complete. It restores onto any mesh and any number of processes. The data state is the step number, so it holds
the TrainState and nothing else. Checksums of its files are written after it and compared before it is restored: a
damaged checkpoint is set aside as STEP.damaged, and the run goes on from the one before.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import absl.logging
import jax
import orbax.checkpoint as ocp

from minisora_jax.io import checksum
from minisora_jax.parallel.mesh import with_shardings
from minisora_jax.parallel.processes import any_process, barrier, is_main, preemption_requested, several
from minisora_jax.types import TrainState

log = logging.getLogger("minisora")

ASIDE = ".damaged"  # the suffix of a damaged checkpoint's name


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read. Earlier checkpoints are unchanged."""


class Checkpoints:
    """Saves and restores a TrainState under `directory`, and keeps the newest `keep` checkpoints.

    A context manager: it waits for the last save and closes.
    """

    def __init__(self, directory: Path, *, keep: int = 3) -> None:
        # Orbax slices replicated arrays, so that each device writes a slice, and compiles a program for every slice.
        # For arrays below 1 MiB this saves nothing, and it takes 4 s of a tiny run.
        handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
        level = absl.logging.get_verbosity()
        absl.logging.set_verbosity(absl.logging.ERROR)  # no warning that a handler is replaced
        ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
        absl.logging.set_verbosity(level)
        self._directory = Path(directory).absolute()
        finalized = ocp.options.AsyncOptions(post_finalization_callback=self._write_checksums)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True, create=True, async_options=finalized
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def latest(self) -> int | None:
        """The step of the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    def _write_checksums(self) -> None:
        """Write the checksums of a checkpoint. Orbax calls it in its thread: all is written, and not yet renamed."""
        if is_main():
            for folder in self._directory.iterdir():
                if folder.name.split(".")[0].isdigit() and not folder.name.endswith(ASIDE):
                    if not (folder / checksum.NAME).exists():
                        checksum.write_checksums(folder, without=("_CHECKPOINT_METADATA",))  # times; Orbax adds one

    def save(self, step: int, state: TrainState) -> None:
        """Start to save the state of `step`, unless there is a checkpoint of it.

        Raises:
            CheckpointError: This save, or an earlier one, failed.
        """
        if step not in self._manager.all_steps():
            with self._checkpoint_errors("written"):
                self._manager.save(step, args=ocp.args.StandardSave(state))

    def preempted(self, step: int) -> bool:
        """Whether SIGTERM was sent to this process or, with several processes, to any of them.

        Each process calls it at every step. All processes get True at the same step.
        """
        return self._manager.reached_preemption(step) if several() else preemption_requested()

    def restore(self, abstract: TrainState, mesh: jax.sharding.Mesh, step: int | None = None) -> TrainState:
        """The state of a checkpoint on `mesh`.

        Args:
            abstract: The state as `jax.ShapeDtypeStruct`s with shardings.
            mesh: The mesh to restore to.
            step: None: the newest checkpoint that is not damaged.

        Raises:
            CheckpointError: The checkpoint cannot be read, or all checkpoints are damaged.
        """
        target = with_shardings(abstract, mesh)
        step = self._newest_whole() if step is None else step
        with self._checkpoint_errors("read", step):
            state: Any = self._manager.restore(step, args=ocp.args.StandardRestore(target))
            return state

    def _newest_whole(self) -> int | None:
        """The step of the newest checkpoint whose files match their checksums. Damaged ones are set aside."""
        while (step := self.latest()) is not None:
            folder = self._directory / str(step)
            found = checksum.damage(folder, part=jax.process_index(), parts=jax.process_count())
            if not any_process(bool(found)):
                return step
            others = [s for s in self._manager.all_steps() if s != step]
            found = found or f"checkpoint {step} is damaged"
            if not others:
                raise CheckpointError(f"{found}: it is the last checkpoint. Delete {folder} to begin again at step 0")
            aside = self._directory / f"{step}{ASIDE}"
            log.warning("%s; set aside as %s, going on from step %d", found, aside, max(others))
            if is_main():
                folder.rename(aside)
            barrier(f"checkpoint {step} set aside")
            self._manager.reload()
        return None

    def wait(self) -> None:
        """Wait until all saves are on disk.

        Raises:
            CheckpointError: A save failed.
        """
        with self._checkpoint_errors("written"):
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _checkpoint_errors(self, what: str, step: int | None = None) -> Iterator[None]:
        """Turn any error into a CheckpointError with a fix. `what` is "written" or "read"."""
        try:
            yield
        except Exception as error:  # Orbax raises many types, and it may report a failed save at the next one
            message = " ".join(str(error).split())[:500]
            if what == "read":
                others = [s for s in self._manager.all_steps() if s != step]
                fix = f"delete {self._directory / str(step)} to go on from step {max(others, default=0)}"
            else:
                newest = max((int(p.name) for p in self._directory.glob("*") if p.name.isdigit()), default=None)
                state = "there is no complete checkpoint"
                if newest is not None:
                    state = f"the newest complete checkpoint is step {newest}"
                fix = f"{state}; free disk space or repair the disk, and start the same command again"
            raise CheckpointError(
                f"a checkpoint under {self._directory} could not be {what}: {message}. {fix}"
            ) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # With several processes, a process that fails must not wait for the others: they would wait for it.
        if error is None or not several():
            self.close()

    def close(self) -> None:
        """Wait until all saves are on disk, and release the manager.

        Raises:
            CheckpointError: A save failed.
        """
        with self._checkpoint_errors("written"):
            self._manager.wait_until_finished()
            self._manager.close()

"""Reports a run to Google's ML Goodput, from which its share of productive time is computed over all restarts.

The package writes to Cloud Logging. `ml_goodput_measurement.goodput.GoodputCalculator(JOB, NAME).get_job_goodput()`
reads it back; JOB is the name of the work directory. metrics.jsonl has a goodput of our own without any service.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minisora_jax.parallel.processes import is_main


class Goodput:
    """Records the start of a job, of its steps and of their data, and its end. Only the main process records."""

    def __init__(self, name: str, workdir: Path) -> None:
        """Begin or continue the job of a work directory.

        Args:
            name: The log of Cloud Logging; "": nothing is recorded.
            workdir: The work directory, whose name is the job's.

        Raises:
            ImportError: ml-goodput-measurement is not installed.
        """
        self._recorder: Any = None
        if not name:
            return
        try:
            from ml_goodput_measurement import goodput
        except ImportError as error:
            raise ImportError(
                f"run.goodput={name} needs the package ml-goodput-measurement: pip install ml-goodput-measurement"
            ) from error
        self._recorder = goodput.GoodputRecorder(workdir.resolve().name, name, logging_enabled=is_main())
        self._recorder.record_job_start_time()
        self._recorder.record_training_preparation_start_time()

    def prepared(self) -> None:
        """The state is there, and the first batch is next."""
        if self._recorder:
            self._recorder.record_training_preparation_end_time()

    @contextlib.contextmanager
    def data(self) -> Iterator[None]:
        """A context in which the run waits for a batch."""
        if self._recorder:
            self._recorder.record_data_loading_start_time()
        yield
        if self._recorder:
            self._recorder.record_data_loading_end_time()

    def step(self, number: int) -> None:
        """Step `number` begins. They count from 1; the package counts from 0."""
        if self._recorder:
            self._recorder.record_step_start_time(number - 1)

    def close(self) -> None:
        """The run ends, and its entries are written."""
        if self._recorder:
            self._recorder.record_job_end_time()
            self._recorder.flush()

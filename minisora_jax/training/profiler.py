"""A window of steps whose trace is written for xprof: what ran when on devices and host."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax


def profile_window(text: str) -> range:
    """The steps of "20:23": 20, 21, 22 and 23. "" has none.

    Raises:
        ValueError: The text has another form.
    """
    if not text:
        return range(0)
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"run.profile={text!r} must be the first and the last step of a trace, such as 20:23")
    return range(int(match[1]), int(match[2]) + 1)


class Profiler:
    """Traces the steps of a window. A run that goes on within the window traces the rest of it."""

    def __init__(self, window: range, directory: Path) -> None:
        self._window, self._directory, self._tracing = window, directory, False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """A context for the call of step `number`. The trace begins before its first step."""
        if number not in self._window:
            yield
            return
        if not self._tracing:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # else calls of Python functions are nearly all that it shows
            jax.profiler.start_trace(str(self._directory), profiler_options=options)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def after(self, number: int, values: Any) -> bool:
        """End the trace after its last step, when the devices have computed `values`. Returns whether it ended."""
        ends = self._tracing and number == self._window[-1]
        if ends:
            jax.block_until_ready(values)
            self.close()
        return ends

    def close(self) -> None:
        """End a trace that still runs."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()

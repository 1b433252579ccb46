"""Progress bars: a moving bar on a terminal, and a plain line now and then in a log file, a pipe or a notebook."""

from __future__ import annotations

import io
import sys
import time
from typing import Any

from tqdm import tqdm

EVERY = 30.0  # seconds between plain lines
BRIEF = 3.0  # seconds; a shorter task writes no plain line
LINE = (
    "{desc}: {n_fmt} of {total_fmt} ({percentage:.0f} %), {rate_noinv_fmt}, {elapsed} so far, {remaining} left{postfix}"
)


class Progress(tqdm):
    """A `tqdm` that writes carriage returns to terminals only."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.plain = not sys.stderr.isatty()
        if self.plain and options.get("disable", False) is not None:  # None: no bar without a terminal
            self._began, self._wrote, self._shown = time.monotonic(), time.monotonic(), -1
            options |= {"file": io.StringIO(), "bar_format": LINE, "mininterval": 1.0, "dynamic_ncols": False}
            options["smoothing"] = 0.0  # the rate of the whole task: lines are too far apart to weigh the last steps
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Show the state; as a plain line at most every `EVERY` seconds."""
        if not self.plain:
            super().display(msg, pos)
        elif time.monotonic() - self._wrote >= EVERY:
            self._write()

    def close(self) -> None:
        """End the bar; a plain one says how far it came, unless it was brief."""
        if self.plain and not self.disable:
            if time.monotonic() - self._began >= BRIEF and self.n != self._shown:
                self._write()
        super().close()

    def _write(self) -> None:
        self._wrote, self._shown = time.monotonic(), self.n
        print(self, file=sys.stderr, flush=True)

"""Transient storage errors are retried with backoff; damaged records are permanent errors."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger("minisora")

DELAYS = (0.5, 2.0, 8.0)  # seconds before each further attempt
SLOW = 10.0  # seconds; a read that takes longer is logged


class DataError(RuntimeError):
    """A data set on disk is missing, damaged or of another kind. Another attempt does not help."""


class StorageError(RuntimeError):
    """A file could not be read in several attempts."""


def with_retries[Read](read: Callable[[], Read], what: str) -> Read:
    """The result of read(), which is tried again after each of `DELAYS` when it raises OSError.

    Raises:
        StorageError: all attempts failed. The message names `what`.
    """
    for attempt, delay in enumerate((*DELAYS, None), 1):
        begin = time.monotonic()
        try:
            result = read()
        except OSError as error:
            if delay is None:
                raise StorageError(f"{what} could not be read in {attempt} attempts: {error}") from error
            log.warning("%s: %s; attempt %d of %d in %g s", what, error, attempt + 1, len(DELAYS) + 1, delay)
            time.sleep(delay)
            continue
        if (taken := time.monotonic() - begin) > SLOW:
            log.warning("%s took %.0f s to read", what, taken)
        return result
    raise AssertionError("unreachable")


def require_readable(path: str | Path) -> None:
    """Read a whole file; OSError means that the storage is at fault, not the data."""
    with open(path, "rb") as file:
        while file.read(2**24):
            pass


class Damaged:
    """The log of clips that training skips because their records are damaged. `count` counts every skip.

    Args:
        path: a JSON-lines file that gets each error once; None for no file.
        strict: raise the first error.
    """

    def __init__(self, path: Path | None = None, *, strict: bool = False):
        self.path, self.strict, self.count = path, strict, 0
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    def add(self, error: Exception) -> None:
        """Count a skipped clip, and log its error if it is new."""
        if self.strict:
            raise error
        with self._lock:
            self.count += 1
            if str(error) in self._seen:
                return
            self._seen.add(str(error))
            log.warning("skipped a clip: %s", error)
            if self.path:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"error": str(error)}) + "\n")

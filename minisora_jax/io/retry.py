"""Storage that is slow or away for a moment, and records that are damaged for good: two things, told apart."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger("minisora")

DELAYS = (0.5, 2.0, 8.0)  # seconds before each further attempt
SLOW = 10.0  # seconds of a read that are worth a word


class DataError(RuntimeError):
    """A data set on disk that is not what it should be, and will not be at another attempt."""


class StorageError(RuntimeError):
    """A file that could not be read at all, after several attempts."""


def patiently[Read](read: Callable[[], Read], what: str) -> Read:
    """read(), tried again after each of `DELAYS` where it raises OSError; then StorageError, which names `what`."""
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
    """OSError where the storage does not give the whole file: then it, and not the data, is at fault."""
    with open(path, "rb") as file:
        while file.read(2**24):
            pass


class Damaged:
    """Clips left out of training since their records are damaged: said once each, counted, and named in a file.

    strict: the first is raised instead.
    """

    def __init__(self, path: Path | None = None, *, strict: bool = False):
        self.path, self.strict, self.count = path, strict, 0
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    def add(self, error: Exception) -> None:
        if self.strict:
            raise error
        with self._lock:
            self.count += 1
            if str(error) in self._seen:
                return
            self._seen.add(str(error))
            log.warning("left out: %s", error)
            if self.path:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"error": str(error)}) + "\n")

"""The results of the page: files with generated names, each with its record. The oldest results are deleted.

    OUT/20260102-030405-0a1b2c3d.mp4, .mp4.json     a result and its record (jobs/output.py)
    OUT/20260102-030405-0a1b2c3d.webm, .gif, .zip   the same in other formats, written on first request
    OUT/uploads/                                    the inputs of the results, while a record names them

Everyone who can open the page sees all results. Other files of the folder are neither shown, served nor deleted.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
import threading
import time
from pathlib import Path

from minisora_jax.io.filesystem import json_or_none
from minisora_jax.jobs.output import batch_of, record_problem
from minisora_jax.ui.conversions import CONVERTED

KEPT = 200  # results; older ones are deleted
NAME = re.compile(r"\d{8}-\d{6}-[0-9a-f]{8}")
RESULTS = (".mp4", ".png")  # formats of results: videos and images
TYPES = {
    ".mp4": "video/mp4",
    ".png": "image/png",
    ".webm": "video/webm",
    ".gif": "image/gif",
    ".zip": "application/zip",
    ".json": "application/json",
}


@dataclasses.dataclass(frozen=True)
class Item:
    """A result: its file and its record."""

    name: str
    suffix: str
    record: dict

    @property
    def file(self) -> str:
        """The name of the file."""
        return self.name + self.suffix


class Gallery:
    """The results in the folder `out`."""

    def __init__(self, out: Path):
        self.out, self._newest, self._naming = Path(out), "", threading.Lock()
        self.out.mkdir(parents=True, exist_ok=True)

    @property
    def uploads(self) -> Path:
        """The folder of checked uploads."""
        return self.out / "uploads"

    def new_name(self) -> str:
        """A unique name, which sorts after those of all earlier results. It is the time, to the microsecond.

        If results are dated in the future, or the clock went backwards, it is the newest name and one microsecond.
        """
        seconds, rest = divmod(time.time_ns(), 10**9)
        stamp = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(seconds))}-{rest // 1000:05x}"
        with self._naming:
            names = (path.name.partition(".")[0] for path in self.out.glob("*-*-*.*"))
            newest = max((name[:-3] for name in names if NAME.fullmatch(name)), default="")
            self._newest = max(stamp, _next(max(newest, self._newest)))
            return self._newest + secrets.token_hex(2)[:3]

    def items(self, most: int = KEPT) -> list[Item]:
        """The newest results, newest first."""
        items = []
        for path in sorted(self.out.glob("*-*-*.json"), reverse=True):
            file = Path(path.name[: -len(".json")])
            if NAME.fullmatch(file.stem) and file.suffix in RESULTS and (self.out / file).is_file():
                record = json_or_none(path.read_text(encoding="utf-8", errors="replace"))
                if isinstance(record, dict) and not record_problem(record):
                    items.append(Item(file.stem, file.suffix, record))
            if len(items) == most:
                break
        return items

    def item(self, file: str) -> Item | None:
        """The result with this file name."""
        return next((item for item in self.items() if item.file == file), None)

    def path(self, file: str) -> tuple[Path, Path] | None:
        """(the result, the file that is asked for), which is the result, its record, or another format of it.

        None for other names, and for results that are deleted. The other format may not be written yet.
        """
        name, dot, kind = file.partition(".")
        if not NAME.fullmatch(name) or not dot:
            return None
        if file in {name + end for suffix in RESULTS for end in (suffix, f"{suffix}.json")}:
            result = self.out / file.removesuffix(".json")
        elif f".{kind}" in CONVERTED:
            result = self.out / f"{name}.mp4"
        else:
            return None
        path = self.out / file
        return (result, path) if result.is_file() and (path.is_file() or f".{kind}" in CONVERTED) else None

    def drop(self, name: str) -> None:
        """Delete a result with its record and converted files."""
        for end in (*RESULTS, *(f"{suffix}.json" for suffix in RESULTS), *CONVERTED):
            (self.out / f"{name}{end}").unlink(missing_ok=True)

    def prune(self, older: float = 3600) -> None:
        """Keep the newest results, and the uploads that their records name or that are not `older` seconds old."""
        items = self.items(most=10 * KEPT)
        for item in items[KEPT:]:
            self.drop(item.name)
        named = {Path(path).name for item in items[:KEPT] for path in _inputs(item.record)}
        for upload in self.uploads.glob("*"):
            if upload.name not in named and abs(time.time() - upload.stat().st_mtime) > older:
                upload.unlink(missing_ok=True)


def _next(stamp: str) -> str:
    """The stamp that sorts next after one such as 20260102-030405-0a1b2, read as one number; "" after the last."""
    if not stamp:
        return ""
    seconds, _, rest = stamp.rpartition("-")
    day, _, time_of_day = seconds.partition("-")
    number = int(day + time_of_day) * 16**5 + int(rest, 16) + 1
    digits = f"{number // 16**5:014d}"
    return f"{digits[:8]}-{digits[8:]}-{number % 16**5:05x}" if len(digits) == 14 else ""


def _inputs(record: dict) -> list[str]:
    """The input files of all jobs of a result's batch: reproducing one result needs the whole batch."""
    return [path for job in batch_of(record) for path in job.inputs]

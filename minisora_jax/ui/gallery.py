"""The results of the page: files with generated names, each with its record. The oldest results are deleted.

    OUT/20260102-030405-0a1b2c3d.mp4, .mp4.json     a result and its record (jobs/output.py)
    OUT/20260102-030405-0a1b2c3d.webm, .gif, .zip   the same in other formats, written on first request
    OUT/uploads/                                    the inputs of the results, while a record names them

Everyone who can open the page sees all results. Other files of the folder are neither shown, served nor deleted.
"""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
import threading
import time
import zipfile
from pathlib import Path

from PIL import Image

from minisora_jax.io.atomic import replacing
from minisora_jax.io.filesystem import json_or_none
from minisora_jax.jobs.output import batch_of, beside
from minisora_jax.media.sound import Sound
from minisora_jax.media.video import open_frames, read_note
from minisora_jax.media.video_writer import VideoWriter

KEPT = 200  # results; older ones are deleted
NAME = re.compile(r"\d{8}-\d{6}-[0-9a-f]{8}")
RESULTS = (".mp4", ".png")  # formats of results: videos and images
CONVERTED = (".webm", ".gif", ".zip")  # other formats of a video; a zip has its frames as png
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
        self.out, self._converting = Path(out), threading.Lock()
        self.out.mkdir(parents=True, exist_ok=True)

    @property
    def uploads(self) -> Path:
        """The folder of checked uploads."""
        return self.out / "uploads"

    def new_name(self) -> str:
        """A unique name. Names sort by time, to the microsecond."""
        seconds, rest = divmod(time.time_ns(), 10**9)
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(seconds))
        return f"{stamp}-{rest // 1000:05x}{secrets.token_hex(2)[:3]}"

    def items(self, most: int = KEPT) -> list[Item]:
        """The newest results, newest first."""
        items = []
        for path in sorted(self.out.glob("*-*-*.json"), reverse=True):
            file = Path(path.name[: -len(".json")])
            if NAME.fullmatch(file.stem) and file.suffix in RESULTS and (self.out / file).is_file():
                record = json_or_none(path.read_text(encoding="utf-8"))
                if isinstance(record, dict) and isinstance(record.get("job"), dict):
                    items.append(Item(file.stem, file.suffix, record))
            if len(items) == most:
                break
        return items

    def item(self, file: str) -> Item | None:
        """The result with this file name."""
        return next((item for item in self.items() if item.file == file), None)

    def path(self, file: str) -> Path | None:
        """The path of a result, its record or a converted file, which is written if need be; None for other names."""
        name, dot, kind = file.partition(".")
        if not NAME.fullmatch(name) or not dot:
            return None
        if file in {name + end for suffix in RESULTS for end in (suffix, f"{suffix}.json")}:
            path = self.out / file
        elif f".{kind}" in CONVERTED:
            path = self._converted(self.out / f"{name}.mp4", f".{kind}")
        else:
            return None
        return path if path.is_file() else None

    def drop(self, name: str) -> None:
        """Delete a result with its record and converted files."""
        for end in (*RESULTS, *(f"{suffix}.json" for suffix in RESULTS), *CONVERTED):
            (self.out / f"{name}{end}").unlink(missing_ok=True)

    def prune(self) -> None:
        """Keep the newest results, and the uploads that their records name or that are less than an hour old."""
        items = self.items(most=10 * KEPT)
        for item in items[KEPT:]:
            self.drop(item.name)
        named = {Path(path).name for item in items[:KEPT] for path in _inputs(item.record)}
        for upload in self.uploads.glob("*"):
            if upload.name not in named and time.time() - upload.stat().st_mtime > 3600:
                upload.unlink(missing_ok=True)

    def _converted(self, video: Path, suffix: str) -> Path:
        path = video.with_suffix(suffix)
        with self._converting:
            if path.is_file() or not video.is_file():
                return path
            record = json.loads(beside(video).read_text(encoding="utf-8"))
            with open_frames(video) as (frames, fps):
                if suffix == ".zip":
                    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as packed:
                        for i, frame in enumerate(frames):
                            with packed.open(f"{video.stem}/{i:05d}.png", "w") as file:
                                Image.fromarray(frame).save(file, "png")
                        packed.writestr(f"{video.stem}/record.json", json.dumps(record, indent=1))
                else:
                    with VideoWriter(path, fps, note=read_note(video), sounds=[Sound(video)]) as writer:
                        for frame in frames:
                            writer.write(frame[None])
        return path


def _inputs(record: dict) -> list[str]:
    """The input files of all jobs of a result's batch: reproducing one result needs the whole batch."""
    return [path for job in batch_of(record) for path in job.inputs]

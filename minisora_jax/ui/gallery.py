"""What was made: files under names of ours, each with its record, the oldest of them dropped.

    OUT/20260102-030405-0a1b2c3d.mp4, .mp4.json     made, and how (jobs/output.py)
    OUT/20260102-030405-0a1b2c3d.webm, .gif, .zip   the same in other formats, once somebody has asked for them
    OUT/uploads/                                    what it was made of, as long as a record says so

Everybody who can open the page sees it. Nothing else in the folder is shown, handed out or dropped.
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
from minisora_jax.io.video import open_frames, read_note
from minisora_jax.io.video_writer import VideoWriter
from minisora_jax.jobs.output import batch_of, beside

KEPT = 200  # results
NAME = re.compile(r"\d{8}-\d{6}-[0-9a-f]{8}")
MADE = (".mp4", ".png")  # as they are made: videos and images
OTHERS = (".webm", ".gif", ".zip")  # a video's other formats; zip: its frames as png
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
    name: str
    suffix: str
    record: dict

    @property
    def file(self) -> str:
        return self.name + self.suffix


class Gallery:
    def __init__(self, out: Path):
        self.out, self._converting = Path(out), threading.Lock()
        self.out.mkdir(parents=True, exist_ok=True)

    @property
    def uploads(self) -> Path:
        return self.out / "uploads"

    def new_name(self) -> str:
        """In the order of time, to the microsecond."""
        seconds, rest = divmod(time.time_ns(), 10**9)
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(seconds))
        return f"{stamp}-{rest // 1000:05x}{secrets.token_hex(2)[:3]}"

    def items(self, most: int = KEPT) -> list[Item]:
        """Newest first."""
        found = []
        for path in sorted(self.out.glob("*-*-*.json"), reverse=True):
            made = Path(path.name[: -len(".json")])
            if NAME.fullmatch(made.stem) and made.suffix in MADE and (self.out / made).is_file():
                record = json_or_none(path.read_text(encoding="utf-8"))
                if isinstance(record, dict) and isinstance(record.get("job"), dict):
                    found.append(Item(made.stem, made.suffix, record))
            if len(found) == most:
                break
        return found

    def item(self, file: str) -> Item | None:
        return next((item for item in self.items() if item.file == file), None)

    def path(self, asked: str) -> Path | None:
        """The file of that name, made of the mp4 where it is another format of it; None for everything else."""
        name, dot, kind = asked.partition(".")
        if not NAME.fullmatch(name) or not dot:
            return None
        if asked in {name + end for made in MADE for end in (made, f"{made}.json")}:
            path = self.out / asked
        elif f".{kind}" in OTHERS:
            path = self._converted(self.out / f"{name}.mp4", f".{kind}")
        else:
            return None
        return path if path.is_file() else None

    def drop(self, name: str) -> None:
        for end in (*MADE, *(f"{made}.json" for made in MADE), *OTHERS):
            (self.out / f"{name}{end}").unlink(missing_ok=True)

    def prune(self) -> None:
        """Keep the newest results, and the uploads that their records name or that came within the hour."""
        items = self.items(most=10 * KEPT)
        for item in items[KEPT:]:
            self.drop(item.name)
        named = {Path(path).name for item in items[:KEPT] for path in _inputs(item.record)}
        for upload in self.uploads.glob("*"):
            if upload.name not in named and time.time() - upload.stat().st_mtime > 3600:
                upload.unlink(missing_ok=True)

    def _converted(self, made: Path, suffix: str) -> Path:
        path = made.with_suffix(suffix)
        with self._converting:
            if path.is_file() or not made.is_file():
                return path
            note = json.loads(beside(made).read_text(encoding="utf-8"))
            with open_frames(made) as (frames, fps):
                if suffix == ".zip":
                    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as packed:
                        for i, frame in enumerate(frames):
                            with packed.open(f"{made.stem}/{i:05d}.png", "w") as file:
                                Image.fromarray(frame).save(file, "png")
                        packed.writestr(f"{made.stem}/record.json", json.dumps(note, indent=1))
                else:
                    with VideoWriter(path, fps, note=read_note(made)) as writer:
                        for frame in frames:
                            writer.write(frame[None])
        return path


def _inputs(record: dict) -> list[str]:
    """The files of all jobs that were made together: reproducing one of them needs the others."""
    return [path for job in batch_of(record) for path in job.inputs]

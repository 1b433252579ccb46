"""Write results in other formats: one at a time, and each once, however many ask for it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import zipfile
from pathlib import Path

from PIL import Image

from minisora_jax.io.atomic import replacing
from minisora_jax.io.json_files import read_json
from minisora_jax.jobs.output import beside
from minisora_jax.media.sound import Sound
from minisora_jax.media.video import open_video, read_note
from minisora_jax.media.video_writer import GIF_FPS, VideoWriter
from minisora_jax.ui.uploads import InvalidInput

CONVERTED = (".webm", ".gif", ".zip")  # the formats; a zip has the frames as png
MOST_WAITING = 16  # files


class Conversions:
    """The queue of files that are being written, for the event loop of a server."""

    def __init__(self) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "conversions")
        self._waiting: dict[Path, concurrent.futures.Future[None]] = {}

    async def converted(self, video: Path, path: Path) -> None:
        """Write a video under another name, whose suffix is one of `CONVERTED`, unless it is there.

        Raises:
            InvalidInput: too many files are waiting.
            ValueError, OSError, DataError: the video or its record is damaged or deleted.
        """
        if path.is_file():
            return
        if path not in self._waiting:
            if len(self._waiting) >= MOST_WAITING:
                raise InvalidInput(f"{MOST_WAITING} files are being converted: try again in a minute")
            self._waiting[path] = future = self._thread.submit(convert, video, path)
            future.add_done_callback(lambda _: self._waiting.pop(path, None))
        await asyncio.shield(asyncio.wrap_future(self._waiting[path]))

    def close(self) -> None:
        """End when the file that is being written is done."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def convert(video: Path, path: Path) -> None:
    """Write a video under another name, whose suffix is one of `CONVERTED`."""
    if path.is_file():
        return
    record = read_json(beside(video))
    with open_video(video) as clip:
        fps = min(clip.info.fps, GIF_FPS) if path.suffix == ".gif" else clip.info.fps
        frames = clip.frames(fps=fps)
        if path.suffix == ".zip":
            with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as packed:
                for i, frame in enumerate(frames):
                    with packed.open(f"{video.stem}/{i:05d}.png", "w") as file:
                        Image.fromarray(frame).save(file, "png")
                packed.writestr(f"{video.stem}/record.json", json.dumps(record, indent=1))
        else:
            with VideoWriter(path, fps, note=read_note(video), sounds=[Sound(video)]) as writer:
                for frame in frames:
                    writer.write(frame[None])
    if not video.is_file():  # the gallery dropped it meanwhile
        path.unlink(missing_ok=True)

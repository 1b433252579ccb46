"""Check the files that visitors upload. A file is copied under a generated name, or refused with a sentence.

The first bytes tell the type of a file, not its name (media/opening.py). Sizes are read from headers before anything
is decoded. Every file is decoded once, so that no job fails on a
damaged file later.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import secrets
import shutil
from pathlib import Path

from PIL import Image

from minisora_jax.io.records import sha256
from minisora_jax.media.sniff import HEAD, sniff
from minisora_jax.media.video import VideoError, open_video

log = logging.getLogger("minisora")

MOST_BYTES = 64 * 2**20
MOST_PICTURE = 2**24  # pixels of one frame: 4096x4096
MOST_FRAMES = 600
MOST_VIDEO = 2**26  # pixels of all frames: 200 MB in memory
LEAST_SIDE = 8  # pixels
MOST_ASPECT = 8  # the longer side over the shorter
MOST_RATE = 120  # frames per second
THUMBNAIL = 160  # pixels of its longer side

PICTURES = (".png", ".jpg", ".webp", ".bmp", ".avif")
VIDEOS = (".mp4", ".mov", ".avi", ".webm", ".gif")
ANIMATED = (".png", ".webp", ".avif")  # pictures that may be videos
KINDS = {  # kind -> (allowed suffixes, the advice for another file)
    "picture": (PICTURES, "choose a picture: PNG, JPEG, WebP, AVIF or BMP"),
    "video": (VIDEOS, "choose a video: MP4, MOV, WebM, MKV, AVI or GIF"),
    "mask": (PICTURES + VIDEOS, "choose a black and white picture or video"),
}
REASONS = {
    "empty file": "is empty",
    "not a video": "is no readable video",
    "not an image": "is no readable picture",
    "truncated": "stops before its end: copy or download it again",
    "audio only": "has sound and no picture",
    "zero frames": "has no frame in it",
    "corrupt frames": "is damaged",
    "too large": "is too large a picture",
    "unreadable file": "cannot be read",
}


class InvalidInput(ValueError):
    """A visitor's input is refused. The message is for the visitor."""


@dataclasses.dataclass(frozen=True)
class Upload:
    """A checked copy of an uploaded file, which was decoded from its first frame to its last."""

    path: str
    frames: int
    height: int
    width: int
    fps: float
    thumbnail: bytes = dataclasses.field(repr=False)  # webp, animated for a video

    def frames_at(self, fps: float) -> int:
        """The number of frames at a rate."""
        return self.frames if self.frames == 1 else max(1, round(self.frames * fps / self.fps))

    @property
    def description(self) -> str:
        """The size, and the number and rate of frames, in words."""
        size = f"{self.width} x {self.height} pixels"
        return size if self.frames == 1 else f"{self.frames} frames, {size}, {self.fps:.3g} frames per second"


def validate_upload(sent: str, kind: str, come_from: Path, folder: Path) -> Upload:
    """A checked copy of an uploaded file.

    Args:
        sent: the path of the uploaded file.
        kind: a key of `KINDS`.
        come_from: the folder that must contain the file.
        folder: the folder of the copy.

    Raises:
        InvalidInput: the message says in a sentence what is wrong with the file.
    """
    path = Path(os.path.realpath(sent)) if "\0" not in sent else Path("?")
    name = display_name(sent)
    if not path.is_relative_to(os.path.realpath(come_from)) or not path.is_file():
        raise InvalidInput(f"{name} was not uploaded here: choose it again")
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise InvalidInput(f"{name} has {size / 2**20:.0f} MiB: the limit is {MOST_BYTES // 2**20} MiB")
    with path.open("rb") as file:
        suffix = _suffix(name, file.read(HEAD), kind)
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / f".{secrets.token_hex(8)}{suffix}"
    try:
        shutil.copyfile(path, copy)
        frames, height, width, fps, thumbnail = _read(copy, name, kind)
        stored = folder / f"{sha256(copy)[:20]}{suffix}"
        os.replace(copy, stored)
    except VideoError as error:
        raise InvalidInput(f"{name} {REASONS.get(error.reason, 'cannot be read')}") from error
    except InvalidInput:
        raise
    except Exception as error:  # whatever a library raises at one file is that file's fault
        log.warning("%s cannot be read: %s: %s", name, type(error).__name__, error)
        raise InvalidInput(f"{name} cannot be read") from error
    finally:
        copy.unlink(missing_ok=True)
    return Upload(str(stored), frames, height, width, fps, thumbnail)


def display_name(sent: str) -> str:
    """The base name of a path, shortened and printable."""
    name = os.path.basename(sent.replace("\\", "/"))
    name = "".join(c if c.isprintable() else "?" for c in name).encode("utf-8", "replace").decode()
    return (name if len(name) <= 48 else f"{name[:32]}...{name[-12:]}") or "the file"


def _suffix(name: str, head: bytes, kind: str) -> str:
    """The suffix of a file's type, by its first bytes; InvalidInput if the type is not of this kind."""
    if not head:
        raise InvalidInput(f"{name} is empty")
    suffixes, advice = KINDS[kind]
    file_format = sniff(head)
    if file_format.suffix in suffixes or (kind == "video" and file_format.suffix in ANIMATED):
        return file_format.suffix
    what = "a picture" if file_format.pillow else "a video" if file_format.demuxer else file_format.name
    raise InvalidInput(f"{name} is {what}; {advice}")


def _read(path: Path, name: str, kind: str) -> tuple[int, int, int, float, bytes]:
    """(frames, height, width, frames per second, thumbnail). All frames are decoded, one at a time."""
    with open_video(path, made=True) as video:
        info = video.info
        H, W = info.height, info.width
        if H * W > MOST_PICTURE:
            raise InvalidInput(f"{name} has {W} x {H} pixels: make it smaller, to at most 4096 x 4096")
        if min(H, W) < LEAST_SIDE:
            raise InvalidInput(f"{name} has {W} x {H} pixels: it needs at least {LEAST_SIDE} a side")
        if max(H, W) > MOST_ASPECT * min(H, W):
            raise InvalidInput(f"{name} has {W} x {H} pixels: one side is more than {MOST_ASPECT} times the other")
        if kind == "video" and video.still:
            raise InvalidInput(f"{name} is a picture; {KINDS[kind][1]}")
        most = min(MOST_FRAMES, MOST_VIDEO // (H * W))
        if info.frames > most and kind != "picture":
            raise InvalidInput(_too_long(name, most, H, W))
        if not 0.1 <= info.fps <= MOST_RATE:
            raise InvalidInput(f"{name} has {info.fps:.3g} frames per second: it needs 0.1 to {MOST_RATE}")
        count, small = 0, []
        for frame in video.frames(fit=_thumbnail_size):
            count += 1
            if count <= 64:
                small.append(Image.fromarray(frame))
            if kind == "picture":
                break
    return count, H, W, info.fps, animated_webp(small, info.fps)


def _too_long(name: str, most: int, H: int, W: int) -> str:
    return f"{name} is too long: the limit is {most} frames of {W} x {H} pixels; cut it, or make it smaller"


def _thumbnail_size(H: int, W: int) -> tuple[int, int]:
    scale = min(1.0, THUMBNAIL / max(H, W))
    return max(1, round(H * scale)), max(1, round(W * scale))


def animated_webp(frames: list[Image.Image], fps: float) -> bytes:
    """The frames as a looping webp; one frame as a still webp."""
    file = io.BytesIO()
    animation = {"save_all": True, "append_images": frames[1:], "duration": round(1000 / fps), "loop": 0}
    frames[0].save(file, "webp", quality=80, method=0, **(animation if len(frames) > 1 else {}))
    return file.getvalue()

"""Files that strangers send: each is let in under a name of ours, or refused in a sentence.

What a file is, its first bytes say and never its name: FFmpeg would otherwise follow a playlist called .mp4 to other
files and hosts. Sizes are read from headers before anything is decoded, and everything is decoded once before a job
may have it, so that a job does not find the damage.
"""

from __future__ import annotations

import dataclasses
import io
import os
import secrets
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from minisora_jax.io.records import sha256
from minisora_jax.io.video import VideoError, open_frames, probe

MOST_BYTES = 64 * 2**20
MOST_PICTURE = 2**24  # pixels of one frame: 4096x4096
MOST_FRAMES = 600
MOST_VIDEO = 2**26  # pixels of all frames: 200 MB in memory
LEAST_SIDE = 8
MOST_ASPECT = 8
MOST_RATE = 120  # frames a second
THUMBNAIL = 160  # pixels of its longer side

PICTURES = (".png", ".jpg", ".webp", ".bmp")
VIDEOS = (".mp4", ".mov", ".avi", ".webm", ".gif")
WANTED = {
    "picture": (PICTURES, "a picture is wanted here: PNG, JPEG, WebP or BMP"),
    "video": (VIDEOS, "a video is wanted here: MP4, MOV, WebM, MKV, AVI or GIF"),
    "mask": (PICTURES + VIDEOS, "a black and white picture or video is wanted here"),
}
MARKS = (  # place, first bytes, the suffix by which our reader goes or, without a dot, what it is instead
    (0, b"\x89PNG", ".png"),
    (0, b"\xff\xd8\xff", ".jpg"),
    (8, b"WEBP", ".webp"),
    (8, b"AVI ", ".avi"),
    (8, b"WAVE", "sound alone"),
    (0, b"GIF8", ".gif"),
    (0, b"\x1a\x45\xdf\xa3", ".webm"),
    *((4, b"ftyp" + brand, "a HEIC or AVIF picture") for brand in (b"heic", b"heix", b"mif1", b"avif", b"avis")),
    (4, b"ftypM4A", "sound alone"),
    (4, b"ftypqt", ".mov"),
    *((4, atom, ".mp4") for atom in (b"ftyp", b"moov", b"mdat", b"wide", b"free")),
    (0, b"BM", ".bmp"),
    *((0, mark, "sound alone") for mark in (b"ID3", b"fLaC", b"OggS", b"\xff\xfb", b"\xff\xf1")),
    (0, b"PK", "a zip archive, or a document"),
    (0, b"%PDF", "a PDF"),
    (0, b"\x7fELF", "a program"),
    (0, b"#EXTM3U", "a playlist"),
)
REASONS = {
    "empty file": "is empty",
    "not a video": "is no video that can be read",
    "not an image": "is no picture that can be read",
    "truncated": "stops before its end: it was cut off, perhaps while it was copied",
    "audio only": "has sound and no picture",
    "zero frames": "has no frame in it",
    "corrupt frames": "is damaged",
    "too large": "is too large a picture",
    "unreadable file": "cannot be read",
}


class InvalidInput(ValueError):
    """What somebody asked for cannot be done: the message is for them to read."""


@dataclasses.dataclass(frozen=True)
class Upload:
    """A file of ours that was read from its first frame to its last."""

    path: str
    frames: int
    height: int
    width: int
    fps: float
    thumbnail: bytes = dataclasses.field(repr=False)  # webp, moving where the file does

    @property
    def words(self) -> str:
        size = f"{self.width} x {self.height} pixels"
        return size if self.frames == 1 else f"{self.frames} frames, {size}, {self.fps:.3g} a second"


def validate_upload(sent: str, kind: str, come_from: Path, folder: Path) -> Upload:
    """The file at `sent`, which must lie in `come_from`, as one in `folder`. `Refused` says why not."""
    path = Path(os.path.realpath(sent)) if "\0" not in sent else Path("?")
    name = called(sent)
    if not path.is_relative_to(os.path.realpath(come_from)) or not path.is_file():
        raise InvalidInput(f"{name} was not uploaded here: choose it again")
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise InvalidInput(f"{name} has {size / 2**20:.0f} MiB, and at most {MOST_BYTES // 2**20} MiB are taken")
    with path.open("rb") as file:
        suffix = _suffix(name, file.read(512), kind)
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / f".{secrets.token_hex(8)}{suffix}"
    try:
        shutil.copyfile(path, copy)
        read = _read(copy, name, suffix in PICTURES)
        ours = folder / f"{sha256(copy)[:20]}{suffix}"
        os.replace(copy, ours)
    except VideoError as error:
        raise InvalidInput(f"{name} {REASONS.get(error.reason, 'cannot be read')}") from error
    finally:
        copy.unlink(missing_ok=True)
    return Upload(str(ours), *read)


def called(sent: str) -> str:
    """A name to call a file by in a sentence."""
    name = os.path.basename(sent.replace("\\", "/"))
    name = "".join(c if c.isprintable() else "?" for c in name).encode("utf-8", "replace").decode()
    return (name if len(name) <= 48 else f"{name[:32]}...{name[-12:]}") or "the file"


def _suffix(name: str, head: bytes, kind: str) -> str:
    if not head:
        raise InvalidInput(f"{name} is empty")
    suffixes, spec = WANTED[kind]
    what = next((what for at, mark, what in MARKS if head[at : at + len(mark)] == mark), "")
    if what in suffixes:
        return what
    if what.startswith("."):
        what = "a picture" if what in PICTURES else "a video"
    if not what:
        begins = head.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
        markup = begins.startswith(b"<")
        what = "an SVG drawing" if markup and b"<svg" in begins else "a web page" if markup else ""
        what = what or ("nothing that is known here" if b"\0" in head or not _is_text(head) else "text")
    raise InvalidInput(f"{name} is {what}; {spec}")


def _is_text(head: bytes) -> bool:
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4  # cut within a letter
    return True


def _read(path: Path, name: str, picture: bool) -> tuple[int, int, int, float, bytes]:
    """(frames, height, width, frames per second, thumbnail): everything is decoded, a frame at a time."""
    info = probe(path)
    H, W = info.height, info.width
    if H * W > MOST_PICTURE:
        raise InvalidInput(f"{name} has {W} x {H} pixels, and at most 4096 x 4096 are taken: make it smaller")
    if min(H, W) < LEAST_SIDE:
        raise InvalidInput(f"{name} has {W} x {H} pixels: at least {LEAST_SIDE} a side are needed")
    if max(H, W) > MOST_ASPECT * min(H, W):
        raise InvalidInput(f"{name} has {W} x {H} pixels: one side is more than {MOST_ASPECT} times the other")
    most = min(MOST_FRAMES, MOST_VIDEO // (H * W))
    if info.frames > most and not picture:
        raise InvalidInput(_too_long(name, most, H, W))
    count, small = 0, []
    with open_frames(path) as (frames, fps):
        if not 0.1 <= fps <= MOST_RATE:
            raise InvalidInput(f"{name} says {fps:.3g} frames a second: 0.1 to {MOST_RATE} are taken")
        for frame in frames:
            count += 1
            if count > most and not picture:
                raise InvalidInput(_too_long(name, most, H, W))
            H, W = frame.shape[:2]  # upright
            if count <= 64:
                small.append(_small(frame))
    return count, H, W, fps, moving_picture(small, fps)


def _too_long(name: str, most: int, H: int, W: int) -> str:
    return f"{name} is too long: at most {most} frames of {W} x {H} pixels are taken; cut it, or make it smaller"


def _small(frame_HWC: np.ndarray) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(frame_HWC))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


def moving_picture(frames: list[Image.Image], fps: float) -> bytes:
    """A webp of them, which goes round."""
    made = io.BytesIO()
    more = {"save_all": True, "append_images": frames[1:], "duration": round(1000 / fps), "loop": 0}
    frames[0].save(made, "webp", quality=80, method=0, **(more if len(frames) > 1 else {}))
    return made.getvalue()

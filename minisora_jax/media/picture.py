"""Pictures that Pillow decodes: still, or animated as WebP, PNG and AVIF can be.

A file of several pictures that is no animation, such as a JPEG with a gain map or depth, is its first picture.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image, JpegImagePlugin, features

from minisora_jax.media.colour import over_black
from minisora_jax.media.container import Fit
from minisora_jax.media.opening import MAX_PIXELS, MediaFile, VideoError, faults_of, label
from minisora_jax.media.picture_colour import PictureColour
from minisora_jax.media.sniff import Format
from minisora_jax.media.timeline import Timeline

MAX_ANIMATED = 2**31  # pixels of all frames of an animated picture, which is decoded once to learn its times
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
UPRIGHT = {  # what each of them needs
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Picture:
    """A picture of one or more frames, with the attributes of `ContainerVideo`.

    Raises:
        VideoError: 'not an image', 'truncated', 'corrupt frames' or 'too large'.
    """

    sound, header_frames = False, 1

    def __init__(self, file: MediaFile, stream: BinaryIO, file_format: Format):
        self.file, self.stream, self.format, self.remarks = file, stream, file_format, []
        if file_format.pillow == "AVIF" and not features.check("avif"):
            raise VideoError("not an image", f"{label(file)} is an AVIF picture, which needs pillow >= 11.3")
        with self._open() as image:
            H, W, count = image.height, image.width, getattr(image, "n_frames", 1) if file_format.animates else 1
            if H * W > MAX_PIXELS or (count > 1 and count * H * W > MAX_ANIMATED):
                frames = f"{count} frames of " if count > 1 else ""
                raise VideoError("too large", f"{label(file)} has {frames}{H}x{W} pixels; the limit is {MAX_PIXELS}")
            self.comment = _comment(image)
            place = stream.tell()  # Pillow goes on from here
            self.colour = PictureColour(file, image, stream, file_format)
            stream.seek(place)
            self.height, self.width = (W, H) if _orientation(image) in TURNED else (H, W)
            # The default image of an animated PNG need not be a frame of it.
            self.first = int(count > 1 and bool(image.info.get("default_image")))
            self.count = count - self.first
            self.timeline = Timeline.of_still()
            if self.count > 1:
                with faults_of(file):
                    durations = [self._load(image, k).info.get("duration", 0) for k in range(self.count)]
                    seconds = np.maximum(np.array(durations, np.float64), 0) / 1000
                    seconds[seconds < 0.011] = 0.1  # as browsers show it
                    ends = np.cumsum(seconds)
                    self.timeline = Timeline.of([0.0, *ends[:-1]], float(seconds[-1]), None)

    def frames(self, start: float, fit: Fit | None) -> Iterator[tuple[float, Callable[[], np.ndarray]]]:
        """As `ContainerVideo.frames`."""
        shape: tuple[int, ...] = ()
        with self._open() as image:
            deep = self.colour.deep_frames((image.height, image.width), self.count)
            for k in range(self.count):
                pixels = self._pixels(self._load(image, k), next(deep), fit)
                if pixels.shape != (shape := shape or pixels.shape):
                    sizes = sorted([shape[:2], pixels.shape[:2]])
                    raise VideoError("corrupt frames", f"{label(self.file)} changes its frame size midway: {sizes}")
                yield float(self.timeline.stamps[k]), lambda pixels=pixels: pixels

    def _pixels(self, image: Image.Image, deep_HWC: np.ndarray | None, fit: Fit | None) -> np.ndarray:
        with faults_of(self.file):
            orientation = _orientation(image)
            if deep_HWC is not None:
                alpha = image.getchannel("A") if image.mode == "RGBA" else None
                image = Image.fromarray(deep_HWC)
                if alpha:
                    image.putalpha(alpha)
            elif image.mode.startswith("I;16"):  # 16-bit grey: Pillow's own conversion would clip it at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            upright = image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image
            rgb = self.colour.rgb(upright)
            if fit and (size := fit(rgb.height, rgb.width)) != (rgb.height, rgb.width):
                rgb = rgb.resize((size[1], size[0]), Image.Resampling.BICUBIC)
            pixels = np.asarray(rgb) if deep_HWC is not None else self.colour.to_srgb(np.asarray(rgb))
            return over_black(pixels) if pixels.shape[-1] == 4 else pixels

    def _load(self, image: Image.Image, k: int) -> Image.Image:
        with faults_of(self.file):
            try:
                if self.first + self.count > 1:
                    image.seek(self.first + k)
                image.load()
            except OSError as error:
                if "truncated" in str(error):
                    raise VideoError("truncated", f"{label(self.file)}: {error}") from error
                raise
            return image

    def _open(self) -> Image.Image:
        self.stream.seek(0)
        with faults_of(self.file, "not an image"), _quiet():
            try:
                if self.format.pillow == "JPEG":  # without the list of further pictures, which may be damaged
                    return JpegImagePlugin.JpegImageFile(self.stream)
                return Image.open(self.stream, formats=[self.format.pillow])
            except Image.DecompressionBombError as error:
                raise VideoError("too large", f"{label(self.file)}: {error}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Pillow warns of damage that it reads around, and of sizes that are checked here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where the EXIF data are broken, as players take it."""
    try:
        with _quiet():
            return int(image.getexif().get(0x0112, 1))
    except Exception:  # Pillow raises nearly anything here
        return 1


def _comment(image: Image.Image) -> str:
    note = image.info.get("comment", "")
    return note.decode("utf-8", "replace") if isinstance(note, bytes) else str(note)

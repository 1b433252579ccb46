"""The colours of pictures in sRGB, by what their files say of them.

Of several statements the first counts: PNG's cICP chunk, an ICC profile, PNG's sRGB chunk, its gAMA and cHRM chunks or
an AVIF's code points, and EXIF's mark of Adobe RGB. LittleCMS converts profiles. The others are converted by light, HDR
as in videos (colour.py). A statement that is broken or does not fit the picture is passed over.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Iterator
from typing import BinaryIO

import av
import numpy as np
from PIL import Image, ImageCms

from minisora_jax.media.colour import SRGB, ByLight, ToRGB, codes_of, light_of, to_bt709
from minisora_jax.media.opening import MediaFile, VideoError, container_of, faults_of
from minisora_jax.media.sniff import AVIF, JPEG, MP4, PNG, Format

MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # Pillow's, of the colour spaces of profiles
SRGB_GAMMA = 1 / 2.2  # the gAMA that is written for sRGB
ADOBE_RGB = ((0.3127, 0.3290), (0.64, 0.33), (0.21, 0.71), (0.15, 0.06))  # chromaticities (x, y), the white first
ADOBE_GAMMA = 256 / 563
INTEROPERABILITY = 0xA005  # an EXIF tag: cameras mark Adobe RGB by "R03" there
UNKNOWN = (0, 2, 3)  # code points that say nothing
VIDEO_RANGE = 1  # FFmpeg's number of the range 16 to 235
PNG_STREAM = Format("a PNG picture", demuxer="png_pipe")


class PictureColour:
    """What a picture's file says of its colours, and the conversion of its pixels.

    Args:
        image: the opened picture, and `stream` its file, whose position changes.
    """

    def __init__(self, file: MediaFile, image: Image.Image, stream: BinaryIO, file_format: Format):
        self._file, self._stream, self._demuxed = file, stream, MP4 if file_format is AVIF else PNG_STREAM
        self._by_light, self._deep = None, False
        points = _cicp(stream) if file_format is PNG else None
        self._mode, self._by_profile = ("", None) if points else _profile(image)
        with contextlib.suppress(Exception):  # FFmpeg, EXIF and arithmetic raise nearly anything at broken values
            if file_format is AVIF:
                *points, self._deep = _nclx(file, stream)
            if self._by_profile or (not points and "srgb" in image.info):
                return
            if points:
                self._by_light = ByLight.of(points[1], points[0])
            elif file_format is PNG:
                self._by_light = _by_gamma(image.info.get("gamma"), image.info.get("chromaticity"))
            elif file_format is JPEG and image.getexif().get_ifd(INTEROPERABILITY).get(1, "")[:3] == "R03":
                self._by_light = _by_gamma(ADOBE_GAMMA, [value for xy in ADOBE_RGB for value in xy])
        still_png = file_format is PNG and getattr(image, "n_frames", 1) == 1 and not image.has_transparency_data
        self._deep |= self._by_light is not None and (file_format is AVIF or still_png)

    def deep_frames(self, size_HW: tuple[int, int], count: int) -> Iterator[np.ndarray | None]:
        """The frames as FFmpeg decodes them, uint8 (H, W, 3), stored in this size; None for one that Pillow decodes.

        Pillow gives 8 bits, and its AVIF decoder takes blue of video range too small: a green (40, 180, 60) in PQ came
        out as (0, 184, 61), and a blue (40, 60, 200) of BT.709 as (38, 59, 191).
        """
        if self._deep:
            with contextlib.suppress(VideoError):
                for frame in self._decoded(*size_HW, count):
                    yield frame if frame.shape[:2] == size_HW else None
        yield from itertools.repeat(None)

    def _decoded(self, H: int, W: int, count: int) -> Iterator[np.ndarray]:
        """A still may be tiles in rows, each a stream of its own."""
        convert = ToRGB(self._by_light)
        with container_of(self._file, self._stream, self._demuxed) as container, faults_of(self._file):
            videos = [v for v in container.streams.video if count == 1 or v.frames >= count]
            h, w = videos[0].height, videos[0].width
            rows, columns = -(-H // h), -(-W // w)
            tiles, canvas = videos[: rows * columns], np.empty((rows * h, columns * w, 3), np.uint8)
            places = {tile.index: divmod(k, columns) for k, tile in enumerate(tiles)}
            if len(tiles) != rows * columns:
                return
            for packet in container.demux(tiles):
                for frame in packet.decode():
                    assert isinstance(frame, av.VideoFrame)
                    row, column = places[packet.stream.index]
                    canvas[row * h :, column * w :][:h, :w] = convert(frame, (h, w))
                    if len(tiles) == 1:
                        yield canvas.copy()
            if len(tiles) > 1:
                yield canvas[:H, :W]

    def rgb(self, image: Image.Image) -> Image.Image:
        """The picture in RGB or RGBA, converted by its profile."""
        if self._by_profile is None:
            return image.convert("RGBA" if image.has_transparency_data else "RGB")
        converted = self._by_profile.apply(image.convert(self._mode))
        if image.has_transparency_data:
            converted.putalpha(image.convert("RGBA").getchannel("A"))
        return converted

    def to_srgb(self, pixels_HWC: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3 or 4) of `rgb`, converted by light."""
        return pixels_HWC if self._by_light is None else self._by_light(pixels_HWC)


def _profile(image: Image.Image) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """(mode of the pixels, transform from them to RGB in sRGB) of a picture's ICC profile; ("", None) for none."""
    with contextlib.suppress(Exception):
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        assert isinstance(profile.profile, ImageCms.core.CmsProfile)
        mode = MODES[profile.profile.xcolor_space.strip()]
        is_grey = image.mode[0] in "1LIF" and not image.mode.startswith("LAB")
        if (mode == "CMYK") == (image.mode == "CMYK") and (is_grey or mode != "L"):
            intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
            return mode, ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB", intent, flags)
    return "", None


def _by_gamma(gamma: float | None, chromaticities: list[float] | None) -> ByLight | None:
    """The conversion from code value^(1 / gamma) and (x, y) of white, red, green and blue; None for sRGB."""
    matrix = None
    if chromaticities:
        x, y = chromaticities[::2], chromaticities[1::2]
        matrix = to_bt709(*zip(x, y))
        matrix = None if np.allclose(matrix, np.eye(3), atol=0.01) else matrix
    light = light_of(SRGB)
    if gamma and 0.1 < gamma < 10 and (matrix is not None or abs(gamma - SRGB_GAMMA) > 0.01):
        light = ((np.arange(65536) / 65535) ** (1 / gamma)).astype(np.float32)
    elif matrix is None:
        return None
    return ByLight(light, codes_of(None), matrix)


def _nclx(file: MediaFile, stream: BinaryIO) -> tuple[int, int, bool]:
    """(primaries, transfer) of an AVIF by their numbers (ISO/IEC 23091-2), and whether it has video range."""
    with container_of(file, stream, MP4) as container:
        context = container.streams.video[0].codec_context
        return context.color_primaries, context.color_trc, context.color_range == VIDEO_RANGE


def _cicp(stream: BinaryIO) -> tuple[int, int] | None:
    """(primaries, transfer) of a PNG's cICP chunk; None without one, or if it says nothing."""
    stream.seek(8)
    while len(head := stream.read(8)) == 8 and head[4:] not in (b"IDAT", b"IEND"):
        if head[4:] == b"cICP":
            points = (*stream.read(min(2, int.from_bytes(head[:4], "big"))),)
            return points if len(points) == 2 and not set(points) & set(UNKNOWN) else None
        stream.seek(int.from_bytes(head[:4], "big") + 4, 1)
    return None

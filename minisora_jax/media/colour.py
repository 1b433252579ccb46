"""Decoded frames as RGB of standard dynamic range: uint8 (H, W, 3), BT.709 primaries.

swscale converts the matrix and the range, and resizes. Frames of high dynamic range (PQ and HLG of ITU-R BT.2100) and
of wide primaries (BT.2020, P3) are then converted by light: transfer, primaries, and back, as FFmpeg's zscale does it
with its defaults. 100 cd/m2 are white and brighter light is clipped; nothing is tone mapped.
"""

from __future__ import annotations

import dataclasses
import functools

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

LINEAR, SRGB, PQ, HLG = 8, 13, 16, 18  # FFmpeg's numbers of transfer characteristics (ISO/IEC 23091-2)
BT2020, P3 = (9, 10), (11, 12)  # ... and of colour primaries; 10 is XYZ of SMPTE 428, which BT.2020 stands in for
WHITE, HLG_PEAK = 100.0, 1000.0  # cd/m2 of SDR's white, and of the display that HLG is made for
GAMMA = 2.4  # of an SDR display (BT.1886)
TO_BT709 = {  # linear RGB of other primaries to BT.709's
    BT2020: ((1.660491, -0.587641, -0.072850), (-0.124550, 1.132900, -0.008349), (-0.018151, -0.100579, 1.118730)),
    P3: ((1.224940, -0.224940, 0.0), (-0.042057, 1.042057, 0.0), (-0.019638, -0.078636, 1.098274)),
}
ROWS = 256  # of a frame that are converted at a time, so that float copies stay small
FINE = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
STEPS = 2**14  # of the table from light to code values


@dataclasses.dataclass(frozen=True)
class ByLight:
    """Converts code values of RGB to those of BT.709's primaries and standard range, by light.

    Args:
        light: float32 (65536,), linear light of a 16-bit code value; 1 is white.
        codes: uint8 (STEPS,), the code value of the light (i / (STEPS - 1))^2.
        to_bt709: float32 (3, 3), from linear RGB to BT.709's; None if it is that.
    """

    light: np.ndarray
    codes: np.ndarray
    to_bt709: np.ndarray | None = None

    @classmethod
    def of(cls, transfer: int, primaries: int) -> ByLight | None:
        """The conversion from a transfer and primaries by their numbers; None where there is nothing to convert."""
        matrix = next((np.array(TO_BT709[known], np.float32) for known in TO_BT709 if primaries in known), None)
        if matrix is None and transfer not in (LINEAR, PQ, HLG):
            return None
        return cls(light_of(transfer), codes_of(GAMMA if transfer not in (LINEAR, SRGB) else None), matrix)

    def __call__(self, rgb_HWC: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3 or 4) of uint8 or uint16 (H, W, 3 or 4). Alpha, the fourth, stays as it is."""
        sdr, step = np.empty(rgb_HWC.shape, np.uint8), 257 if rgb_HWC.dtype == np.uint8 else 1
        for top in range(0, len(rgb_HWC), ROWS):
            light = self.light[::step][rgb_HWC[top : top + ROWS, :, :3]]
            if self.to_bt709 is not None:
                light = light @ self.to_bt709.T
            codes = np.sqrt(np.clip(light, 0, 1)) * (STEPS - 1)  # finer steps in the dark
            sdr[top : top + ROWS, :, :3] = self.codes[(codes + 0.5).astype(np.uint16)]
        sdr[..., 3:] = rgb_HWC[..., 3:] // (257 // step)
        return sdr


class ToRGB:
    """Converts the frames of one stream; one instance keeps one swscale context."""

    def __init__(self, by_light: ByLight | None):
        self._by_light = by_light
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame, size_HW: tuple[int, int]) -> np.ndarray:
        """uint8 (H, W, 3) of a frame, resized to the size (bicubic). Transparent frames lie on black."""
        alpha = any(c.is_alpha for c in frame.format.components) or frame.format.name == "pal8"
        wide = self._by_light is not None
        target = ("rgba64le" if wide else "rgba") if alpha else ("rgb48le" if wide else "rgb24")
        H, W = size_HW
        resized = (H, W) != (frame.height, frame.width)
        method = (FINE if wide else Interpolation.BICUBIC) if wide or resized else None
        rgb = self._reformatter.reformat(frame, W, H, target, interpolation=method, dst_color_range=2, threads=1)
        pixels = rgb.to_ndarray()
        if self._by_light is not None:
            pixels = self._by_light(pixels)
        return over_black(pixels) if alpha else pixels


@functools.cache
def light_of(transfer: int) -> np.ndarray:
    """float32 (65536,): linear light on the display of a 16-bit code value; 1 is white."""
    code = np.arange(65536) / 65535
    if transfer == PQ:  # SMPTE ST 2084
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
        root = code ** (1 / m2)
        light = 10_000 / WHITE * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)
    elif transfer == HLG:  # ARIB STD-B67
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        scene = np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)
        light = HLG_PEAK / WHITE * scene**1.2  # the system gamma of BT.2100, by channel as zscale does it
    elif transfer == SRGB:  # IEC 61966-2-1
        light = np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)
    else:
        light = code if transfer == LINEAR else code**GAMMA
    return light.astype(np.float32)


@functools.cache
def codes_of(gamma: float | None) -> np.ndarray:
    """uint8 (STEPS,): the code value of the light (i / (STEPS - 1))^2 on a display of that gamma; None: of sRGB."""
    light = (np.arange(STEPS) / (STEPS - 1)) ** 2
    if gamma is not None:
        return np.round(255 * light ** (1 / gamma)).astype(np.uint8)
    return np.round(255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)).astype(
        np.uint8
    )


def to_bt709(white: tuple[float, float], *primaries: tuple[float, float]) -> np.ndarray:
    """float32 (3, 3) from linear RGB of these chromaticities (x, y) to BT.709's, the white adapted (Bradford).

    Raises:
        ValueError: they span no colours (also as its subclass LinAlgError).
    """
    if min(y for _, y in (white, *primaries)) <= 0:
        raise ValueError(f"the white {white} or the primaries {primaries} are no colours")
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    to_xyz, cones = _to_xyz(white, *primaries), bradford @ _xyz(white)
    d65 = (0.3127, 0.3290)
    adapted = np.linalg.inv(bradford) @ np.diag(bradford @ _xyz(d65) / cones) @ bradford
    matrix = np.linalg.inv(_to_xyz(d65, (0.64, 0.33), (0.30, 0.60), (0.15, 0.06))) @ adapted @ to_xyz
    return matrix.astype(np.float32)


def _xyz(xy: tuple[float, float]) -> np.ndarray:
    return np.array([xy[0], xy[1], 1 - xy[0] - xy[1]]) / xy[1]


def _to_xyz(white: tuple[float, float], *primaries: tuple[float, float]) -> np.ndarray:
    columns = np.stack([_xyz(xy) for xy in primaries], axis=1)
    return columns * np.linalg.solve(columns, _xyz(white))


def over_black(rgba_HWC: np.ndarray) -> np.ndarray:
    """Transparent pixels, uint8 (H, W, 4), composited onto black: uint8 (H, W, 3)."""
    alpha = rgba_HWC[..., 3:].astype(np.uint16)
    return ((rgba_HWC[..., :3] * alpha + 127) // 255).astype(np.uint8)

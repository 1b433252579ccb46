"""Decoded video frames as RGB of standard dynamic range: uint8 (H, W, 3), BT.709 primaries.

swscale converts the matrix and the range, and resizes. Frames of high dynamic range (PQ and HLG of ITU-R BT.2100) and
of wide primaries (BT.2020, P3) are then converted by light: transfer, primaries, and back, as FFmpeg's zscale does it
with its defaults. 100 cd/m2 are white and brighter light is clipped; nothing is tone mapped.
"""

from __future__ import annotations

import functools

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

PQ, HLG = 16, 18  # FFmpeg's numbers of transfer characteristics (ISO/IEC 23091-2)
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


class ToRGB:
    """Converts the frames of one stream; one instance keeps one swscale context."""

    def __init__(self, transfer: int, primaries: int):
        self.transfer = transfer if transfer in (PQ, HLG) else 0
        self.primaries = next((known for known in TO_BT709 if primaries in known), ())
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame, size_HW: tuple[int, int]) -> np.ndarray:
        """uint8 (H, W, 3) of a frame, resized to the size (bicubic). Transparent frames lie on black."""
        alpha = any(c.is_alpha for c in frame.format.components) or frame.format.name == "pal8"
        wide = bool(self.transfer or self.primaries)
        target = "rgba" if alpha else "rgb48le" if wide else "rgb24"
        H, W = size_HW
        resized = (H, W) != (frame.height, frame.width)
        method = (FINE if wide else Interpolation.BICUBIC) if wide or resized else None
        rgb = self._reformatter.reformat(frame, W, H, target, interpolation=method, dst_color_range=2, threads=1)
        pixels = rgb.to_ndarray()
        if alpha:
            return over_black(pixels)
        return self._to_sdr(pixels) if wide else pixels

    def _to_sdr(self, rgb_HWC: np.ndarray) -> np.ndarray:
        sdr = np.empty(rgb_HWC.shape, np.uint8)
        matrix = np.array(TO_BT709[self.primaries], np.float32).T if self.primaries else None
        for top in range(0, len(rgb_HWC), ROWS):
            light = _light(self.transfer)[rgb_HWC[top : top + ROWS]]
            if matrix is not None:
                light = light @ matrix
            codes = np.sqrt(np.clip(light, 0, 1)) * (STEPS - 1)  # finer steps in the dark
            sdr[top : top + ROWS] = _codes()[(codes + 0.5).astype(np.uint16)]
        return sdr


@functools.cache
def _light(transfer: int) -> np.ndarray:
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
    else:
        light = code**GAMMA
    return light.astype(np.float32)


@functools.cache
def _codes() -> np.ndarray:
    """uint8 (STEPS,): the code value of the light (i / (STEPS - 1))^2."""
    return np.round(255 * (np.arange(STEPS) / (STEPS - 1)) ** (2 / GAMMA)).astype(np.uint8)


def over_black(rgba_HWC: np.ndarray) -> np.ndarray:
    """Transparent pixels, uint8 (H, W, 4), composited onto black: uint8 (H, W, 3)."""
    alpha = rgba_HWC[..., 3:].astype(np.uint16)
    return ((rgba_HWC[..., :3] * alpha + 127) // 255).astype(np.uint8)

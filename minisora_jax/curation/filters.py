"""Measurements of clips, and filters that set limits on them. A filter that is None is off.

    seconds      length of the clip                                              too short
    side         pixels of its shorter side                                      low resolution
    brightness   mean luma, 0 to 1                                               black frames
    change       mean difference of luma between sampled frames, 0 to 1          static
    sharpness    variance of the luma's Laplacian, in squares of 1/255           blurred
                 (Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy")
    motion       mean length of the optical flow, per cent of the diagonal per second     little motion
                 (DIS: Kroeger et al. 2016, arXiv:1603.03590; as a filter: Stable Video Diffusion, arXiv:2311.15127)
    text         share of a frame that detected lines of text cover, 0 to 1               text overlay
                 (PP-OCR's detector, by RapidOCR)
    aesthetic    the value of a function that the user names                     low aesthetic score

The right column is the reason for skipping a clip. The first five need NumPy only. They are always measured, and the
report shows their distributions even if their filters are off. The others take longer or need
`uv sync --extra curate`, so they are measured only if their filter is on. Stills have no length, change or
motion.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from minisora_jax.config import how_to_install
from minisora_jax.io.user_function import load_function, number_by

SAMPLED = 8  # frames that are measured, evenly spaced
LINE = 1 / 2  # of the frame's shorter side; thicker boxes are objects, not lines of text
FLOW_SIDE = 256  # pixels of the longer side at which flow is computed
FLOW_RATE = 12.0  # flow is computed between frames at about this rate, in frames per second


@dataclasses.dataclass(frozen=True)
class Filters:
    """Limits on the measurements of the module's docstring; None is off.

    Args:
        aesthetic: "FILE.py:FUNCTION" or "package.module:function". The function gets uint8 RGB (n, H, W, 3), n <= 8
            evenly spaced frames, and returns a number.
        duplicates: a clip is dropped if its hash differs from an earlier clip's in at most so many of the 192 bits
            (curation/duplicates.py).

    Raises:
        ValueError: a limit is negative or not finite, or has no model.
    """

    min_seconds: float | None = None
    min_side: int | None = None
    min_brightness: float | None = None
    min_change: float | None = None
    min_sharpness: float | None = None
    min_motion: float | None = None
    max_text: float | None = None
    min_aesthetic: float | None = None
    aesthetic: str | None = None
    duplicates: int | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and field.name != "aesthetic" and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{field.name}={value} must be a number, at least 0")
        if self.min_aesthetic is not None and self.aesthetic is None:
            raise ValueError(
                f"min_aesthetic={self.min_aesthetic} needs a model: aesthetic='FILE.py:FUNCTION', a function of uint8 "
                "frames (n, H, W, 3) that returns a number"
            )
        if self.duplicates is not None and not 0 <= self.duplicates < 64:
            raise ValueError(f"duplicates={self.duplicates} must be 0 to 63 of the 192 bits of a hash; try 11")

    def check(self) -> None:
        """Import the packages of the active filters; ImportError for a missing one, before any work."""
        if self.min_motion is not None:
            curate_module("cv2", "the filter of motion")
        if self.max_text is not None:
            curate_module("rapidocr", "the filter of text overlays")
            curate_module("onnxruntime", "the filter of text overlays")
        if self.duplicates is not None:
            curate_module("imagehash", "the filter of duplicates")
        if self.aesthetic is not None:
            load_function(self.aesthetic)


# `--curate`: permissive limits that drop clips without use for training. docs/benchmarks.md has the measurements.
CURATED = Filters(
    min_seconds=0.5,
    min_side=128,
    min_brightness=0.04,
    min_change=0.004,
    min_sharpness=10.0,
    min_motion=0.5,
    max_text=0.05,
    duplicates=11,
)


class SampledClip:
    """A clip with cached values that several measurements use."""

    def __init__(self, frames_THWC: np.ndarray, fps: float, filters: Filters):
        self.frames_THWC, self.fps, self.filters = frames_THWC, fps, filters

    @functools.cached_property
    def sampled_THWC(self) -> np.ndarray:
        """Up to `SAMPLED` evenly spaced frames, including the first and the last."""
        T = len(self.frames_THWC)
        return self.frames_THWC[np.unique(np.linspace(0, T - 1, min(SAMPLED, T)).round().astype(int))]

    @functools.cached_property
    def luma_THW(self) -> np.ndarray:
        """The luma of the sampled frames: float32, 0 to 255, with the weights of BT.601."""
        weights = np.array([0.299, 0.587, 0.114], np.float32)
        return np.stack([frame @ weights for frame in self.sampled_THWC])  # a frame at a time: the copies are large


@dataclasses.dataclass(frozen=True)
class Measure:
    """A measurement and its filter."""

    name: str
    limit: str  # the field of Filters with its limit
    reason: str  # of skipping a clip beyond the limit
    compute: Callable[[SampledClip], float]
    always: bool = False  # measured even if the filter is off
    stills: bool = True  # measured for stills too

    @property
    def is_minimum(self) -> bool:
        """Whether the limit is a lower bound."""
        return self.limit.startswith("min")


def measure(frames_THWC: np.ndarray, fps: float, still: bool, filters: Filters) -> tuple[dict[str, float], str, str]:
    """(measurements by name, reason, detail) of a clip; reason and detail are "" for a clip within all limits.

    Measurements run in the order of `MEASURES`, cheap ones first, up to the first limit that is not met.

    Args:
        frames_THWC: uint8 RGB.
        fps: frames per second.
        still: the clip is an image.
    """
    scores: dict[str, float] = {}
    clip = SampledClip(frames_THWC, fps, filters)
    for m in MEASURES:
        limit = getattr(filters, m.limit)
        active = m.always or limit is not None or (m.name == "aesthetic" and filters.aesthetic is not None)
        if not active or (still and not m.stills):
            continue
        value = scores[m.name] = round(float(m.compute(clip)), 6)
        if not (limit is None or (value >= limit if m.is_minimum else value <= limit)):  # NaN meets no limit
            bound = "at least" if m.is_minimum else "at most"
            return scores, m.reason, f"{m.name} is {value:g}; the filter requires {bound} {limit:g}"
    return scores, "", ""


# ---- The measurements


def brightness(clip: SampledClip) -> float:
    """The mean luma of the brightest sampled frame, 0 to 1, so that a fade from black is not called black."""
    return clip.luma_THW.mean((1, 2)).max() / 255


def change(clip: SampledClip) -> float:
    """The mean difference of luma between sampled frames, 0 to 1."""
    y = clip.luma_THW
    return float(np.mean([np.abs(b - a).mean() for a, b in zip(y, y[1:])])) / 255 if len(y) > 1 else 0.0


def sharpness(clip: SampledClip) -> float:
    """The variance of the Laplacian of the sharpest sampled frame, so that a fade or a blurred frame does not count."""
    if min(clip.luma_THW.shape[1:]) < 3:
        return 0.0
    laplacian = lambda y: y[:-2, 1:-1] + y[2:, 1:-1] + y[1:-1, :-2] + y[1:-1, 2:] - 4 * y[1:-1, 1:-1]
    return max(laplacian(y).var() for y in clip.luma_THW)


def motion(clip: SampledClip) -> float:
    """The mean length of the optical flow, in per cent of the frame's diagonal per second."""
    cv2 = curate_module("cv2", "the filter of motion")
    T, H, W = clip.frames_THWC.shape[:3]
    if T < 2:
        return 0.0
    step = min(max(1, round(clip.fps / FLOW_RATE)), T - 1)
    starts = np.unique(np.linspace(0, T - 1 - step, min(SAMPLED, T - step)).round().astype(int))
    scale = min(1.0, FLOW_SIDE / max(H, W))
    small = (max(16, round(W * scale)), max(16, round(H * scale)))
    grey = lambda frame: cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), small, interpolation=cv2.INTER_AREA)
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flows = (dis.calc(grey(clip.frames_THWC[t]), grey(clip.frames_THWC[t + step]), None) for t in starts)
    lengths = [np.linalg.norm(flow, axis=-1).mean() for flow in flows]
    return 100 * float(np.mean(lengths)) / math.hypot(*small) * clip.fps / step


def text(clip: SampledClip) -> float:
    """The share of a frame that lines of text cover: the median of three frames, since false detections seldom last."""
    shares = sorted(_text_share(clip.frames_THWC[int(p * len(clip.frames_THWC))]) for p in (1 / 6, 1 / 2, 5 / 6))
    return shares[1]


def _text_share(frame_HWC: np.ndarray) -> float:
    detection = _text_detector()(np.ascontiguousarray(frame_HWC[..., ::-1]), use_det=True, use_cls=False, use_rec=False)
    if getattr(detection, "boxes", None) is None:
        return 0.0
    boxes = np.asarray(detection.boxes, np.float64)  # (n, 4, 2): the corners of n boxes
    x, y = np.moveaxis(boxes, -1, 0)
    areas = 0.5 * np.abs((x * np.roll(y, -1, 1) - y * np.roll(x, -1, 1)).sum(1))
    lines = np.linalg.norm(boxes - np.roll(boxes, -1, 1), axis=-1).min(1) <= LINE * min(frame_HWC.shape[:2])
    return min(1.0, float(areas[lines].sum()) / math.prod(frame_HWC.shape[:2]))


def aesthetic(clip: SampledClip) -> float:
    """The value of the user's function."""
    if clip.filters.aesthetic is None:
        raise ValueError("there is no function for the aesthetic score: set aesthetic='FILE.py:FUNCTION'")
    return number_by(load_function(clip.filters.aesthetic), clip.filters.aesthetic, clip.sampled_THWC)


MEASURES = (
    Measure("seconds", "min_seconds", "too short", lambda clip: len(clip.frames_THWC) / clip.fps, True, stills=False),
    Measure("side", "min_side", "low resolution", lambda clip: min(clip.frames_THWC.shape[1:3]), True),
    Measure("brightness", "min_brightness", "black frames", brightness, True),
    Measure("change", "min_change", "static", change, True, stills=False),
    Measure("sharpness", "min_sharpness", "blurred", sharpness, True),
    Measure("motion", "min_motion", "little motion", motion, stills=False),
    Measure("text", "max_text", "text overlay", text),
    Measure("aesthetic", "min_aesthetic", "low aesthetic score", aesthetic),
)


# ---- Optional packages


def curate_module(name: str, what_for: str) -> ModuleType:
    """A package of the extra [curate]; ImportError with the command that installs it."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{what_for} needs {name}: {how_to_install('curate')} ({error})") from error
    if name == "cv2":
        module.setNumThreads(1)  # several workers run in parallel already
    return module


@functools.cache
def _text_detector() -> Callable[..., Any]:
    """PP-OCR's text detector. The rapidocr package contains its weights."""
    rapidocr = curate_module("rapidocr", "the filter of text overlays")
    one_thread = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
    size = {"Det.limit_type": "max", "Det.limit_side_len": 736}
    return rapidocr.RapidOCR(params={"Global.log_level": "critical", **one_thread, **size})

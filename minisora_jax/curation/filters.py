"""What is measured of a clip, and the limits that it must meet. A filter that is None is off.

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
    aesthetic    whatever the function says that the user names                  low aesthetic score

The first five need NumPy only: they are measured always, and the report shows how they are distributed, also where
their filter is off. The others are measured where they are asked for, since they take longer or need
`pip install minisora_jax[curate]`. Stills are not asked for length, change and motion.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np

SAMPLED = 8  # frames looked at, evenly spaced
LINE = 1 / 2  # of the frame's shorter side: what is thicker is an object that was taken for text
FLOW_SIDE = 256  # pixels of the longer side that flow is computed at
FLOW_RATE = 12.0  # frames per second, about, between which it is computed


@dataclasses.dataclass(frozen=True)
class Filters:
    """Limits by the measurements above. aesthetic: "FILE.py:FUNCTION" or "package.module:function", called with uint8
    RGB (n, H, W, 3), n <= 8 frames evenly spaced, and returning a number. duplicates: how many of the 192 bits of two
    clips' perceptual hashes may differ for the later clip to be dropped (curation/duplicates.py)."""

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
                raise ValueError(f"{field.name}={value} must be a number that is not negative")
        if self.min_aesthetic is not None and self.aesthetic is None:
            raise ValueError(
                f"min_aesthetic={self.min_aesthetic} needs a model: aesthetic='FILE.py:FUNCTION', a function of uint8 "
                "frames (n, H, W, 3) that returns a number"
            )
        if self.duplicates is not None and not 0 <= self.duplicates < 64:
            raise ValueError(f"duplicates={self.duplicates} must be 0 to 63 of the 192 bits of a hash; try 11")

    def check(self) -> None:
        """Import what the filters that are on need, so that a missing package is said before any work."""
        if self.min_motion is not None:
            curate_module("cv2", "the filter of motion")
        if self.max_text is not None:
            curate_module("rapidocr", "the filter of text overlays")
            curate_module("onnxruntime", "the filter of text overlays")
        if self.duplicates is not None:
            curate_module("imagehash", "the filter of duplicates")
        if self.aesthetic is not None:
            load_function(self.aesthetic)


# `--curate`: permissive limits, which drop what no training wants. The measurements behind them: docs/benchmarks.md.
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


class Look:
    """A clip as the measurements look at it; what several of them need is computed once."""

    def __init__(self, frames_THWC: np.ndarray, fps: float, filters: Filters):
        self.frames_THWC, self.fps, self.filters = frames_THWC, fps, filters

    @functools.cached_property
    def sampled_THWC(self) -> np.ndarray:
        """Up to `SAMPLED` frames, evenly spaced, the first and the last among them."""
        T = len(self.frames_THWC)
        return self.frames_THWC[np.unique(np.linspace(0, T - 1, min(SAMPLED, T)).round().astype(int))]

    @functools.cached_property
    def luma_THW(self) -> np.ndarray:
        """Of the sampled frames: float32, 0 to 255, by the weights of BT.601."""
        return self.sampled_THWC @ np.array([0.299, 0.587, 0.114], np.float32)


@dataclasses.dataclass(frozen=True)
class Measure:
    name: str
    limit: str  # the field of Filters that it is held against
    reason: str
    of: Callable[[Look], float]
    always: bool = False
    stills: bool = True

    @property
    def least(self) -> bool:
        return self.limit.startswith("min")


def measure(frames_THWC: np.ndarray, fps: float, still: bool, filters: Filters) -> tuple[dict[str, float], str, str]:
    """(the measurements by name, why the clip is refused, with what numbers); the last two are "" for a good clip.

    frames: uint8 RGB. In the order of `MEASURES`, up to the first limit that is not met: the cheap ones come first."""
    scores: dict[str, float] = {}
    look = Look(frames_THWC, fps, filters)
    for m in MEASURES:
        limit = getattr(filters, m.limit)
        asked = m.always or limit is not None or (m.name == "aesthetic" and filters.aesthetic is not None)
        if not asked or (still and not m.stills):
            continue
        value = scores[m.name] = round(float(m.of(look)), 6)
        if not (limit is None or (value >= limit if m.least else value <= limit)):  # NaN meets no limit
            return scores, m.reason, f"{m.name} is {value:g}, {'at least' if m.least else 'at most'} {limit:g} asked"
    return scores, "", ""


# ---- The measurements


def brightness(look: Look) -> float:
    """Of the brightest of the sampled frames: a fade from black is none."""
    return look.luma_THW.mean((1, 2)).max() / 255


def change(look: Look) -> float:
    return np.abs(np.diff(look.luma_THW, axis=0)).mean() / 255 if len(look.luma_THW) > 1 else 0.0


def sharpness(look: Look) -> float:
    """Of the sharpest of the sampled frames, so that a clip with a fade or a change of focus is judged by its best."""
    y = look.luma_THW
    if min(y.shape[1:]) < 3:
        return 0.0
    sides = y[:, :-2, 1:-1] + y[:, 2:, 1:-1] + y[:, 1:-1, :-2] + y[:, 1:-1, 2:]
    return (sides - 4 * y[:, 1:-1, 1:-1]).var((1, 2)).max()


def motion(look: Look) -> float:
    cv2 = curate_module("cv2", "the filter of motion")
    T, H, W = look.frames_THWC.shape[:3]
    if T < 2:
        return 0.0
    step = min(max(1, round(look.fps / FLOW_RATE)), T - 1)
    starts = np.unique(np.linspace(0, T - 1 - step, min(SAMPLED, T - step)).round().astype(int))
    scale = min(1.0, FLOW_SIDE / max(H, W))
    small = (max(16, round(W * scale)), max(16, round(H * scale)))
    grey = lambda frame: cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), small, interpolation=cv2.INTER_AREA)
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flows = (dis.calc(grey(look.frames_THWC[t]), grey(look.frames_THWC[t + step]), None) for t in starts)
    lengths = [np.linalg.norm(flow, axis=-1).mean() for flow in flows]
    return 100 * float(np.mean(lengths)) / math.hypot(*small) * look.fps / step


def text(look: Look) -> float:
    """The median of three frames: an overlay stays, and what a detector takes for text in one frame seldom does."""
    covered = sorted(_text_share(look.frames_THWC[int(p * len(look.frames_THWC))]) for p in (1 / 6, 1 / 2, 5 / 6))
    return covered[1]


def _text_share(frame_HWC: np.ndarray) -> float:
    found = _text_detector()(np.ascontiguousarray(frame_HWC[..., ::-1]), use_det=True, use_cls=False, use_rec=False)
    if getattr(found, "boxes", None) is None:
        return 0.0
    boxes = np.asarray(found.boxes, np.float64)  # (n, 4, 2): the corners of n boxes
    x, y = np.moveaxis(boxes, -1, 0)
    areas = 0.5 * np.abs((x * np.roll(y, -1, 1) - y * np.roll(x, -1, 1)).sum(1))
    lines = np.linalg.norm(boxes - np.roll(boxes, -1, 1), axis=-1).min(1) <= LINE * min(frame_HWC.shape[:2])
    return min(1.0, float(areas[lines].sum()) / math.prod(frame_HWC.shape[:2]))


def aesthetic(look: Look) -> float:
    return float(load_function(look.filters.aesthetic)(look.sampled_THWC))


MEASURES = (
    Measure("seconds", "min_seconds", "too short", lambda look: len(look.frames_THWC) / look.fps, True, stills=False),
    Measure("side", "min_side", "low resolution", lambda look: min(look.frames_THWC.shape[1:3]), True),
    Measure("brightness", "min_brightness", "black frames", brightness, True),
    Measure("change", "min_change", "static", change, True, stills=False),
    Measure("sharpness", "min_sharpness", "blurred", sharpness, True),
    Measure("motion", "min_motion", "little motion", motion, stills=False),
    Measure("text", "max_text", "text overlay", text),
    Measure("aesthetic", "min_aesthetic", "low aesthetic score", aesthetic),
)


# ---- What comes from elsewhere


def curate_module(name: str, what_for: str) -> ModuleType:
    """A package of the extra [curate]; ImportError with the command that installs it."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{what_for} needs {name}: pip install 'minisora_jax[curate]' ({error})") from error
    if name == "cv2":
        module.setNumThreads(1)  # the workers are the parallelism
    return module


@functools.cache
def _text_detector():
    """PP-OCR's text detector; its weights are in the package."""
    rapidocr = curate_module("rapidocr", "the filter of text overlays")
    one_thread = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
    size = {"Det.limit_type": "max", "Det.limit_side_len": 736}
    return rapidocr.RapidOCR(params={"Global.log_level": "critical", **one_thread, **size})


@functools.cache
def load_function(spec: str) -> Callable:
    """The function "FILE.py:NAME" or "package.module:NAME"; ValueError with what is missing."""
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise ValueError(f"{spec!r} must be FILE.py:FUNCTION or package.module:function")
    if where.endswith(".py"):
        if not Path(where).is_file():
            raise ValueError(f"{spec!r}: there is no file {where}")
        module_spec = importlib.util.spec_from_file_location(f"minisora_plug_{Path(where).stem}", where)
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
    else:
        module = importlib.import_module(where)
    if not callable(getattr(module, name, None)):
        raise ValueError(f"{spec!r}: {where} has no function {name}")
    return getattr(module, name)

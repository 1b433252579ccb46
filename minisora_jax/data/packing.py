"""Patch-n-pack: clips of any size as segments of fixed rows (NaViT: Dehghani et al. 2023, arXiv:2307.06304).

    clips  |####|##|######|#|###|            row 0  |######|####|
                                    plan ->  row 1  |###|##|#|..      . = padding

Packing is planned, not streamed. The index of the latent cache has all sizes, so the rows of an epoch are a pure
function of (seed, epoch, sizes). Best-fit decreasing fills rows within shuffled windows. Where captions limit the rows,
a fit to both video and captions is tried. Rows of similar attention cost (the sum of squared clip lengths, not the
token count) form a step, so that devices finish at the same time. Planning a million clips takes seconds.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import hashlib
import json
import logging
import threading
from pathlib import Path

import numpy as np

from minisora_jax.data.epochs import Epochs, Stage
from minisora_jax.io.atomic import write_text
from minisora_jax.models.text import BYTES_PER_TOKEN

log = logging.getLogger("minisora")


@dataclasses.dataclass(frozen=True)
class PackConfig:
    """The size of packed rows. Training replaces each 0 by what the clips need (`row_size.sized_by`)."""

    tokens: int = 0  # S: video tokens per row; 0: as the longest clip needs, at least 256
    text_tokens: int = 0  # L: caption tokens per row; 0: as the captions need
    slots: int = 0  # G: clips per row at most; 0: twice the mean of the data
    rows: int = 0  # B: rows per microbatch, over all devices; 0: 8, or as many as few clips fill
    window: int = 4096  # clips shuffled and packed together
    frames: int = 0  # latent frames of a row's clips together at most; 0: as many as the clips may have

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value < (least := int(name == "window")):
                raise ValueError(f"pack.{name}={value} must be at least {least}")
        if self.text_tokens % BYTES_PER_TOKEN:
            raise ValueError(f"pack.text_tokens={self.text_tokens} must be a multiple of {BYTES_PER_TOKEN}")


def token_counts(sizes_thwL: np.ndarray, patch: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(video tokens, caption tokens) of each clip, both int32 (n,).

    Args:
        sizes_thwL: (n, 4): latent frames, rows, columns and caption tokens of each clip.
        patch: the latents of one token: (t, h, w).

    Raises:
        ValueError: a latent height or width is not a multiple of the patch.
    """
    t, h, w, text = np.asarray(sizes_thwL, np.int32).T
    bad = np.flatnonzero((h % patch[1] != 0) | (w % patch[2] != 0))
    if len(bad):
        i = bad[0]
        raise ValueError(f"clip {i} has latents {t[i]}x{h[i]}x{w[i]}, not whole patches of {patch[1]}x{patch[2]}")
    return t * (h // patch[1]) * (w // patch[2]), text


def pack_rows(tokens: np.ndarray, text: np.ndarray, config: PackConfig, seed: int, epoch: int) -> list[np.ndarray]:
    """The clip indices of each row of an epoch, rows in training order. Every clip comes once.

    Args:
        tokens: the video tokens of each clip.
        text: the caption tokens of each clip.

    Raises:
        ValueError: a clip does not fit a row.
    """
    _require_fit(tokens, text, config)
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(tokens))
    rows = []
    for start in range(0, len(order), config.window):
        window = order[start : start + config.window]
        rows += [window[row] for row in _fill(tokens[window], text[window], config)]
    return _cost_balanced(rows, tokens, config.rows, rng)


def _fill(tokens: np.ndarray, text: np.ndarray, config: PackConfig) -> list[np.ndarray]:
    """The rows of one window: the fewer of best fit and, if best fit is 1 % above the bound, a fit to both measures."""
    bins = _Bins(config)
    for i in np.argsort(-tokens, kind="stable"):
        bins.add(int(i), int(tokens[i]), int(text[i]))
    rows = [np.array(clips) for clips in bins.clips]
    fewest = max(tokens.sum() / config.tokens, text.sum() / config.text_tokens, len(tokens) / config.slots)
    if len(rows) > 1.01 * fewest + 1:
        rows = min(rows, _fill_by_both(tokens / config.tokens, text / config.text_tokens, config.slots), key=len)
    return rows


def _fill_by_both(video: np.ndarray, text: np.ndarray, slots: int) -> list[np.ndarray]:
    """Fill one row after another, each time with the clip whose (video, text) is closest to the room left of both.

    `video` and `text` are shares of a row. Each is weighted by its amount that is not placed yet (norm-based greedy:
    Panigrahy et al. 2011, "Heuristics for Vector Bin Packing").
    """
    clips, rows = np.arange(len(video)), []
    while len(clips):
        weights, left, row = (video.sum(), text.sum()), [1.0, 1.0], []
        free = np.ones(len(clips), bool)
        while len(row) < slots:
            fits = np.flatnonzero(free & (video <= left[0] + 1e-9) & (text <= left[1] + 1e-9))
            if not len(fits):
                break
            misses = weights[0] * (left[0] - video[fits]) ** 2 + weights[1] * (left[1] - text[fits]) ** 2
            best = fits[np.argmin(misses)]
            row.append(best)
            free[best] = False
            left = [left[0] - video[best], left[1] - text[best]]
        rows.append(clips[row])
        clips, video, text = clips[free], video[free], text[free]
    return rows


def _require_fit(
    tokens: np.ndarray, text: np.ndarray, config: PackConfig, clips: np.ndarray | slice = slice(None)
) -> None:
    too_long = np.flatnonzero((tokens[clips] > config.tokens) | (text[clips] > config.text_tokens))
    if len(too_long):
        i = np.arange(len(tokens))[clips][too_long[0]]
        raise ValueError(
            f"{len(too_long)} clips do not fit a row; clip {i} has {tokens[i]} video and {text[i]} caption tokens, a "
            f"row has {config.tokens} and {config.text_tokens}: raise pack.tokens or pack.text_tokens, or cut the clips"
        )


class _Bins:
    """Open rows, sorted by the room left in them, so that the tightest fit is one look-up."""

    def __init__(self, config: PackConfig):
        self.config = config
        self.clips: list[list[int]] = []
        self.text_left: list[int] = []
        self._rooms: list[int] = []  # sorted numbers of tokens that open rows have left, each once
        self._with_room: dict[int, list[int]] = {}

    def add(self, clip: int, tokens: int, text: int) -> None:
        row, room = self._tightest(tokens, text) or self._open()
        rows = self._with_room[room]
        rows.remove(row)
        if not rows:
            del self._with_room[room]
            del self._rooms[bisect.bisect_left(self._rooms, room)]
        self.clips[row].append(clip)
        self.text_left[row] -= text
        if len(self.clips[row]) < self.config.slots:
            self._put(row, room - tokens)

    def _tightest(self, tokens: int, text: int) -> tuple[int, int] | None:
        for at in range(bisect.bisect_left(self._rooms, tokens), len(self._rooms)):
            room = self._rooms[at]
            for row in reversed(self._with_room[room][-8:]):
                if self.text_left[row] >= text:
                    return row, room
        return None

    def _open(self) -> tuple[int, int]:
        self.clips.append([])
        self.text_left.append(self.config.text_tokens)
        self._put(len(self.clips) - 1, self.config.tokens)
        return len(self.clips) - 1, self.config.tokens

    def _put(self, row: int, room: int) -> None:
        if room not in self._with_room:
            self._with_room[room] = []
            bisect.insort(self._rooms, room)
        self._with_room[room].append(row)


def _cost_balanced(
    rows: list[np.ndarray], tokens: np.ndarray, batch: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Shuffle the rows, sort them by cost within windows of 32 steps, then shuffle the steps."""
    order = rng.permutation(len(rows))
    costs = np.array([np.sum(tokens[r].astype(np.float64) ** 2) for r in rows])
    steps = []
    for start in range(0, len(order), 32 * batch):
        window = order[start : start + 32 * batch]
        window = window[np.argsort(costs[window], kind="stable")]
        steps += [window[i : i + batch] for i in range(0, len(window), batch)]
    full = [s for s in steps if len(s) == batch]
    rest = [s for s in steps if len(s) < batch]
    steps = [full[i] for i in rng.permutation(len(full))] + rest
    return [rows[i] for step in steps for i in step]


class PackPlan:
    """The rows of every step of a run: `rows(n)` lists the clip indices of each of step n's `per_step` rows.

    A part of an epoch ends with its last whole step, so up to per_step - 1 rows of it are not used; they differ from
    epoch to epoch. Memory holds 8 bytes a clip, and one part of an epoch.

    Args:
        tokens, text: (n,) video and caption tokens of each clip, see `token_counts`.
        per_step: the rows of a step, over all devices and microbatches.
        epochs: the order of the clips; None for every clip once an epoch.
        step_cache: a file with the first step of each part, so that a resumed run need not plan all earlier parts. A
            file of other clips or settings is overwritten.

    Raises:
        ValueError: a clip does not fit a row, or a part has fewer rows than a step.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        text: np.ndarray,
        config: PackConfig,
        seed: int,
        per_step: int,
        epochs: Epochs | None = None,
        step_cache: Path | None = None,
    ):
        self.tokens, self.text, self.config, self.seed, self.per_step = tokens, text, config, seed, per_step
        self.epochs = epochs or Epochs((len(tokens),), seed)
        self._step_cache = step_cache
        self._first_step = [0]  # the first step of each part
        if step_cache:
            self._plan_digest = self._digest()
            self._first_step = self._read_first_steps(step_cache) or self._first_step
        self._parts: dict[int, list[np.ndarray]] = {}
        self._lock = threading.Lock()
        clips = self.epochs.clips
        _require_fit(tokens, text, config, clips)
        self.max_segment_len = int(tokens[clips].max())  # tokens of the longest clip that takes part

    def epoch(self, step: int) -> int:
        """The epoch of a step."""
        return self.epochs.epoch(self._place(step)[0])

    def rows(self, step: int) -> list[np.ndarray]:
        """The clip indices of each row of a step."""
        part, first = self._place(step)
        return self._part(part)[first : first + self.per_step]

    def _place(self, step: int) -> tuple[int, int]:
        """(part, first row within it) of a step."""
        with self._lock:
            planned = len(self._first_step)
            while self._first_step[-1] <= step:
                part = len(self._first_step) - 1
                rows = self._part(part)
                if len(rows) < self.per_step:
                    raise ValueError(
                        f"{len(self.tokens)} clips fill {len(rows)} of the {self.per_step} rows of a step, at "
                        f"{self.config.tokens} tokens each: set --config.pack.rows={max(len(rows), 1)}, or add clips"
                    )
                self._first_step.append(self._first_step[-1] + len(rows) // self.per_step)
            if self._step_cache and len(self._first_step) > planned:
                write_text(self._step_cache, json.dumps({"of": self._plan_digest, "first_step": self._first_step}))
            part = int(np.searchsorted(self._first_step, step, side="right")) - 1
            self._part(part)  # under the lock, so that no other thread plans the same part
            return part, (step - self._first_step[part]) * self.per_step

    def _digest(self) -> str:
        """A hash of everything that determines the rows."""
        epochs = {field.name: getattr(self.epochs, field.name) for field in dataclasses.fields(Epochs)}
        members = epochs.pop("members")
        settings = [dataclasses.asdict(self.config), self.seed, self.per_step, epochs]
        digest = hashlib.sha256(json.dumps(settings).encode("utf-8"))
        for array in (self.tokens, self.text, *members):
            array = np.zeros(0) if array is None else np.ascontiguousarray(array)
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(array)
        return digest.hexdigest()

    def _read_first_steps(self, path: Path) -> list[int] | None:
        """The first step of each part from the cache file; None if it is missing or of another plan."""
        if not path.exists():
            return None
        with contextlib.suppress(ValueError, KeyError, TypeError):
            cached = json.loads(path.read_text(encoding="utf-8"))
            if cached["of"] == self._plan_digest:
                return cached["first_step"]
        log.warning("%s is of other clips or settings: steps are planned again", path)
        return None

    def _part(self, part: int) -> list[np.ndarray]:
        """The rows of a part of an epoch; the newest two are kept."""
        if part not in self._parts:
            _, clips = self.epochs.part(part)
            rows = pack_rows(self.tokens[clips], self.text[clips], self.config, self.seed, part)
            self._parts = {p: kept for p, kept in self._parts.items() if abs(p - part) <= 1}
            self._parts[part] = [clips[row] for row in rows]
        return self._parts[part]


class StagedPlan:
    """A curriculum: one PackPlan after another, with the interface of a PackPlan."""

    def __init__(self, stages: list[tuple[Stage, PackPlan]]):
        self.stages, plan = stages, stages[0][1]
        self.config, self.seed, self.per_step = plan.config, plan.seed, plan.per_step

    @property
    def max_segment_len(self) -> int:
        """The tokens of the longest clip of all stages."""
        return max(plan.max_segment_len for _, plan in self.stages)

    def epoch(self, step: int) -> int:
        """The epoch within the stage, plus 1000 times the stage's number: a clip's seed never repeats."""
        stage, plan, first = self._stage(step)
        return 1000 * stage + plan.epoch(step - first)

    def rows(self, step: int) -> list[np.ndarray]:
        """The clip indices of each row of a step."""
        _, plan, first = self._stage(step)
        return plan.rows(step - first)

    def _stage(self, step: int) -> tuple[int, PackPlan, int]:
        first = 0
        for i, (stage, plan) in enumerate(self.stages):
            if step < stage.until or i == len(self.stages) - 1:
                return i, plan, first
            first = stage.until
        raise AssertionError("no stages")

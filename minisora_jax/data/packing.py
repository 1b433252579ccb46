"""Patch-n-pack: clips of any size as segments of fixed rows (NaViT: Dehghani et al. 2023, arXiv:2307.06304).

    clips  |####|##|######|#|###|            row 0  |######|####|
                                    plan ->  row 1  |###|##|#|..      . = padding

Packing is planned, not streamed: sizes are known from the index of the latent cache, so the rows of an epoch are a
pure function of (seed, epoch, sizes). Best-fit decreasing within shuffled windows fills rows, or a fit to
video and captions both, where captions are what fills them up; rows of like attention cost (the sum of squared clip
lengths, not the token count) form a step, so that devices finish together. A million clips take seconds.
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
    tokens: int = 4096  # S: video tokens per row
    text_tokens: int = 2048  # L: caption tokens per row
    slots: int = 64  # G: clips per row at most
    rows: int = 8  # B: rows per microbatch, over all devices
    window: int = 4096  # clips shuffled and packed together

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"pack.{name}={value} must be at least 1")
        if self.text_tokens % BYTES_PER_TOKEN:
            raise ValueError(f"pack.text_tokens={self.text_tokens} must be a multiple of {BYTES_PER_TOKEN}")


def token_counts(sizes_thwL: np.ndarray, patch: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(video tokens, caption tokens) of each clip, int32; ValueError where a latent size is not whole patches."""
    t, h, w, text = np.asarray(sizes_thwL, np.int32).T
    bad = np.flatnonzero((h % patch[1] != 0) | (w % patch[2] != 0))
    if len(bad):
        i = bad[0]
        raise ValueError(f"clip {i} has latents {t[i]}x{h[i]}x{w[i]}, not whole patches of {patch[1]}x{patch[2]}")
    return t * (h // patch[1]) * (w // patch[2]), text


def pack_rows(tokens: np.ndarray, text: np.ndarray, config: PackConfig, seed: int, epoch: int) -> list[np.ndarray]:
    """Clip indices of each row of an epoch: every clip once, rows in training order."""
    _require_fit(tokens, text, config)
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(tokens))
    rows = []
    for start in range(0, len(order), config.window):
        window = order[start : start + config.window]
        rows += [window[row] for row in _fill(tokens[window], text[window], config)]
    return _cost_balanced(rows, tokens, config.rows, rng)


def _fill(tokens: np.ndarray, text: np.ndarray, config: PackConfig) -> list[np.ndarray]:
    """Rows of one window: by best fit, or by both measures where captions are what fills rows, if those are fewer."""
    bins = _Bins(config)
    for i in np.argsort(-tokens, kind="stable"):
        bins.add(int(i), int(tokens[i]), int(text[i]))
    rows = [np.array(clips) for clips in bins.clips]
    fewest = max(tokens.sum() / config.tokens, text.sum() / config.text_tokens, len(tokens) / config.slots)
    if len(rows) > 1.01 * fewest + 1:
        rows = min(rows, _fill_by_both(tokens / config.tokens, text / config.text_tokens, config.slots), key=len)
    return rows


def _fill_by_both(video: np.ndarray, text: np.ndarray, slots: int) -> list[np.ndarray]:
    """Row after row, each time the clip whose (video, text) comes closest to what the row has left of both.

    video, text: shares of a row. The two are weighed by how much of each is still to be placed (norm-based greedy:
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


def _require_fit(tokens: np.ndarray, text: np.ndarray, config: PackConfig, clips=slice(None)) -> None:
    too_long = np.flatnonzero((tokens[clips] > config.tokens) | (text[clips] > config.text_tokens))
    if len(too_long):
        i = np.arange(len(tokens))[clips][too_long[0]]
        raise ValueError(
            f"{len(too_long)} clips do not fit a row; clip {i} has {tokens[i]} video and {text[i]} caption tokens, "
            f"a row {config.tokens} and {config.text_tokens}: raise pack.tokens or pack.text_tokens, or cut the clips"
        )


class _Bins:
    """Open rows by the room left in them, so that the tightest fit is one look-up in a sorted list."""

    def __init__(self, config: PackConfig):
        self.config = config
        self.clips: list[list[int]] = []
        self.text_left: list[int] = []
        self._rooms: list[int] = []  # sorted: of each, some open row has exactly so many tokens left
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
    """Rows shuffled, then sorted by cost within windows of 32 steps, then the steps shuffled."""
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
    """The rows of every step of a run: `rows(n)` is the list of clip indices of each of step n's `per_step` rows.

    tokens, text (n,): of each clip (`token_counts`), 8 bytes a clip; all else is as large as one part of an epoch.
    epochs: the clips of each epoch in their order; by default every clip once.
    remember: a file for how many steps each part has, so that a run that goes on late need not plan all parts before.
    One of other clips or settings is not believed, and is written anew.

    A part ends with its last whole step, so up to per_step - 1 rows of it are left out, others each time.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        text: np.ndarray,
        config: PackConfig,
        seed: int,
        per_step: int,
        epochs: Epochs | None = None,
        remember: Path | None = None,
    ):
        self.tokens, self.text, self.config, self.seed, self.per_step = tokens, text, config, seed, per_step
        self.epochs = epochs or Epochs((len(tokens),), seed)
        self._remember = remember
        self._first_step = [0]  # of each part
        if remember:
            self._of = self._digest()
            self._first_step = self._remembered() or self._first_step
        self._parts: dict[int, list[np.ndarray]] = {}
        self._lock = threading.Lock()
        clips = self.epochs.clips
        _require_fit(tokens, text, config, clips)
        self.longest = int(tokens[clips].max())  # tokens of the longest clip that takes part

    def epoch(self, step: int) -> int:
        return self.epochs.epoch(self._place(step)[0])

    def rows(self, step: int) -> list[np.ndarray]:
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
                        f"{len(self.tokens)} clips fill only {len(rows)} rows of {self.config.tokens} tokens, a step "
                        f"takes {self.per_step}: lower pack.rows or pack.tokens, or add clips"
                    )
                self._first_step.append(self._first_step[-1] + len(rows) // self.per_step)
            if self._remember and len(self._first_step) > planned:
                write_text(self._remember, json.dumps({"of": self._of, "first_step": self._first_step}))
            part = int(np.searchsorted(self._first_step, step, side="right")) - 1
            self._part(part)  # while others wait, so that none plans the same
            return part, (step - self._first_step[part]) * self.per_step

    def _digest(self) -> str:
        """Of all that the rows depend on."""
        epochs = {field.name: getattr(self.epochs, field.name) for field in dataclasses.fields(Epochs)}
        members = epochs.pop("members")
        settings = [dataclasses.asdict(self.config), self.seed, self.per_step, epochs]
        found = hashlib.sha256(json.dumps(settings).encode("utf-8"))
        for array in (self.tokens, self.text, *members):
            array = np.zeros(0) if array is None else np.ascontiguousarray(array)
            found.update(f"{array.dtype.str}{array.shape}".encode())
            found.update(array)
        return found.hexdigest()

    def _remembered(self) -> list[int] | None:
        """The first step of each part, of a plan like this one."""
        if not self._remember.exists():
            return None
        with contextlib.suppress(ValueError, KeyError, TypeError):
            kept = json.loads(self._remember.read_text(encoding="utf-8"))
            if kept["of"] == self._of:
                return kept["first_step"]
        log.warning("%s is not of these clips and settings: steps are placed anew", self._remember)
        return None

    def _part(self, part: int) -> list[np.ndarray]:
        """The rows of a part of an epoch; the newest two are kept."""
        if part not in self._parts:
            _, clips = self.epochs.part(part)
            rows = pack_rows(self.tokens[clips], self.text[clips], self.config, self.seed, part)
            self._parts = {p: made for p, made in self._parts.items() if abs(p - part) <= 1}
            self._parts[part] = [clips[row] for row in rows]
        return self._parts[part]


class StagedPlan:
    """PackPlans one after another: a curriculum. What a PackPlan offers, of the plan that a step falls to."""

    def __init__(self, stages: list[tuple[Stage, PackPlan]]):
        self.stages, plan = stages, stages[0][1]
        self.config, self.seed, self.per_step = plan.config, plan.seed, plan.per_step

    @property
    def longest(self) -> int:
        return max(plan.longest for _, plan in self.stages)

    def epoch(self, step: int) -> int:
        """Of the stage, a thousand apart from those of other stages, so that no clip is drawn the same way twice."""
        stage, plan, first = self._stage(step)
        return 1000 * stage + plan.epoch(step - first)

    def rows(self, step: int) -> list[np.ndarray]:
        _, plan, first = self._stage(step)
        return plan.rows(step - first)

    def _stage(self, step: int) -> tuple[int, PackPlan, int]:
        first = 0
        for i, (stage, plan) in enumerate(self.stages):
            if step < stage.until or i == len(self.stages) - 1:
                return i, plan, first
            first = stage.until
        raise AssertionError("no stages")

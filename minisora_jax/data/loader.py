"""Batches for codec and transformer training, read by Grain threads. Batch n is a pure function of (seed, n).

So the data state of a run is its step number. A resumed run, on any number of hosts, continues with the batch that the
uninterrupted run would have read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np

from minisora_jax.data.conditioning import ConditioningConfig
from minisora_jax.data.epochs import curriculum
from minisora_jax.data.latents import Latents, Mixture
from minisora_jax.data.packing import PackPlan, StagedPlan
from minisora_jax.data.rows import Segment, pack_segments, training_segment
from minisora_jax.io.retry import Damaged, DataError
from minisora_jax.media.resize import resized
from minisora_jax.parallel.mesh import host_rows
from minisora_jax.sources.clips import size_and_frames
from minisora_jax.types import ClipSequence, PackedBatch


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The training data of a transformer."""

    path: str = ""  # a latent cache, or several with weights and masks: "data/a + data/b*0.5@between"
    held_out: str = ""  # a latent cache whose loss is measured as training goes; "" for none
    temperature: float = 1.0  # above 1, small data sets come more often than in proportion to their size
    curriculum: str = ""  # "1000:1x32x32 5000:5x32x32": up to a step, latents of at most frames x rows x columns
    strict: bool = False  # stop at the first damaged clip instead of skipping it

    def __post_init__(self):
        if self.temperature <= 0:
            raise ValueError(f"data.temperature={self.temperature} must be positive")
        curriculum(self.curriculum, 1)


@dataclasses.dataclass(frozen=True)
class ClipsConfig:
    """The training data of a codec."""

    path: str = ""  # a prepared data set, or shapes[:SPLIT[:COUNT]]
    held_out: str = ""  # the data set for evaluation; "" for the last clips of `path`
    strict: bool = False  # stop at the first damaged clip instead of drawing another


def in_order(make: Callable[[int], Any], steps: range, *, threads: int = 4, ahead: int = 8) -> Iterator[Any]:
    """make(n) for each n of `steps` in order. `threads` Grain threads compute up to `ahead` results ahead."""
    dataset = grain.MapDataset.range(steps.start, steps.stop).map(make)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)))


def crop_batches(
    clips: ClipSequence,
    steps: range,
    *,
    crop_THW: tuple[int, int, int],
    batch: int,
    accumulate: int,
    seed: int,
    enlarge: float = 1.0,
    damaged: Damaged | None = None,
) -> Iterator[np.ndarray]:
    """uint8 frames (A, B, T, H, W, C), one array a step: random crops of random clips.

    Of a data set that `prepare --crf` wrote, a crop decodes the frames of its window, however long the clip is. A clip
    of lossless pixels is one compressed record, which is read whole.

    A clip shorter than the crop repeats its last frame. A clip that is smaller, or damaged, is replaced by another.

    Args:
        crop_THW: the size of a crop in frames and pixels.
        batch: B, the crops of a microbatch over all hosts; each host gets its own rows.
        accumulate: A, the microbatches of a step.
        enlarge: above 1, half the crops come from clips enlarged by up to this factor, whose logarithm is uniform.
        damaged: the log of damaged clips; None raises at the first one.

    Raises:
        ValueError: 1000 random clips in a row are smaller than the crop.
    """
    damage_log = damaged or Damaged(strict=True)

    def crop(step: int, row: int) -> np.ndarray:
        rng = np.random.default_rng([seed, step, row])
        for _ in range(1000):
            try:
                (T, *sides), read = size_and_frames(clips, int(rng.integers(len(clips))))
                if not all(n >= c for n, c in zip(sides, crop_THW[1:])):
                    continue
                factor = enlarge ** max(rng.uniform(-1, 1), 0.0) if enlarge > 1 else 1.0
                cut = (crop_THW[0], *(round(c / factor) for c in crop_THW[1:]))
                start, top, left = (int(rng.integers(max(n - c, 0) + 1)) for n, c in zip((T, *sides), cut))
                frames = read(start, cut[0])[:, top : top + cut[1], left : left + cut[2]]
            except DataError as error:
                damage_log.add(error)
                continue
            if len(frames) < cut[0]:
                frames = np.concatenate([frames, np.repeat(frames[-1:], cut[0] - len(frames), axis=0)])
            return resized(frames, crop_THW[1:])
        raise ValueError(f"1000 random clips are all smaller than crop_THW={crop_THW}: lower it")

    mine = host_rows(batch)

    def crops(step: int) -> np.ndarray:
        return np.stack([[crop(step, a * batch + b) for b in mine] for a in range(accumulate)])

    return in_order(crops, steps)


def packed_batches(
    latents: Latents | Mixture,
    plan: PackPlan | StagedPlan,
    steps: range,
    *,
    patch: tuple[int, int, int],
    conditioning: ConditioningConfig,
    caption_dropout: float,
    caption_tokens: int = 0,
    action_width: int = 0,
    action_dropout: float = 0.0,
    damaged: Damaged | None = None,
) -> Iterator[tuple[PackedBatch, list[np.ndarray]]]:
    """(PackedBatch (A, B, ...), sizes) of each step; sizes[r] is the (t, h, w, L) of the clips of row r, on all hosts.

    The place of a damaged clip stays empty.

    Args:
        patch: the latents of one token: (t, h, w).
        caption_dropout: the share of clips whose caption is replaced by the empty one.
        action_width: `DiTConfig.action_width`; 0: actions are not read.
        action_dropout: the share of clips whose actions are left out.
        caption_tokens: captions are padded to so many tokens, see `DiTConfig`.
        damaged: the log of damaged clips; None raises at the first one.

    Raises:
        DataError: no clip of a step's rows of this host is readable.
    """
    damage_log = damaged or Damaged(strict=True)
    pack, seed, accumulate = plan.config, plan.seed, plan.per_step // plan.config.rows
    mine = [a * pack.rows + b for a in range(accumulate) for b in host_rows(pack.rows)]
    for mask in filter(None, latents.masks):
        conditioning.require_kind(mask)
    masks, ends = np.array(latents.masks), np.cumsum(latents.counts)

    def segment(epoch: int, i: int, shown: tuple[int, int], mask: str) -> Segment | None:
        # Seeded by the clip and the epoch, not by its place in a row, so packing does not change the clip.
        rng = np.random.default_rng([seed, epoch, i])
        try:
            clip = latents[i]
        except DataError as error:
            damage_log.add(error)
            return None
        empty = latents.empty_text_LE
        dropout = (caption_dropout, action_dropout)
        return training_segment(clip, patch, conditioning, dropout, empty, caption_tokens, rng, shown, mask)

    def batch(step: int) -> tuple[PackedBatch, list[np.ndarray]]:
        epoch, rows = plan.epoch(step), plan.rows(step)
        sizes = [latents.sizes[clips].clip((0, 0, 0, caption_tokens)) for clips in rows]
        fixed = [masks[np.searchsorted(ends, clips, side="right")] for clips in rows]  # the mask of each clip's set
        shown = [conditioning.stretches(c, size[:, 0], seed, epoch, f != "") for c, size, f in zip(rows, sizes, fixed)]
        of_row = lambda r: zip(rows[r], shown[r], fixed[r])
        segments = [[s for i, span, m in of_row(r) if (s := segment(epoch, int(i), span, str(m)))] for r in mine]
        if not any(segments):
            raise DataError(f"no clip of step {step + 1} is readable; {damage_log.count} clips were damaged so far")
        packed = pack_segments(segments, pack, plan.max_segment_len, action_width)
        packed = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), packed)
        for size, spans in zip(sizes, shown):
            size[:, 0] = spans[:, 1] - spans[:, 0]
        return packed, sizes

    return in_order(batch, steps)

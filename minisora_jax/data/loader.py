"""Batches for the two trainings, read by Grain threads. The n-th batch is a pure function of (seed, n).

So the data state of a run is its step number: a resumed run, on however many hosts, continues with the batch
that the uninterrupted run would have seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import grain
import jax
import numpy as np

from minisora_jax.data.conditioning import ConditioningConfig
from minisora_jax.data.epochs import curriculum
from minisora_jax.data.latents import Latents, Mixture
from minisora_jax.data.packing import PackPlan, StagedPlan
from minisora_jax.data.rows import pack_segments, training_segment
from minisora_jax.io.resize import resized
from minisora_jax.io.retry import Damaged, DataError
from minisora_jax.parallel.mesh import host_rows
from minisora_jax.types import ClipSequence, PackedBatch


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a transformer learns from."""

    path: str = ""  # a latent cache, or several with weights: "data/a + data/b*0.5"
    temperature: float = 1.0  # above 1, smaller data sets come more often than their size says
    curriculum: str = ""  # "1000:1x32x32 5000:5x32x32": up to a step, latents of at most frames x rows x columns
    strict: bool = False  # stop at the first damaged clip, and not leave it out

    def __post_init__(self):
        if self.temperature <= 0:
            raise ValueError(f"data.temperature={self.temperature} must be positive")
        curriculum(self.curriculum, 1)


@dataclasses.dataclass(frozen=True)
class ClipsConfig:
    """What a codec learns from."""

    path: str = ""  # a data set that `minisora prepare` wrote, or shapes[:SPLIT[:COUNT]]
    held_out: str = ""  # another to be scored on; "" for the last clips of the first
    strict: bool = False  # stop at the first damaged clip, and not draw another


def in_order(make: Callable[[int], object], steps: range, *, threads: int = 4, ahead: int = 8) -> Iterator:
    """make(n) for each n of `steps`, computed ahead of time by Grain's threads."""
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
    """uint8 frames (A, B, T, H, W, C): random crops of clips drawn at random, one array a step.

    Above 1, half the crops are of clips enlarged by up to `enlarge`, the factor's logarithm uniform. A clip shorter
    than the crop stands still at its end; one that is smaller, or damaged, is passed over for another.
    """
    damaged = damaged or Damaged(strict=True)

    def crop(step: int, row: int) -> np.ndarray:
        rng = np.random.default_rng([seed, step, row])
        for _ in range(1000):
            try:
                frames = clips[int(rng.integers(len(clips)))].frames_THWC
            except DataError as error:
                damaged.add(error)
                continue
            if all(n >= c for n, c in zip(frames.shape[1:], crop_THW[1:])):
                break
        else:
            raise ValueError(f"1000 clips drawn at random were all smaller than crop_THW={crop_THW}: lower it")
        if len(frames) < crop_THW[0]:
            frames = np.concatenate([frames, np.repeat(frames[-1:], crop_THW[0] - len(frames), axis=0)])
        factor = enlarge ** max(rng.uniform(-1, 1), 0.0) if enlarge > 1 else 1.0
        cut = (crop_THW[0], *(round(c / factor) for c in crop_THW[1:]))
        at = [int(rng.integers(n - c + 1)) for n, c in zip(frames.shape, cut)]
        return resized(frames[tuple(slice(a, a + c) for a, c in zip(at, cut))], crop_THW[1:])

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
    damaged: Damaged | None = None,
) -> Iterator[tuple[PackedBatch, list[np.ndarray]]]:
    """(PackedBatch (A, B, ...), the (t, h, w, L) of the clips of each of the step's rows on all hosts), one a step.

    Captions are padded to `caption_tokens`, as DiTConfig has it. A damaged clip's place stays empty.
    """
    damaged = damaged or Damaged(strict=True)
    pack, seed, accumulate = plan.config, plan.seed, plan.per_step // plan.config.rows
    mine = [a * pack.rows + b for a in range(accumulate) for b in host_rows(pack.rows)]

    def segment(epoch: int, i: int, shown: tuple[int, int]):
        # Seeded by the clip and the epoch, never by its place, so that packing changes nothing about a clip.
        rng = np.random.default_rng([seed, epoch, i])
        try:
            clip = latents[i]
        except DataError as error:
            return damaged.add(error)
        return training_segment(
            clip, patch, conditioning, caption_dropout, latents.empty_text_LE, caption_tokens, rng, shown
        )

    def batch(step: int):
        epoch, rows = plan.epoch(step), plan.rows(step)
        sizes = [latents.sizes[clips].clip((0, 0, 0, caption_tokens)) for clips in rows]
        shown = [conditioning.stretches(clips, size[:, 0], seed, epoch) for clips, size in zip(rows, sizes)]
        made = [[s for i, span in zip(rows[r], shown[r]) if (s := segment(epoch, int(i), span))] for r in mine]
        if not any(made):
            raise DataError(f"none of the clips of step {step + 1} could be read: {damaged.count} were damaged so far")
        packed = pack_segments(made, pack, plan.max_segment_len)
        packed = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), packed)
        for size, spans in zip(sizes, shown):
            size[:, 0] = spans[:, 1] - spans[:, 0]
        return packed, sizes

    return in_order(batch, steps)

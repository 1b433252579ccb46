"""Batches for the two trainings, read by Grain threads. The n-th batch is a pure function of (seed, n).

So the data state of a run is its step number: a resumed run, on however many hosts, continues with the batch
that the uninterrupted run would have seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import grain
import jax
import numpy as np

from minisora_jax.data.known import KnownConfig
from minisora_jax.data.latents import Latents
from minisora_jax.data.packing import PackPlan, StagedPlan, pack_segments, padded_text, training_segment
from minisora_jax.parallel.mesh import host_rows
from minisora_jax.types import Clip, PackedBatch


def in_order(make: Callable[[int], object], steps: range, *, threads: int = 4, ahead: int = 8) -> Iterator:
    """make(n) for each n of `steps`, computed ahead of time by Grain's threads."""
    dataset = grain.MapDataset.range(steps.start, steps.stop).map(make)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)))


def crop_batches(
    clips: Sequence[Clip], steps: range, *, crop_THW: tuple[int, int, int], batch: int, accumulate: int, seed: int
) -> Iterator[np.ndarray]:
    """uint8 frames (A, B, T, H, W, C): random crops of clips drawn at random, one array a step.

    A clip shorter than the crop stands still at its end; one that is smaller is passed over for another.
    """

    def crop(step: int, row: int) -> np.ndarray:
        rng = np.random.default_rng([seed, step, row])
        for _ in range(1000):
            frames = clips[int(rng.integers(len(clips)))].frames_THWC
            if all(n >= c for n, c in zip(frames.shape[1:], crop_THW[1:])):
                break
        else:
            raise ValueError(f"1000 clips drawn at random were all smaller than crop_THW={crop_THW}: lower it")
        if len(frames) < crop_THW[0]:
            frames = np.concatenate([frames, np.repeat(frames[-1:], crop_THW[0] - len(frames), axis=0)])
        at = [int(rng.integers(n - c + 1)) for n, c in zip(frames.shape, crop_THW)]
        return frames[tuple(slice(a, a + c) for a, c in zip(at, crop_THW))]

    mine = host_rows(batch)

    def crops(step: int) -> np.ndarray:
        return np.stack([[crop(step, a * batch + b) for b in mine] for a in range(accumulate)])

    return in_order(crops, steps)


def packed_batches(
    latents: Latents,
    plan: PackPlan | StagedPlan,
    steps: range,
    *,
    patch: tuple[int, int, int],
    known: KnownConfig,
    caption_dropout: float,
    caption_tokens: int = 0,
) -> Iterator[tuple[PackedBatch, list[np.ndarray]]]:
    """(PackedBatch (A, B, ...), the (t, h, w, L) of the clips of each of the step's rows on all hosts), one a step.

    Captions are padded to `caption_tokens`, as DiTConfig has it.
    """
    pack, seed, accumulate = plan.config, plan.seed, plan.per_step // plan.config.rows
    mine = [a * pack.rows + b for a in range(accumulate) for b in host_rows(pack.rows)]

    def segment(epoch: int, i: int):
        # Seeded by the clip and the epoch, never by its place, so that packing changes nothing about a clip.
        rng = np.random.default_rng([seed, epoch, i])
        made = training_segment(latents[i], patch, known, caption_dropout, latents.empty_text_LE, rng)
        return dataclasses.replace(made, text_LE=padded_text(made.text_LE, caption_tokens))

    def batch(step: int):
        epoch, rows = plan.epoch(step), plan.rows(step)
        packed = pack_segments([[segment(epoch, int(i)) for i in rows[r]] for r in mine], pack, plan.longest)
        packed = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), packed)
        return packed, [np.maximum(latents.sizes[r], (0, 0, 0, caption_tokens)) for r in rows]

    return in_order(batch, steps)

"""Batches for the two trainings, read by Grain threads. The n-th batch is a pure function of (seed, n).

So the data state of a run is its step number: a resumed run, on however many hosts, continues with the batch
that the uninterrupted run would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import grain
import jax
import numpy as np

from minisora_jax.data.packing import PackPlan, pack_segments, token_counts, training_segment
from minisora_jax.models.flops import count_work
from minisora_jax.types import Clip, PackedBatch

if TYPE_CHECKING:
    from minisora_jax.train.codec_task import CodecTask
    from minisora_jax.train.diffusion_task import DiffusionTask


def in_order(make, start: int, steps: int, *, threads: int = 4, ahead: int = 8) -> Iterator:
    """make(start), make(start + 1), ... make(steps - 1), computed ahead of time by Grain's threads."""
    steps_left = grain.MapDataset.range(start, steps).map(make)
    return iter(steps_left.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)))


def host_rows(batch: int) -> range:
    """The rows of a global batch that this process loads."""
    each = batch // jax.process_count()
    return range(jax.process_index() * each, (jax.process_index() + 1) * each)


def crop_batches(clips: Sequence[Clip], task: CodecTask, start: int) -> Iterator[np.ndarray]:
    """uint8 frames (A, B, T, H, W, C): random crops of clips drawn at random, from step `start` on."""
    accumulate, T = task.run.optim.accumulate, task.crop_THW[0]

    def crop(step: int, row: int) -> np.ndarray:
        rng = np.random.default_rng([task.run.seed, step, row])
        while True:  # draw until a clip is large enough to cut the crop out of it
            frames = clips[int(rng.integers(len(clips)))].frames_THWC
            if all(n >= c for n, c in zip(frames.shape, task.crop_THW)):
                break
            if frames.shape[0] < T and all(n >= c for n, c in zip(frames.shape[1:], task.crop_THW[1:])):
                frames = np.concatenate([frames, np.repeat(frames[-1:], T - frames.shape[0], axis=0)])
                break
        at = [int(rng.integers(n - c + 1)) for n, c in zip(frames.shape, task.crop_THW)]
        return frames[tuple(slice(a, a + c) for a, c in zip(at, task.crop_THW))]

    def batch(step: int) -> np.ndarray:
        rows = [[crop(step, a * task.batch + b) for b in host_rows(task.batch)] for a in range(accumulate)]
        return np.stack([np.stack(r) for r in rows])

    return in_order(batch, start, task.run.steps)


def packed_batches(latents, task: DiffusionTask, start: int) -> Iterator[tuple[PackedBatch, dict[str, float]]]:
    """(PackedBatch (A, B, ...), its counts) from step `start` on, from a latent cache."""
    pack, patch = task.pack, task.dit.patch
    accumulate = task.run.optim.accumulate
    plan = PackPlan(*token_counts(latents.sizes, patch), pack, task.run.seed, accumulate * pack.rows)

    def segment(epoch: int, i: int):
        # Seeded by the clip and the epoch, never by its place, so that packing changes nothing about a clip.
        rng = np.random.default_rng([task.run.seed, epoch, i])
        return training_segment(latents[i], patch, task.known, task.caption_dropout, latents.empty_text_LE, rng)

    def batch(step: int):
        epoch, _ = plan.place(step)
        rows = plan.rows(step)
        mine = [rows[a * pack.rows + b] for a in range(accumulate) for b in host_rows(pack.rows)]
        packed = pack_segments([[segment(epoch, int(i)) for i in row] for row in mine], pack, task.dit.token_width)
        packed = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), packed)
        return packed, count_work(task.dit, pack, [latents.sizes[r] for r in rows])

    return in_order(batch, start, task.run.steps)

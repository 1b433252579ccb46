"""Which clips of a latent cache fill which row of which step of a transformer's training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minisora_jax.data.epochs import Epochs, curriculum, within
from minisora_jax.data.latents import Latents, Mixture
from minisora_jax.data.packing import PackPlan, StagedPlan, token_counts
from minisora_jax.data.row_size import sized_by

if TYPE_CHECKING:
    from minisora_jax.training.diffusion_task import DiffusionTask


def pack_plan(task: DiffusionTask, latents: Latents | Mixture, workdir: Path | None = None) -> PackPlan | StagedPlan:
    """The plan of which clips fill which row of which step.

    Args:
        task: Its `pack`, `data` and `run`.
        latents: The cache, or several.
        workdir: Where the plan of a large cache is stored as packing_N.json; None: it is not stored.
    """
    sizes = padded_sizes(task, latents)
    tokens, text = token_counts(sizes, task.dit.patch)
    rows_per_step = task.run.optim.accumulate * task.pack.rows
    stages = []
    for number, stage in enumerate(curriculum(task.data.curriculum, task.run.steps)):
        small = within(sizes, stage)
        members = () if small is None else _by_cache(small, latents.counts)
        epochs = Epochs(latents.counts, task.run.seed, latents.weights, task.data.temperature, members)
        remember = workdir / f"packing_{number}.json" if workdir and epochs.parts > 1 else None
        stages.append((stage, PackPlan(tokens, text, task.pack, task.run.seed, rows_per_step, epochs, remember)))
    return stages[0][1] if len(stages) == 1 else StagedPlan(stages)


def with_row_size(task: DiffusionTask, latents: Latents | Mixture) -> DiffusionTask:
    """The task with rows of a size that fits the clips, where its `pack` leaves that to them."""
    sizes = padded_sizes(task, latents)
    allowed = [within(sizes, stage) for stage in curriculum(task.data.curriculum, task.run.steps)]
    if not any(clips is None for clips in allowed):
        sizes = sizes[np.unique(np.concatenate([clips for clips in allowed if clips is not None]))]
    tokens, text = token_counts(sizes, task.dit.patch)
    return dataclasses.replace(task, pack=sized_by(tokens, text, task.pack, task.run.optim.accumulate, sizes[:, 0]))


def padded_sizes(task: DiffusionTask, latents: Latents | Mixture) -> np.ndarray:
    """(t, h, w, L) of each clip, int32 (clips, 4), with L at least the model's `caption_tokens`."""
    return np.maximum(latents.sizes, np.array([0, 0, 0, task.dit.caption_tokens], np.int32))


def trained_size(latents: Latents | Mixture) -> list[int]:
    """The largest (t, h, w) of clips from all of which the model learns whole videos, not a fixed part only."""
    whole = np.repeat([not mask for mask in latents.masks], latents.counts)
    return latents.sizes[whole if whole.any() else slice(None), :3].max(0).tolist()


def _by_cache(clips: np.ndarray, counts: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Sorted indices over concatenated caches, as indices within each cache."""
    starts = np.cumsum([0, *counts])
    edges = np.searchsorted(clips, starts)
    return tuple(clips[a:b] - start for a, b, start in zip(edges, edges[1:], starts))

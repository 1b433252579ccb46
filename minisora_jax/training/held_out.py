"""The loss of clips that training never sees, at fixed noise levels and with fixed noise: only the weights change it.

So it shows overfitting, and runs can be compared whose batches, meshes and mixtures differ. Every clip is whole, has
its caption, and is predicted from nothing else: text to video.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minisora_jax.data.conditioning import ConditioningConfig
from minisora_jax.data.latents import Latents, Mixture
from minisora_jax.data.loader import in_order
from minisora_jax.data.packing import PackConfig, pack_rows, token_counts
from minisora_jax.data.rows import Segment, pack_segments, training_segment
from minisora_jax.diffusion.loss import loss_at
from minisora_jax.diffusion.objective import ObjectiveConfig
from minisora_jax.io.retry import Damaged, DataError
from minisora_jax.models.dit import DiT, DiTConfig
from minisora_jax.parallel.mesh import batch_specs, host_rows, to_global
from minisora_jax.types import PackedBatch

LEVELS = tuple((k + 0.5) / 8 for k in range(8))  # the times t at which the loss is taken
UNMASKED = ConditioningConfig(**dict.fromkeys((f.name for f in dataclasses.fields(ConditioningConfig)), 0.0))


def held_out_loss(
    dit: DiTConfig,
    objective: ObjectiveConfig,
    pack: PackConfig,
    latents: Latents | Mixture,
    damaged: Damaged,
    within: tuple[float, float] = (0.0, 1.0),
) -> Callable[[Any], dict[str, float]]:
    """A function from the model's parameters to {"held_out_loss": mean of all levels, "held_out_loss/t=0.0625": ...}.

    All processes call it, under the training's mesh. A level's loss is the mean over the tokens of all clips. Noise
    belongs to a clip, not to its place, so rows of another size give the same loss, but for rounding.

    Args:
        dit: The transformer's configuration.
        objective: Noise path, prediction and weight.
        pack: The size of rows; B rows at a time.
        latents: The held-out cache. Weights and masks of a mixture are not used.
        damaged: The log of damaged clips, which are left out.
        within: The range of times: the levels are spread over it.

    Raises:
        ValueError: A clip does not fit a row.
        DataError: No clip can be read.
    """
    model, (low, high) = DiT(dit), within
    levels = [low + (high - low) * t for t in LEVELS]
    sizes = np.maximum(latents.sizes, np.array([0, 0, 0, dit.caption_tokens], np.int32))
    tokens, text = token_counts(sizes, dit.patch)
    try:
        rows = pack_rows(tokens, text, pack, 0, 0)
    except ValueError as error:
        raise ValueError(f"data.held_out: {error}") from error

    @jax.jit
    def sums(params: Any, batch: PackedBatch, noise_BSP: jax.Array) -> tuple[jax.Array, jax.Array]:
        def at(time: jax.Array) -> jax.Array:
            time_BS = jnp.full(batch.segment_BS.shape, time)
            error_BS, weights_BS = loss_at(model, params, batch, noise_BSP, time_BS, objective)
            return jnp.sum(error_BS * weights_BS)

        return jax.lax.map(at, jnp.array(levels)), jnp.sum(batch.segment_BS > 0)

    def loss(params: Any) -> dict[str, float]:
        total, count = np.zeros(len(LEVELS)), 0
        for batch, noise_BSP in _batches(dit, pack, latents, damaged, rows, int(tokens.max())):
            of_levels, of_batch = sums(params, batch, noise_BSP)
            total, count = total + np.asarray(of_levels, np.float64), count + int(of_batch)
        if not count:
            raise DataError(f"none of the {len(latents)} held-out clips can be read")
        by_level = {f"held_out_loss/t={t:g}": float(value) for t, value in zip(levels, total / count)}
        return {"held_out_loss": float(np.mean(total / count))} | by_level

    return loss


def _batches(
    dit: DiTConfig,
    pack: PackConfig,
    latents: Latents | Mixture,
    damaged: Damaged,
    rows: list[np.ndarray],
    max_segment_len: int,
) -> Iterator[tuple[PackedBatch, jax.Array]]:
    """(batch, noise (B, S, P)) on the mesh in use, with each clip once. The last rows of the last one may be empty."""
    mesh, B = jax.sharding.get_mesh(), pack.rows
    mine = np.array(host_rows(B))

    def segment(i: int) -> tuple[Segment, Segment] | None:
        """A clip, and its noise in its place; None for a damaged one."""
        rng = np.random.default_rng([2**31, i])
        try:
            clip = latents[i]
        except DataError as error:
            damaged.add(error)
            return None
        whole, empty = (0, clip.mean_thwc.shape[0]), latents.empty_text_LE
        own = training_segment(clip, dit.patch, UNMASKED, (0.0, 0.0), empty, dit.caption_tokens, rng, whole)
        return own, dataclasses.replace(own, tokens_nP=rng.standard_normal(own.tokens_nP.shape, np.float32))

    def batch(number: int) -> tuple[PackedBatch, np.ndarray] | None:
        segments = [[s for i in row if (s := segment(int(i)))] for row in rows[number * B : (number + 1) * B]]
        if not any(segments):
            return None
        segments += [[]] * (B - len(segments))
        clips, noise = (
            pack_segments([[s[k] for s in row] for row in segments], pack, max_segment_len, dit.action_width)
            for k in (0, 1)
        )
        return jax.tree.map(lambda x: x[mine], (clips, noise.tokens_BSP))

    for packed in in_order(batch, range(-(-len(rows) // B))):
        if packed is not None:
            specs = batch_specs(packed[0])
            yield to_global(packed, mesh, (specs, specs.tokens_BSP))

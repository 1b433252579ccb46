"""The training objective: the weighted squared error of the prediction, per token and not yet reduced."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from minisora_jax.diffusion.noise_path import target
from minisora_jax.diffusion.objective import ObjectiveConfig, weight
from minisora_jax.diffusion.time import TimeConfig, training_times
from minisora_jax.models.dit import DiT, drop_variance
from minisora_jax.parallel.mesh import draw
from minisora_jax.types import PackedBatch

FLOW_MATCHING = ObjectiveConfig()


def diffusion_loss(
    model: DiT,
    times: TimeConfig,
    params: Any,
    batch: PackedBatch,
    key: jax.Array,
    objective: ObjectiveConfig = FLOW_MATCHING,
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The loss of each token: w(t) times the mean over P of (p - p_theta)^2.

    Args:
        model: The transformer.
        times: Distribution of training times.
        params: The model's parameters.
        batch: Packed clips.
        key: For noise and times.
        objective: Noise path, prediction and weight w(t).

    Returns:
        {"loss": (values_BS, weights_BS)}. training/step.py averages by the weights: 1 for tokens to predict, 0 for
        padding and for tokens that are given.
    """
    noise_key, time_key = jax.random.split(key)
    noise_BSP = draw(jax.random.normal, noise_key, batch.tokens_BSP)
    time_BS = training_times(times, batch, time_key, objective.noise_path)
    return {"loss": loss_at(model, params, batch, noise_BSP, time_BS, objective)}


def loss_at(
    model: DiT,
    params: Any,
    batch: PackedBatch,
    noise_BSP: jax.Array,
    time_BS: jax.Array,
    objective: ObjectiveConfig = FLOW_MATCHING,
) -> tuple[jax.Array, jax.Array]:
    """(values_BS, weights_BS) of `diffusion_loss` for given noise and times."""
    path = objective.noise_path
    x_BSP = path.mix(batch.tokens_BSP, noise_BSP, time_BS[..., None])
    y_BSP: Any = model.apply(params, *objective.model_input(x_BSP, time_BS), batch)
    p_BSP = drop_variance(model.config, y_BSP)
    target_BSP = target(path, objective.prediction, batch.tokens_BSP, noise_BSP, time_BS[..., None])
    error_BS = jnp.mean((p_BSP - target_BSP) ** 2, axis=-1) * weight(objective, time_BS)
    return error_BS, ((batch.segment_BS > 0) & ~batch.cond_mask_BS).astype(jnp.float32)

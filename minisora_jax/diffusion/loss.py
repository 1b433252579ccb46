"""The training objective: the weighted squared error of the prediction, per token and not yet reduced.

MotionDirector (Zhao et al. 2023, arXiv:2310.08465) adds the appearance-debiased error, which compares the frames of a
clip with one of them, the anchor, at random:

    e_i = p_i - p_theta_i                        the error of frame i
    w(t) |sqrt(beta^2 + 1) e_i - beta e_anchor|^2

What all frames of a clip share is its appearance. An error in it cancels in the difference, and an error in the motion
does not.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from minisora_jax.diffusion.noise_path import target
from minisora_jax.diffusion.objective import ObjectiveConfig, weight
from minisora_jax.diffusion.time import TimeConfig, draw_by_ids, training_times
from minisora_jax.models.dit import DiT, drop_variance
from minisora_jax.models.layers import per_token
from minisora_jax.parallel.mesh import draw, like, take_in_row
from minisora_jax.types import PackedBatch

FLOW_MATCHING = ObjectiveConfig()


def diffusion_loss(
    model: DiT,
    times: TimeConfig,
    params: Any,
    batch: PackedBatch,
    key: jax.Array,
    objective: ObjectiveConfig = FLOW_MATCHING,
    debias: float = 0.0,
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The loss of each token: w(t) times the mean over P of (p - p_theta)^2, and of the debiased error's square.

    Args:
        model: The transformer.
        times: Distribution of training times.
        params: The model's parameters.
        batch: Packed clips.
        key: For noise, times and anchors.
        objective: Noise path, prediction and weight w(t).
        debias: beta of the appearance-debiased error; 0: it is left out.

    Returns:
        {"loss": (values_BS, weights_BS)}. training/step.py averages by the weights: 1 for tokens to predict, 0 for
        padding and for tokens that are given.
    """
    noise_key, time_key = jax.random.split(key)
    if share := 1.0 if model.config.causal else times.causal:
        in_order_BG = draw(jax.random.uniform, jax.random.fold_in(key, 2), batch.fps_BG) < share
        batch = dataclasses.replace(batch, causal_BG=in_order_BG)
    noise_BSP = draw(jax.random.normal, noise_key, batch.tokens_BSP)
    time_BS = training_times(times, batch, time_key, objective.noise_path)
    error_BSP = error_at(model, params, batch, noise_BSP, time_BS, objective)
    square_BS = jnp.mean(error_BSP**2, axis=-1)
    if debias:
        row_BS = jnp.zeros_like(batch.segment_BS) + jnp.arange(batch.segment_BS.shape[0])[:, None]
        anchor_BS = draw_by_ids(jax.random.uniform, jax.random.fold_in(key, 1), row_BS, batch.segment_BS)
        square_BS += jnp.mean(appearance_debiased(error_BSP, batch, anchor_BS, debias) ** 2, axis=-1)
    return {"loss": (square_BS * weight(objective, time_BS), to_predict(batch))}


def loss_at(
    model: DiT,
    params: Any,
    batch: PackedBatch,
    noise_BSP: jax.Array,
    time_BS: jax.Array,
    objective: ObjectiveConfig = FLOW_MATCHING,
) -> tuple[jax.Array, jax.Array]:
    """(values_BS, weights_BS) of `diffusion_loss` for given noise and times, without the debiased error."""
    error_BSP = error_at(model, params, batch, noise_BSP, time_BS, objective)
    return jnp.mean(error_BSP**2, axis=-1) * weight(objective, time_BS), to_predict(batch)


def error_at(
    model: DiT, params: Any, batch: PackedBatch, noise_BSP: jax.Array, time_BS: jax.Array, objective: ObjectiveConfig
) -> jax.Array:
    """p_theta - p of each token (B, S, P), for given noise and times."""
    path = objective.noise_path
    x_BSP = path.mix(batch.tokens_BSP, noise_BSP, time_BS[..., None])
    y_BSP: Any = model.apply(params, *objective.model_input(x_BSP, time_BS), batch)
    p_BSP = drop_variance(model.config, y_BSP)
    return p_BSP - target(path, objective.prediction, batch.tokens_BSP, noise_BSP, time_BS[..., None])


def to_predict(batch: PackedBatch) -> jax.Array:
    """1 for tokens to predict, 0 for padding and for tokens that are given (B, S)."""
    return ((batch.segment_BS > 0) & ~batch.cond_mask_BS).astype(jnp.float32)


def appearance_debiased(error_BSP: jax.Array, batch: PackedBatch, anchor_BS: jax.Array, beta: float) -> jax.Array:
    """sqrt(beta^2 + 1) e_i - beta e_anchor at each place of each frame (B, S, P). A given token's error is 0.

    Args:
        error_BSP: The errors e.
        batch: Packed clips.
        anchor_BS: Where in its clip the anchor frame is, from 0 (the first) to below 1. The tokens of a clip agree.
        beta: The strength of the debiasing.
    """
    size_BG3 = batch.size_BG3.astype(jnp.float32)
    count_BG = jnp.prod(size_BG3, axis=-1)
    start_BG = jnp.cumsum(count_BG, axis=1) - count_BG  # clips follow one another without a gap
    table_BG4 = like(jnp.concatenate([size_BG3, start_BG[..., None]], axis=-1), batch.fps_BG)
    frames_BS, height_BS, width_BS, start_BS = jnp.moveaxis(per_token(table_BG4, batch.segment_BS), -1, 0)
    y_BS, x_BS = batch.position_BS3[..., 1], batch.position_BS3[..., 2]
    place_BS = (jnp.floor(anchor_BS * frames_BS) * height_BS + y_BS) * width_BS + x_BS
    index_BS = jnp.where(batch.segment_BS > 0, start_BS + place_BS, 0).astype(jnp.int32)
    error_BSP = jnp.where(batch.cond_mask_BS[..., None], 0.0, error_BSP)
    return (beta**2 + 1) ** 0.5 * error_BSP - beta * take_in_row(error_BSP, index_BS)

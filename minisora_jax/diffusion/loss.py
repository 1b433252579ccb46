"""The training objective: squared error of the velocity, per token and before any reduction."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from minisora_jax.diffusion.path import interpolate, velocity
from minisora_jax.diffusion.time import TimeConfig, training_times
from minisora_jax.models.dit import DiT
from minisora_jax.parallel.mesh import like
from minisora_jax.types import PackedBatch


def flow_matching_loss(
    model: DiT, times: TimeConfig, params: Any, batch: PackedBatch, key: jax.Array
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """{"loss": (values_BS, weights_BS)}: the mean over P of (v - v_theta)^2; weight 0 on padding and known tokens."""
    noise_key, time_key = jax.random.split(key)
    noise_BSP = like(jax.random.normal(noise_key, batch.tokens_BSP.shape), batch.tokens_BSP)
    time_BS = training_times(times, batch, time_key)
    x_BSP = interpolate(batch.tokens_BSP, noise_BSP, time_BS[..., None])
    v_BSP = model.apply(params, x_BSP, time_BS, batch)
    error_BS = jnp.mean((v_BSP - velocity(batch.tokens_BSP, noise_BSP)) ** 2, axis=-1)
    counted_BS = ((batch.segment_BS > 0) & ~batch.known_BS).astype(jnp.float32)
    return {"loss": (error_BS, counted_BS)}

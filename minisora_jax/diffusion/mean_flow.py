"""MeanFlow: a student learns the mean velocity u between two times, with which one step is exact.

    u(z_t, r, t) = (1 / (t - r)) integral of v from r to t           mean velocity, v itself where r = t
    u = v - (t - r) du/dt,   du/dt = v du/dz + du/dt at fixed z      its derivative by t: one `jax.jvp`
    loss = |u_theta - u_tgt|^2 / (|u_theta - u_tgt|^2 + c)           u_tgt = v - (t - r) du_theta/dt without a gradient

Geng et al. 2025, arXiv:2505.13447, algorithm 1 with p = 1 and c = 0.01; the norm is over a clip. There v is that of the
data, mixed for guidance with the model's own u(z_t, t, t). Here it is that of the guided teacher, which the mixture has
as its limit and which has no noise of the data in it. r = t in three quarters of the clips. Tokens that are given keep
time 0.

The student is told t - r (`DiTConfig.interval_input`). The derivative is a second pass of the model without a gradient:
attention runs there without its own backward rule, which would refuse it (`attention.forward_mode`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from minisora_jax.diffusion.distillation import Distillation
from minisora_jax.diffusion.loss import to_predict
from minisora_jax.diffusion.time import draw_by_ids, training_times
from minisora_jax.models.layers import per_slot_mean, per_token
from minisora_jax.parallel.attention import forward_mode
from minisora_jax.parallel.mesh import draw
from minisora_jax.types import PackedBatch

SAME = 0.75  # share of clips with r = t
EPSILON = 0.01  # c of the loss


def mean_flow_loss(
    of: Distillation, params: Any, batch: PackedBatch, key: jax.Array, step: jax.Array | int = 0
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The loss of each token, and "error", the mean over P of (u_theta - u_tgt)^2: the loss itself stays near 1.

    Arguments and result: see `Distillation`.
    """
    noise_key, same_key, *time_keys = jax.random.split(key, 4)
    times, path = dataclasses.replace(of.times, per_frame=0.0), of.objective.noise_path
    one_BS, other_BS = (training_times(times, batch, time_key, path) for time_key in time_keys)
    row_BS = jnp.zeros_like(batch.segment_BS) + jnp.arange(batch.segment_BS.shape[0])[:, None]
    same_BS = draw_by_ids(jax.random.uniform, same_key, row_BS, batch.segment_BS) < SAME
    time_BS = jnp.maximum(one_BS, other_BS)
    r_BS = jnp.where(same_BS, time_BS, jnp.minimum(one_BS, other_BS))
    noise_BSP = draw(jax.random.normal, noise_key, batch.tokens_BSP)
    loss_BS, error_BS = mean_flow_at(of, params, batch, noise_BSP, time_BS, r_BS)
    return {"loss": (loss_BS, to_predict(batch)), "error": (error_BS, to_predict(batch))}


def mean_flow_at(
    of: Distillation, params: Any, batch: PackedBatch, noise_BSP: jax.Array, time_BS: jax.Array, r_BS: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(the loss of each token, its error), both (B, S), for given noise and times."""
    z_BSP = of.objective.noise_path.mix(batch.tokens_BSP, noise_BSP, time_BS[..., None])
    v_BSP = of.guided_teacher(params, batch).velocity(z_BSP, time_BS)
    still = of.student(jax.lax.stop_gradient(params), batch)
    with forward_mode():
        u = lambda z_BSP, time_BS: still.mean_velocity(z_BSP, time_BS, r_BS)  # type: ignore[misc]
        moves_BS = jnp.where(batch.cond_mask_BS, 0.0, 1.0)
        _, slope_BSP = jax.jvp(u, (z_BSP, time_BS), (v_BSP * moves_BS[..., None], moves_BS))
    target_BSP = jax.lax.stop_gradient(v_BSP - (time_BS - r_BS)[..., None] * slope_BSP)
    u_BSP = of.student(params, batch).mean_velocity(z_BSP, time_BS, r_BS)  # type: ignore[misc]
    error_BS = jnp.mean((u_BSP - target_BSP) ** 2, axis=-1)

    P, slots = u_BSP.shape[-1], batch.fps_BG.shape[1]
    segment_BS = jnp.where(batch.cond_mask_BS, 0, batch.segment_BS)
    tokens_BG1 = jnp.sum(segment_BS[..., None] == jnp.arange(1, slots + 1), axis=1)[..., None].astype(jnp.float32)
    whole_BG1 = P * tokens_BG1 * per_slot_mean(jax.lax.stop_gradient(error_BS)[..., None], segment_BS, slots)
    factor_BS = per_token(P * tokens_BG1 / (whole_BG1 + EPSILON), segment_BS)[..., 0]
    return error_BS * factor_BS, error_BS

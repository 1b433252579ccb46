"""The guided model: what a sampler calls as one model is a call of the transformer with twins, or of two transformers.

Where guidance does nothing, at times outside its interval, the twins without caption or the second transformer are left
out: such a call costs half (Kynkaanniemi et al. 2024, arXiv:2404.07724).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from minisora_jax.diffusion.denoiser import Denoiser
from minisora_jax.diffusion.guidance import guide, rescale, twins, weight
from minisora_jax.generate.step_cache import CachedCalls
from minisora_jax.models.dit import DiT, DiTConfig, split_variance
from minisora_jax.parallel.mesh import take_in_row
from minisora_jax.types import PackedBatch


@struct.dataclass
class Alone:
    """The requests without their twins, see `PackedRequests.alone`."""

    batch: PackedBatch
    from_BR: jax.Array
    to_BS: jax.Array


def run_model(
    config: DiTConfig,
    params: Any,
    x_BSP: jax.Array,
    time_BS: jax.Array,
    batch: PackedBatch,
    interval_BS: jax.Array | None = None,
    keep: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """The transformer's (output (B, S, out_width), what its blocks added (B, S, D) if it is to be kept, else None)."""
    kept: Any = ["intermediates"] if keep else False
    result: Any = DiT(config).apply(params, x_BSP, time_BS, batch, interval_BS=interval_BS, mutable=kept)
    if not keep:
        return result, None
    output, variables = result
    [residual_BSD] = variables["intermediates"]["residual"]
    return output, residual_BSD


def run_alone(
    config: DiTConfig,
    params: Any,
    x_BSP: jax.Array,
    time_BS: jax.Array,
    batch: PackedBatch,
    interval_BS: jax.Array | None,
    alone: Alone,
    keep: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """`run_model` of the requests without their twins; each twin has the result of its request."""
    take = lambda x_BSx: take_in_row(x_BSx, alone.from_BR)
    back = lambda y_BRx: None if y_BRx is None else take_in_row(y_BRx, alone.to_BS)
    short = dataclasses.replace(alone.batch, position_BS3=take(batch.position_BS3))  # a loop's positions are turned
    number = lambda n_BS: take(n_BS[..., None])[..., 0]
    interval_BR = None if interval_BS is None else number(interval_BS)
    y_BRP, residual_BRD = run_model(config, params, take(x_BSP), number(time_BS), short, interval_BR, keep)
    return take_in_row(y_BRP, alone.to_BS), back(residual_BRD)


def guided_denoiser(static, inputs, cache: CachedCalls | None = None) -> Denoiser:
    """The guided model. static: (configs, objective, settings of guidance); a guide model's config comes second."""
    configs, objective, (share, schedule, channels) = static
    params, batch, with_caption_BS, without_BS, scale, interval, alone = inputs
    path = objective.noise_path

    def predict(x_BSP, time_BS, interval_BS=None):
        """(the prediction, the variance of the model with its caption or None)."""
        seen_BSP, seen_BS = objective.model_input(x_BSP, time_BS)
        w_BS = weight(time_BS, scale, interval, schedule)
        made_BS = (batch.segment_BS > 0) & ~batch.cond_mask_BS
        acts = jnp.any(made_BS & (w_BS != 1))
        first = configs[0], params[0], seen_BSP, seen_BS, batch

        def compute() -> Any:
            whole = lambda: run_model(*first, interval_BS, keep=cache is not None)
            short = lambda: run_alone(*first, interval_BS, alone, cache is not None)
            return jax.lax.cond(acts, whole, short) if alone else whole()

        reuse: Any = lambda residual_BSD: DiT(configs[0]).apply(*first[1:], residual_BSD, interval_BS)
        y_BSP = cache(compute, reuse) if cache else compute()[0]
        good_BSP, variance_BSP = split_variance(configs[0], y_BSP)
        if len(configs) > 1:
            weaker = lambda: split_variance(configs[1], run_model(configs[1], params[1], seen_BSP, seen_BS, batch)[0])[
                0
            ]
            guide_BSP = jax.lax.cond(acts, weaker, lambda: good_BSP)
        else:
            good_BSP, guide_BSP = twins(good_BSP, with_caption_BS, without_BS)
            variance_BSP = None if variance_BSP is None else take_in_row(variance_BSP, with_caption_BS)
        p_BSP = guide(good_BSP, guide_BSP, w_BS)
        if channels:
            guided_P = np.arange(p_BSP.shape[-1]) % configs[0].latent_channels < channels
            p_BSP = jnp.where(guided_P, p_BSP, good_BSP)
        if share:
            unknown_BS, slots = jnp.where(batch.cond_mask_BS, 0, batch.segment_BS), batch.fps_BG.shape[1]
            p_BSP = rescale(path, objective.prediction, p_BSP, good_BSP, x_BSP, time_BS, unknown_BS, slots, share)
        return p_BSP, variance_BSP

    learned = objective.path == "ddpm" and configs[0].out_channels == 2 * configs[0].latent_channels
    prediction = lambda x_BSP, time_BS: predict(x_BSP, time_BS)[0]
    with_variance: Any = predict if learned else None
    mean: Any = None
    if configs[0].interval_input:
        mean = lambda x_BSP, time_BS, next_BS: predict(x_BSP, time_BS, time_BS - next_BS)[0]
    return Denoiser(prediction, path, objective.prediction, with_variance, mean)

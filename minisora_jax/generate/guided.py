"""The guided model: what a sampler calls as one model is one run of the transformer, or of two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minisora_jax.diffusion.denoiser import Denoiser
from minisora_jax.diffusion.guidance import guide, rescale, twins
from minisora_jax.models.dit import DiT, DiTConfig, split_variance
from minisora_jax.parallel.mesh import take_in_row
from minisora_jax.types import PackedBatch

Run = Callable[[DiTConfig, Any, jax.Array, jax.Array, PackedBatch], jax.Array]


def run_model(config: DiTConfig, params: Any, x_BSP: jax.Array, time_BS: jax.Array, batch: PackedBatch) -> jax.Array:
    """The transformer's output (B, S, out_width)."""
    output: Any = DiT(config).apply(params, x_BSP, time_BS, batch)
    return output


def guided_denoiser(static, inputs, run: Run = run_model) -> Denoiser:
    """The guided model. static: (configs, objective, settings of guidance); a guide model's config comes second."""
    configs, objective, (share, schedule, channels) = static
    params, batch, with_caption_BS, without_BS, scale, interval = inputs
    path = objective.noise_path

    def predict(x_BSP, time_BS):
        """(the prediction, the variance of the model with its caption or None)."""
        seen_BSP, seen_BS = objective.model_input(x_BSP, time_BS)
        outputs = [run(c, p, seen_BSP, seen_BS, batch) for c, p in zip(configs, params)]
        (good_BSP, variance_BSP), *others = (split_variance(c, y) for c, y in zip(configs, outputs))
        if others:
            guide_BSP = others[0][0]
        else:
            good_BSP, guide_BSP = twins(good_BSP, with_caption_BS, without_BS)
            variance_BSP = None if variance_BSP is None else take_in_row(variance_BSP, with_caption_BS)
        p_BSP = guide(good_BSP, guide_BSP, time_BS, scale, interval, schedule)
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
    return Denoiser(prediction, path, objective.prediction, with_variance)

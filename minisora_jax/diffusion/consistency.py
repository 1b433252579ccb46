"""Consistency distillation: a student learns one clean estimate for all times of a path of its teacher.

    t > t'                    neighbours of the `steps * substeps` times of the teacher's steps
    x_t  = a x + s e          a clip with noise
    x_t'                      one guided step of the teacher from x_t
    f(x, t)                   the student's clean estimate, and x itself at t = 0
    loss = d(f(x_t, t), f-(x_t', t'))      d(u, v) = sqrt((u - v)^2 + c^2) - c

Song et al. 2023, arXiv:2303.01469, algorithm 2 and eq. 7; with a guided teacher in latents Luo et al. 2023,
arXiv:2310.04378 (LCM), whose loss with `loss_type="huber"` this is. f- is the student itself without a gradient: an
average of it as target is a mistake in the theory and works worse (Song & Dhariwal 2023, arXiv:2310.14189, section
3.2), and costs one more copy of the weights. On the linear path f = x - t v, which is x at t = 0 by itself. So is every
clean estimate but that of a model that predicts it; LCM's c_skip and c_out say the same within 3e-5 from timestep 4 on.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from minisora_jax.diffusion.distillation import Distillation, at_index, clean_estimate, drawn_index
from minisora_jax.diffusion.loss import to_predict
from minisora_jax.diffusion.sampler import SAMPLERS
from minisora_jax.parallel.mesh import draw
from minisora_jax.types import PackedBatch

HUBER = 1e-3  # c: LCM's `huber_c`, for data of unit variance


def consistency_loss(
    of: Distillation, params: Any, batch: PackedBatch, key: jax.Array, step: jax.Array | int = 0
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The loss of each token: the mean over P of d. Arguments and result: see `Distillation`."""
    noise_key, index_key = jax.random.split(key)
    count = of.config.steps * of.config.substeps
    times_KBS, index_BS = of.grid(count, batch), drawn_index(index_key, count, batch)
    noise_BSP = draw(jax.random.normal, noise_key, batch.tokens_BSP)
    times = at_index(times_KBS, index_BS), at_index(times_KBS, index_BS + 1)
    return {"loss": (consistency_at(of, params, batch, noise_BSP, *times), to_predict(batch))}


def consistency_at(
    of: Distillation, params: Any, batch: PackedBatch, noise_BSP: jax.Array, time_BS: jax.Array, next_BS: jax.Array
) -> jax.Array:
    """The loss of each token (B, S) for given noise and neighbouring times."""
    x_BSP = of.objective.noise_path.mix(batch.tokens_BSP, noise_BSP, time_BS[..., None])
    teacher = of.guided_teacher(params, batch)
    next_BSP, _ = SAMPLERS[of.config.sampler].step(teacher, x_BSP, time_BS, next_BS, (), None, 0.0)
    estimate_BSP = clean_estimate(of.student(params, batch), x_BSP, time_BS)
    target_BSP = jax.lax.stop_gradient(clean_estimate(of.student(params, batch), next_BSP, next_BS))
    return jnp.mean(jnp.sqrt((estimate_BSP - target_BSP) ** 2 + HUBER**2) - HUBER, axis=-1)

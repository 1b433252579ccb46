"""Progressive distillation: a student learns to do in one step what its teacher does in several.

    t > t'                                    neighbouring times of the student's steps
    x_t  = a x + s e                          a clip with noise
    x_t'                                      where the teacher comes to from x_t, in `substeps` guided steps
    x~ = (s x_t' - s' x_t) / (a' s - a s')    the clean data with which one DDIM step leads from x_t to x_t'

The student predicts x~ in its own kind of prediction (Salimans & Ho 2022, arXiv:2202.00512, algorithm 2 and eq. 30-33).
With velocity on the linear path that is (x_t - x_t') / (t - t'), the mean slope. Halve the steps run by run, each from
the last one's student, or take many substeps at once.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from minisora_jax.diffusion.distillation import Distillation, at_index, drawn_index
from minisora_jax.diffusion.loss import to_predict
from minisora_jax.diffusion.noise_path import target
from minisora_jax.diffusion.objective import ObjectiveConfig, weight
from minisora_jax.diffusion.sampler import SAMPLERS
from minisora_jax.parallel.mesh import draw
from minisora_jax.types import PackedBatch


def progressive_loss(
    of: Distillation, params: Any, batch: PackedBatch, key: jax.Array, step: jax.Array | int = 0
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The loss of each token: w(t) times the mean over P of (p~ - p_theta)^2, p~ the prediction of x~.

    Arguments and result: see `Distillation`.
    """
    config, objective = of.config, of.objective
    noise_key, step_key = jax.random.split(key)
    times_KBS = of.grid(config.steps * config.substeps, batch)
    first_BS = config.substeps * drawn_index(step_key, config.steps, batch)
    at = lambda j: at_index(times_KBS, first_BS + j)

    noise_BSP = draw(jax.random.normal, noise_key, batch.tokens_BSP)
    x_BSP = start_BSP = objective.noise_path.mix(batch.tokens_BSP, noise_BSP, at(0)[..., None])
    teacher = of.guided_teacher(params, batch)
    for j in range(config.substeps):
        x_BSP, _ = SAMPLERS[config.sampler].step(teacher, x_BSP, at(j), at(j + 1), (), None, 0.0)
    target_BSP = jax.lax.stop_gradient(one_step_target(objective, start_BSP, x_BSP, at(0), at(config.substeps)))
    p_BSP = of.student(params, batch).model(start_BSP, at(0))
    return {"loss": (jnp.mean((p_BSP - target_BSP) ** 2, axis=-1) * weight(objective, at(0)), to_predict(batch))}


def one_step_target(
    objective: ObjectiveConfig, x_BSP: jax.Array, next_BSP: jax.Array, time_BS: jax.Array, next_BS: jax.Array
) -> jax.Array:
    """The prediction at x_t with which one DDIM step leads to x_t'. 0 for tokens whose time stays."""
    path = objective.noise_path
    (a, s), (a2, s2) = ((path.alpha(t)[..., None], path.sigma(t)[..., None]) for t in (time_BS, next_BS))
    det = a2 * s - a * s2
    safe = jnp.where(jnp.abs(det) < 1e-9, 1.0, det)
    clean_BSP, noise_BSP = (s * next_BSP - s2 * x_BSP) / safe, (a2 * x_BSP - a * next_BSP) / safe
    moves = (time_BS != next_BS)[..., None]
    return jnp.where(moves, target(path, objective.prediction, clean_BSP, noise_BSP, time_BS[..., None]), 0.0)

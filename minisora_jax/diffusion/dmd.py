"""Distribution matching: a student of few steps makes clips that its teacher finds as likely as a model of them does.

    k ~ U{0, ..., steps - 1}                     one step of the student's sampling, the same for a whole batch
    x_k                                          what its own sampling has come to (backward simulation)
    x = f(x_k, t_k)                              the student's clean estimate, with a gradient
    z = a x + s e,  t ~ U(0.02, 0.98)            noise on it
    g = (x_fake(z) - x_real(z)) / mean |x - x_real(z)|     the mean is over a clip
    loss = 0.5 (x - [x - g])^2 + the usual loss of the fake model on [x]         [ ]: without a gradient

Yin et al. 2024, arXiv:2405.14867 (DMD2). x_real is the guided teacher's clean estimate, x_fake that of the fake model,
which starts as the teacher and learns the student's clips at every step. The student takes every `fake_updates`th step:
at the others its part is not computed (training/distilling.py has the optimiser). The clips of the cache give sizes,
captions and what is given; no other token of theirs is used. DMD2's adversarial term, optional there, is left out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from minisora_jax.diffusion.denoiser import Denoiser
from minisora_jax.diffusion.distillation import FAKE, Distillation, clean_estimate
from minisora_jax.diffusion.loss import loss_at, to_predict
from minisora_jax.diffusion.sampler import SAMPLERS
from minisora_jax.diffusion.time import training_times
from minisora_jax.models.layers import per_slot_mean, per_token
from minisora_jax.parallel.mesh import draw
from minisora_jax.types import PackedBatch

LOW, HIGH = 0.02, 0.98  # times at which the two scores are compared: DMD2's min_step_percent and max_step_percent


def dmd_loss(
    of: Distillation, params: Any, batch: PackedBatch, key: jax.Array, step: jax.Array | int = 0
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The loss of each token: the student's at its turn, and the fake model's ("fake"). See `Distillation`."""
    index_key, start_key, noise_key, time_key, fake_noise_key, fake_time_key = jax.random.split(key, 6)
    uniform = dataclasses.replace(of.times, distribution="uniform", per_frame=0.0, low=0.0, high=1.0)
    path = of.objective.noise_path
    x_BSP, time_BS = _simulated(of, params, batch, index_key, start_key)

    def of_student(params: Any) -> tuple[jax.Array, jax.Array]:
        clean_BSP = clean_estimate(of.student(params, batch), x_BSP, time_BS)
        within = dataclasses.replace(uniform, low=LOW, high=HIGH)
        noise_BSP = draw(jax.random.normal, noise_key, clean_BSP)
        compared_BS = training_times(within, batch, time_key, path)
        return clean_BSP, matching_at(of, params, batch, clean_BSP, noise_BSP, compared_BS)

    def of_fake_alone(params: Any) -> tuple[jax.Array, jax.Array]:
        return clean_estimate(of.student(jax.lax.stop_gradient(params), batch), x_BSP, time_BS), jnp.zeros_like(time_BS)

    turn = jnp.asarray(step) % of.config.fake_updates == 0
    clean_BSP, student_BS = jax.lax.cond(turn, of_student, of_fake_alone, params)
    noise_BSP = draw(jax.random.normal, fake_noise_key, clean_BSP)
    times_BS = training_times(uniform, batch, fake_time_key, path)
    fake_BS = fake_at(of, params, batch, clean_BSP, noise_BSP, times_BS)
    weight_BS = to_predict(batch)
    return {"loss": (student_BS + fake_BS, weight_BS), "fake": (fake_BS, weight_BS)}


def matching_at(
    of: Distillation, params: Any, batch: PackedBatch, clean_BSP: jax.Array, noise_BSP: jax.Array, time_BS: jax.Array
) -> jax.Array:
    """The student's loss of each token (B, S), whose gradient by `clean_BSP` is -g / P, for given noise and times."""
    still_BSP = jax.lax.stop_gradient(clean_BSP)
    z_BSP = of.objective.noise_path.mix(still_BSP, noise_BSP, time_BS[..., None])
    real_BSP, fake_BSP = (
        model.clean_and_noise(z_BSP, time_BS)[0]
        for model in (of.guided_teacher(params, batch), _fake(of, params, batch))
    )
    segment_BS = jnp.where(batch.cond_mask_BS, 0, batch.segment_BS)
    far_BS1 = jnp.mean(jnp.abs(still_BSP - real_BSP), axis=-1, keepdims=True)
    far_BS1 = per_token(per_slot_mean(far_BS1, segment_BS, batch.fps_BG.shape[1]), segment_BS)
    g_BSP = jnp.where(far_BS1 > 0, (fake_BSP - real_BSP) / jnp.where(far_BS1 > 0, far_BS1, 1.0), 0.0)
    return 0.5 * jnp.mean((clean_BSP - jax.lax.stop_gradient(still_BSP - g_BSP)) ** 2, axis=-1)


def fake_at(
    of: Distillation, params: Any, batch: PackedBatch, clean_BSP: jax.Array, noise_BSP: jax.Array, time_BS: jax.Array
) -> jax.Array:
    """The fake model's loss of each token (B, S) on the student's clips."""
    made = dataclasses.replace(batch, tokens_BSP=jax.lax.stop_gradient(clean_BSP))
    return loss_at(of.model, {"params": params[FAKE]}, made, noise_BSP, time_BS, of.objective)[0]


def _simulated(
    of: Distillation, params: Any, batch: PackedBatch, index_key: jax.Array, start_key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(x_k, t_k): the state of the student's sampling at a step of its own, and the time of each token."""
    path, times_KBS = of.objective.noise_path, of.grid(of.config.steps, batch)
    student = of.student(jax.lax.stop_gradient(params), batch)
    fresh = lambda k: draw(jax.random.normal, jax.random.fold_in(start_key, k), batch.tokens_BSP)
    start_BSP = fresh(0) * path.spread(times_KBS[0])[..., None]
    start_BSP = jnp.where(batch.cond_mask_BS[..., None], batch.tokens_BSP, start_BSP)
    advance = lambda k, x_BSP: SAMPLERS["consistency"].step(
        student, x_BSP, times_KBS[k], times_KBS[k + 1], (), fresh(k + 1), 1.0
    )[0]
    index = jax.random.randint(index_key, (), 0, of.config.steps)
    return jax.lax.stop_gradient(jax.lax.fori_loop(0, index, advance, start_BSP)), times_KBS[index]


def _fake(of: Distillation, params: Any, batch: PackedBatch) -> Denoiser:
    return of.student({"params": params[FAKE]}, batch)

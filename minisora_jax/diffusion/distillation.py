"""Progressive distillation: a student learns to do in one step what its teacher does in several.

    t > t'                                    neighbouring times of the student's steps
    x_t  = a x + s e                          a clip with noise
    x_t'                                      where the teacher comes to from x_t, in `substeps` guided steps
    x~ = (s x_t' - s' x_t) / (a' s - a s')    the clean data with which one DDIM step leads from x_t to x_t'

The student predicts x~ in its own kind of prediction (Salimans & Ho 2022, arXiv:2202.00512, algorithm 2 and eq. 30-33).
With velocity on the linear path that is (x_t - x_t') / (t - t'), the mean slope. A guided teacher (Meng et al. 2022,
arXiv:2210.03142) leaves nothing to guide: the student makes one model call a step. Halve the steps run by run, each
from the last one's student, or take many substeps at once.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from minisora_jax.diffusion.denoiser import Denoiser
from minisora_jax.diffusion.guidance import GuidanceConfig, guide
from minisora_jax.diffusion.noise_path import target
from minisora_jax.diffusion.objective import ObjectiveConfig, weight
from minisora_jax.diffusion.sampler import SAMPLERS, SamplerConfig
from minisora_jax.diffusion.time import TimeConfig, draw_by_ids, latest_time, sampling_times
from minisora_jax.models.dit import DiT, drop_variance
from minisora_jax.parallel.mesh import draw, like
from minisora_jax.types import PackedBatch

TEACHER = "teacher"  # the teacher's parameters beside the student's {"params": ...}


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Distillation of the model of --init.

    Raises:
        ValueError: A number is out of range, or the sampler has no steps of its own.
    """

    steps: int = 0  # of the student; 0: no distillation
    substeps: int = 2  # of the teacher for one of the student's
    sampler: str = "heun"  # of the teacher: "heun" (two calls a substep), "euler" or "ddim" (one)
    guidance: float = 1.0  # scale of the teacher's guidance; 1: none

    def __post_init__(self) -> None:
        if self.steps < 0 or self.substeps < 1:
            raise ValueError(
                f"distill.steps={self.steps} must be 0 or more, distill.substeps={self.substeps} 1 or more"
            )
        if self.sampler not in ("heun", "euler", "ddim"):
            raise ValueError(f"distill.sampler={self.sampler!r} must be 'heun', 'euler' or 'ddim'")


def recorded_steps(config: dict, directory: str | Path) -> int:
    """The steps that an exported model was distilled to; 0: it was not.

    Raises:
        ValueError: The record is damaged.
    """
    record = config.get("distilled", {"steps": 0})
    steps = record.get("steps") if isinstance(record, dict) else None
    if not isinstance(steps, int) or not 0 <= steps <= 1000:
        raise ValueError(f"{directory}/config.json: distilled={record!r:.100} must name its steps, at most 1000")
    return steps


def sampling_defaults(distilled: int) -> tuple[int, float, str]:
    """(steps, guidance scale, sampler) of a model, by the steps that it was distilled to."""
    return (distilled, 1.0, "euler") if distilled else (20, 3.0, "heun")


def sampling_of(
    distilled: int,
    steps: int | None,
    guidance: float | GuidanceConfig | None,
    sampler: str | SamplerConfig | None,
) -> tuple[SamplerConfig, GuidanceConfig]:
    """The configurations of a sampling, with the defaults of the model for what is None."""
    own_steps, own_scale, own_name = sampling_defaults(distilled)
    if sampler is None or isinstance(sampler, str):
        sampler = SamplerConfig(sampler or own_name, own_steps if steps is None else steps)
    if not isinstance(guidance, GuidanceConfig):
        guidance = GuidanceConfig(own_scale if guidance is None else float(guidance))
    return sampler, guidance


def distillation_loss(
    model: DiT,
    times: TimeConfig,
    config: DistillConfig,
    empty_text_LE: jax.Array,
    params: Any,
    batch: PackedBatch,
    key: jax.Array,
    objective: ObjectiveConfig,
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The loss of each token: w(t) times the mean over P of (p~ - p_theta)^2, p~ the prediction of x~.

    Args:
        model: The transformer.
        times: The shifts of the times of sampling.
        config: Steps and teacher.
        empty_text_LE: Features of the empty caption, for the teacher's guidance.
        params: The student's parameters, with the teacher's under `TEACHER`. Without these the teacher is the student
            without its "lora".
        batch: Packed clips.
        key: For noise and times.
        objective: Of both models.

    Returns:
        {"loss": (values_BS, weights_BS)}, as `diffusion_loss`.
    """
    path, noise_key, step_key = objective.noise_path, *jax.random.split(key)
    frozen = {"params": params[TEACHER]} if TEACHER in params else {k: v for k, v in params.items() if k != "lora"}
    times_KBS = sampling_times(
        times, config.steps * config.substeps, batch, path, latest=latest_time(path, objective.prediction)
    )
    row_BS = jnp.zeros_like(batch.segment_BS) + jnp.arange(batch.segment_BS.shape[0])[:, None]
    drawn_BS = draw_by_ids(jax.random.uniform, step_key, row_BS, batch.segment_BS)
    first_BS = config.substeps * jnp.floor(config.steps * drawn_BS).astype(jnp.int32)
    at = lambda j: jnp.take_along_axis(times_KBS, (first_BS + j)[None], axis=0)[0]

    noise_BSP = draw(jax.random.normal, noise_key, batch.tokens_BSP)
    x_BSP = start_BSP = path.mix(batch.tokens_BSP, noise_BSP, at(0)[..., None])
    teacher = guided_teacher(model, frozen, batch, objective, config.guidance, empty_text_LE)
    for j in range(config.substeps):
        x_BSP, _ = SAMPLERS[config.sampler].step(teacher, x_BSP, at(j), at(j + 1), (), None, 0.0)
    target_BSP = jax.lax.stop_gradient(one_step_target(objective, start_BSP, x_BSP, at(0), at(config.substeps)))

    student = {name: tree for name, tree in params.items() if name != TEACHER}
    y_BSP: Any = model.apply(student, *objective.model_input(start_BSP, at(0)), batch)
    error_BS = jnp.mean((drop_variance(model.config, y_BSP) - target_BSP) ** 2, axis=-1) * weight(objective, at(0))
    return {"loss": (error_BS, ((batch.segment_BS > 0) & ~batch.cond_mask_BS).astype(jnp.float32))}


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


def guided_teacher(
    model: DiT, params: Any, batch: PackedBatch, objective: ObjectiveConfig, scale: float, empty_text_LE: jax.Array
) -> Denoiser:
    """The teacher with guidance: a second call, without captions, if the scale is not 1."""

    def call(x_BSP: jax.Array, time_BS: jax.Array, seen: PackedBatch) -> jax.Array:
        y_BSP: Any = model.apply(params, *objective.model_input(x_BSP, time_BS), seen)
        return drop_variance(model.config, y_BSP)

    def predict(x_BSP: jax.Array, time_BS: jax.Array) -> jax.Array:
        p_BSP = call(x_BSP, time_BS, batch)
        if scale == 1:
            return p_BSP
        return guide(p_BSP, call(x_BSP, time_BS, without_captions(batch, empty_text_LE)), jnp.full_like(time_BS, scale))

    return Denoiser(predict, objective.noise_path, objective.prediction)


def without_captions(batch: PackedBatch, empty_text_LE: jax.Array) -> PackedBatch:
    """The batch with the empty caption for each of its clips."""
    (B, slots), (L, E) = batch.fps_BG.shape, empty_text_LE.shape
    text_BLE = jnp.broadcast_to(jnp.tile(empty_text_LE, (slots, 1)), (B, slots * L, E)).astype(batch.text_BLE.dtype)
    segment_BL = jnp.broadcast_to(jnp.repeat(jnp.arange(1, slots + 1, dtype=jnp.int32), L), (B, slots * L))
    return dataclasses.replace(
        batch, text_BLE=like(text_BLE, batch.text_BLE), text_segment_BL=like(segment_BL, batch.text_segment_BL)
    )

"""Distillation: a student that starts as its teacher learns to sample in few steps, without guidance.

    method         the student learns                                                     its sampler    file
    progressive    to do in one step what its teacher does in several                     euler          progressive.py
    consistency    the same clean estimate at neighbouring times of the teacher's path    consistency    consistency.py
    meanflow       the mean velocity between two times                                    mean-flow      mean_flow.py
    dmd            the distribution of its teacher's clips, by two scores of its own      consistency    dmd.py

Here is what they share: settings, the record in the exported config, the teacher with its guidance (Meng et al. 2022,
arXiv:2210.03142), and the times. A guided teacher leaves nothing to guide: the student makes one model call a step.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minisora_jax.diffusion.denoiser import Denoiser
from minisora_jax.diffusion.guidance import GuidanceConfig, guide
from minisora_jax.diffusion.objective import ObjectiveConfig
from minisora_jax.diffusion.sampler import SamplerConfig
from minisora_jax.diffusion.time import TimeConfig, draw_by_ids, latest_time, sampling_times
from minisora_jax.models.dit import DiT, drop_variance
from minisora_jax.parallel.mesh import like
from minisora_jax.types import PackedBatch

TEACHER = "teacher"  # the teacher's parameters beside the student's {"params": ...}
FAKE = "fake"  # those of the model that learns the student's clips along with it (dmd.py)

# method -> the student's sampler
METHODS = {"progressive": "euler", "consistency": "consistency", "meanflow": "mean-flow", "dmd": "consistency"}


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Distillation of the model of --init.

    Raises:
        ValueError: The method is unknown, a number is out of range, or the sampler has no steps of its own.
    """

    steps: int = 0  # of the student; 0: no distillation
    substeps: int = 2  # of the teacher for one of the student's; "meanflow" and "dmd" use neither it nor `sampler`
    sampler: str = "heun"  # of the teacher: "heun" (two calls a substep), "euler" or "ddim" (one)
    guidance: float = 1.0  # scale of the teacher's guidance; 1: none
    method: str = "progressive"  # or "consistency", "meanflow" or "dmd", see diffusion/distillation.py
    fake_updates: int = 5  # of the fake model for one of the student, with "dmd" only

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"distill.method={self.method!r} must be one of {', '.join(METHODS)}")
        if self.steps < 0 or self.substeps < 1:
            raise ValueError(
                f"distill.steps={self.steps} must be 0 or more, distill.substeps={self.substeps} 1 or more"
            )
        if self.fake_updates < 1:
            raise ValueError(f"distill.fake_updates={self.fake_updates} must be at least 1")
        if self.sampler not in ("heun", "euler", "ddim"):
            raise ValueError(f"distill.sampler={self.sampler!r} must be 'heun', 'euler' or 'ddim'")


# ---- How a distilled model is sampled


@dataclasses.dataclass(frozen=True)
class Distilled:
    """How a model was distilled, as its exported config records it. It is false for a model that was not."""

    steps: int = 0  # that it was distilled to
    method: str = "progressive"

    def __bool__(self) -> bool:
        """Whether the model was distilled."""
        return self.steps > 0


def recorded_distillation(config: dict, directory: str | Path) -> Distilled:
    """How an exported model was distilled.

    Raises:
        ValueError: The record is damaged.
    """
    record = config.get("distilled", {"steps": 0})
    steps = record.get("steps") if isinstance(record, dict) else None
    if not isinstance(steps, int) or not 0 <= steps <= 1000:
        raise ValueError(f"{directory}/config.json: distilled={record!r:.100} must name its steps, at most 1000")
    method = record.get("method", "progressive")
    if method not in METHODS:
        raise ValueError(
            f"{directory}/config.json: distilled={record!r:.100} must have a method of {', '.join(METHODS)}"
        )
    return Distilled(steps, method)


def sampling_defaults(distilled: Distilled | None) -> tuple[int, float, str]:
    """(steps, guidance scale, sampler) of a model, by how it was distilled; None: it was not."""
    return (distilled.steps, 1.0, METHODS[distilled.method]) if distilled else (20, 3.0, "heun")


def sampling_of(
    distilled: Distilled,
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


# ---- What the losses share


@dataclasses.dataclass(frozen=True)
class Distillation:
    """A student and its teacher, with what both are trained for.

    A loss takes (a `Distillation`, params, batch, key, step) and returns {"loss": (values_BS, weights_BS)}, as
    `diffusion_loss`. `params` are the student's, with the teacher's under `TEACHER`; without these the teacher is the
    student without its "lora".
    """

    config: DistillConfig
    model: DiT  # the student
    teacher: DiT
    times: TimeConfig
    objective: ObjectiveConfig
    empty_text_LE: np.ndarray  # features of the empty caption, for the teacher's guidance

    def student(self, params: Any, batch: PackedBatch) -> Denoiser:
        """The student."""
        own = trained_of(params)
        call: Any = functools.partial(called, self.model, self.objective, own, batch)
        mean: Any = lambda x_BSP, time_BS, next_BS: call(x_BSP, time_BS, time_BS - next_BS)
        return Denoiser(call, self.objective.noise_path, self.objective.prediction, mean_velocity=mean)

    def guided_teacher(self, params: Any, batch: PackedBatch) -> Denoiser:
        """The teacher with guidance."""
        scale, empty_LE = self.config.guidance, self.empty_text_LE
        return guided_model(self.teacher, self.objective, given_of(params), batch, scale, empty_LE)

    def grid(self, count: int, batch: PackedBatch) -> jax.Array:
        """The times of a sampling with `count` steps, (count + 1, B, S)."""
        path = self.objective.noise_path
        return sampling_times(self.times, count, batch, path, latest=latest_time(path, self.objective.prediction))


def trained_of(params: Any) -> Any:
    """The parameters of the model that is trained, with its "lora" if it has one."""
    return {name: tree for name, tree in params.items() if name not in (TEACHER, FAKE)}


def given_of(params: Any) -> Any:
    """The parameters of the model of --init."""
    return {"params": params[TEACHER]} if TEACHER in params else {k: v for k, v in params.items() if k != "lora"}


def called(
    model: DiT,
    objective: ObjectiveConfig,
    params: Any,
    batch: PackedBatch,
    x_BSP: jax.Array,
    time_BS: jax.Array,
    interval_BS: jax.Array | None = None,
) -> jax.Array:
    """The model's prediction (B, S, P); with an interval, that of its mean velocity over it."""
    y_BSP: Any = model.apply(params, *objective.model_input(x_BSP, time_BS), batch, interval_BS=interval_BS)
    return drop_variance(model.config, y_BSP)


def guided_model(
    model: DiT,
    objective: ObjectiveConfig,
    params: Any,
    batch: PackedBatch,
    scale: float = 1.0,
    empty_text_LE: np.ndarray | None = None,
) -> Denoiser:
    """A model with guidance: a second call, with the empty caption, if the scale is not 1."""

    call = functools.partial(called, model, objective, params)

    def predict(x_BSP: jax.Array, time_BS: jax.Array) -> jax.Array:
        p_BSP = call(batch, x_BSP, time_BS)
        if scale == 1 or empty_text_LE is None:
            return p_BSP
        return guide(p_BSP, call(without_captions(batch, empty_text_LE), x_BSP, time_BS), jnp.full_like(time_BS, scale))

    return Denoiser(predict, objective.noise_path, objective.prediction)


def drawn_index(key: jax.Array, count: int, batch: PackedBatch) -> jax.Array:
    """A number below `count` for each clip, (B, S) int32."""
    row_BS = jnp.zeros_like(batch.segment_BS) + jnp.arange(batch.segment_BS.shape[0])[:, None]
    drawn_BS = draw_by_ids(jax.random.uniform, key, row_BS, batch.segment_BS)
    return jnp.floor(count * drawn_BS).astype(jnp.int32)


def at_index(times_KBS: jax.Array, index_BS: jax.Array) -> jax.Array:
    """The time of each token at the index of its clip, (B, S)."""
    return jnp.take_along_axis(times_KBS, index_BS[None], axis=0)[0]


def clean_estimate(student: Denoiser, x_BSP: jax.Array, time_BS: jax.Array) -> jax.Array:
    """The clean estimate f(x, t); x itself where t = 0, as for tokens that are given."""
    return jnp.where((time_BS > 0)[..., None], student.clean_and_noise(x_BSP, time_BS)[0], x_BSP)


def without_captions(batch: PackedBatch, empty_text_LE: np.ndarray) -> PackedBatch:
    """The batch with the empty caption for each of its clips."""
    (B, slots), (L, E) = batch.fps_BG.shape, empty_text_LE.shape
    text_BLE = jnp.broadcast_to(jnp.tile(empty_text_LE, (slots, 1)), (B, slots * L, E)).astype(batch.text_BLE.dtype)
    segment_BL = jnp.broadcast_to(jnp.repeat(jnp.arange(1, slots + 1, dtype=jnp.int32), L), (B, slots * L))
    return dataclasses.replace(
        batch, text_BLE=like(text_BLE, batch.text_BLE), text_segment_BL=like(segment_BL, batch.text_segment_BL)
    )

"""Training a student of the model of --init: what each method of distillation trains, and what it starts from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from minisora_jax.diffusion.consistency import consistency_loss
from minisora_jax.diffusion.distillation import FAKE, TEACHER, Distillation, DistillConfig
from minisora_jax.diffusion.dmd import dmd_loss
from minisora_jax.diffusion.mean_flow import mean_flow_loss
from minisora_jax.diffusion.objective import ObjectiveConfig
from minisora_jax.diffusion.progressive import progressive_loss
from minisora_jax.diffusion.time import TimeConfig
from minisora_jax.io.model_dir import open_model
from minisora_jax.models.dit import DiT, DiTConfig
from minisora_jax.models.lora import together
from minisora_jax.training.frozen import Frozen, load_frozen, read_part
from minisora_jax.training.optim import OptimConfig, make_optimizer
from minisora_jax.training.step import LossFn

LOSSES = {
    "progressive": progressive_loss,
    "consistency": consistency_loss,
    "meanflow": mean_flow_loss,
    "dmd": dmd_loss,
}


def require_fitting(config: DistillConfig, objective: ObjectiveConfig, lora_rank: int, train_only: str) -> None:
    """Raise ValueError if a distillation cannot be of this model, or of a part of it."""
    if not config.steps:
        return
    if train_only:
        raise ValueError(
            f"distill.steps={config.steps} trains all parameters or a lora: train_only={train_only!r} must be ''"
        )
    if config.method == "meanflow" and lora_rank:
        raise ValueError(
            f"distill.method='meanflow' gives the model an input, for which an adapter has no place: set "
            f"lora.rank={lora_rank} to 0, or use distill.method='consistency'"
        )
    if config.method == "dmd" and lora_rank:
        raise ValueError(
            f"distill.method='dmd' trains a whole model beside the student: set lora.rank={lora_rank} to 0, or use "
            f"distill.method='consistency'"
        )
    if config.method == "meanflow" and objective.prediction != "velocity":
        raise ValueError(
            f"distill.method='meanflow' averages velocities, and objective.prediction={objective.prediction!r}: use "
            f"distill.method='consistency'"
        )


def student_dit(config: DistillConfig, dit: DiTConfig) -> DiTConfig:
    """The student's shape: its teacher's, told a second time for MeanFlow. Without a distillation, `dit`."""
    told = config.steps > 0 and config.method == "meanflow"
    return dataclasses.replace(dit, interval_input=True) if told else dit


def loss_of(
    config: DistillConfig, dit: DiTConfig, times: TimeConfig, objective: ObjectiveConfig, empty_text_LE: np.ndarray
) -> LossFn:
    """The loss of the method. `dit` is the teacher's shape."""
    of = Distillation(config, DiT(student_dit(config, dit)), DiT(dit), times, objective, empty_text_LE)
    return functools.partial(LOSSES[config.method], of)


def two_optimizers(config: DistillConfig, optim: OptimConfig, steps: int) -> optax.GradientTransformation:
    """The optimiser of a student and its fake model. The student takes every `config.fake_updates`th step.

    Its moments and its learning rate's schedule count those steps alone.
    """
    every = config.fake_updates
    fewer = dataclasses.replace(optim, warmup=optim.warmup // every)
    own = make_optimizer(fewer, max(steps // every, 1))
    each: dict[Hashable, Any] = {
        "params": optax.conditionally_mask(own, lambda step, **_: jnp.asarray(step) % every == 0),
        FAKE: make_optimizer(optim, steps),
    }
    return optax.partition(each, {name: name for name in each})


def frozen_teacher(abstract: Callable[[], Any], init: str | Path | None) -> Frozen:
    """All parameters of a model, beside those of its student. Arguments are those of `frozen_base`."""
    beside = lambda trained, frozen: trained | {TEACHER: frozen["params"]}
    return Frozen(abstract, functools.partial(load_frozen, init), beside)


def read_student(init: str | Path, places: Any) -> Any:
    """The parameters that a student starts with: its teacher's, and zeros for an input that its teacher has not.

    Its fake model, if `places` has one, starts as the teacher too.
    """
    if FAKE in places:
        start = lambda name: read_part(init, {"params": places[name]})["params"]
        return {name: start(name) for name in places}
    stored = traverse_util.flatten_dict(open_model(init)[0], sep="/")
    flat = traverse_util.flatten_dict(places, sep="/")
    pick = lambda old: traverse_util.unflatten_dict({n: x for n, x in flat.items() if (n in stored) == old}, sep="/")
    zeros = lambda x: jax.jit(lambda: jnp.zeros(x.shape, x.dtype), out_shardings=x.sharding)()
    return together(read_part(init, pick(True)), jax.tree.map(zeros, pick(False)))

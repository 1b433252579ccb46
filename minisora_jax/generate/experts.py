"""A pair of experts (Wan 2.2 A14B): one model for high noise, and a second of the same shape for low noise."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from minisora_jax.diffusion.guidance import GuidanceConfig
from minisora_jax.diffusion.objective import ObjectiveConfig
from minisora_jax.parallel.processes import whole


@dataclasses.dataclass(frozen=True)
class LowNoise:
    """The second expert."""

    params: dict = dataclasses.field(repr=False)
    below: float  # the time, as the model is told it, under which it takes over

    def scale(self, guidance: GuidanceConfig) -> float:
        """The guidance scale of its steps."""
        return guidance.scale if guidance.low_noise is None else guidance.low_noise

    def first_step(self, objective: ObjectiveConfig, times_KBS: jax.Array, steps: int) -> int:
        """The first of `steps` steps that it makes. times_KBS: the time before each step, and more after them."""
        latest_K1 = jnp.max(times_KBS, axis=(1, 2))[:, None]
        _, told_K1 = objective.model_input(jnp.zeros((1,)), latest_K1)
        return int(np.sum(whole(told_K1)[:steps, 0] >= np.float32(self.below)))

"""The objective of a model: its noise path, the quantity that it predicts, and the weight of errors at each time.

A weight is defined on the squared error of the clean estimate, with the signal-to-noise ratio SNR = a^2 / s^2:

    min-snr   min(SNR, 5)             Hang et al. 2023, arXiv:2303.09556
    edm       (s^2 + a^2) / s^2       Karras et al. 2022, arXiv:2206.00364, table 1, data of unit variance

|error of p|^2 = (determinant / s)^2 |error of x|^2 converts it to the prediction's error. So min-snr is
min(SNR, 5) / SNR for noise and min(SNR, 5) / (SNR + 1) for v, and edm is 1 for v. "natural" is 1 on the prediction's
own error: DDPM's "simple" loss for noise, flow matching for velocity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from minisora_jax.diffusion.noise_path import DDPM_STEPS, PATHS, PREDICTIONS, NoisePath, determinant

MAX_SNR = 5.0  # Hang et al.'s gamma

# (a, s, determinant) -> weight of the squared error of the prediction
WEIGHTS: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "natural": lambda a, s, det: jnp.ones_like(det),
    "min-snr": lambda a, s, det: jnp.minimum(a**2, MAX_SNR * s**2) / jnp.maximum(det**2, 1e-12),
    "edm": lambda a, s, det: (a**2 + s**2) / jnp.maximum(det**2, 1e-12),
}


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Keys of PATHS, PREDICTIONS and WEIGHTS, and how the model is told the time. The default is flow matching.

    Raises:
        ValueError: A key is unknown.
    """

    path: str = "linear"  # from data to noise: "linear", "gvp", "vp", "ddpm", "cosine" or "ve"
    prediction: str = "velocity"  # or "noise", "clean", "v"
    weight: str = "natural"  # of the loss over noise levels: "natural", "min-snr" or "edm"
    whole_timesteps: bool = False  # whether the model is told int(1000 t) in place of 1000 t, as Wan's authors do

    def __post_init__(self) -> None:
        for name, choices in (("path", PATHS), ("prediction", PREDICTIONS), ("weight", WEIGHTS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"objective.{name}={getattr(self, name)!r} must be one of {', '.join(choices)}")

    @property
    def noise_path(self) -> NoisePath:
        """The path of that name."""
        return PATHS[self.path]

    def model_input(self, x_BSP: jax.Array, time_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The model's inputs for x_t and t: those of the path, with whole timesteps if the model wants such."""
        x_BSP, time_BS = self.noise_path.model_input(x_BSP, time_BS)
        if self.whole_timesteps:  # an error of t in float32, 3e-8, is no reason to round 42 down to 41
            time_BS = jnp.floor(DDPM_STEPS * time_BS + 1e-4) / DDPM_STEPS
        return x_BSP, time_BS


def weight(objective: ObjectiveConfig, time: jax.Array) -> jax.Array:
    """The weight of the prediction's squared error at each time, in the shape of `time`."""
    path = objective.noise_path
    det = determinant(path, objective.prediction, time)
    return WEIGHTS[objective.weight](path.alpha(time), path.sigma(time), det)

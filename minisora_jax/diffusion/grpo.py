"""Preference tuning by Flow-GRPO (Liu et al. 2025, arXiv:2505.05470): videos of one caption are compared by a reward.

    rollout     a group of videos of each caption, by the model as it is: `steps` steps, of which `trained` neighbours,
                at a place drawn for each rollout, renew noise (MixGRPO: Li et al. 2025, arXiv:2507.21802). A group
                starts from one noise (DanceGRPO: Xue et al. 2025, arXiv:2505.07818), so that its videos differ by
                the trained steps alone
    advantage   A = (r - mean of the group) / its standard deviation
    loss        -A log p(x_t' | x_t) of the noisy steps, which are normal distributions around what the model predicts

A noisy step is DDIM's with `eta`. It follows any noise path and any kind of prediction, and keeps the noise at the
level that the model expects; Flow-GRPO's own step of an SDE is of the first order and does not. log p is a mean over a
video's latents, as in that paper. A rollout serves one update: the model has not moved since it sampled, so the ratio
of their probabilities is 1, and there is nothing to clip. The gradient is that of the clipped objective at this ratio.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from minisora_jax.diffusion.denoiser import where_moving
from minisora_jax.diffusion.distillation import given_of, guided_model, trained_of
from minisora_jax.diffusion.objective import ObjectiveConfig
from minisora_jax.diffusion.sampler import ddim_distribution
from minisora_jax.diffusion.time import TimeConfig, draw_by_ids, latest_time, sampling_times
from minisora_jax.models.dit import DiT
from minisora_jax.parallel.mesh import draw
from minisora_jax.types import PackedBatch


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
    """Preference tuning of the model of --init.

    Raises:
        ValueError: A number is out of range.
    """

    reward: str = ""  # FILE.py:FUNCTION of (frames uint8 (T, H, W, 3), caption) -> a number; "": no preference tuning
    group: int = 16  # videos of each caption
    steps: int = 10  # of a rollout
    trained: int = 3  # of these, neighbours that renew noise and are trained
    eta: float = 0.7  # share of the noise that they renew
    guidance: float = 1.0  # scale of the guidance of rollout and loss; 1: none
    kl: float = 0.0  # weight of the divergence from the model of --init, see `grpo_loss`

    def __post_init__(self) -> None:
        if self.group < 2:
            raise ValueError(f"grpo.group={self.group} must be at least 2: videos of one caption are compared")
        if not 1 <= self.trained < self.steps:
            raise ValueError(
                f"grpo.trained={self.trained} must be from 1 to {self.steps - 1}, below grpo.steps={self.steps}: the "
                f"last step adds no noise"
            )
        if not 0 < self.eta <= 1 or self.kl < 0:
            raise ValueError(f"grpo.eta={self.eta} must be above 0 and at most 1, grpo.kl={self.kl} 0 or more")


@struct.dataclass
class Rollout:
    """Noisy steps of sampled clips. With a leading axis for the steps it is what one update reads."""

    batch: PackedBatch
    x_BSP: jax.Array  # before the step
    next_BSP: jax.Array  # after it
    time_BS: jax.Array
    next_time_BS: jax.Array
    reward_BS: jax.Array  # of the token's clip
    advantage_BS: jax.Array


def roll_out(
    model: DiT,
    times: TimeConfig,
    config: GrpoConfig,
    objective: ObjectiveConfig,
    empty_text_LE: np.ndarray,
    params: Any,
    batch: PackedBatch,
    key: jax.Array,
) -> tuple[jax.Array, Rollout]:
    """Sample the batch's clips from noise; what is given stays.

    Args:
        model: The transformer.
        times: The shifts of the times of sampling.
        config: Steps, noise and guidance.
        objective: Of the model.
        empty_text_LE: Features of the empty caption, for guidance.
        params: The model's parameters.
        batch: Packed clips, the rows of a group one after another.
        key: For noise, and the place of the trained steps.

    Returns:
        (clean latents_BSP, the trained steps along a new first axis, without rewards).
    """
    path, latest = objective.noise_path, latest_time(objective.noise_path, objective.prediction)
    policy = guided_model(model, objective, trained_of(params), batch, config.guidance, empty_text_LE)
    times_KBS = sampling_times(times, config.steps, batch, path, latest=latest)
    start_key, place_key, noise_key = jax.random.split(key, 3)
    first = jax.random.randint(place_key, (), 0, config.steps - config.trained)
    noise_BSP = start_noise(start_key, batch, config.group) * path.spread(times_KBS[0])[..., None]
    x_BSP = jnp.where(batch.cond_mask_BS[..., None], batch.tokens_BSP, noise_BSP)

    def step(x_BSP: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        trained = (k >= first) & (k < first + config.trained)
        mean_BSP, spread_BS1 = ddim_distribution(
            policy, x_BSP, times_KBS[k], times_KBS[k + 1], jnp.where(trained, config.eta, 0.0)
        )
        fresh_BSP = draw(jax.random.normal, jax.random.fold_in(noise_key, k), x_BSP)
        return where_moving(times_KBS[k], times_KBS[k + 1], mean_BSP + spread_BS1 * fresh_BSP, x_BSP), x_BSP

    end_BSP, x_KBSP = jax.lax.scan(step, x_BSP, jnp.arange(config.steps))
    x_KBSP = jnp.concatenate([x_KBSP, end_BSP[None]])
    part = lambda of_steps, skip: jax.lax.dynamic_slice_in_dim(of_steps, first + skip, config.trained)
    zeros_KBS = jnp.zeros_like(part(times_KBS, 0))
    batch_K = jax.tree.map(lambda x: jnp.stack([x] * config.trained), batch)
    steps = part(x_KBSP, 0), part(x_KBSP, 1), part(times_KBS, 0), part(times_KBS, 1)
    return end_BSP, Rollout(batch_K, *steps, zeros_KBS, zeros_KBS)


def start_noise(key: jax.Array, batch: PackedBatch, group: int) -> jax.Array:
    """Standard normal noise (B, S, P), the same in each `group` of neighbouring rows."""
    (B, S), width = batch.segment_BS.shape, batch.tokens_BSP.shape[-1]
    zeros_BS = jnp.zeros_like(batch.segment_BS)
    ids = zeros_BS + jnp.arange(B)[:, None] // group, zeros_BS + jnp.arange(S)
    return draw_by_ids(lambda k: jax.random.normal(k, (width,)), key, *ids)


def grpo_loss(
    model: DiT,
    config: GrpoConfig,
    empty_text_LE: np.ndarray,
    params: Any,
    rollout: Rollout,
    objective: ObjectiveConfig,
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The loss of a step of each token: -A log p(x_t' | x_t), plus `kl` times the divergence of its distributions.

    Args:
        model: The transformer.
        config: Noise, guidance and the weight `kl`.
        empty_text_LE: Features of the empty caption, for guidance.
        params: The model's parameters. With `kl` also those of the model of --init, see `given_of`.
        rollout: One step of it.
        objective: Of both models.

    Returns:
        {"loss", "reward", with `kl` "divergence": (values_BS, weights_BS)}, as `diffusion_loss`.
    """
    batch, x_BSP, now_BS, next_BS = rollout.batch, rollout.x_BSP, rollout.time_BS, rollout.next_time_BS
    policy = guided_model(model, objective, trained_of(params), batch, config.guidance, empty_text_LE)
    mean_BSP, spread_BS1 = ddim_distribution(policy, x_BSP, now_BS, next_BS, config.eta)
    moves_BS = (batch.segment_BS > 0) & (now_BS != next_BS)
    surprise = lambda value_BSP: jnp.mean((value_BSP - mean_BSP) ** 2, -1) / (2.0 * _variance(spread_BS1, moves_BS))
    values_BS, terms = rollout.advantage_BS * surprise(rollout.next_BSP), {}  # log p is minus that, and a constant
    weights_BS = moves_BS.astype(jnp.float32)
    if config.kl:
        reference = guided_model(model, objective, given_of(params), batch, config.guidance, empty_text_LE)
        divergence_BS = surprise(ddim_distribution(reference, x_BSP, now_BS, next_BS, config.eta)[0])
        values_BS, terms = values_BS + config.kl * divergence_BS, {"divergence": (divergence_BS, weights_BS)}
    return {"loss": (values_BS, weights_BS), "reward": (rollout.reward_BS, weights_BS), **terms}


def _variance(spread_BS1: jax.Array, moves_BS: jax.Array) -> jax.Array:
    return jnp.where(moves_BS, spread_BS1[..., 0] ** 2, 1.0)

"""Rollouts of preference tuning: sample the clips of a batch, decode them, and compare their rewards by groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from minisora_jax.data.latents import Latents, Mixture
from minisora_jax.data.packing import PackPlan, StagedPlan
from minisora_jax.data.rows import unpatchify
from minisora_jax.diffusion.grpo import GrpoConfig, Rollout
from minisora_jax.io.retry import DataError
from minisora_jax.io.user_function import load_function, number_by
from minisora_jax.models.codec import Codec, by_size
from minisora_jax.parallel.mesh import TOKENS, MeshConfig, host_rows, make_mesh, to_global
from minisora_jax.parallel.processes import whole

RollOut = Callable[[Any, Any, int], Rollout]  # (parameters, batch (1, B, ...) of NumPy arrays, its number)


def rollouts(
    config: GrpoConfig,
    sample: Callable,
    codec: Codec | None,
    patch: tuple[int, int, int],
    latents: Latents | Mixture,
    plan: PackPlan | StagedPlan,
) -> RollOut:
    """What turns a batch of captions into a rollout with rewards. A row of the batch becomes `config.group` rows.

    Args:
        config: Its reward and group.
        sample: `roll_out`, with its settings.
        codec: The latents' codec.
        patch: Of the transformer.
        latents: The cache of the captions.
        plan: Which of its clips fill the rows of a batch.

    Raises:
        ValueError: There is no such function, or no codec.
        UserFunctionError: The function's file raises an error; later, the function does, or it gives no number.
    """
    if codec is None:
        raise ValueError(f"grpo.reward={config.reward} judges videos: name the codec that decodes the latents")
    judge, program, key = load_function(config.reward), jax.jit(sample), jax.random.key(plan.seed)
    group, readable = config.group, lambda clips: [c for i in clips if (c := _caption(latents, int(i))) is not None]

    def of_batch(params: Any, batch: Any, number: int) -> Rollout:
        mesh = jax.sharding.get_mesh()
        repeated = jax.tree.map(lambda x: np.repeat(x, group, axis=1), batch)
        own = jax.tree.map(lambda x: x[0], repeated)
        rows = jax.tree.map(lambda x: x[0], to_global(repeated, mesh))
        latents_BSP, rollout = program(params, rows, jax.random.fold_in(key, number))
        latents_BSP = whole(latents_BSP)[host_rows(latents_BSP.shape[0])]
        planned = plan.rows(number)
        texts = [row for b in host_rows(len(planned)) for row in [readable(planned[b])] * group]
        clips = [
            (b, g, text, _clip(latents_BSP[b], own.segment_BS[b], g, own.size_BG3[b], patch))
            for b, row in enumerate(texts)
            for g, text in enumerate(row)
        ]
        with jax.set_mesh(make_mesh(MeshConfig(), jax.local_devices()[:1])):
            decode, latents_of = lambda same_size, _: codec.decode(np.stack(same_size)), [z for *_, z in clips]
            videos = by_size(decode, latents_of, [z.shape for z in latents_of], full=True)
        reward_BG = np.zeros(own.fps_BG.shape, np.float32)
        for (b, g, text, _), frames in zip(clips, videos):
            reward_BG[b, g] = _finite(number_by(judge, config.reward, frames, text), config.reward, text)
        return put_rewards(rollout, own.segment_BS, reward_BG, group, mesh)

    return of_batch


def put_rewards(
    rollout: Rollout, segment_BS: np.ndarray, reward_BG: np.ndarray, group: int, mesh: jax.sharding.Mesh
) -> Rollout:
    """The rollout with the reward and the advantage of each token's clip, from the rewards of this process's rows."""
    per_token = lambda x_BG: np.take_along_axis(np.pad(x_BG, ((0, 0), (1, 0))), segment_BS, 1)
    steps = rollout.time_BS.shape[0]
    both = [np.stack([per_token(x)] * steps) for x in (reward_BG, advantages(reward_BG, group))]
    reward, advantage = to_global(both, mesh, P(None, *TOKENS))
    return dataclasses.replace(rollout, reward_BS=reward, advantage_BS=advantage)


def advantages(reward_BG: np.ndarray, group: int) -> np.ndarray:
    """(r - mean) / standard deviation over each `group` of neighbouring rows; 0 where all rewards are equal."""
    grouped = reward_BG.reshape(-1, group, reward_BG.shape[1]).astype(np.float64)
    centred = grouped - grouped.mean(1, keepdims=True)
    return (centred / (grouped.std(1, keepdims=True) + 1e-4)).reshape(reward_BG.shape).astype(np.float32)


def _clip(
    latents_SP: np.ndarray, segment_S: np.ndarray, slot: int, size_G3: np.ndarray, patch: tuple[int, int, int]
) -> np.ndarray:
    return unpatchify(latents_SP[segment_S == slot + 1].reshape(*size_G3[slot], -1), patch)


def _finite(number: float, reward: str, caption: str) -> float:
    if not np.isfinite(number):
        raise ValueError(f"grpo.reward={reward} gave {number} for {caption!r:.100}: it must return a finite number")
    return number


def _caption(latents: Latents | Mixture, i: int) -> str | None:
    """The caption of a clip; None of a damaged one, whose place in the row is empty."""
    try:
        return latents[i].caption
    except DataError:
        return None

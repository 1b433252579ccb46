"""Which action was it? A small convolutional network that reads the action between two frames.

It is trained on true frames alone (inverse dynamics: Pathak et al. 2017, arXiv:1705.05363), so it says of a made video
whether it shows what the player did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from minisora_jax.types import Clip


class ActionProbe(nn.Module):
    """Two frames (B, H, W, 6), -1 to 1 -> logits of the actions (B, A)."""

    actions: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (32, 64, 128):
            x = nn.silu(nn.GroupNorm(8)(nn.Conv(width, (3, 3), strides=2)(x)))
        x = nn.silu(nn.Conv(128, (3, 3))(x))
        return nn.Dense(self.actions)(x.reshape(len(x), -1))


def train_probe(
    clips: Sequence[Clip], steps: int = 800, batch: int = 64, seed: int = 0
) -> Callable[[np.ndarray], np.ndarray]:
    """A function from frames (T, H, W, 3) to the numbers of the actions that led to all but the first (T - 1,).

    Args:
        clips: Clips of one size with one-hot actions.
        steps: Of Adam.
        batch: Pairs of frames a step; every action is drawn as often as the others.
        seed: Of the draws.

    Raises:
        ValueError: No clip has actions.
    """
    clips = [clip for clip in clips if clip.actions_TA is not None and len(clip.frames_THWC) > 1]
    if not clips:
        raise ValueError("no clip has actions, so there is nothing to learn")
    places = [(i, t) for i, clip in enumerate(clips) for t in range(1, len(clip.frames_THWC))]
    taken = np.array([np.argmax(np.asarray(clips[i].actions_TA)[t]) for i, t in places])
    by_action = [np.flatnonzero(taken == action) for action in np.unique(taken)]
    rng, model = np.random.default_rng(seed), ActionProbe(np.asarray(clips[0].actions_TA).shape[1])
    pairs = lambda at: np.stack([_pairs(clips[places[n][0]].frames_THWC[places[n][1] - 1 :][:2])[0] for n in at])
    params: Any = model.init(jax.random.key(seed), jnp.asarray(pairs([0])))
    logits: Any = model.apply
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, steps))

    @jax.jit
    def update(params, state, x, wanted):
        loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(logits(p, x), wanted).mean()
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(steps):
        at = [int(rng.choice(by_action[rng.integers(len(by_action))])) for _ in range(batch)]
        params, state = update(params, state, jnp.asarray(pairs(at)), jnp.asarray(taken[at]))
    read = jax.jit(lambda x: jnp.argmax(logits(params, x), axis=-1))
    return lambda frames_THWC: np.asarray(read(jnp.asarray(_pairs(frames_THWC))))


def _pairs(frames_THWC: np.ndarray) -> np.ndarray:
    """Each frame but the last beside the next, float32 (T - 1, H, W, 6)."""
    x = np.asarray(frames_THWC, np.float32) / 127.5 - 1
    return np.concatenate([x[:-1], x[1:]], axis=-1)

"""The noise levels of a row, for adaLN: one for each latent frame of a clip, and one for what is given of it.

Shift, scale and gate depend on a token's time and clip alone. In long rows they are computed once a level, and each
token takes those of its own. That saves their FLOPs and, of a chip's memory, 6 D numbers a token with their gradients.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from minisora_jax.models.layers import per_token
from minisora_jax.parallel.mesh import like
from minisora_jax.types import PackedBatch

LEAST_TOKENS = 16  # of a level in the mean: with fewer, taking a level costs as much as computing it


@struct.dataclass
class Levels:
    """A table over the U levels of a row, and each token's place in it. Without a table each token is its own level."""

    time_BU: jax.Array
    segment_BU: jax.Array  # int32; 0 where no token has this level
    level_BS: jax.Array | None  # int32, counted from 1; 0 for padding. None: U = S
    interval_BU: jax.Array | None = None  # t - r, for a model that is told it
    frame_BU: jax.Array | None = None  # int32, with actions: the latent frame of the row, counted from 1; 0 for none

    def to_tokens(self, table_BUx: jax.Array) -> jax.Array:
        """(B, U, x) -> (B, S, x); zeros for padding, if there is a table."""
        return table_BUx if self.level_BS is None else per_token(table_BUx, self.level_BS)


def table_size(frames: int, tokens: int) -> int:
    """Levels of a row with so many latent frames and tokens; 0 if each token has its own."""
    levels = 2 * frames
    return levels if 0 < levels * LEAST_TOKENS <= tokens else 0


def noise_levels(time_BS: jax.Array, batch: PackedBatch, interval_BS: jax.Array | None = None) -> Levels:
    """The levels of a batch with these times. It has a table if `batch.frames` says so and the rows are long enough.

    Args:
        time_BS: Time of each token.
        batch: Packed clips.
        interval_BS: t - r of each token. Tokens of one time and clip have one interval.
    """
    count = table_size(batch.frames, time_BS.shape[1])
    has_actions = batch.actions_BUx is not None
    if not count or not jnp.issubdtype(batch.position_BS3.dtype, jnp.integer):  # positions with a spacing
        return Levels(time_BS, batch.segment_BS, None, interval_BS, frame_numbers(batch) if has_actions else None)
    level_BS = jnp.where(batch.segment_BS > 0, 2 * frame_numbers(batch) - 1 + batch.cond_mask_BS, 0)
    is_level_BSU = level_BS[..., None] == jnp.arange(1, count + 1)
    of_level = lambda x_BS: jnp.max(jnp.where(is_level_BSU, x_BS[..., None], 0), axis=1)
    interval_BU = None if interval_BS is None else of_level(interval_BS)
    frame_BU = of_level(frame_numbers(batch)) if has_actions else None
    return Levels(of_level(time_BS), of_level(batch.segment_BS), level_BS, interval_BU, frame_BU)


def frame_numbers(batch: PackedBatch) -> jax.Array:
    """The latent frame of each token, counted from 1 along the row; int32 (B, S), 0 for padding."""
    frames_BG = batch.size_BG3[..., 0].astype(jnp.float32)
    frames_BG2 = jnp.stack([frames_BG, jnp.cumsum(frames_BG, axis=1) - frames_BG], axis=-1)  # and those before
    # JAX forgets the sharding of B in a slice that leaves one number.
    of_clip = per_token(like(frames_BG2, batch.fps_BG), batch.segment_BS).astype(jnp.int32)
    # A clip's positions are 0 to t - 1; those of a loop or a later stretch are 1 to t.
    place_BS = of_clip[..., 1] + batch.position_BS3[..., 0].astype(jnp.int32) % jnp.maximum(of_clip[..., 0], 1)
    return jnp.where(batch.segment_BS > 0, 1 + place_BS, 0)

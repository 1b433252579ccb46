"""The frames before those that a causal model is to continue, whose keys and values each layer keeps.

A layer keeps its keys before the rotation, so a frame's temporal position may change as a window rolls on. The arrays
are flax's collection "cache", and `Past` says what is in them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from minisora_jax.models.dit_config import DiTConfig
from minisora_jax.models.rope import rope_angles


@struct.dataclass
class Past:
    """What the M places of a cache hold, for all layers alike."""

    segment_BM: jax.Array  # int32 causal ids, see `parallel.attention.attend`; 0: the place is empty
    angles_BMk: jax.Array | None  # rotations of the keys
    write_at: jax.Array | None = None  # the place where the keys and values of this call begin; None: none is kept


def past_of(
    config: DiTConfig, segment_BM: jax.Array, position_BM3: jax.Array, write_at: jax.Array | None = None
) -> Past:
    """The `Past` of places with these ids and positions (t, y, x)."""
    angles = rope_angles(position_BM3, config.width // config.heads, config.scaling) if config.rope else None
    return Past(segment_BM, angles, write_at)


def empty_cache(config: DiTConfig, rows: int, places: int, dtype: Any = None) -> dict[str, Any]:
    """{"cache": ...}: keys and values of no tokens yet, zeros (depth, rows, places, heads, head width).

    Args:
        config: The model.
        rows: B.
        places: M, tokens of all frames that are kept.
        dtype: Of the arrays; None: of the model's computation.
    """
    shape = (config.depth, rows, places, config.heads, config.width // config.heads)
    zeros = {name: jnp.zeros(shape, dtype or config.dtype) for name in ("k", "v")}
    return {"cache": {"blocks": {"joint": {"self_attention": zeros}}}}

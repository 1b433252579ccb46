"""Who attends to whom: the ids of tokens, by kind of attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from minisora_jax.models.layers import per_token
from minisora_jax.parallel.kernels import FRAMES
from minisora_jax.types import PackedBatch


def attention_segments(kinds: tuple[str, ...], batch: PackedBatch) -> dict[str, jax.Array]:
    """Ids (B, S) for "joint" and each other of the kinds: a token attends to the tokens of the same id.

    Padding has id 0. "joint" ids are the segments. "spatial" ids are one per latent frame of a segment. "temporal" ids
    are one per place (y, x) of a segment. A segment may have up to 65,536 frames, and as many places. With
    `batch.causal_BG` there are "causal" ids too, one per latent frame of a causal clip (`parallel.attention`).

    Raises:
        ValueError: `batch.causal_BG` is given to a model with other than joint attention.
    """
    segment_BS = batch.segment_BS
    t_BS, y_BS, x_BS = (batch.position_BS3[..., i] for i in range(3))
    ids = {"joint": segment_BS}
    if "spatial" in kinds:
        ids["spatial"] = jnp.where(segment_BS > 0, segment_BS * FRAMES + t_BS, 0)
    if "temporal" in kinds:
        columns_BS = per_token(batch.size_BG3[..., 2:].astype(jnp.float32), segment_BS)[..., 0].astype(jnp.int32)
        ids["temporal"] = jnp.where(segment_BS > 0, segment_BS * FRAMES + y_BS * columns_BS + x_BS, 0)
    if batch.causal_BG is not None:
        if set(kinds) != {"joint"}:
            raise ValueError(f"causal attention needs attention_pattern of 'joint' alone, and the model has {kinds}")
        frame_BS = jnp.where(is_causal(batch), t_BS.astype(jnp.int32), FRAMES - 1)
        ids["causal"] = jnp.where(segment_BS > 0, segment_BS * FRAMES + frame_BS, 0)
    return ids


def is_causal(batch: PackedBatch) -> jax.Array:
    """Whether each token is of a causal clip, bool (B, S)."""
    if batch.causal_BG is None:
        return jnp.zeros_like(batch.cond_mask_BS)
    return per_token(batch.causal_BG[..., None].astype(jnp.float32), batch.segment_BS)[..., 0] > 0

"""Attention by its definition: all S x M weights of a head at once. For tests and for short rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp

FRAMES = 65_536  # causal ids are segment * FRAMES + frame: a segment has up to so many frames
EMPTY = -1e30  # the logarithm of a denominator without terms; finite, so that the difference of two is a number


def visible(q_segment_BS: jax.Array, kv_segment_BM: jax.Array, causal: bool = False) -> jax.Array:
    """Whether each query attends to each key, bool (B, S, M); (S, M) of the ids of one row."""
    q_BS1, kv_B1M = q_segment_BS[..., :, None], kv_segment_BM[..., None, :]
    if causal:
        return (first_seen(q_BS1) <= kv_B1M) & (kv_B1M <= q_BS1) & (q_BS1 > 0)
    return (q_BS1 == kv_B1M) & (q_BS1 > 0)


def first_seen(ids: jax.Array) -> jax.Array:
    """The smallest id that a query with each of these causal ids attends to: frame 0 of its segment."""
    return ids - ids % FRAMES


def forward(
    q_BSNK: jax.Array,
    k_BMNK: jax.Array,
    v_BMNK: jax.Array,
    q_segment_BS: jax.Array,
    kv_segment_BM: jax.Array,
    scale: float,
    causal: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(o, lse), see `kernels.Kernel`."""
    seen_B1SM = visible(q_segment_BS, kv_segment_BM, causal)[:, None]
    logits_BNSM = scale * jnp.einsum("bsnk,bmnk->bnsm", q_BSNK, k_BMNK, preferred_element_type=jnp.float32)
    logits_BNSM = jnp.where(seen_B1SM, logits_BNSM, EMPTY)
    top_BNS = jnp.max(logits_BNSM, axis=-1)
    weights_BNSM = jnp.where(seen_B1SM, jnp.exp(logits_BNSM - top_BNS[..., None]), 0.0)
    total_BNS = jnp.sum(weights_BNSM, axis=-1)
    weights_BNSM /= jnp.where(total_BNS > 0, total_BNS, 1.0)[..., None]
    o_BSNK = jnp.einsum("bnsm,bmnk->bsnk", weights_BNSM.astype(v_BMNK.dtype), v_BMNK)
    return o_BSNK, jnp.where(total_BNS > 0, top_BNS + jnp.log(jnp.maximum(total_BNS, 1e-37)), EMPTY)


def backward(
    q_BSNK: jax.Array,
    k_BMNK: jax.Array,
    v_BMNK: jax.Array,
    q_segment_BS: jax.Array,
    kv_segment_BM: jax.Array,
    o_BSNK: jax.Array,
    lse_BNS: jax.Array,
    d_o_BSNK: jax.Array,
    scale: float,
    causal: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(d_q, d_k, d_v), see `kernels.Kernel`."""
    seen_B1SM = visible(q_segment_BS, kv_segment_BM, causal)[:, None]
    logits_BNSM = scale * jnp.einsum("bsnk,bmnk->bnsm", q_BSNK, k_BMNK, preferred_element_type=jnp.float32)
    weights_BNSM = jnp.where(seen_B1SM, jnp.exp(logits_BNSM - lse_BNS[..., None]), 0.0)
    d_v_BMNK = jnp.einsum("bnsm,bsnk->bmnk", weights_BNSM.astype(v_BMNK.dtype), d_o_BSNK)
    d_weights_BNSM = jnp.einsum("bsnk,bmnk->bnsm", d_o_BSNK, v_BMNK, preferred_element_type=jnp.float32)
    mean_BNS = jnp.einsum("bsnk,bsnk->bns", d_o_BSNK, o_BSNK, preferred_element_type=jnp.float32)
    d_logits_BNSM = (scale * weights_BNSM * (d_weights_BNSM - mean_BNS[..., None])).astype(q_BSNK.dtype)
    d_q_BSNK = jnp.einsum("bnsm,bmnk->bsnk", d_logits_BNSM, k_BMNK)
    d_k_BMNK = jnp.einsum("bnsm,bsnk->bmnk", d_logits_BNSM, q_BSNK)
    return d_q_BSNK, d_k_BMNK, d_v_BMNK

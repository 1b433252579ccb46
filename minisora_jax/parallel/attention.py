"""Attention between packed rows: a query sees a key where both carry the same segment id."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attend(
    q_BSNK: jax.Array,
    k_BTNK: jax.Array,
    v_BTNK: jax.Array,
    q_segment_BS: jax.Array,
    kv_segment_BT: jax.Array,
    *,
    scale: float | None = None,
    bias_NST: jax.Array | None = None,
) -> jax.Array:
    """softmax(scale q k^T + bias) v within segments -> (B, S, N, K) in v's dtype; softmax in float32.

    `scale` is 1 / sqrt(K) by default. Bidirectional. Padding is segment 0, which sees only padding; a query with no
    key of its segment gets zeros.
    """
    logits = jnp.einsum("bsnk,btnk->bnst", q_BSNK, k_BTNK, preferred_element_type=jnp.float32)
    logits = logits * (q_BSNK.shape[-1] ** -0.5 if scale is None else scale)
    if bias_NST is not None:
        logits = logits + bias_NST
    same = q_segment_BS[:, None, :, None] == kv_segment_BT[:, None, None, :]
    logits = jnp.where(same, logits, -1e30)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.where(same, jnp.exp(logits - top), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    return jnp.einsum("bnst,btnk->bsnk", weights.astype(v_BTNK.dtype), v_BTNK)

"""The definition: all weights at once, S x T of them a head. For tests, and for short rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp

EMPTY = -1e30  # log of a denominator without terms; finite, so that differences of two are numbers


def visible(q_segment_BS: jax.Array, kv_segment_BT: jax.Array) -> jax.Array:
    """Whether each query sees each key, (B, S, T)."""
    return (q_segment_BS[:, :, None] == kv_segment_BT[:, None, :]) & (q_segment_BS[:, :, None] > 0)


def forward(q_BSNK, k_BTNK, v_BTNK, q_segment_BS, kv_segment_BT, scale):
    seen_BNST = visible(q_segment_BS, kv_segment_BT)[:, None]
    logits_BNST = scale * jnp.einsum("bsnk,btnk->bnst", q_BSNK, k_BTNK, preferred_element_type=jnp.float32)
    logits_BNST = jnp.where(seen_BNST, logits_BNST, EMPTY)
    top_BNS = jnp.max(logits_BNST, axis=-1)
    weights_BNST = jnp.where(seen_BNST, jnp.exp(logits_BNST - top_BNS[..., None]), 0.0)
    total_BNS = jnp.sum(weights_BNST, axis=-1)
    weights_BNST /= jnp.where(total_BNS > 0, total_BNS, 1.0)[..., None]
    o_BSNK = jnp.einsum("bnst,btnk->bsnk", weights_BNST.astype(v_BTNK.dtype), v_BTNK)
    return o_BSNK, jnp.where(total_BNS > 0, top_BNS + jnp.log(jnp.maximum(total_BNS, 1e-37)), EMPTY)


def backward(q_BSNK, k_BTNK, v_BTNK, q_segment_BS, kv_segment_BT, o_BSNK, lse_BNS, d_o_BSNK, scale):
    seen_BNST = visible(q_segment_BS, kv_segment_BT)[:, None]
    logits_BNST = scale * jnp.einsum("bsnk,btnk->bnst", q_BSNK, k_BTNK, preferred_element_type=jnp.float32)
    weights_BNST = jnp.where(seen_BNST, jnp.exp(logits_BNST - lse_BNS[..., None]), 0.0)
    d_v = jnp.einsum("bnst,bsnk->btnk", weights_BNST.astype(v_BTNK.dtype), d_o_BSNK)
    d_weights_BNST = jnp.einsum("bsnk,btnk->bnst", d_o_BSNK, v_BTNK, preferred_element_type=jnp.float32)
    mean_BNS = jnp.einsum("bsnk,bsnk->bns", d_o_BSNK, o_BSNK, preferred_element_type=jnp.float32)
    d_logits_BNST = (scale * weights_BNST * (d_weights_BNST - mean_BNS[..., None])).astype(q_BSNK.dtype)
    d_q = jnp.einsum("bnst,btnk->bsnk", d_logits_BNST, k_BTNK)
    d_k = jnp.einsum("bnst,bsnk->btnk", d_logits_BNST, q_BSNK)
    return d_q, d_k, d_v

"""Attention between packed rows: a query sees a key where both carry the same segment id."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

MASKED = -1e30


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
    key of its segment gets zeros. Without a bias, heads run one after another, so that the weights of one head alone
    are held at a time, and none are kept for the gradient.
    """
    scale = q_BSNK.shape[-1] ** -0.5 if scale is None else scale
    if bias_NST is not None:
        same = q_segment_BS[:, None, :, None] == kv_segment_BT[:, None, None, :]
        logits = scale * jnp.einsum("bsnk,btnk->bnst", q_BSNK, k_BTNK, preferred_element_type=jnp.float32)
        weights, _ = _softmax(logits + bias_NST, same)
        return jnp.einsum("bnst,btnk->bsnk", weights.astype(v_BTNK.dtype), v_BTNK)
    heads = (jnp.moveaxis(x, 2, 0) for x in (q_BSNK, k_BTNK, v_BTNK))
    out = jax.lax.map(lambda qkv: _head(*qkv, q_segment_BS, kv_segment_BT, scale), tuple(heads))
    return jnp.moveaxis(out, 0, 2)


def _softmax(logits: jax.Array, same: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(softmax over the last axis where `same`, log of its denominator); zeros where nothing is the same."""
    logits = jnp.where(same, logits, MASKED)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.where(same, jnp.exp(logits - top), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    total = jnp.where(total > 0, total, 1.0)
    return weights / total, (top + jnp.log(total))[..., 0]


def _logits(q_BSK, k_BTK, q_segment_BS, kv_segment_BT, scale) -> tuple[jax.Array, jax.Array]:
    logits = scale * jnp.einsum("bsk,btk->bst", q_BSK, k_BTK, preferred_element_type=jnp.float32)
    return logits, q_segment_BS[:, :, None] == kv_segment_BT[:, None, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _head(q_BSK, k_BTK, v_BTK, q_segment_BS, kv_segment_BT, scale):
    return _head_forward(q_BSK, k_BTK, v_BTK, q_segment_BS, kv_segment_BT, scale)[0]


def _head_forward(q_BSK, k_BTK, v_BTK, q_segment_BS, kv_segment_BT, scale):
    weights_BST, denominator_BS = _softmax(*_logits(q_BSK, k_BTK, q_segment_BS, kv_segment_BT, scale))
    out_BSK = jnp.einsum("bst,btk->bsk", weights_BST.astype(v_BTK.dtype), v_BTK)
    return out_BSK, (q_BSK, k_BTK, v_BTK, q_segment_BS, kv_segment_BT, out_BSK, denominator_BS)


def _head_backward(scale, residuals, d_out_BSK):
    """The weights are computed again from the denominators (Dao et al. 2022, arXiv:2205.14135, algorithm 4)."""
    q_BSK, k_BTK, v_BTK, q_segment_BS, kv_segment_BT, out_BSK, denominator_BS = residuals
    logits_BST, same = _logits(q_BSK, k_BTK, q_segment_BS, kv_segment_BT, scale)
    weights_BST = jnp.where(same, jnp.exp(logits_BST - denominator_BS[..., None]), 0.0)
    d_v = jnp.einsum("bst,bsk->btk", weights_BST.astype(v_BTK.dtype), d_out_BSK)
    d_weights_BST = jnp.einsum("bsk,btk->bst", d_out_BSK, v_BTK, preferred_element_type=jnp.float32)
    mean_BS = jnp.einsum("bsk,bsk->bs", d_out_BSK, out_BSK, preferred_element_type=jnp.float32)
    d_logits_BST = (scale * weights_BST * (d_weights_BST - mean_BS[..., None])).astype(q_BSK.dtype)
    d_q = jnp.einsum("bst,btk->bsk", d_logits_BST, k_BTK)
    d_k = jnp.einsum("bst,bsk->btk", d_logits_BST, q_BSK)
    return d_q, d_k, d_v, None, None


_head.defvjp(_head_forward, _head_backward)

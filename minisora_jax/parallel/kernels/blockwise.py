"""Attention by tiles in plain XLA, on any backend: memory linear in S, tiles without a common segment left out.

All heads go together, a tile of queries after another and over the tiles of keys that are near it, so that one tile of
weights a head is held at a time (Rabe & Staats 2021, arXiv:2112.05682). On CPUs tiles are small: they stay in the
cache, and packed clips share few of them. Short rows are a single tile.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from minisora_jax.parallel.kernels.reference import EMPTY, visible

BLOCK = 0  # the largest side of a tile; 0: what suits the backend


def extent(segment_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(smallest, largest) id of each row, padding left out; smallest > largest where there is nothing else."""
    real = segment_BS > 0
    most = jnp.iinfo(segment_BS.dtype).max
    return jnp.min(jnp.where(real, segment_BS, most), axis=-1), jnp.max(jnp.where(real, segment_BS, -1), axis=-1)


def meet(extent_B, other_B) -> jax.Array:
    """Whether a segment may be in both blocks of ids, in any of the rows. Never wrong where it says no."""
    return jnp.any(jnp.maximum(extent_B[0], other_B[0]) <= jnp.minimum(extent_B[1], other_B[1]), axis=-1)


def forward(q_BSNK, k_BTNK, v_BTNK, q_segment_BS, kv_segment_BT, scale):
    S, ids_q, ids_k = q_BSNK.shape[1], _tiles(q_segment_BS), _tiles(kv_segment_BT)
    q, k, v = (_tiles(_heads_first(x)) for x in (q_BSNK, k_BTNK, v_BTNK))
    tile = lambda query: _attend_tile(*query, k, v, ids_k, scale)
    o, lse_BNS = (_whole(x, S) for x in jax.lax.map(tile, (q, ids_q, _near(ids_q, ids_k))))
    return jnp.moveaxis(o, 1, 2), lse_BNS


def _near(ids, other_ids) -> tuple[jax.Array, jax.Array]:
    """(first, after the last) of the other side's tiles that may share a segment with each tile; equal where none does.

    Clips lie together in a row, so what is between the two is near as well, but for rows that differ.
    """
    near = meet(jax.tree.map(lambda x: x[:, None], extent(ids)), extent(other_ids))  # of (tiles, B) each
    first, after = jnp.argmax(near, axis=1), near.shape[1] - jnp.argmax(near[:, ::-1], axis=1)
    return first, jnp.where(jnp.any(near, axis=1), after, first)


def _attend_tile(q_BNSK, q_ids, near, k_tiles, v_tiles, id_tiles, scale):
    """One tile of queries against the keys that are near."""
    if k_tiles.shape[0] == 1:  # no running maximum to keep: normalise the weights before the product
        logits, seen = _logits(q_BNSK, k_tiles[0], q_ids, id_tiles[0], scale)
        top = jnp.max(logits, axis=-1)
        weights = jnp.where(seen, jnp.exp(logits - top[..., None]), 0.0)
        total = jnp.sum(weights, axis=-1)
        weights = (weights / jnp.where(total > 0, total, 1.0)[..., None]).astype(v_tiles.dtype)
        return jnp.einsum("bnst,bntk->bnsk", weights, v_tiles[0]), _log_total(top, total)

    def update(j, carry):
        (o, top, total), (k, v, ids) = carry, (x[j] for x in (k_tiles, v_tiles, id_tiles))
        logits, seen = _logits(q_BNSK, k, q_ids, ids, scale)
        higher = jnp.maximum(top, jnp.max(logits, axis=-1))
        weights = jnp.where(seen, jnp.exp(logits - higher[..., None]), 0.0)
        fade = jnp.exp(top - higher)
        part = jnp.einsum("bnst,bntk->bnsk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return o * fade[..., None] + part, higher, total * fade + jnp.sum(weights, axis=-1)

    zero = jnp.zeros((*q_BNSK.shape[:3], v_tiles.shape[-1]), jnp.float32)
    start = (zero, zero[..., 0] + EMPTY, zero[..., 0])
    o, top, total = jax.lax.fori_loop(*near, update, start)
    o = o / jnp.where(total > 0, total, 1.0)[..., None]
    return o.astype(v_tiles.dtype), _log_total(top, total)


def backward(q_BSNK, k_BTNK, v_BTNK, q_segment_BS, kv_segment_BT, o_BSNK, lse_BNS, d_o_BSNK, scale):
    S, T = q_BSNK.shape[1], k_BTNK.shape[1]
    ids_q, ids_k = _tiles(q_segment_BS), _tiles(kv_segment_BT)
    mean_BNS = jnp.einsum("bsnk,bsnk->bns", d_o_BSNK, o_BSNK, preferred_element_type=jnp.float32)
    q, k, v, d_o = (_tiles(_heads_first(x)) for x in (q_BSNK, k_BTNK, v_BTNK, d_o_BSNK))
    queries = (q, ids_q, d_o, _tiles(lse_BNS), _tiles(mean_BNS))

    def of_keys(d_q, key):
        k, v, ids, near = key

        def add(i, carry):
            d_q, d_k, d_v = carry
            parts = _tile_gradients(*(x[i] for x in queries), k, v, ids, scale)
            return d_q.at[i].add(parts[0]), d_k + parts[1], d_v + parts[2]

        zero = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
        d_q, d_k, d_v = jax.lax.fori_loop(*near, add, (d_q, *zero))
        return d_q, (d_k, d_v)

    if len(q) == len(k) == 1:
        gradients = (x[None] for x in _tile_gradients(*(x[0] for x in queries), k[0], v[0], ids_k[0], scale))
    else:
        start = jnp.zeros(q.shape, jnp.float32)
        d_q, d_kv = jax.lax.scan(of_keys, start, (k, v, ids_k, _near(ids_k, ids_q)))
        gradients = d_q, *d_kv
    return tuple(
        jnp.moveaxis(_whole(d, n), 1, 2).astype(x.dtype)
        for d, n, x in zip(gradients, (S, T, T), (q_BSNK, k_BTNK, v_BTNK))
    )


def _tile_gradients(q, q_ids, d_o, lse, mean, k, v, k_ids, scale):
    logits, seen = _logits(q, k, q_ids, k_ids, scale)
    weights = jnp.where(seen, jnp.exp(logits - lse[..., None]), 0.0)
    d_v = jnp.einsum("bnst,bnsk->bntk", weights.astype(v.dtype), d_o, preferred_element_type=jnp.float32)
    d_weights = jnp.einsum("bnsk,bntk->bnst", d_o, v, preferred_element_type=jnp.float32)
    d_logits = (scale * weights * (d_weights - mean[..., None])).astype(q.dtype)
    d_q = jnp.einsum("bnst,bntk->bnsk", d_logits, k, preferred_element_type=jnp.float32)
    d_k = jnp.einsum("bnst,bnsk->bntk", d_logits, q, preferred_element_type=jnp.float32)
    return d_q, d_k, d_v


def _logits(q_BNSK, k_BNTK, q_ids, k_ids, scale):
    # The barrier ties the ids to these queries: XLA would else compute all masks, S x T, ahead of the tiles.
    q_BNSK, q_ids, k_ids = jax.lax.optimization_barrier((q_BNSK, q_ids, k_ids))
    seen = visible(q_ids, k_ids)[:, None]
    logits = scale * jnp.einsum("bnsk,bntk->bnst", q_BNSK, k_BNTK, preferred_element_type=jnp.float32)
    return jnp.where(seen, logits, EMPTY), seen


def _log_total(top, total):
    return jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), EMPTY)


def _heads_first(x_BSNK):
    return jnp.moveaxis(x_BSNK, 2, 1)


def _tiles(x):
    """Ids (B, S), lse (B, N, S) or (B, N, S, K) -> (tiles, ...): as few as may be, of one side, zeros at the end."""
    axis = max(1, min(x.ndim, 3) - 1)
    S = x.shape[axis]
    count = -(-S // (BLOCK or (128 if jax.default_backend() == "cpu" else 512)))
    side = -(-S // count)
    if count == 1:
        return x[None]
    widths = [(0, count * side - S if i == axis else 0) for i in range(x.ndim)]
    x = jnp.pad(x, widths).reshape(*x.shape[:axis], count, side, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _whole(tiles, S):
    """The first S of (tiles, B, N, side, ...) put together: (B, N, S, ...)."""
    count, B, N, side, *rest = tiles.shape
    return jnp.moveaxis(tiles, 0, 2).reshape(B, N, count * side, *rest)[:, :, :S]

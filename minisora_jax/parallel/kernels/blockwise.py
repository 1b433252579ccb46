"""Attention by tiles in plain XLA, on any backend: memory linear in S, tiles without a common segment left out.

Heads run one after another and a head's tiles too, so that one tile of weights is held at a time (Rabe & Staats 2021,
arXiv:2112.05682). Short rows are a single tile, which on CPUs is also the quickest way.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from minisora_jax.parallel.kernels.reference import EMPTY, visible

BLOCK = 1024  # the largest side of a tile


def extent(segment_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(smallest, largest) id of each row, padding left out; smallest > largest where there is nothing else."""
    real = segment_BS > 0
    most = jnp.iinfo(segment_BS.dtype).max
    return jnp.min(jnp.where(real, segment_BS, most), axis=-1), jnp.max(jnp.where(real, segment_BS, -1), axis=-1)


def meet(extent_B, other_B) -> jax.Array:
    """Whether a segment may be in both blocks of ids, in any of the rows. Never wrong where it says no."""
    return jnp.any(jnp.maximum(extent_B[0], other_B[0]) <= jnp.minimum(extent_B[1], other_B[1]))


def forward(q_BSNK, k_BTNK, v_BTNK, q_segment_BS, kv_segment_BT, scale):
    S = q_BSNK.shape[1]
    ids_q, ids_k = _tiles(q_segment_BS), _tiles(kv_segment_BT)

    def head(qkv):
        q, k, v = (_tiles(x) for x in qkv)
        o, lse = jax.lax.map(lambda q: _attend_tile(*q, k, v, ids_k, scale), (q, ids_q))
        return _whole(o, S), _whole(lse, S)

    o_NBSK, lse_NBS = jax.lax.map(head, _heads_first(q_BSNK, k_BTNK, v_BTNK))
    return jnp.moveaxis(o_NBSK, 0, 2), jnp.moveaxis(lse_NBS, 0, 1)


def _attend_tile(q_BSK, q_ids, k_tiles, v_tiles, id_tiles, scale):
    """One tile of queries against all keys."""
    if k_tiles.shape[0] == 1:  # no running maximum to keep: normalise the weights before the product
        logits, seen = _logits(q_BSK, k_tiles[0], q_ids, id_tiles[0], scale)
        top = jnp.max(logits, axis=-1)
        weights = jnp.where(seen, jnp.exp(logits - top[..., None]), 0.0)
        total = jnp.sum(weights, axis=-1)
        weights = (weights / jnp.where(total > 0, total, 1.0)[..., None]).astype(v_tiles.dtype)
        return jnp.einsum("bst,btk->bsk", weights, v_tiles[0]), _log_total(top, total)

    def update(carry, k, v, ids):
        o, top, total = carry
        logits, seen = _logits(q_BSK, k, q_ids, ids, scale)
        higher = jnp.maximum(top, jnp.max(logits, axis=-1))
        weights = jnp.where(seen, jnp.exp(logits - higher[..., None]), 0.0)
        fade = jnp.exp(top - higher)
        part = jnp.einsum("bst,btk->bsk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return o * fade[..., None] + part, higher, total * fade + jnp.sum(weights, axis=-1)

    def tile(carry, key):
        near = meet(extent(q_ids), extent(key[2]))
        return jax.lax.cond(near, update, lambda carry, *key: carry, carry, *key), None

    zero = jnp.zeros(q_BSK.shape, jnp.float32)
    start = (zero, zero[..., 0] + EMPTY, zero[..., 0])
    (o, top, total), _ = jax.lax.scan(tile, start, (k_tiles, v_tiles, id_tiles))
    o = o / jnp.where(total > 0, total, 1.0)[..., None]
    return o.astype(v_tiles.dtype), _log_total(top, total)


def backward(q_BSNK, k_BTNK, v_BTNK, q_segment_BS, kv_segment_BT, o_BSNK, lse_BNS, d_o_BSNK, scale):
    S, T = q_BSNK.shape[1], k_BTNK.shape[1]
    ids_q, ids_k = _tiles(q_segment_BS), _tiles(kv_segment_BT)

    def head(arrays):
        q, k, v, o, d_o, lse = (_tiles(x) for x in arrays)
        mean = jnp.einsum("nbsk,nbsk->nbs", d_o, o, preferred_element_type=jnp.float32)
        queries = (q, ids_q, d_o, lse, mean)
        if len(q) == len(k) == 1:
            d_q, d_k, d_v = _tile_gradients(*(x[0] for x in queries), k[0], v[0], ids_k[0], scale)
            return d_q, d_k, d_v

        def of_keys(d_q, key):
            k, v, ids = key

            def add(carry, i, query):
                d_q, d_k, d_v = carry
                parts = _tile_gradients(*query, k, v, ids, scale)
                return d_q.at[i].add(parts[0]), d_k + parts[1], d_v + parts[2]

            def of_queries(carry, query):
                i, query = query
                near = meet(extent(query[1]), extent(ids))
                return jax.lax.cond(near, add, lambda carry, i, query: carry, carry, i, query), None

            zero = jnp.zeros(k.shape, jnp.float32)
            (d_q, d_k, d_v), _ = jax.lax.scan(of_queries, (d_q, zero, zero), (jnp.arange(len(q)), queries))
            return d_q, (d_k, d_v)

        d_q, (d_k, d_v) = jax.lax.scan(of_keys, jnp.zeros(q.shape, jnp.float32), (k, v, ids_k))
        return _whole(d_q, S), _whole(d_k, T), _whole(d_v, T)

    arrays = (*_heads_first(q_BSNK, k_BTNK, v_BTNK, o_BSNK, d_o_BSNK), jnp.moveaxis(lse_BNS, 1, 0))
    return tuple(
        jnp.moveaxis(d, 0, 2).astype(x.dtype) for d, x in zip(jax.lax.map(head, arrays), (q_BSNK, k_BTNK, v_BTNK))
    )


def _tile_gradients(q, q_ids, d_o, lse, mean, k, v, k_ids, scale):
    logits, seen = _logits(q, k, q_ids, k_ids, scale)
    weights = jnp.where(seen, jnp.exp(logits - lse[..., None]), 0.0)
    d_v = jnp.einsum("bst,bsk->btk", weights.astype(v.dtype), d_o, preferred_element_type=jnp.float32)
    d_weights = jnp.einsum("bsk,btk->bst", d_o, v, preferred_element_type=jnp.float32)
    d_logits = (scale * weights * (d_weights - mean[..., None])).astype(q.dtype)
    d_q = jnp.einsum("bst,btk->bsk", d_logits, k, preferred_element_type=jnp.float32)
    d_k = jnp.einsum("bst,bsk->btk", d_logits, q, preferred_element_type=jnp.float32)
    return d_q, d_k, d_v


def _logits(q_BSK, k_BTK, q_ids, k_ids, scale):
    # The barrier ties the ids to this head's queries: XLA would else compute all masks, S x T, ahead of the heads.
    q_BSK, q_ids, k_ids = jax.lax.optimization_barrier((q_BSK, q_ids, k_ids))
    seen = visible(q_ids, k_ids)
    logits = scale * jnp.einsum("bsk,btk->bst", q_BSK, k_BTK, preferred_element_type=jnp.float32)
    return jnp.where(seen, logits, EMPTY), seen


def _log_total(top, total):
    return jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), EMPTY)


def _heads_first(*arrays_BSNK):
    return tuple(jnp.moveaxis(x, 2, 0) for x in arrays_BSNK)


def _tiles(x_BS):
    """(B, S, ...) -> (tiles, B, side, ...): as few tiles as BLOCK allows, of one side, zeros at the end."""
    B, S, *rest = x_BS.shape
    count = -(-S // BLOCK)
    side = -(-S // count)
    if count == 1:
        return x_BS[None]
    x_BS = jnp.pad(x_BS, ((0, 0), (0, count * side - S)) + ((0, 0),) * len(rest))
    return jnp.moveaxis(x_BS.reshape(B, count, side, *rest), 1, 0)


def _whole(tiles, S):
    count, B, side, *rest = tiles.shape
    return jnp.moveaxis(tiles, 0, 1).reshape(B, count * side, *rest)[:, :S]

"""Attention by tiles in plain XLA, on any backend. Memory is linear in S; tiles without a common segment are skipped.

The tiles of queries are computed one after another, with all heads together. Each visits the tiles of keys that may
share a segment with it, so one tile of weights per head is in memory (Rabe & Staats 2021, arXiv:2112.05682). On CPUs
the tiles are small: they stay in the cache, and few of them hold tokens of the same clip. A short row is one tile.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from minisora_jax.parallel.kernels.reference import EMPTY, first_seen, visible

BLOCK = 0  # the largest side of a tile in tokens; 0: 128 on CPUs, 512 elsewhere


def extent(segment_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(smallest, largest) segment id of each row, ignoring padding. smallest > largest in a row of padding."""
    real = segment_BS > 0
    most = jnp.iinfo(segment_BS.dtype).max
    return jnp.min(jnp.where(real, segment_BS, most), axis=-1), jnp.max(jnp.where(real, segment_BS, -1), axis=-1)


def seen_extent(q_segment_BS: jax.Array, causal: bool) -> tuple[jax.Array, jax.Array]:
    """(smallest, largest) id that the queries of each row attend to; smallest > largest in a row of padding."""
    first, last = extent(q_segment_BS)
    return (first_seen(first) if causal else first), last


def meet(extent_B: tuple[jax.Array, jax.Array], other_B: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Whether two blocks of ids may share a segment in any row, from their extents. False is always right."""
    return jnp.any(jnp.maximum(extent_B[0], other_B[0]) <= jnp.minimum(extent_B[1], other_B[1]), axis=-1)


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
    S, q_ids, kv_ids = q_BSNK.shape[1], _tiles(q_segment_BS), _tiles(kv_segment_BM)
    q, k, v = (_tiles(_heads_first(x)) for x in (q_BSNK, k_BMNK, v_BMNK))
    tile = lambda query: _attend_tile(query[0], query[1], query[2], k, v, kv_ids, scale, causal)
    o, lse = jax.lax.map(tile, (q, q_ids, _near(seen_extent(q_ids, causal), extent(kv_ids))))
    o_BNSK, lse_BNS = _whole(o, S), _whole(lse, S)
    return jnp.moveaxis(o_BNSK, 1, 2), lse_BNS


def _near(extents, other_extents) -> tuple[jax.Array, jax.Array]:
    """For each tile, (first, last + 1) of the other side's tiles that it may share ids with; equal if none does.

    Extents are (tiles, B). Every tile in between counts as near, because a clip's tokens are contiguous in a row.
    """
    return span(meet(jax.tree.map(lambda x: x[:, None], extents), other_extents))


def span(near: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(first, last + 1) of the True entries along the last axis; equal if there is none."""
    first, after = jnp.argmax(near, axis=-1), near.shape[-1] - jnp.argmax(near[..., ::-1], axis=-1)
    return first, jnp.where(jnp.any(near, axis=-1), after, first)


def _attend_tile(q_BNSK, q_ids, near, k_tiles, v_tiles, id_tiles, scale, causal):
    """(o_BNSK, lse_BNS) of one tile of queries over the tiles of keys near[0] to near[1]."""
    if k_tiles.shape[0] == 1:  # with one tile there is no running maximum: normalise the weights before the product
        logits, seen = _logits(q_BNSK, k_tiles[0], q_ids, id_tiles[0], scale, causal)
        top = jnp.max(logits, axis=-1)
        weights = jnp.where(seen, jnp.exp(logits - top[..., None]), 0.0)
        total = jnp.sum(weights, axis=-1)
        weights = (weights / jnp.where(total > 0, total, 1.0)[..., None]).astype(v_tiles.dtype)
        return jnp.einsum("bnsm,bnmk->bnsk", weights, v_tiles[0]), _log_total(top, total)

    def update(j, carry):
        (o, top, total), (k, v, ids) = carry, (x[j] for x in (k_tiles, v_tiles, id_tiles))
        logits, seen = _logits(q_BNSK, k, q_ids, ids, scale, causal)
        higher = jnp.maximum(top, jnp.max(logits, axis=-1))
        weights = jnp.where(seen, jnp.exp(logits - higher[..., None]), 0.0)
        fade = jnp.exp(top - higher)
        part = jnp.einsum("bnsm,bnmk->bnsk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return o * fade[..., None] + part, higher, total * fade + jnp.sum(weights, axis=-1)

    zero = jnp.zeros((*q_BNSK.shape[:3], v_tiles.shape[-1]), jnp.float32)
    start = (zero, zero[..., 0] + EMPTY, zero[..., 0])
    o, top, total = jax.lax.fori_loop(near[0], near[1], update, start)
    o = o / jnp.where(total > 0, total, 1.0)[..., None]
    return o.astype(v_tiles.dtype), _log_total(top, total)


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
    S, M = q_BSNK.shape[1], k_BMNK.shape[1]
    q_ids, kv_ids = _tiles(q_segment_BS), _tiles(kv_segment_BM)
    mean_BNS = jnp.einsum("bsnk,bsnk->bns", d_o_BSNK, o_BSNK, preferred_element_type=jnp.float32)
    q, k, v, d_o = (_tiles(_heads_first(x)) for x in (q_BSNK, k_BMNK, v_BMNK, d_o_BSNK))
    queries = (q, q_ids, d_o, _tiles(lse_BNS), _tiles(mean_BNS))

    def of_keys(d_q, key):
        k, v, ids, near = key

        def add(i, carry):
            d_q, d_k, d_v = carry
            parts = _tile_gradients(tuple(x[i] for x in queries), k, v, ids, scale, causal)
            return d_q.at[i].add(parts[0]), d_k + parts[1], d_v + parts[2]

        zero = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
        d_q, d_k, d_v = jax.lax.fori_loop(near[0], near[1], add, (d_q, *zero))
        return d_q, (d_k, d_v)

    if len(q) == len(k) == 1:
        parts = _tile_gradients(tuple(x[0] for x in queries), k[0], v[0], kv_ids[0], scale, causal)
        d_q, d_k, d_v = (x[None] for x in parts)
    else:
        start, near = jnp.zeros(q.shape, jnp.float32), _near(extent(kv_ids), seen_extent(q_ids, causal))
        d_q, (d_k, d_v) = jax.lax.scan(of_keys, start, (k, v, kv_ids, near))
    join = lambda d, length, x: jnp.moveaxis(_whole(d, length), 1, 2).astype(x.dtype)
    return join(d_q, S, q_BSNK), join(d_k, M, k_BMNK), join(d_v, M, v_BMNK)


def _tile_gradients(query, k, v, k_ids, scale, causal):
    """(d_q, d_k, d_v) of one pair of tiles, float32. `query` is (q, ids, d_o, lse, mean) of the tile of queries."""
    q, q_ids, d_o, lse, mean = query
    logits, seen = _logits(q, k, q_ids, k_ids, scale, causal)
    weights = jnp.where(seen, jnp.exp(logits - lse[..., None]), 0.0)
    d_v = jnp.einsum("bnsm,bnsk->bnmk", weights.astype(v.dtype), d_o, preferred_element_type=jnp.float32)
    d_weights = jnp.einsum("bnsk,bnmk->bnsm", d_o, v, preferred_element_type=jnp.float32)
    d_logits = (scale * weights * (d_weights - mean[..., None])).astype(q.dtype)
    d_q = jnp.einsum("bnsm,bnmk->bnsk", d_logits, k, preferred_element_type=jnp.float32)
    d_k = jnp.einsum("bnsm,bnsk->bnmk", d_logits, q, preferred_element_type=jnp.float32)
    return d_q, d_k, d_v


def _logits(q_BNSK, k_BNMK, q_ids, k_ids, scale, causal):
    """(logits_BNSM, whether each query attends to each key (B, 1, S, M))."""
    # Without the barrier, which ties the ids to these queries, XLA computes all S x M masks ahead of the tiles.
    q_BNSK, q_ids, k_ids = jax.lax.optimization_barrier((q_BNSK, q_ids, k_ids))
    seen = visible(q_ids, k_ids, causal)[:, None]
    logits = scale * jnp.einsum("bnsk,bnmk->bnsm", q_BNSK, k_BNMK, preferred_element_type=jnp.float32)
    return jnp.where(seen, logits, EMPTY), seen


def _log_total(top, total):
    """The logarithm of the softmax's denominator; EMPTY where it has no terms."""
    return jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), EMPTY)


def _heads_first(x_BSNK):
    return jnp.moveaxis(x_BSNK, 2, 1)


def _tiles(x):
    """Arrays (B, S), (B, N, S) or (B, N, S, K) as tiles along S: (tiles, B, ..., side, ...).

    Tiles are as few as possible and equally long. Zeros fill the last one.
    """
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
    """Tiles (tiles, B, N, side, ...) concatenated to (B, N, S, ...), without the padding after S."""
    count, B, N, side, *rest = tiles.shape
    return jnp.moveaxis(tiles, 0, 2).reshape(B, N, count * side, *rest)[:, :, :S]

"""Flash attention for GPUs, by Pallas and Triton: FlashAttention-2 (Dao 2023, arXiv:2307.08691) with segment ids.

One program computes a tile of queries of one head (backward, also a tile of keys) and goes over the tiles of the other
side that may share a segment with it; what is left out is neither loaded nor computed. Nothing of size S x T is held.

On other backends than GPUs it runs in Pallas's interpreter: slowly, for tests. Checked so, in value and gradient, and
lowered for CUDA; it has not been run on a GPU by us, and so "auto" does not choose it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from minisora_jax.parallel.kernels.blockwise import extent
from minisora_jax.parallel.kernels.reference import EMPTY

TILE = 64  # tokens along each side; with heads of 128 in bfloat16, four such tiles are 64 KiB of an SM's memory
SMALLEST = 16  # the least side of a matrix that tensor cores multiply


def forward(q_BSNK, k_BTNK, v_BTNK, q_segment_BS, kv_segment_BT, scale):
    (B, S, N, K), q_ids, kv_ids = q_BSNK.shape, _tiled(q_segment_BS), _tiled(kv_segment_BT)
    q, k, v = (_tiled(x) for x in (q_BSNK, k_BTNK, v_BTNK))
    rows = q.shape[1]
    o, lse = _call(
        functools.partial(_forward_tile, scale=scale),
        (q, q_ids, k, v, kv_ids, *_extents(kv_ids)),
        (_tile_of, _ids_of, _all, _all, _all_ids, _all_ids, _all_ids),
        (jax.ShapeDtypeStruct(q.shape, v.dtype), jax.ShapeDtypeStruct((B, N, rows), jnp.float32)),
        (_tile_of, _lse_of),
    )
    return o[:, :S, :, :K], lse[..., :S]


def backward(q_BSNK, k_BTNK, v_BTNK, q_segment_BS, kv_segment_BT, o_BSNK, lse_BNS, d_o_BSNK, scale):
    (_, S, _, K), T = q_BSNK.shape, k_BTNK.shape[1]
    q_ids, kv_ids = _tiled(q_segment_BS), _tiled(kv_segment_BT)
    mean_BNS = jnp.einsum("bsnk,bsnk->bns", d_o_BSNK, o_BSNK, preferred_element_type=jnp.float32)
    q, k, v, d_o = (_tiled(x) for x in (q_BSNK, k_BTNK, v_BTNK, d_o_BSNK))
    lse, mean = (jnp.pad(x, ((0, 0), (0, 0), (0, q.shape[1] - S))) for x in (lse_BNS, mean_BNS))
    (d_q,) = _call(
        functools.partial(_query_gradient_tile, scale=scale),
        (q, q_ids, d_o, lse, mean, k, v, kv_ids, *_extents(kv_ids)),
        (_tile_of, _ids_of, _tile_of, _lse_of, _lse_of, _all, _all, _all_ids, _all_ids, _all_ids),
        (jax.ShapeDtypeStruct(q.shape, jnp.float32),),
        (_tile_of,),
    )
    d_k, d_v = _call(
        functools.partial(_key_gradient_tile, scale=scale),
        (k, v, kv_ids, q, q_ids, d_o, lse, mean, *_extents(q_ids)),
        (_tile_of, _tile_of, _ids_of, _all, _all_ids, _all, _all_lse, _all_lse, _all_ids, _all_ids),
        (jax.ShapeDtypeStruct(k.shape, jnp.float32), jax.ShapeDtypeStruct(v.shape, jnp.float32)),
        (_tile_of, _tile_of),
    )
    cut = lambda d, x, length: d[:, :length, :, :K].astype(x.dtype)
    return cut(d_q, q_BSNK, S), cut(d_k, k_BTNK, T), cut(d_v, v_BTNK, T)


# ---- Tiles. A `_ref` is a tile of one (row, head), or all of it.


def _forward_tile(q_ref, q_ids_ref, k_ref, v_ref, kv_ids_ref, least_ref, most_ref, o_ref, lse_ref, *, scale):
    q, ids = q_ref[...], q_ids_ref[...]
    side = q.shape[0]

    def update(j, carry):
        o, top, total = carry
        k, v, kv_ids = (_load(ref, j) for ref in (k_ref, v_ref, kv_ids_ref))
        seen = _seen(ids, kv_ids)
        logits = jnp.where(seen, scale * _dot(q, k.T), EMPTY)
        higher = jnp.maximum(top, jnp.max(logits, axis=1))
        weights = jnp.where(seen, jnp.exp(logits - higher[:, None]), 0.0)
        fade = jnp.exp(top - higher)
        return o * fade[:, None] + _dot(weights.astype(v.dtype), v), higher, total * fade + jnp.sum(weights, axis=1)

    start = (jnp.zeros((side, v_ref.shape[1]), jnp.float32), jnp.full((side,), EMPTY), jnp.zeros((side,), jnp.float32))
    o, top, total = _over_near_tiles(ids, least_ref, most_ref, update, start)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    o_ref[...] = (o / total[:, None]).astype(o_ref.dtype)
    lse_ref[...] = jnp.where(some, top + jnp.log(total), EMPTY)


def _query_gradient_tile(
    q_ref, q_ids_ref, d_o_ref, lse_ref, mean_ref, k_ref, v_ref, kv_ids_ref, least_ref, most_ref, d_q_ref, *, scale
):
    q, ids, d_o, lse, mean = (ref[...] for ref in (q_ref, q_ids_ref, d_o_ref, lse_ref, mean_ref))

    def update(j, d_q):
        k, v, kv_ids = (_load(ref, j) for ref in (k_ref, v_ref, kv_ids_ref))
        _, d_logits = _weights(q, ids, d_o, lse, mean, k, v, kv_ids, scale)
        return d_q + _dot(d_logits, k)

    d_q_ref[...] = _over_near_tiles(ids, least_ref, most_ref, update, jnp.zeros(q.shape, jnp.float32))


def _key_gradient_tile(k_ref, v_ref, kv_ids_ref, *others, scale):
    *query_refs, least_ref, most_ref, d_k_ref, d_v_ref = others
    k, v, kv_ids = k_ref[...], v_ref[...], kv_ids_ref[...]

    def update(i, carry):
        q, ids, d_o, lse, mean = (_load(ref, i) for ref in query_refs)
        weights, d_logits = _weights(q, ids, d_o, lse, mean, k, v, kv_ids, scale)
        return carry[0] + _dot(d_logits.T, q), carry[1] + _dot(weights.astype(d_o.dtype).T, d_o)

    zero = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    d_k_ref[...], d_v_ref[...] = _over_near_tiles(kv_ids, least_ref, most_ref, update, zero)


def _weights(q, ids, d_o, lse, mean, k, v, kv_ids, scale):
    """(softmax weights of a tile, gradients of its logits before the scale)."""
    weights = jnp.where(_seen(ids, kv_ids), jnp.exp(scale * _dot(q, k.T) - lse[:, None]), 0.0)
    return weights, (scale * weights * (_dot(d_o, v.T) - mean[:, None])).astype(q.dtype)


def _over_near_tiles(ids, least_ref, most_ref, update, start):
    """update(j, carry) over the other side's tiles j that may share a segment with these ids (`blockwise.meet`)."""
    some = ids > 0
    least = jnp.min(jnp.where(some, ids, jnp.iinfo(ids.dtype).max))
    most = jnp.max(jnp.where(some, ids, -1))

    def tile(j, carry):
        near = jnp.maximum(least, least_ref[j]) <= jnp.minimum(most, most_ref[j])
        return jax.lax.cond(near, lambda carry: update(j, carry), lambda carry: carry, carry)

    return jax.lax.fori_loop(0, least_ref.shape[0], tile, start)


def _seen(ids, kv_ids):
    return (ids[:, None] == kv_ids[None, :]) & (ids > 0)[:, None]


def _load(ref, j):
    side = TILE if ref.shape[0] % TILE == 0 else ref.shape[0]
    return plt.load(ref.at[pl.ds(j * side, side)])


def _dot(a, b):
    """float32 products of float32 (not TF32), float32 sums of anything."""
    return plt.dot(a, b, precision="highest" if a.dtype == jnp.float32 else None).astype(jnp.float32)


# ---- The grid: one program for each (tile, row, head)


def _call(kernel, arrays, specs, out_shape, out_specs):
    """The kernel over all tiles of the first array. Specs are functions of an array's shape."""
    B, S, N, _ = arrays[0].shape

    def run(interpret: bool, *arrays):
        return pl.pallas_call(
            kernel,
            grid=(S // _side(S), B, N),
            in_specs=[spec(x.shape) for spec, x in zip(specs, arrays)],
            out_specs=[spec(x.shape) for spec, x in zip(out_specs, out_shape)],
            out_shape=list(out_shape),
            compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
            interpret=interpret,
            name=kernel.func.__name__.strip("_"),
        )(*arrays)

    interpreted, lowered = functools.partial(run, True), functools.partial(run, False)
    return jax.lax.platform_dependent(*arrays, cuda=lowered, rocm=lowered, default=interpreted)


def _tile_of(shape):
    return pl.BlockSpec((None, _side(shape[1]), None, shape[3]), lambda i, b, n: (b, i, n, 0))


def _all(shape):
    return pl.BlockSpec((None, shape[1], None, shape[3]), lambda i, b, n: (b, 0, n, 0))


def _ids_of(shape):
    return pl.BlockSpec((None, _side(shape[1])), lambda i, b, n: (b, i))


def _all_ids(shape):
    return pl.BlockSpec((None, shape[1]), lambda i, b, n: (b, 0))


def _lse_of(shape):
    return pl.BlockSpec((None, None, _side(shape[2])), lambda i, b, n: (b, n, i))


def _all_lse(shape):
    return pl.BlockSpec((None, None, shape[2]), lambda i, b, n: (b, n, 0))


def _side(length: int) -> int:
    """Of the tiles of a length that `_tiled` made."""
    return TILE if length % TILE == 0 else length


def _tiled(x):
    """Ids (B, S), or (B, S, N, K): S up to whole tiles and K up to a power of two, filled with zeros."""
    S = x.shape[1]
    whole = max(pl.next_power_of_2(S), SMALLEST) if S <= TILE else S + -S % TILE
    widths = ((0, 0), (0, whole - S))
    if x.ndim == 4:
        widths += ((0, 0), (0, max(pl.next_power_of_2(x.shape[3]), SMALLEST) - x.shape[3]))
    return jnp.pad(x, widths)


def _extents(ids_BS):
    """(smallest, largest) id of each tile, (B, tiles) each."""
    B, S = ids_BS.shape
    return extent(ids_BS.reshape(B, S // _side(S), -1))

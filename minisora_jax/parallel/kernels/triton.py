"""Flash attention for GPUs, by Pallas and Triton: FlashAttention-2 (Dao 2023, arXiv:2307.08691) with segment ids.

One program computes a tile of queries of one head (backward, also a tile of keys) and goes over the tiles of the other
side that may share a segment with it; what is left out is neither loaded nor computed. Nothing of size S x T is held.

On other backends than GPUs it runs in Pallas's interpreter: slowly, for tests. On an H100 it agrees with float64 in value
and gradient, and the tilings below were the fastest of those that bench/gpu.py tries (docs/benchmarks.md).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from minisora_jax.parallel.kernels.blockwise import extent, meet
from minisora_jax.parallel.kernels.reference import EMPTY

SMALLEST = 16  # the least side of a matrix that tensor cores multiply


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a kernel is cut into programs; the sides are powers of two."""

    side: int  # tokens that a program holds
    step: int  # tokens of the other side that it loads at a time
    warps: int
    stages: int  # loads under way at once


FORWARD = Tiling(side=128, step=32, warps=4, stages=3)
QUERY_GRADIENT = Tiling(side=128, step=32, warps=4, stages=3)
KEY_GRADIENT = Tiling(side=64, step=64, warps=4, stages=2)


def forward(q_BSNK, k_BTNK, v_BTNK, q_segment_BS, kv_segment_BT, scale):
    (B, S, N, K), q_ids, kv_ids = q_BSNK.shape, _padded(q_segment_BS), _padded(kv_segment_BT)
    q, k, v = (_padded(x) for x in (q_BSNK, k_BTNK, v_BTNK))
    o, lse = _call(
        _forward_tile,
        _fitted(FORWARD, q),
        scale,
        q_ids,
        kv_ids,
        (q, k, v),
        (_tile_of, _all, _all),
        (jax.ShapeDtypeStruct(q.shape, v.dtype), jax.ShapeDtypeStruct((B, N, q.shape[1]), jnp.float32)),
        (_tile_of, _lse_of),
    )
    return o[:, :S, :, :K], lse[..., :S]


def backward(q_BSNK, k_BTNK, v_BTNK, q_segment_BS, kv_segment_BT, o_BSNK, lse_BNS, d_o_BSNK, scale):
    (_, S, _, K), T = q_BSNK.shape, k_BTNK.shape[1]
    q_ids, kv_ids = _padded(q_segment_BS), _padded(kv_segment_BT)
    mean_BNS = jnp.einsum("bsnk,bsnk->bns", d_o_BSNK, o_BSNK, preferred_element_type=jnp.float32)
    q, k, v, d_o = (_padded(x) for x in (q_BSNK, k_BTNK, v_BTNK, d_o_BSNK))
    lse, mean = (jnp.pad(x, ((0, 0), (0, 0), (0, q.shape[1] - S))) for x in (lse_BNS, mean_BNS))
    (d_q,) = _call(
        _query_gradient_tile,
        _fitted(QUERY_GRADIENT, q),
        scale,
        q_ids,
        kv_ids,
        (q, d_o, lse, mean, k, v),
        (_tile_of, _tile_of, _lse_of, _lse_of, _all, _all),
        (jax.ShapeDtypeStruct(q.shape, q.dtype),),
        (_tile_of,),
    )
    d_k, d_v = _call(
        _key_gradient_tile,
        _fitted(KEY_GRADIENT, q),
        scale,
        kv_ids,
        q_ids,
        (k, v, q, d_o, lse, mean),
        (_tile_of, _tile_of, _all, _all, _all_lse, _all_lse),
        (jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        (_tile_of, _tile_of),
    )
    return d_q[:, :S, :, :K], d_k[:, :T, :, :K], d_v[:, :T, :, :K]


# ---- Tiles. A `_ref` is a tile of one (row, head), or all of it. `near` is the range of the other side's tiles.


def _forward_tile(near, step, ids_ref, other_ids_ref, q_ref, k_ref, v_ref, o_ref, lse_ref, *, scale):
    q, ids = q_ref[...], ids_ref[...]
    side = q.shape[0]

    def update(j, carry):
        o, top, total = carry
        k, v, kv_ids = (_load(ref, j, step) for ref in (k_ref, v_ref, other_ids_ref))
        seen = _seen(ids, kv_ids)
        logits = jnp.where(seen, scale * _dot(q, k.T), EMPTY)
        higher = jnp.maximum(top, jnp.max(logits, axis=1))
        weights = jnp.where(seen, jnp.exp(logits - higher[:, None]), 0.0)
        fade = jnp.exp(top - higher)
        return o * fade[:, None] + _dot(weights.astype(v.dtype), v), higher, total * fade + jnp.sum(weights, axis=1)

    start = (jnp.zeros((side, v_ref.shape[1]), jnp.float32), jnp.full((side,), EMPTY), jnp.zeros((side,), jnp.float32))
    o, top, total = jax.lax.fori_loop(*near, update, start)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    o_ref[...] = (o / total[:, None]).astype(o_ref.dtype)
    lse_ref[...] = jnp.where(some, top + jnp.log(total), EMPTY)


def _query_gradient_tile(
    near, step, ids_ref, other_ids_ref, q_ref, d_o_ref, lse_ref, mean_ref, k_ref, v_ref, d_q_ref, *, scale
):
    q, ids, d_o, lse, mean = (ref[...] for ref in (q_ref, ids_ref, d_o_ref, lse_ref, mean_ref))

    def update(j, d_q):
        k, v, kv_ids = (_load(ref, j, step) for ref in (k_ref, v_ref, other_ids_ref))
        _, d_logits = _weights(q, ids, d_o, lse, mean, k, v, kv_ids, scale)
        return d_q + _dot(d_logits, k)

    d_q = jax.lax.fori_loop(*near, update, jnp.zeros(q.shape, jnp.float32))
    d_q_ref[...] = d_q.astype(d_q_ref.dtype)


def _key_gradient_tile(near, step, ids_ref, other_ids_ref, k_ref, v_ref, *others, scale):
    *query_refs, d_k_ref, d_v_ref = others
    k, v, kv_ids = k_ref[...], v_ref[...], ids_ref[...]

    def update(i, carry):
        q_ids = _load(other_ids_ref, i, step)
        q, d_o, lse, mean = (_load(ref, i, step) for ref in query_refs)
        weights, d_logits = _weights(q, q_ids, d_o, lse, mean, k, v, kv_ids, scale)
        return carry[0] + _dot(d_logits.T, q), carry[1] + _dot(weights.astype(d_o.dtype).T, d_o)

    zero = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    d_k, d_v = jax.lax.fori_loop(*near, update, zero)
    d_k_ref[...], d_v_ref[...] = d_k.astype(d_k_ref.dtype), d_v.astype(d_v_ref.dtype)


def _weights(q, ids, d_o, lse, mean, k, v, kv_ids, scale):
    """(softmax weights of a tile, gradients of its logits before the scale)."""
    weights = jnp.where(_seen(ids, kv_ids), jnp.exp(scale * _dot(q, k.T) - lse[:, None]), 0.0)
    return weights, (scale * weights * (_dot(d_o, v.T) - mean[:, None])).astype(q.dtype)


def _seen(ids, kv_ids):
    return (ids[:, None] == kv_ids[None, :]) & (ids > 0)[:, None]


def _load(ref, j, step):
    return plt.load(ref.at[pl.ds(j * step, step)])


def _dot(a, b):
    """float32 products of float32 (not TF32), float32 sums of anything."""
    return plt.dot(a, b, precision="highest" if a.dtype == jnp.float32 else None).astype(jnp.float32)


# ---- The grid: one program for each (tile, row, head)


def _call(tile, tiling, scale, ids, other_ids, arrays, specs, out_shape, out_specs):
    """The tile's function over all tiles of `ids`. Specs are functions of an array's shape and a tile's side."""
    (B, S), N, T = ids.shape, arrays[0].shape[2], other_ids.shape[1]
    side, step = min(tiling.side, S), min(tiling.step, T)
    near = _near(ids.reshape(B, -1, side), other_ids.reshape(B, -1, step))
    specs = (_near_of, _near_of, _ids_of, _all_ids, *specs)

    def kernel(first_ref, after_ref, *refs):
        tile((first_ref[...], after_ref[...]), step, *refs, scale=scale)

    def run(interpret: bool, *arrays):
        return pl.pallas_call(
            kernel,
            grid=(S // side, B, N),
            in_specs=[spec(x.shape, side) for spec, x in zip(specs, arrays)],
            out_specs=[spec(x.shape, side) for spec, x in zip(out_specs, out_shape)],
            out_shape=list(out_shape),
            compiler_params=plt.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
            interpret=interpret,
            name=tile.__name__.strip("_"),
        )(*arrays)

    interpreted, lowered = functools.partial(run, True), functools.partial(run, False)
    arrays = (*near, ids, other_ids, *arrays)
    return jax.lax.platform_dependent(*arrays, cuda=lowered, rocm=lowered, default=interpreted)


def _near(ids, other_ids):
    """(first, after the last) of the other side's tiles that may share a segment with each tile, (B, tiles) each.

    ids (B, tiles, side). Clips lie together in a row, so that what is between the two is near as well.
    """
    here, there = (jax.tree.map(lambda x: x[..., None], extent(x)) for x in (ids, other_ids))
    near = meet(jax.tree.map(lambda x: x[:, :, None], here), jax.tree.map(lambda x: x[:, None], there))
    first, after = jnp.argmax(near, axis=2), near.shape[2] - jnp.argmax(near[..., ::-1], axis=2)
    return first.astype(jnp.int32), jnp.where(jnp.any(near, axis=2), after, first).astype(jnp.int32)


def _near_of(shape, side):
    return pl.BlockSpec((None, None), lambda i, b, n: (b, i))


def _tile_of(shape, side):
    return pl.BlockSpec((None, side, None, shape[3]), lambda i, b, n: (b, i, n, 0))


def _all(shape, side):
    return pl.BlockSpec((None, shape[1], None, shape[3]), lambda i, b, n: (b, 0, n, 0))


def _ids_of(shape, side):
    return pl.BlockSpec((None, side), lambda i, b, n: (b, i))


def _all_ids(shape, side):
    return pl.BlockSpec((None, shape[1]), lambda i, b, n: (b, 0))


def _lse_of(shape, side):
    return pl.BlockSpec((None, None, side), lambda i, b, n: (b, n, i))


def _all_lse(shape, side):
    return pl.BlockSpec((None, None, shape[2]), lambda i, b, n: (b, n, 0))


def _fitted(tiling: Tiling, x) -> Tiling:
    """With half the sides for float32, which takes twice the memory of an SM."""
    if x.dtype.itemsize < 4:
        return tiling
    return dataclasses.replace(tiling, side=max(tiling.side // 2, SMALLEST), step=max(tiling.step // 2, SMALLEST))


def _padded(x):
    """Ids (B, S), or (B, S, N, K): S up to whole tiles and K up to a power of two, filled with zeros."""
    tile = max(max(t.side, t.step) for t in (FORWARD, QUERY_GRADIENT, KEY_GRADIENT))
    S = x.shape[1]
    whole = max(pl.next_power_of_2(S), SMALLEST) if S <= tile else S + -S % tile
    widths = ((0, 0), (0, whole - S))
    if x.ndim == 4:
        widths += ((0, 0), (0, max(pl.next_power_of_2(x.shape[3]), SMALLEST) - x.shape[3]))
    return jnp.pad(x, widths)

"""Flash attention for GPUs in Pallas and Triton: FlashAttention-2 (Dao 2023, arXiv:2307.08691) with segment ids.

One program computes one tile of queries of one head (for the gradient of keys and values, one tile of keys). It visits
the tiles of the other side that may share a segment with it. It neither loads nor computes the others. No array of size
S x M is stored.

On other backends it runs in Pallas's interpreter, slowly, for tests. On an H100 its values and gradients agree with
float64. The tilings below are the fastest that bench/gpu.py tries (docs/benchmarks.md).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from minisora_jax.parallel.kernels.blockwise import extent, meet, seen_extent, span
from minisora_jax.parallel.kernels.reference import EMPTY, visible

SMALLEST = 16  # the smallest side of a matrix that tensor cores multiply


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The size of a kernel's programs. `side` and `step` are powers of two."""

    side: int  # tokens that a program computes
    step: int  # tokens of the other side that it loads at a time
    warps: int
    stages: int  # loads in flight at once


FORWARD = Tiling(side=128, step=32, warps=4, stages=3)
QUERY_GRADIENT = Tiling(side=128, step=32, warps=4, stages=3)
KEY_GRADIENT = Tiling(side=64, step=64, warps=4, stages=2)


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
    (B, S, N, K), q_ids, kv_ids = q_BSNK.shape, _padded(q_segment_BS), _padded(kv_segment_BM)
    q, k, v = (_padded(x) for x in (q_BSNK, k_BMNK, v_BMNK))
    o, lse = _call(
        _forward_tile,
        _fitted(FORWARD, q),
        scale,
        causal,
        q_ids,
        kv_ids,
        (q, k, v),
        (_tile_of, _all, _all),
        (jax.ShapeDtypeStruct(q.shape, v.dtype), jax.ShapeDtypeStruct((B, N, q.shape[1]), jnp.float32)),
        (_tile_of, _lse_of),
    )
    return o[:, :S, :, :K], lse[..., :S]


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
    (_, S, _, K), M = q_BSNK.shape, k_BMNK.shape[1]
    q_ids, kv_ids = _padded(q_segment_BS), _padded(kv_segment_BM)
    mean_BNS = jnp.einsum("bsnk,bsnk->bns", d_o_BSNK, o_BSNK, preferred_element_type=jnp.float32)
    q, k, v, d_o = (_padded(x) for x in (q_BSNK, k_BMNK, v_BMNK, d_o_BSNK))
    lse, mean = (jnp.pad(x, ((0, 0), (0, 0), (0, q.shape[1] - S))) for x in (lse_BNS, mean_BNS))
    (d_q,) = _call(
        _query_gradient_tile,
        _fitted(QUERY_GRADIENT, q),
        scale,
        causal,
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
        causal,
        kv_ids,
        q_ids,
        (k, v, q, d_o, lse, mean),
        (_tile_of, _tile_of, _all, _all, _all_lse, _all_lse),
        (jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        (_tile_of, _tile_of),
    )
    return d_q[:, :S, :, :K], d_k[:, :M, :, :K], d_v[:, :M, :, :K]


# ---- Programs. A `_ref` is one tile of a (row, head), or all of its tokens.
# `near` is the range (first, last + 1) of the other side's tiles to visit; `step` is their length.


def _forward_tile(near, step, ids_ref, other_ids_ref, q_ref, k_ref, v_ref, o_ref, lse_ref, *, scale, causal):
    q, ids = q_ref[...], ids_ref[...]
    side = q.shape[0]

    def update(j, carry):
        o, top, total = carry
        k, v, kv_ids = (_load(ref, j, step) for ref in (k_ref, v_ref, other_ids_ref))
        seen = visible(ids, kv_ids, causal)
        logits = jnp.where(seen, scale * _dot(q, k.T), EMPTY)
        higher = jnp.maximum(top, jnp.max(logits, axis=1))
        weights = jnp.where(seen, jnp.exp(logits - higher[:, None]), 0.0)
        fade = jnp.exp(top - higher)
        return o * fade[:, None] + _dot(weights.astype(v.dtype), v), higher, total * fade + jnp.sum(weights, axis=1)

    start = (jnp.zeros((side, v_ref.shape[1]), jnp.float32), jnp.full((side,), EMPTY), jnp.zeros((side,), jnp.float32))
    o, top, total = jax.lax.fori_loop(near[0], near[1], update, start)
    has_keys = total > 0
    total = jnp.where(has_keys, total, 1.0)
    o_ref[...] = (o / total[:, None]).astype(o_ref.dtype)
    lse_ref[...] = jnp.where(has_keys, top + jnp.log(total), EMPTY)


def _query_gradient_tile(
    near, step, ids_ref, other_ids_ref, q_ref, d_o_ref, lse_ref, mean_ref, k_ref, v_ref, d_q_ref, *, scale, causal
):
    q, ids, d_o, lse, mean = (ref[...] for ref in (q_ref, ids_ref, d_o_ref, lse_ref, mean_ref))

    def update(j, d_q):
        k, v, kv_ids = (_load(ref, j, step) for ref in (k_ref, v_ref, other_ids_ref))
        _, d_logits = _weights(q, ids, d_o, lse, mean, k, v, kv_ids, scale, causal)
        return d_q + _dot(d_logits, k)

    d_q = jax.lax.fori_loop(near[0], near[1], update, jnp.zeros(q.shape, jnp.float32))
    d_q_ref[...] = d_q.astype(d_q_ref.dtype)


def _key_gradient_tile(near, step, ids_ref, other_ids_ref, k_ref, v_ref, *others, scale, causal):
    *query_refs, d_k_ref, d_v_ref = others
    k, v, kv_ids = k_ref[...], v_ref[...], ids_ref[...]

    def update(i, carry):
        q_ids = _load(other_ids_ref, i, step)
        q, d_o, lse, mean = (_load(ref, i, step) for ref in query_refs)
        weights, d_logits = _weights(q, q_ids, d_o, lse, mean, k, v, kv_ids, scale, causal)
        return carry[0] + _dot(d_logits.T, q), carry[1] + _dot(weights.astype(d_o.dtype).T, d_o)

    zero = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    d_k, d_v = jax.lax.fori_loop(near[0], near[1], update, zero)
    d_k_ref[...], d_v_ref[...] = d_k.astype(d_k_ref.dtype), d_v.astype(d_v_ref.dtype)


def _weights(q, ids, d_o, lse, mean, k, v, kv_ids, scale, causal):
    """(softmax weights of a pair of tiles, gradient of q k^T), both (queries, keys)."""
    weights = jnp.where(visible(ids, kv_ids, causal), jnp.exp(scale * _dot(q, k.T) - lse[:, None]), 0.0)
    return weights, (scale * weights * (_dot(d_o, v.T) - mean[:, None])).astype(q.dtype)


def _load(ref, j, step):
    return plt.load(ref.at[pl.ds(j * step, step)])


def _dot(a, b):
    """a b with sums in float32. Products of float32 are float32 too, and not TF32."""
    return plt.dot(a, b, precision="highest" if a.dtype == jnp.float32 else None).astype(jnp.float32)


# ---- The grid: one program for each (tile, row, head)


def _call(program, tiling, scale, causal, ids, other_ids, arrays, specs, out_shape, out_specs):
    """The outputs of `program`, run for every tile of `ids` and every head.

    Specs are functions from an array's shape and a tile's side to its block. `arrays[0]` has the heads on axis 2.
    """
    (B, length), N = ids.shape, arrays[0].shape[2]
    side, step = min(tiling.side, length), min(tiling.step, other_ids.shape[1])
    of_queries, of_keys = functools.partial(seen_extent, causal=causal), extent
    own, other = (of_keys, of_queries) if program is _key_gradient_tile else (of_queries, of_keys)
    near = _near(own(ids.reshape(B, -1, side)), other(other_ids.reshape(B, -1, step)))
    specs = (_near_of, _near_of, _ids_of, _all_ids, *specs)

    def kernel(first_ref, after_ref, *refs):
        program((first_ref[...], after_ref[...]), step, *refs, scale=scale, causal=causal)

    def run(interpret: bool, *arrays):
        return pl.pallas_call(
            kernel,
            grid=(length // side, B, N),
            in_specs=[spec(x.shape, side) for spec, x in zip(specs, arrays)],
            out_specs=[spec(x.shape, side) for spec, x in zip(out_specs, out_shape)],
            out_shape=list(out_shape),
            compiler_params=plt.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
            interpret=interpret,
            name=program.__name__.strip("_"),
        )(*arrays)

    interpreted, lowered = functools.partial(run, True), functools.partial(run, False)
    arrays = (*near, ids, other_ids, *arrays)
    return jax.lax.platform_dependent(*arrays, cuda=lowered, rocm=lowered, default=interpreted)


def _near(extents, other_extents):
    """For each tile, (first, last + 1) of the other side's tiles that it may share ids with, (B, tiles) each.

    Extents are (B, tiles). Every tile in between counts as near, because a clip's tokens are contiguous in a row.
    """
    extents, other_extents = (jax.tree.map(lambda x: x[..., None], pair) for pair in (extents, other_extents))
    near = meet(jax.tree.map(lambda x: x[:, :, None], extents), jax.tree.map(lambda x: x[:, None], other_extents))
    first, after = span(near)
    return first.astype(jnp.int32), after.astype(jnp.int32)


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
    """The tiling, with half the sides for float32, which takes twice the memory of an SM."""
    if x.dtype.itemsize < 4:
        return tiling
    return dataclasses.replace(tiling, side=max(tiling.side // 2, SMALLEST), step=max(tiling.step // 2, SMALLEST))


def _padded(x):
    """Ids (B, S) or arrays (B, S, N, K) padded with zeros: S to whole tiles, K to a power of two."""
    tile = max(max(t.side, t.step) for t in (FORWARD, QUERY_GRADIENT, KEY_GRADIENT))
    S = x.shape[1]
    whole = max(pl.next_power_of_2(S), SMALLEST) if S <= tile else S + -S % tile
    widths = ((0, 0), (0, whole - S))
    if x.ndim == 4:
        widths += ((0, 0), (0, max(pl.next_power_of_2(x.shape[3]), SMALLEST) - x.shape[3]))
    return jnp.pad(x, widths)

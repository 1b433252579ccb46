"""Splash attention on TPUs: tokamax's Pallas kernels, which skip tiles without a common segment.

tokamax is in the extra `[tpu]`. Rows run one after another, because each row has its own schedule of tiles. Head widths
are padded to multiples of 128 lanes, and lengths to whole tiles. Without a TPU the kernel runs only inside
`jax.experimental.pallas.tpu.force_tpu_interpret_mode`. It can also be compiled for a described TPU topology (plan/).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from minisora_jax.config import how_to_install
from minisora_jax.parallel.kernels import in_order
from minisora_jax.parallel.kernels.reference import EMPTY

LANES = 128
TILE = 1024  # the most tokens along a side of a tile
MOST_TILES = 40_000  # of one call: the list of tiles takes 16 bytes per tile of 1 MiB of scalar memory


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
    run = functools.partial(in_order.forward, _forward) if causal else _forward
    return run(q_BSNK, k_BMNK, v_BMNK, q_segment_BS, kv_segment_BM, scale)


def _forward(q_BSNK, k_BMNK, v_BMNK, q_segment_BS, kv_segment_BM, scale, in_token_order=False):
    S, K = q_BSNK.shape[1], v_BMNK.shape[3]
    parts, keys = _parts(S, k_BMNK.shape[1], in_token_order), (*_padded(k_BMNK, v_BMNK), _ids(kv_segment_BM, -2))
    attention, _, ids = _operators(_whole(S) // parts, keys[0].shape[2])

    def row(arrays):
        q, q_ids, k, v, kv_ids = arrays

        def part(arrays):
            masks = {"segment_ids": ids(arrays[1], kv_ids), **_mask(in_token_order)}
            out, (_, lse) = attention(arrays[0], k, v, **masks, return_residuals=True)
            return out, lse

        return _over_parts(part, (q, q_ids[None]), parts)

    queries = (*_padded(q_BSNK * scale), _ids(q_segment_BS, -1))
    out_BNSK, lse_BNS = jax.lax.map(row, (*queries, *keys))
    # Where a query has no key, the kernel's lse is -2e38 and its output is undefined.
    empty_BNS = (lse_BNS[..., :S] < EMPTY) | (q_segment_BS == 0)[:, None, :]
    o_BSNK = jnp.where(empty_BNS[..., None], 0, out_BNSK[:, :, :S, :K]).swapaxes(1, 2)
    return o_BSNK, jnp.where(empty_BNS, EMPTY, lse_BNS[..., :S])


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
    run = functools.partial(in_order.backward, _backward) if causal else _backward
    return run(q_BSNK, k_BMNK, v_BMNK, q_segment_BS, kv_segment_BM, o_BSNK, lse_BNS, d_o_BSNK, scale)


def _backward(
    q_BSNK, k_BMNK, v_BMNK, q_segment_BS, kv_segment_BM, o_BSNK, lse_BNS, d_o_BSNK, scale, in_token_order=False
):
    (S, K), M = q_BSNK.shape[1::2], k_BMNK.shape[1]
    parts, keys = _parts(S, M, in_token_order), (*_padded(k_BMNK, v_BMNK), _ids(kv_segment_BM, -2))
    _, gradients, ids = _operators(_whole(S) // parts, keys[0].shape[2])

    def row(arrays):
        *queries, q_ids, k, v, kv_ids = arrays

        def part(carry, arrays):
            q, o, d_o, lse, q_ids = arrays
            masks = {"segment_ids": ids(q_ids, kv_ids), **_mask(in_token_order)}
            grads = gradients((lse, lse), o, d_o, q, k, v, **masks)
            return jax.tree.map(lambda s, x: s + x.astype(s.dtype), carry, (grads["k"], grads["v"])), grads["q"]

        first = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype if parts == 1 else jnp.float32), (k, v))
        d_kv, d_q = _scan_parts(part, first, (*queries, q_ids[None]), parts)
        return d_q, *d_kv

    lse_BNS = jnp.pad(lse_BNS, ((0, 0), (0, 0), (0, _whole(S) - S)))
    queries = (*_padded(q_BSNK * scale, o_BSNK, d_o_BSNK), lse_BNS, _ids(q_segment_BS, -1))
    d_q, d_k, d_v = jax.lax.map(row, (*queries, *keys))
    d_q, d_k, d_v = (d[:, :, :n, :K].swapaxes(1, 2) for d, n in ((d_q, S), (d_k, M), (d_v, M)))
    return scale * d_q, d_k.astype(k_BMNK.dtype), d_v.astype(v_BMNK.dtype)


def _mask(in_token_order: bool) -> dict[str, Any]:
    if not in_token_order:
        return {}
    from tokamax._src.ops.experimental.tpu.splash_attention.base import CAUSAL_MASK

    return {"mask": CAUSAL_MASK}


def _parts(S: int, M: int, in_token_order: bool) -> int:
    """Number of parts that the queries are divided into, so that each call has at most MOST_TILES tiles."""
    if in_token_order:  # its schedule has half the tiles, and a part of the queries would begin at another place
        if (tiles := (_whole(S) // _tile(S)) ** 2) > 2 * MOST_TILES:
            raise ValueError(f"causal attention of {S} tokens a device has {tiles} tiles: divide them by mesh.ring")
        return 1
    tiles, queries = (_whole(S) // _tile(S)) * (_whole(M) // _tile(M)), _whole(S) // _tile(S)
    return next(n for n in range(1, queries + 1) if queries % n == 0 and tiles <= n * MOST_TILES)


def _over_parts(part, arrays_NS, parts):
    """part(arrays) for each part of the queries, which are axis 1 of (N, S, ...). The results are concatenated."""
    _, out = _scan_parts(lambda _, arrays: (None, part(arrays)), None, arrays_NS, parts)
    return out


def _scan_parts(part, carry, arrays_NS, parts):
    """`jax.lax.scan` over parts of axis 1 of arrays (N, S, ...). The last array has N = 1 and is passed as (S,)."""
    if parts == 1:
        return part(carry, (*arrays_NS[:-1], arrays_NS[-1][0]))
    cut = lambda x: jnp.moveaxis(x.reshape(x.shape[0], parts, -1, *x.shape[2:]), 1, 0)
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])
    carry, out = jax.lax.scan(
        lambda c, arrays: part(c, (*arrays[:-1], arrays[-1][0])), carry, tuple(cut(x) for x in arrays_NS)
    )
    return carry, jax.tree.map(join, out)


@functools.cache
def _operators(S: int, M: int):
    """(attention, its gradient, the type of a pair of ids) with tiles for S queries and M keys."""
    try:
        from tokamax.ops.experimental.tpu import SplashAttention, SplashAttentionConfig
    except ImportError as error:
        raise ImportError(f"attention='splash' needs tokamax: {how_to_install('tpu')}") from error
    # tokamax 0.0.17 exports neither the gradient's configuration nor the type of ids.
    from tokamax._src.ops.experimental.tpu.splash_attention.base import SegmentIds
    from tokamax._src.ops.experimental.tpu.splash_attention.pallas_mosaic_tpu import QKVLayout
    from tokamax._src.ops.experimental.tpu.splash_attention.pallas_mosaic_tpu_vjp import Config as GradientConfig

    q, kv = _tile(S), _tile(M)
    rows = QKVLayout.HEAD_DIM_MINOR
    layout = {"q_layout": rows, "k_layout": rows, "v_layout": rows}
    config = SplashAttentionConfig(
        block_q=q, block_kv=kv, block_kv_compute=_half(kv), use_experimental_scheduler=True, **layout
    )
    attention = SplashAttention(config=config, bypass_device_check=True)
    config = GradientConfig(block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=_half(kv))
    return attention, dataclasses.replace(attention.vjp, config=config, bypass_device_check=True), SegmentIds


def _tile(length: int) -> int:
    """The side of a tile that needs the least padding of `length`. Of several, the largest."""
    sides = range(LANES, TILE + 1, LANES)
    least = min(-length % side for side in sides[len(sides) // 2 :])
    return LANES * -(-length // LANES) if length <= TILE else max(s for s in sides if -length % s <= least)


def _half(tile: int) -> int:
    return tile // 2 if tile % (2 * LANES) == 0 else tile


def _whole(length: int) -> int:
    return length + -length % _tile(length)


def _padded(*arrays_BSNK):
    """(B, S, N, K) -> (B, N, S', K'), padded to whole tiles and lanes."""

    def pad(x):
        K, S = x.shape[3], x.shape[1]
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, _whole(S) - S), (0, -K % LANES)))

    return tuple(pad(x) for x in arrays_BSNK)


def _ids(segment_BS, padding_id: int):
    """Ids padded to whole tiles, with `padding_id` as padding. Queries and keys use different ones, so none match."""
    ids = jnp.pad(segment_BS, ((0, 0), (0, _whole(segment_BS.shape[1]) - segment_BS.shape[1])))
    return jnp.where(ids > 0, ids, padding_id)

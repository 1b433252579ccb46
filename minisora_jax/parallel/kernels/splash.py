"""Splash attention on TPUs: tokamax's Pallas kernels, which leave out tiles without a common segment.

tokamax is in the extra `[tpu]`. Rows run one after another, for a schedule of tiles is made for each by itself. Head
widths are padded to whole lanes of 128, lengths to whole tiles. On another backend it runs only inside
`jax.experimental.pallas.tpu.force_tpu_interpret_mode`, or compiled for a TPU that is described (plan/).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from minisora_jax.parallel.kernels.reference import EMPTY

LANES = 128
TILE = 1024  # tokens along each side of a tile at most
MOST_TILES = 40_000  # of one call: their list takes 16 bytes each of the 1 MiB of scalar memory


def forward(q_BSNK, k_BTNK, v_BTNK, q_segment_BS, kv_segment_BT, scale):
    S, K = q_BSNK.shape[1], v_BTNK.shape[3]
    parts, keys = _parts(S, k_BTNK.shape[1]), (*_padded(k_BTNK, v_BTNK), _ids(kv_segment_BT, -2))
    attention, _, ids = _operators(_whole(S) // parts, keys[0].shape[2])

    def row(arrays):
        q, q_ids, k, v, kv_ids = arrays

        def part(arrays):
            out, (_, lse) = attention(arrays[0], k, v, segment_ids=ids(arrays[1], kv_ids), return_residuals=True)
            return out, lse

        return _over_parts(part, (q, q_ids[None]), parts)

    queries = (*_padded(q_BSNK * scale), _ids(q_segment_BS, -1))
    out_BNSK, lse_BNS = jax.lax.map(row, (*queries, *keys))
    # Where there was nothing to see, the kernel's lse is -2e38 and its output anything.
    empty_BNS = (lse_BNS[..., :S] < EMPTY) | (q_segment_BS == 0)[:, None, :]
    o_BSNK = jnp.where(empty_BNS[..., None], 0, out_BNSK[:, :, :S, :K]).swapaxes(1, 2)
    return o_BSNK, jnp.where(empty_BNS, EMPTY, lse_BNS[..., :S])


def backward(q_BSNK, k_BTNK, v_BTNK, q_segment_BS, kv_segment_BT, o_BSNK, lse_BNS, d_o_BSNK, scale):
    (S, K), T = q_BSNK.shape[1::2], k_BTNK.shape[1]
    parts, keys = _parts(S, T), (*_padded(k_BTNK, v_BTNK), _ids(kv_segment_BT, -2))
    _, gradients, ids = _operators(_whole(S) // parts, keys[0].shape[2])

    def row(arrays):
        *queries, q_ids, k, v, kv_ids = arrays

        def part(carry, arrays):
            q, o, d_o, lse, q_ids = arrays
            grads = gradients((lse, lse), o, d_o, q, k, v, segment_ids=ids(q_ids, kv_ids))
            return jax.tree.map(lambda s, x: s + x.astype(s.dtype), carry, (grads["k"], grads["v"])), grads["q"]

        first = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype if parts == 1 else jnp.float32), (k, v))
        d_kv, d_q = _scan_parts(part, first, (*queries, q_ids[None]), parts)
        return d_q, *d_kv

    lse_BNS = jnp.pad(lse_BNS, ((0, 0), (0, 0), (0, _whole(S) - S)))
    queries = (*_padded(q_BSNK * scale, o_BSNK, d_o_BSNK), lse_BNS, _ids(q_segment_BS, -1))
    d_q, d_k, d_v = jax.lax.map(row, (*queries, *keys))
    d_q, d_k, d_v = (d[:, :, :n, :K].swapaxes(1, 2) for d, n in ((d_q, S), (d_k, T), (d_v, T)))
    return scale * d_q, d_k.astype(k_BTNK.dtype), d_v.astype(v_BTNK.dtype)


def _parts(S: int, T: int) -> int:
    """Into how many parts the queries are cut: a kernel's list of tiles must fit the scalar memory."""
    tiles, queries = (_whole(S) // _tile(S)) * (_whole(T) // _tile(T)), _whole(S) // _tile(S)
    return next(n for n in range(1, queries + 1) if queries % n == 0 and tiles <= n * MOST_TILES)


def _over_parts(part, arrays_NS, parts):
    """part(arrays) of each part of the queries, axis 1 of (N, S, ...), and the results put together."""
    _, out = _scan_parts(lambda _, arrays: (None, part(arrays)), None, arrays_NS, parts)
    return out


def _scan_parts(part, carry, arrays_NS, parts):
    """As jax.lax.scan, over parts of axis 1 of arrays (N, S, ...); the last has N = 1 and comes as (S,)."""
    if parts == 1:
        return part(carry, (*arrays_NS[:-1], arrays_NS[-1][0]))
    cut = lambda x: jnp.moveaxis(x.reshape(x.shape[0], parts, -1, *x.shape[2:]), 1, 0)
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])
    carry, out = jax.lax.scan(
        lambda c, arrays: part(c, (*arrays[:-1], arrays[-1][0])), carry, tuple(cut(x) for x in arrays_NS)
    )
    return carry, jax.tree.map(join, out)


@functools.cache
def _operators(S: int, T: int):
    """(attention, its gradients, the type of a pair of ids) for tiles that fit S queries and T keys."""
    try:
        from tokamax.ops.experimental.tpu import SplashAttention, SplashAttentionConfig
    except ImportError as error:
        raise ImportError("attention='splash' needs tokamax: pip install 'minisora_jax[tpu]'") from error
    # The public namespace has neither the gradient's configuration nor the type of ids (tokamax 0.0.17).
    from tokamax._src.ops.experimental.tpu.splash_attention.base import SegmentIds
    from tokamax._src.ops.experimental.tpu.splash_attention.pallas_mosaic_tpu import QKVLayout
    from tokamax._src.ops.experimental.tpu.splash_attention.pallas_mosaic_tpu_vjp import Config as GradientConfig

    q, kv = _tile(S), _tile(T)
    rows = QKVLayout.HEAD_DIM_MINOR
    layout = {"q_layout": rows, "k_layout": rows, "v_layout": rows}
    config = SplashAttentionConfig(
        block_q=q, block_kv=kv, block_kv_compute=_half(kv), use_experimental_scheduler=True, **layout
    )
    attention = SplashAttention(config=config, bypass_device_check=True)
    config = GradientConfig(block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=_half(kv))
    return attention, dataclasses.replace(attention.vjp, config=config, bypass_device_check=True), SegmentIds


def _tile(length: int) -> int:
    """The side of a tile that pads `length` least, the largest of those."""
    sides = range(LANES, TILE + 1, LANES)
    least = min(-length % side for side in sides[len(sides) // 2 :])
    return LANES * -(-length // LANES) if length <= TILE else max(s for s in sides if -length % s <= least)


def _half(tile: int) -> int:
    return tile // 2 if tile % (2 * LANES) == 0 else tile


def _whole(length: int) -> int:
    return length + -length % _tile(length)


def _padded(*arrays_BSNK):
    """(B, S, N, K) -> (B, N, S', K'), whole tiles and lanes."""

    def pad(x):
        K, S = x.shape[3], x.shape[1]
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, _whole(S) - S), (0, -K % LANES)))

    return tuple(pad(x) for x in arrays_BSNK)


def _ids(segment_BS, nothing: int):
    """Whole tiles of ids, padding as `nothing`: another number for queries than for keys, so that they never match."""
    ids = jnp.pad(segment_BS, ((0, 0), (0, _whole(segment_BS.shape[1]) - segment_BS.shape[1])))
    return jnp.where(ids > 0, ids, nothing)

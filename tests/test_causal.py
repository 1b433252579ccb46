"""Attention in the order of frames (block-causal), against float64 NumPy, by every kernel and on meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_ring import K, N, S, check, inputs, on_mesh

from minisora_jax.parallel.kernels import KERNELS, blockwise, in_order, reference, triton
from minisora_jax.parallel.kernels.reference import FRAMES
from minisora_jax.parallel.mesh import MeshConfig


def causal_ids(segment_BS: np.ndarray, seed: int = 0) -> np.ndarray:
    """Frames of 1 to 5 tokens within the segments; every third segment is bidirectional, which is one frame."""
    rng, ids = np.random.default_rng(seed), np.zeros_like(segment_BS)
    for row, segments in zip(ids, segment_BS):
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == segment)
            frame = np.repeat(np.arange(len(at)), rng.integers(1, 6, len(at)))[: len(at)]
            row[at] = segment * FRAMES + (frame if segment % 3 else FRAMES - 1)
    return ids


def dense(q, k, v, ids, weight):
    """(output, gradients of sum(weight * output)) in float64, query by query."""
    q, k, v, weight = (np.asarray(x, np.float64) for x in (q, k, v, weight))
    out, grads = np.zeros(q.shape), [np.zeros(x.shape) for x in (q, k, v)]
    for b, s, n in np.ndindex(*q.shape[:3]):
        clip, frame = divmod(int(ids[b, s]), FRAMES)
        seen = [m for m in range(k.shape[1]) if clip and ids[b, m] // FRAMES == clip and ids[b, m] % FRAMES <= frame]
        if not seen:
            continue
        logits = k[b, seen, n] @ q[b, s, n] / np.sqrt(K)
        p = np.exp(logits - logits.max())
        p /= p.sum()
        out[b, s, n] = p @ v[b, seen, n]
        d_p = v[b, seen, n] @ weight[b, s, n]
        d_logits = p * (d_p - p @ d_p) / np.sqrt(K)
        grads[0][b, s, n] = d_logits @ k[b, seen, n]
        grads[1][b, seen, n] += d_logits[:, None] * q[b, s, n]
        grads[2][b, seen, n] += p[:, None] * weight[b, s, n]
    return out, grads


@functools.cache
def case():
    (q, k, v, segments, _), weight = inputs()
    ids = causal_ids(segments)
    return (q, k, v, ids, ids), weight, dense(q, k, v, ids, weight)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 6)
    for name in ("FORWARD", "QUERY_GRADIENT", "KEY_GRADIENT"):
        monkeypatch.setattr(triton, name, triton.Tiling(side=32, step=32, warps=4, stages=2))


@pytest.mark.parametrize("impl", [name for name in KERNELS if name != "splash"])
def test_every_kernel_is_the_definition(impl, small_tiles):
    arrays, weight, wanted = case()
    check(on_mesh(MeshConfig(data=1, fsdp=8), arrays, weight, impl=impl, causal=True), wanted, 2e-5)


def token_kernel(q, k, v, q_ids, kv_ids, *rest):
    """A kernel of equal ids and token order, as `in_order` needs one, by the reference with an id for each token."""
    *residuals, scale, in_token_order = rest
    if in_token_order:
        place = jnp.arange(q.shape[1])
        q_ids, kv_ids = (jnp.where(ids > 0, _ranked(ids) * FRAMES + place, 0) for ids in (q_ids, kv_ids))
    of = reference.backward if residuals else reference.forward
    return of(q, k, v, q_ids, kv_ids, *residuals, scale, in_token_order)


def _ranked(ids):
    """Ids as small numbers above 0, in their own order: the reference takes 32,767 segments."""
    own = np.asarray(case()[0][3])
    return jnp.searchsorted(jnp.asarray(np.unique(np.concatenate([own, own // FRAMES]))), ids) + 1


@pytest.mark.parametrize("cut", [0, S // 2])
def test_order_of_frames_from_order_of_tokens(cut):
    """in_order.py over all keys; and half the queries at a time, with keys that are later, or earlier and their own."""
    arrays, weight, wanted = case()
    q, k, v, ids, _ = map(jnp.asarray, arrays)
    whole, halves = [slice(0, S)], [slice(0, cut), slice(cut, S)]
    out, grads = [], [jnp.zeros_like(x) for x in (q, k, v)]
    for rows, blocks in [(halves[0], halves), (halves[1], whole)] if cut else [(whole[0], whole)]:
        keys = [(k[:, b], v[:, b], ids[:, rows], ids[:, b]) for b in blocks]
        parts = [in_order.forward(token_kernel, q[:, rows], *each, 0.5) for each in keys]
        o, lse = functools.reduce(in_order.merge, parts)
        out.append(o)
        for b, each in zip(blocks, keys):
            ds = in_order.backward(token_kernel, q[:, rows], *each, o, lse, jnp.asarray(weight)[:, rows], 0.5)
            grads = [grad.at[:, at].add(d) for grad, at, d in zip(grads, (rows, b, b), ds)]
    check((jnp.concatenate(out, axis=1), grads), wanted, 2e-5)


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(data=1, ring=8),
        pytest.param(MeshConfig(data=1, ring=2, ulysses=4), marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=1, fsdp=2, ring=4), marks=pytest.mark.slow),
    ],
)
def test_every_mesh_is_the_definition(config, small_tiles):
    arrays, weight, wanted = case()
    check(on_mesh(config, arrays, weight, impl="blockwise", causal=True), wanted, 2e-5)


def test_tiles_of_later_frames_are_skipped(small_tiles):
    """A NaN in a key that no query of a tile sees never enters it: what is skipped is not computed."""
    ids = jnp.asarray(np.repeat(FRAMES + np.arange(S // 4), 4)[None], jnp.int32)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, S, N, K)), jnp.float32)
    half = S // 2
    with_nan = x.at[:, half:].set(jnp.nan)
    for kernel in (blockwise, triton):
        o, _ = jax.jit(functools.partial(kernel.forward, scale=0.5, causal=True))(x, with_nan, with_nan, ids, ids)
        whole, _ = jax.jit(functools.partial(kernel.forward, scale=0.5, causal=True))(x, x, x, ids, ids)
        near = half - 12  # the last tiles of queries may have such keys in their tiles
        np.testing.assert_array_equal(o[:, :near], whole[:, :near])

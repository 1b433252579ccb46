"""Attention on every mesh of 8 devices, and by every kernel, against the dense definition in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from minisora_jax.parallel.attention import attend, forward_mode
from minisora_jax.parallel.kernels import EMPTY, KERNELS, blockwise
from minisora_jax.parallel.mesh import ROWS, SEQUENCE, TOKENS, MeshConfig, make_mesh, to_global
from minisora_jax.parallel.ring import Ring

B, S, N, K = 8, 64, 8, 4
MESHES = [
    MeshConfig(data=1, fsdp=f, ring=r, ulysses=u, tensor=8 // (f * r * u))
    for f in (1, 2, 4, 8)
    for r in (1, 2, 4, 8)
    for u in (1, 2, 4, 8)
    if 8 % (f * r * u) == 0
]
HEADS = P(ROWS, SEQUENCE, "tensor", None)
WHOLE = P(ROWS, None, "tensor", None)


def ragged_ids(rng, rows=B, length=S) -> np.ndarray:
    """Rows of clips of any length, one of them a single clip, one empty, one of single tokens, some padded."""
    ids = np.zeros((rows, length), np.int32)
    for row in ids:
        at, segment = 0, 0
        end = length - int(rng.integers(0, length // 3))
        while at < end:
            n, segment = int(rng.integers(1, length // 3)), segment + 1
            row[at : min(at + n, end)] = segment
            at += n
    ids[1], ids[2], ids[3] = 1, 0, np.arange(1, length + 1)
    ids[4] = 1 + np.arange(length) * 8 // length  # clips that end where the devices' blocks do
    return ids


def inputs(seed=0, T=None, dtype=np.float32):
    rng = np.random.default_rng(seed)
    q_ids = ragged_ids(rng)
    kv_ids = q_ids if T is None else np.minimum(1 + np.arange(T), 5)[None].repeat(B, 0).astype(np.int32)
    q, k, v, weight = (rng.standard_normal((B, n, N, K)).astype(dtype) for n in (S, T or S, T or S, S))
    return (q, k, v, q_ids, kv_ids), weight


def dense(q, k, v, q_ids, kv_ids, weight):
    """(output, gradients of sum(weight * output)) in float64."""
    q, k, v, weight = (np.asarray(x, np.float64) for x in (q, k, v, weight))
    seen = ((q_ids[:, :, None] == kv_ids[:, None]) & (q_ids[:, :, None] > 0))[:, None]
    scale = q.shape[-1] ** -0.5
    logits = np.where(seen, scale * np.einsum("bsnk,btnk->bnst", q, k), -np.inf)
    top = logits.max(-1, keepdims=True)
    p = np.exp(logits - np.where(np.isfinite(top), top, 0))
    p = p / np.maximum(p.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("bnst,btnk->bsnk", p, v)
    d_p = np.einsum("bsnk,btnk->bnst", weight, v)
    d_logits = scale * p * (d_p - (p * d_p).sum(-1, keepdims=True))
    return out, (
        np.einsum("bnst,btnk->bsnk", d_logits, k),
        np.einsum("bnst,bsnk->btnk", d_logits, q),
        np.einsum("bnst,bsnk->btnk", p, weight),
    )


def on_mesh(config, arrays, weight, specs=(HEADS, HEADS, HEADS, TOKENS, TOKENS), **options):
    mesh = make_mesh(config)
    *arrays, weight = to_global((*arrays, weight), mesh, (*specs, HEADS))
    ids = arrays[3:]

    def loss(q, k, v, weight):
        out = attend(q, k, v, *ids, **options)
        return jnp.sum(out.astype(jnp.float32) * weight), out

    with jax.set_mesh(mesh):
        (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays[:3], weight)
        assert out.sharding.spec == HEADS and [g.sharding.spec for g in grads] == list(specs[:3])
    return np.asarray(out, np.float32), [np.asarray(g, np.float32) for g in grads]


def check(got, wanted, tolerance):
    for name, ours, theirs in zip(("o", "d_q", "d_k", "d_v"), (got[0], *got[1]), (wanted[0], *wanted[1])):
        error = np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 0.1)
        assert error <= tolerance, f"{name}: {error}"


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 6)


def named(config):
    return "-".join(f"{k}{v}" for k, v in vars(config).items() if v > 1) or "one"


@pytest.mark.parametrize("config", MESHES, ids=named)
def test_every_mesh_is_the_dense_path(config, small_tiles):
    arrays, weight = inputs()
    wanted = dense(*arrays, weight)
    for impl in ("blockwise", "reference"):
        check(on_mesh(config, arrays, weight, impl=impl), wanted, 2e-5)


@pytest.mark.parametrize("config", [m for m in MESHES if m.ring * m.ulysses > 4], ids=named)
def test_bfloat16(config):
    arrays, weight = inputs(1)
    half = [x.astype(jnp.bfloat16) for x in arrays[:3]]
    wanted = dense(*(np.asarray(x, np.float64) for x in half), *arrays[3:], weight)
    check(on_mesh(config, (*half, *arrays[3:]), weight), wanted, 2e-2)


@pytest.mark.parametrize("config", [MeshConfig(ring=2, ulysses=2, tensor=2), MeshConfig(fsdp=2, ring=4)], ids=named)
def test_keys_that_are_whole_on_every_device(config):
    """Captions: more or fewer segments than the row has, some queries without any."""
    arrays, weight = inputs(2, T=11)
    specs = (HEADS, WHOLE, WHOLE, TOKENS, P(ROWS, None))
    check(on_mesh(config, arrays, weight, specs), dense(*arrays, weight), 2e-5)


@pytest.mark.parametrize("config", [MeshConfig(ring=2, ulysses=2, tensor=2), MeshConfig(ring=8)], ids=named)
def test_the_forward_derivative_on_a_mesh(config, small_tiles):
    """The derivative along a way, summed with weights, is the gradient's product with the way."""
    arrays, weight = inputs(3)
    wanted = dense(*arrays, weight)
    ways = [np.random.default_rng(4).standard_normal(x.shape).astype(np.float32) for x in arrays[:3]]
    mesh = make_mesh(config)
    specs = (HEADS, HEADS, HEADS, TOKENS, TOKENS)
    *primals, q_ids, kv_ids = to_global(arrays, mesh, specs)
    tangents = to_global(tuple(ways), mesh, specs[:3])
    with jax.set_mesh(mesh), forward_mode():
        of = lambda q, k, v: attend(q, k, v, q_ids, kv_ids, max_segment_len=S)
        out, along = jax.jit(lambda primals, tangents: jax.jvp(of, primals, tangents))(tuple(primals), tangents)
    np.testing.assert_allclose(out, wanted[0], atol=2e-5)
    product = sum(float(np.sum(g * w)) for g, w in zip(wanted[1], ways))
    np.testing.assert_allclose(np.sum(np.asarray(along, np.float64) * weight), product, rtol=1e-4)


@settings(max_examples=10)
@given(seed=st.integers(0, 10_000), block=st.sampled_from([3, 16, 40]), T=st.sampled_from([None, 1, 30]))
def test_tiles_of_any_side(seed, block, T):
    arrays, weight = inputs(seed, T)
    before, blockwise.BLOCK = blockwise.BLOCK, block
    try:
        o, lse = blockwise.forward(*map(jnp.asarray, arrays), 0.5)
        grads = blockwise.backward(*map(jnp.asarray, arrays), o, lse, jnp.asarray(weight), 0.5)
    finally:
        blockwise.BLOCK = before
    # Of one key d_k is 0, and what is left is the rounding of terms that cancel.
    check((o, grads), dense(*arrays, weight), 4e-5 if T == 1 else 2e-5)
    ours, theirs = lse, KERNELS["reference"].forward(*map(jnp.asarray, arrays), 0.5)[1]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert ((np.asarray(lse) == np.float32(EMPTY)) == (np.asarray(theirs) == np.float32(EMPTY))).all()


# ---- Journeys


@pytest.mark.parametrize("max_segment_len", [1, 5, 8, 9, 16, 17])
def test_blocks_travel_no_further_than_a_clip_reaches(max_segment_len):
    rng = np.random.default_rng(max_segment_len)
    ids = np.zeros((B, S), np.int32)
    for row in ids:
        at = 0
        for segment in range(1, S):
            n = min(int(rng.integers(max(1, max_segment_len - 2), max_segment_len + 1)), S - at)
            row[at : at + n] = segment
            at += n
    (q, k, v, *_), weight = inputs(3)
    arrays = (q, k, v, ids, ids)
    check(on_mesh(MeshConfig(ring=8), arrays, weight, max_segment_len=max_segment_len), dense(*arrays, weight), 2e-5)


def test_what_travels_how_far():
    ring = functools.partial(Ring, None, 1.0, size=16)
    assert Ring(None, 1.0, size=1).hop_schedule(10) == ()
    assert ring().hop_schedule(10) == ((1, 15, 1),)
    assert ring(max_segment_len=1).hop_schedule(10) == ()
    assert ring(max_segment_len=11).hop_schedule(10) == ((1, 1, -1), (-1, 1, 1))
    assert ring(max_segment_len=12).hop_schedule(10) == ((1, 2, -2), (-1, 2, 2))
    assert ring(max_segment_len=52).hop_schedule(10) == ((1, 15, 1),)


def program(max_segment_len):
    mesh = make_mesh(MeshConfig(data=1, ring=8))
    arrays = [jax.ShapeDtypeStruct((1, 512, 4, 8), jnp.float32, sharding=NamedSharding(mesh, HEADS))] * 3
    ids = [jax.ShapeDtypeStruct((1, 512), jnp.int32, sharding=NamedSharding(mesh, TOKENS))] * 2
    with jax.set_mesh(mesh):
        loss = lambda q, k, v, ids, kv_ids: jnp.sum(attend(q, k, v, ids, kv_ids, max_segment_len=max_segment_len))
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays, *ids).as_text()


def test_clips_of_one_token_send_nothing():
    assert "collective_permute" in program(0) and "collective_permute" not in program(1)


def test_nothing_is_kept_but_the_inputs_and_the_result():
    """Residuals: q, k, v, the ids, o and lse; no weights, no blocks of other devices."""
    mesh = make_mesh(MeshConfig(data=1, ring=8))
    (arrays, weight), sizes = inputs(), None
    *placed, _ = to_global((*arrays, weight), mesh, (HEADS, HEADS, HEADS, TOKENS, TOKENS, HEADS))
    with jax.set_mesh(mesh):
        _, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, *placed[3:]), *placed[:3])
    sizes = sorted(x.size for x in jax.tree.leaves(pullback) if hasattr(x, "size"))
    assert sum(sizes) <= 4 * B * S * N * K + B * S * N + 2 * B * S + 64


# ---- What is refused


def test_heads_that_do_not_divide_are_named():
    arrays, weight = inputs()
    arrays = tuple(x[:, :, :2] if x.ndim == 4 else x for x in arrays)
    with pytest.raises(ValueError, match="2 heads a device cannot be divided over mesh.ulysses=8"):
        on_mesh(MeshConfig(data=1, ulysses=8), arrays, weight[:, :, :2])


def test_an_unknown_kernel_is_named():
    with pytest.raises(ValueError, match="attention='flash' must be 'auto' or one of 'reference', 'blockwise'"):
        attend(*map(jnp.asarray, inputs()[0]), impl="flash")


def test_the_meshes_here_are_all():
    assert len(MESHES) == math.comb(6, 3)

"""The kernel for GPUs: its numbers in Pallas's interpreter, alone and in the ring, and that it lowers for CUDA."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from test_ring import check, dense, inputs, on_mesh

from minisora_jax.parallel.kernels import reference, triton
from minisora_jax.parallel.mesh import MeshConfig


@contextlib.contextmanager
def small_tiles(**sides):
    names = ("FORWARD", "QUERY_GRADIENT", "KEY_GRADIENT")
    before = [getattr(triton, name) for name in names]
    for name, tiling in zip(names, before):
        setattr(triton, name, dataclasses.replace(tiling, **sides))
    try:
        yield
    finally:
        for name, tiling in zip(names, before):
            setattr(triton, name, tiling)
        jax.clear_caches()


@settings(max_examples=2)
@given(
    seed=st.integers(0, 10_000),
    tile=st.sampled_from([32, 64, 128]),
    step=st.sampled_from([32, 64]),
    T=st.sampled_from([None, 1, 30, 70]),
)
def test_it_is_the_definition(seed, tile, step, T):
    arrays, weight = inputs(seed, T)
    arrays = tuple(map(jnp.asarray, (x[:, :, :2] if x.ndim == 4 else x for x in arrays)))
    weight = jnp.asarray(weight[:, :, :2])
    with small_tiles(side=tile, step=step):
        o, lse = jax.jit(triton.forward, static_argnums=5)(*arrays, 0.5)
        grads = jax.jit(triton.backward, static_argnums=8)(*arrays, o, lse, weight, 0.5)
    check((o, grads), dense(*arrays, weight), 2e-5)
    np.testing.assert_allclose(lse, reference.forward(*arrays, 0.5)[1], rtol=1e-5, atol=1e-5)


def test_it_goes_round_the_ring():
    arrays, weight = inputs()
    with small_tiles(side=32, step=32):  # float32 takes half of them
        check_round_the_ring(arrays, weight)


def check_round_the_ring(arrays, weight):
    check(on_mesh(MeshConfig(data=1, ring=4, ulysses=2), arrays, weight, impl="triton"), dense(*arrays, weight), 2e-5)


def test_bfloat16():
    arrays, weight = inputs(1)
    half = [x.astype(jnp.bfloat16) for x in arrays[:3]]
    wanted = dense(*(np.asarray(x, np.float64) for x in half), *arrays[3:], weight)
    check(on_mesh(MeshConfig(data=8), (*half, *arrays[3:]), weight, impl="triton"), wanted, 2e-2)


@pytest.mark.parametrize("width, dtype", [(128, jnp.bfloat16), (64, jnp.float32)])
def test_it_is_lowered_for_cuda(width, dtype):
    """By jax's Triton backend, as on a GPU: nothing of the interpreter is left, and nothing quadratic is made."""
    S = 8192
    x = jax.ShapeDtypeStruct((1, S, 2, width), dtype)
    ids, lse = jax.ShapeDtypeStruct((1, S), jnp.int32), jax.ShapeDtypeStruct((1, 2, S), jnp.float32)
    gpu = AbstractMesh((1,), ("device",), abstract_device=AbstractDevice("NVIDIA H100", 132, "gpu"))
    for call, inputs_, kernels in (
        (triton.forward, (x, x, x, ids, ids), ["forward_tile"]),
        (triton.backward, (x, x, x, ids, ids, x, lse, x), ["query_gradient_tile", "key_gradient_tile"]),
    ):
        with use_abstract_mesh(gpu):
            traced = jax.jit(call, static_argnums=len(inputs_)).trace(*inputs_, 0.1)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("@__gpu$xla.gpu.triton") == len(kernels) and all(k in text for k in kernels)
        assert f"{S}x{S}" not in text and "stablehlo.while" not in text

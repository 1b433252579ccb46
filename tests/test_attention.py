"""Attention by segments against a float64 loop over the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minisora_jax.parallel.attention import attend, forward_mode


def reference(q, k, v, q_segment, kv_segment):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, s, n in np.ndindex(*q.shape[:3]):
        seen = (kv_segment[b] == q_segment[b, s]) & (q_segment[b, s] > 0)
        if seen.any():
            logits = k[b, seen, n] @ q[b, s, n] / np.sqrt(q.shape[-1])
            weights = np.exp(logits - logits.max())
            out[b, s, n] = weights / weights.sum() @ v[b, seen, n]
    return out


def make(seed: int = 0, scale: float = 3.0):
    rng = np.random.default_rng(seed)
    q, k, v = (scale * rng.standard_normal((2, n, 3, 8)).astype(np.float32) for n in (10, 7, 7))
    q_segment = np.array([[1, 1, 1, 2, 2, 2, 3, 3, 0, 0], [1] * 10], np.int32)
    kv_segment = np.array([[1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 2, 2, 2, 2]], np.int32)
    return q, k, v, q_segment, kv_segment


def test_it_is_the_definition():
    inputs = make()
    np.testing.assert_allclose(attend(*map(jnp.asarray, inputs)), reference(*inputs), atol=2e-6)


def test_a_query_with_nothing_to_see_gets_zeros_and_no_gradient():
    q, k, v, q_segment, kv_segment = map(jnp.asarray, make())
    out = attend(q, k, v, q_segment, kv_segment)
    np.testing.assert_array_equal(out[0, 6:8], 0.0)  # segment 3 has no keys
    grads = jax.grad(lambda q, k, v: attend(q, k, v, q_segment, kv_segment)[0, 6:8].sum(), argnums=(0, 1, 2))(q, k, v)
    assert all(np.all(np.asarray(g) == 0) for g in grads)


def test_gradients_are_those_of_differences():
    q, k, v, q_segment, kv_segment = make(1, scale=1.0)
    weight = np.random.default_rng(2).standard_normal(q.shape)
    loss = lambda q, k, v: jnp.sum(attend(q, k, v, q_segment, kv_segment) * weight)
    grads = jax.grad(loss, argnums=(0, 1, 2))(*map(jnp.asarray, (q, k, v)))
    rng = np.random.default_rng(3)
    for i, grad in enumerate(grads):
        way, inputs, h = rng.standard_normal((q, k, v)[i].shape), [a.astype(np.float64) for a in (q, k, v)], 1e-5
        values = []
        for sign in (1, -1):
            moved = list(inputs)
            moved[i] = inputs[i] + sign * h * way
            values.append(np.sum(reference(*moved, q_segment, kv_segment) * weight))
        np.testing.assert_allclose(np.sum(np.asarray(grad) * way), (values[0] - values[1]) / (2 * h), rtol=1e-4)


def test_forward_mode_gives_the_derivative_along_a_way():
    """Of any kernel's attention; without it JAX refuses."""
    q, k, v, *segments = make(1, scale=1.0)
    rng, h = np.random.default_rng(3), 1e-5
    ways = [rng.standard_normal(x.shape) for x in (q, k, v)]
    at = lambda step: reference(*(x.astype(np.float64) + step * way for x, way in zip((q, k, v), ways)), *segments)
    attention = lambda q, k, v: attend(q, k, v, *map(jnp.asarray, segments), impl="triton")
    primals, tangents = (tuple(jnp.asarray(x, jnp.float32) for x in xs) for xs in ((q, k, v), ways))
    with forward_mode():
        out, along = jax.jvp(attention, primals, tangents)
    np.testing.assert_allclose(out, at(0), atol=2e-6)
    np.testing.assert_allclose(along, (at(h) - at(-h)) / (2 * h), atol=1e-5)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(attention, primals, tangents)


def test_large_logits_do_not_overflow():
    q, k, v, *segments = make(scale=100.0)
    assert np.isfinite(attend(*map(jnp.asarray, (q, k, v, *segments)))).all()


def test_bfloat16_is_close():
    q, k, v, *segments = make(scale=1.0)
    out = attend(*(jnp.asarray(a, jnp.bfloat16) for a in (q, k, v)), *map(jnp.asarray, segments))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), reference(q, k, v, *segments), atol=0.03)

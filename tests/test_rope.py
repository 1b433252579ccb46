"""Rotary positions depend on differences; tables are their closed forms."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minisora_jax.models.rope import axis_widths, rope_angles, rotate, sinusoids


@given(st.integers(1, 64))
def test_axes_share_the_head_in_pairs(half):
    widths = axis_widths(2 * half, 3)
    assert sum(widths) == 2 * half and all(w % 2 == 0 for w in widths)


def test_wan_head_is_divided_as_wan_divides_it():
    assert axis_widths(128, 3) == (44, 42, 42)


def test_rotation_is_multiplication_by_a_complex_unit():
    rng = np.random.default_rng(0)
    x, position = rng.standard_normal((2, 5, 3, 12)), rng.integers(0, 50, (2, 5, 3))
    out = np.asarray(rotate(jnp.asarray(x, jnp.float32), rope_angles(jnp.asarray(position), 12)))
    angle = []
    for axis, width in enumerate((4, 4, 4)):
        angle.append(position[..., axis, None] * 10_000.0 ** (-np.arange(0, width, 2) / width))
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * np.concatenate(angle, -1))[:, :, None]
    np.testing.assert_allclose(out[..., ::2], turned.real, atol=1e-4)
    np.testing.assert_allclose(out[..., 1::2], turned.imag, atol=1e-4)


@given(
    st.tuples(*[st.integers(-20, 20)] * 3), st.tuples(*[st.integers(0, 40)] * 3), st.tuples(*[st.integers(0, 40)] * 3)
)
def test_products_depend_on_differences(offset, a, b):
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 24)), jnp.float32) for _ in range(2))
    turn = lambda x, p: rotate(x, rope_angles(jnp.asarray(p)[None, None], 24))
    product = lambda a, b: float(jnp.sum(turn(q, a) * turn(k, b)))
    moved = [tuple(int(i + o) for i, o in zip(p, offset)) for p in (a, b)]
    np.testing.assert_allclose(product(*moved), product(a, b), atol=2e-3)


def test_sinusoids_are_their_closed_form():
    value = np.array([0.0, 1.0, 37.5])
    frequency = 10_000.0 ** (-np.arange(4) / 4)
    expected = np.concatenate([np.cos(value[:, None] * frequency), np.sin(value[:, None] * frequency)], -1)
    np.testing.assert_allclose(sinusoids(jnp.asarray(value), 8), expected, atol=1e-5)

"""Rectified flow against closed forms: the path, the times, the samplers' orders, guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from minisora_jax.data.packing import PackConfig, Segment, pack_segments
from minisora_jax.diffusion.guidance import guide
from minisora_jax.diffusion.loss import flow_matching_loss
from minisora_jax.diffusion.path import clean, interpolate, velocity
from minisora_jax.diffusion.sampler import STEPS
from minisora_jax.diffusion.time import TimeConfig, sampling_times, shift, tokens_of_segment, training_times
from minisora_jax.models.dit import DiT, DiTConfig
from minisora_jax.models.text import encode_bytes


def batch(sizes, tokens=64, rows=1, known=lambda i, n: np.zeros(n, bool)):
    segments = [
        Segment(np.zeros((n, 4), np.float32), known(i, n), size, encode_bytes("x"), 8.0)
        for i, size in enumerate(sizes)
        for n in [int(np.prod(size))]
    ]
    config = PackConfig(tokens=tokens, text_tokens=4 * len(sizes), slots=len(sizes), rows=rows)
    return jax.tree.map(jnp.asarray, pack_segments([segments] * rows, config))


@given(st.floats(0, 1), st.floats(-5, 5), st.floats(-5, 5))
def test_the_velocity_leads_back_to_the_data(t, x, noise):
    x_t, v = interpolate(x, noise, t), velocity(x, noise)
    np.testing.assert_allclose(clean(x_t, v, t), x, atol=1e-12)
    np.testing.assert_allclose(x_t + (1 - t) * v, noise, atol=1e-12)


@given(st.integers(1, 100_000), st.floats(0.01, 0.99))
def test_shift_is_that_of_sd3(tokens, t):
    s = np.sqrt(tokens / 256)
    np.testing.assert_allclose(shift(t, jnp.float32(tokens), 256), s * t / (1 + (s - 1) * t), rtol=1e-4)
    assert shift(0.0, jnp.float32(tokens), 256) == 0 and shift(1.0, jnp.float32(tokens), 256) == 1
    assert shift(t, jnp.float32(tokens), 0) == t


def test_times_are_logit_normal_and_shifted_by_the_clips_own_size():
    sizes = [(1, 2, 2), (2, 4, 4)]
    b = batch(sizes, rows=3000, tokens=40)
    config = TimeConfig(mean=0.3, std=1.2, base_tokens=16, per_frame=0.0)
    time = np.asarray(training_times(config, b, jax.random.key(0)), np.float64)
    assert np.asarray(tokens_of_segment(b)[0, [0, 5, 39]]).tolist() == [4, 32, 0]
    for at, n in ((0, 4), (5, 32)):
        s, t = np.sqrt(n / 16), time[:, at]
        unshifted = t / (s - (s - 1) * t)
        logit = np.log(unshifted / (1 - unshifted))
        assert stats.kstest(logit, stats.norm(0.3, 1.2).cdf).pvalue > 1e-3


def test_times_are_equal_within_a_clip_or_a_frame_and_zero_where_known():
    known = lambda i, n: np.arange(n) < 4 if i == 0 else np.zeros(n, bool)
    b = batch([(3, 2, 2), (2, 2, 3)], rows=200, tokens=24, known=known)
    one = np.asarray(training_times(TimeConfig(per_frame=0.0), b, jax.random.key(1)))
    assert (
        (one[:, :4] == 0).all()
        and (np.ptp(one[:, 4:12], axis=1) == 0).all()
        and (np.ptp(one[:, 12:], axis=1) == 0).all()
    )
    each = np.asarray(training_times(TimeConfig(per_frame=1.0), b, jax.random.key(1)))
    frames = each[:, 12:].reshape(200, 2, 6)
    assert (np.ptp(frames, axis=2) == 0).all() and (frames[:, 0, 0] != frames[:, 1, 0]).all()


def test_sampling_times_run_from_noise_to_clean():
    known = lambda i, n: np.arange(n) < 2
    times = np.asarray(sampling_times(TimeConfig(base_tokens=16), 10, batch([(2, 2, 2)], tokens=10, known=known)))
    assert times.shape == (11, 1, 10)
    assert (times[:, 0, :2] == 0).all() and (times[0, 0, 2:8] == 1).all() and (times[-1] == 0).all()
    assert (np.diff(times[:, 0, 2:8], axis=0) < 0).all()


# ---- Samplers on a flow whose solution is known: Gaussian data N(m, s^2) has, at time t, mean (1 - t) m and
# deviation d(t) = sqrt((1 - t)^2 s^2 + t^2), and dx/dt = v carries x(1) to m + (s / 1) x(1).

M, S = 1.5, 0.4


def gaussian_velocity(x, time_BS):
    t = time_BS[..., None]
    variance = (1 - t) ** 2 * S**2 + t**2
    return -M + (t - (1 - t) * S**2) / variance * (x - (1 - t) * M)


def end_error(name: str, steps: int) -> float:
    with jax.enable_x64(True):
        noise = jnp.linspace(-2.0, 2.0, 9, dtype=jnp.float64).reshape(1, 9, 1)
        x, times = noise, np.linspace(1.0, 0.0, steps + 1)
        for t, after in zip(times, times[1:]):
            x = STEPS[name](gaussian_velocity, x, jnp.full((1, 9), t), jnp.full((1, 9), after))
        return float(jnp.abs(x - (M + S * noise)).max())


@pytest.mark.parametrize("name, order", [("euler", 1), ("heun", 2)])
def test_samplers_converge_at_their_order(name, order):
    errors = [end_error(name, n) for n in (40, 80, 160)]
    measured = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(measured, order, atol=0.2)


@pytest.mark.parametrize("name", STEPS)
def test_known_tokens_do_not_move(name):
    x, time = jnp.ones((1, 3, 2)), jnp.array([[0.0, 1.0, 1.0]])
    out = STEPS[name](lambda x, t: x + 1, x, time, 0.5 * time)
    assert (out[:, 0] == 1).all() and (out[:, 1:] != 1).all()


def test_guidance_mixes_each_token_with_its_twin():
    v = jnp.array([[[1.0], [2.0], [10.0], [20.0], [7.0]]])
    with_caption, without = jnp.array([[0, 1, 0, 1, 4]]), jnp.array([[2, 3, 2, 3, 4]])
    guided = np.asarray(guide(v, with_caption, without, 3.0))[0, :, 0]
    np.testing.assert_allclose(guided, [10 + 3 * (1 - 10), 20 + 3 * (2 - 20)] * 2 + [7], rtol=1e-6)
    np.testing.assert_allclose(guide(v, with_caption, without, 1.0)[0, :2, 0], [1, 2])


def test_the_loss_counts_only_what_is_to_be_made():
    known = lambda i, n: np.arange(n) < 2
    b = batch([(1, 2, 2)], tokens=6, known=known)
    model = DiT(DiTConfig(latent_channels=4, patch=(1, 1, 1), width=32, depth=1, heads=1, text_width=64, text_depth=0))
    params = model.init(jax.random.key(0), b.tokens_BSP, jnp.zeros((1, 6)), b)
    values, weights = flow_matching_loss(model, TimeConfig(), params, b, jax.random.key(1))["loss"]
    assert weights[0].tolist() == [0, 0, 1, 1, 0, 0]
    # The head starts at zero, so the error is that of the velocity itself: the noise, as the tokens are zero.
    noise = jax.random.normal(jax.random.split(jax.random.key(1))[0], b.tokens_BSP.shape)
    np.testing.assert_allclose(values[0, 2:4], (noise**2).mean(-1)[0, 2:4], rtol=1e-5)

"""Guidance against its formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisora_jax.diffusion.guidance import SCHEDULES, GuidanceConfig, guide, rescale, twins, weight
from minisora_jax.diffusion.noise_path import PATHS, PREDICTIONS, convert


def test_guidance_mixes_each_token_with_its_twin():
    v = jnp.array([[[1.0], [2.0], [10.0], [20.0], [7.0]]])
    with_caption, without = jnp.array([[0, 1, 0, 1, 4]]), jnp.array([[2, 3, 2, 3, 4]])
    pair = twins(v, with_caption, without)
    guided = np.asarray(guide(*pair, jnp.full((1, 5), 3.0)))[0, :, 0]
    np.testing.assert_allclose(guided, [10 + 3 * (1 - 10), 20 + 3 * (2 - 20)] * 2 + [7], rtol=1e-6)
    np.testing.assert_allclose(guide(*pair, jnp.ones((1, 5)))[0, :2, 0], [1, 2])


def test_guidance_acts_in_its_interval_only():
    time = jnp.array([[0.0, 0.2, 0.5, 0.7, 0.71, 1.0]])
    good, worse = jnp.ones((1, 6, 1)), jnp.zeros((1, 6, 1))
    guided = guide(good, worse, weight(time, 4.0, (0.2, 0.7)))[0, :, 0]
    np.testing.assert_allclose(guided, [1, 4, 4, 4, 1, 1])


@given(st.sampled_from(list(PATHS)), st.floats(0.02, 0.98), st.floats(0, 10), st.integers(0, 1000))
def test_it_makes_no_difference_which_prediction_is_guided(name, t, scale, seed):
    path, rng = PATHS[name], np.random.default_rng(seed)
    with jax.enable_x64(True):
        x_t, good, worse = (jnp.asarray(rng.standard_normal((1, 3, 2))) for _ in range(3))
        time, results = jnp.full((1, 3), t), []
        for p in PREDICTIONS:
            pair = (convert(path, "clean", p, clean, x_t, time[..., None]) for clean in (good, worse))
            results.append(convert(path, p, "clean", guide(*pair, weight(time, scale)), x_t, time[..., None]))
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_rescaling_gives_each_clip_the_spread_of_the_unguided_estimate(prediction, share):
    """Lin et al. 2023, eq. 15 and 16, on the clean estimate of each clip; token 0 is known, the last two padding."""
    path, rng = PATHS["linear"], np.random.default_rng(0)
    segment = jnp.array([[0, 1, 1, 1, 2, 2, 2, 2, 0, 0]])
    with jax.enable_x64(True):
        x_t, good, guided = (jnp.asarray(rng.standard_normal((1, 10, 3)) * k + 0.3) for k in (1, 1, 2))
        time = jnp.asarray([[0.0, 0.4, 0.4, 0.6, 0.9, 0.9, 0.9, 0.9, 0.5, 0.5]])
        given_ = [convert(path, "clean", prediction, clean, x_t, time[..., None]) for clean in (guided, good)]
        out = rescale(path, prediction, *given_, x_t, time, segment, 2, share)
        assert (out[0, 0] == given_[0][0, 0]).all() and np.isfinite(out).all()
        clean = np.asarray(convert(path, prediction, "clean", out, x_t, time[..., None]))
        good, guided = np.asarray(good), np.asarray(guided)
    for at in (slice(1, 4), slice(4, 8)):
        whole = guided[0, at] * (np.std(good[0, at]) / np.std(guided[0, at]))
        np.testing.assert_allclose(clean[0, at], share * whole + (1 - share) * guided[0, at], rtol=1e-6)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(interval=(0.7, 0.2)), r"guidance interval 0.7-0.2 must be two rising times from 0 \(clean\) to 1"),
        (dict(interval=(0.2, 1.5)), "guidance interval 0.2-1.5 must be two rising times"),
        (dict(rescale=1.5), r"guidance rescale=1.5 must be in \[0, 1\]"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        GuidanceConfig(**values)


def test_schedules_keep_their_mean_and_grow_towards_the_data():
    time = jnp.linspace(0.0, 1.0, 1001)[None]
    for schedule in SCHEDULES:
        weights = np.asarray(weight(time, 5.0, schedule=schedule))[0]
        assert weights.mean() == pytest.approx(5.0, abs=0.01)
        assert (np.diff(weights) <= 1e-5).all()
    with pytest.raises(ValueError, match="schedule='step' must be one of constant, linear, cosine"):
        GuidanceConfig(schedule="step")

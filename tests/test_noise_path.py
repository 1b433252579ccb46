"""Paths, predictions and weights against their formulas in NumPy, written out apart from ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisora_jax.diffusion.noise_path import PATHS, PREDICTIONS, convert, ddpm_ratios, solve, target
from minisora_jax.diffusion.objective import WEIGHTS, ObjectiveConfig, weight

PI = np.pi


def numpy_path(name, t):
    """(a, s, a', s') in float64."""
    if name == "linear":
        return 1 - t, t, -1.0, 1.0
    if name == "gvp":
        return np.cos(PI * t / 2), np.sin(PI * t / 2), -PI / 2 * np.sin(PI * t / 2), PI / 2 * np.cos(PI * t / 2)
    if name == "ve":
        return 1.0, 80 * t, 0.0, 80.0
    if name == "vp":  # d log(a^2) / dt = -beta, beta = 0.1 + 19.9 t
        kept, rate = np.exp(-0.1 * t - 19.9 * t**2 / 2), 0.1 + 19.9 * t
    elif name == "cosine":
        u, start = (t + 0.008) / 1.008 * PI / 2, 0.008 / 1.008 * PI / 2
        kept, rate = np.cos(u) ** 2 / np.cos(start) ** 2, 2 * np.tan(u) * PI / 2 / 1.008
    else:  # the table's ratio, linear between its steps
        kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
        ratios = np.concatenate([[0], np.sqrt(1 / kept - 1)])
        k = min(int(t * 1000), 999)
        slope = (ratios[k + 1] - ratios[k]) * 1000
        q = ratios[k] + slope * (t - k / 1000)
        return (
            (1 + q * q) ** -0.5,
            q * (1 + q * q) ** -0.5,
            -q * slope * (1 + q * q) ** -1.5,
            slope * (1 + q * q) ** -1.5,
        )
    a, s = np.sqrt(kept), np.sqrt(1 - kept)
    return a, s, -a * rate / 2, kept * rate / (2 * s)


def numpy_prediction(kind, path, x, e):
    a, s, a_slope, s_slope = path
    return {
        "clean": x,
        "noise": e,
        "velocity": a_slope * x + s_slope * e,
        "v": (a * e - s * x) / np.sqrt(a * a + s * s),
    }[kind]


times = st.floats(0.003, 0.99).filter(lambda t: min(t * 1000 % 1, -t * 1000 % 1) > 1e-3)  # off the knots of the table


@pytest.mark.parametrize("name", PATHS)
@settings(max_examples=30)  # of sixteen conversions each
@given(times, st.floats(-5, 5), st.floats(-5, 5))
def test_every_prediction_gives_every_other(name, t, x, e):
    reference, path = numpy_path(name, t), PATHS[name]
    a, s, *_ = reference
    with jax.enable_x64(True):
        x_t = path.mix(x, e, jnp.float64(t))
        np.testing.assert_allclose(x_t, a * x + s * e, atol=1e-9)
        for given_, wanted in ((g, w) for g in PREDICTIONS for w in PREDICTIONS):
            p, q = (numpy_prediction(k, reference, x, e) for k in (given_, wanted))
            np.testing.assert_allclose(target(path, given_, x, e, jnp.float64(t)), p, rtol=1e-7, atol=1e-7)
            out = convert(path, given_, wanted, p, x_t, jnp.float64(t))
            np.testing.assert_allclose(out, q, rtol=1e-6, atol=1e-6, err_msg=f"{given_} -> {wanted}")


@pytest.mark.parametrize("name", PATHS)
def test_the_ends_are_clean_and_finite(name):
    path = PATHS[name]
    assert path.alpha(jnp.float32(0)) == pytest.approx(1, abs=1e-6)
    assert path.sigma(jnp.float32(0)) == pytest.approx(0, abs=1e-6)
    ends = jnp.array([0.0, 1.0])
    for prediction in PREDICTIONS:
        assert np.isfinite(target(path, prediction, 0.7, -1.3, ends)).all(), prediction
        both = solve(path, prediction, jnp.array([0.7, 0.1]), jnp.array([-1.3, 0.4]), ends)
        assert np.isfinite(both).all(), prediction
    if name in ("linear", "gvp", "ve"):  # where the velocity is finite, it tells both everywhere
        v = target(path, "velocity", 0.7, -1.3, ends)
        x, e = solve(path, "velocity", v, path.mix(0.7, -1.3, ends), ends)
        np.testing.assert_allclose(x, 0.7, atol=2e-5)
        np.testing.assert_allclose(e, -1.3, atol=1e-5)


@pytest.mark.parametrize("name", PATHS)
def test_time_of_a_noise_level(name):
    with jax.enable_x64(True):
        t = jnp.linspace(0.001, 0.999, 57)
        np.testing.assert_allclose(PATHS[name].time_of(PATHS[name].ratio(t)), t, rtol=1e-9)


def test_ddpms_table_is_the_continuous_path_nearly():
    t = np.arange(1, 1001) / 1000
    np.testing.assert_allclose(np.log(ddpm_ratios()[1:][t > 0.05]), np.log(PATHS["vp"].ratio(t))[t > 0.05], atol=0.04)


@given(st.floats(-3, 3), st.floats(0.01, 80), st.floats(-3, 3))
def test_v_on_ve_is_the_network_of_edm(x_t, sigma, network):
    """D = c_skip x + c_out F(c_in x; c_noise), table 1 of Karras et al. with data of unit variance."""
    with jax.enable_x64(True):
        t = jnp.float64(sigma / 80)
        clean, _ = solve(PATHS["ve"], "v", -network, x_t, t)
        c_skip, c_out, c_in = 1 / (sigma**2 + 1), sigma / np.sqrt(sigma**2 + 1), 1 / np.sqrt(sigma**2 + 1)
        np.testing.assert_allclose(clean, c_skip * x_t + c_out * network, rtol=1e-9, atol=1e-9)
        shown, level = PATHS["ve"].model_input(jnp.full((1, 1, 1), x_t), jnp.full((1, 1), t))
        np.testing.assert_allclose(shown, c_in * x_t, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(jnp.log(level / (1 - level)), np.log(sigma), rtol=1e-6, atol=1e-9)
    same = jnp.ones((1, 1, 2))
    assert PATHS["vp"].model_input(same, jnp.ones((1, 1)))[0] is same


# ---- Weights


@pytest.mark.slow
@given(st.sampled_from(["gvp", "vp", "cosine", "ddpm"]), times)
def test_weights_are_those_of_the_papers(name, t):
    a, s, *_ = numpy_path(name, t)
    snr = a**2 / s**2
    with jax.enable_x64(True):
        ours = {
            (w, p): float(weight(ObjectiveConfig(name, p, w), jnp.float64(t))) for w in WEIGHTS for p in PREDICTIONS
        }
    least = min(snr, 5.0)
    papers = {
        ("min-snr", "clean"): least,
        ("min-snr", "noise"): least / snr,
        ("min-snr", "v"): least / (snr + 1),
        ("edm", "clean"): (1 / snr + 1) * snr,
        ("edm", "v"): 1.0,
        **{("natural", p): 1.0 for p in PREDICTIONS},
    }
    for key, wanted in papers.items():
        np.testing.assert_allclose(ours[key], wanted, rtol=1e-5, err_msg=str(key))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("scheme", ["min-snr", "edm"])
@settings(max_examples=30)
@given(times, st.floats(-2, 2), st.floats(0.01, 2))
def test_a_weight_is_of_the_error_and_not_of_how_it_is_predicted(name, scheme, t, x_t, off):
    with jax.enable_x64(True):
        time, path = jnp.float64(t), PATHS[name]
        losses = []
        for prediction in PREDICTIONS:
            p, q = (convert(path, "clean", prediction, jnp.float64(x), x_t, time) for x in (0.5, 0.5 + off))
            losses.append(float(weight(ObjectiveConfig(name, prediction, scheme), time) * (p - q) ** 2))
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(path="curved"), "objective.path='curved' must be one of linear, gvp, vp, ddpm, cosine, ve"),
        (dict(prediction="x0"), "objective.prediction='x0' must be one of velocity, noise, clean, v"),
        (dict(weight="snr"), "objective.weight='snr' must be one of natural, min-snr, edm"),
    ],
)
def test_unknown_names_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**values)

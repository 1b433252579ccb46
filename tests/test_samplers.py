"""Samplers on a mixture of Gaussians, whose every estimate is known: orders of convergence, distributions, ends."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.integrate import solve_ivp

sys.path.insert(0, str(Path(__file__).parent / "parity"))
import mixture  # noqa: E402

from minisora_jax.diffusion.adaptive import dopri5  # noqa: E402
from minisora_jax.diffusion.denoiser import Denoiser  # noqa: E402
from minisora_jax.diffusion.noise_path import PATHS, PREDICTIONS, target  # noqa: E402
from minisora_jax.diffusion.sampler import SAMPLERS, SamplerConfig  # noqa: E402
from minisora_jax.diffusion.time import TIME_SCHEDULES, latest_time  # noqa: E402

OF_ANY_MODEL = {name: sampler for name, sampler in SAMPLERS.items() if name != "mean-flow"}
DETERMINISTIC = [name for name, sampler in OF_ANY_MODEL.items() if not sampler.eta]
STOCHASTIC = [name for name, sampler in SAMPLERS.items() if sampler.eta is not None]


def model_of(name, prediction="velocity"):
    path = PATHS[name]

    def model(x_BSP, time_BS):
        time = time_BS[..., None]
        a, s = path.alpha(time), path.sigma(time)
        clean = mixture.clean(x_BSP, a, s, jnp)
        return target(path, prediction, clean, (x_BSP - a * clean) / jnp.maximum(s, 1e-12), time)

    return Denoiser(model, path, prediction)


def run(sampler, denoiser, x, times, eta=0.0, key=None):
    """The end state; x is (1, S, P) and all its tokens go through `times`."""
    of_tokens = jnp.broadcast_to(jnp.asarray(times, x.dtype)[:, None, None], (len(times), *x.shape[:2]))

    @jax.jit
    def step(carry, inputs):
        x, past = carry
        time, after, key = inputs
        noise = None if key is None else jax.random.normal(key, x.shape, x.dtype)
        return SAMPLERS[sampler].step(denoiser, x, time, after, past, noise, eta), None

    keys = None if key is None else jax.random.split(key, len(times) - 1)
    start = (x, SAMPLERS[sampler].begin(x, of_tokens[0]))
    return jax.lax.scan(step, start, (of_tokens[:-1], of_tokens[1:], keys))[0][0]


# ---- Orders: from sigma / alpha = 4 to 0.15, where everything is smooth


def flow_reference(x, ratio, after):
    """x_t / alpha carried by d(x_t / alpha) / d(sigma / alpha) = e, with SciPy at 1e-12."""
    slope = lambda q, y: mixture.noise(y / np.hypot(1, q), 1 / np.hypot(1, q), q / np.hypot(1, q))
    return solve_ivp(slope, (ratio, after), x, method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]


def order_of(sampler, name, prediction):
    path, errors = PATHS[name], []
    with jax.enable_x64(True):
        first, last = float(path.time_of(4.0)), float(path.time_of(0.15))
        a, a_last = float(path.alpha(jnp.float64(first))), float(path.alpha(jnp.float64(last)))
        x = np.linspace(-5, 5, 21)
        truth = a_last * flow_reference(x, float(path.ratio(first)), float(path.ratio(last)))
        for steps in (80, 160, 320):
            # on "ve" time is sigma, of which even steps are no sensible grid
            between = np.linspace(first**0.25, last**0.25, steps + 1) ** 4 if name == "ve" else None
            times = np.linspace(first, last, steps + 1) if between is None else between
            out = run(sampler, model_of(name, prediction), a * jnp.asarray(x).reshape(1, 1, 21), times)
            errors.append(np.abs(np.asarray(out).ravel() - truth).max())
    return np.log2(errors[-2] / errors[-1]), errors


SMOOTH = ["linear", "gvp", "vp", "cosine", "ve"]  # "ddpm" has the corners of its table


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_samplers_converge_at_their_order(sampler, name):
    wanted = {"euler": 1, "ddim": 1, "heun": 2, "dpm++2m": 2, "unipc": 2}[sampler]
    measured, errors = order_of(sampler, name, "velocity" if name == "linear" else "v")
    print(f"{sampler} {name}: order {measured:.2f}, errors {errors[0]:.1e} {errors[1]:.1e} {errors[2]:.1e}")
    assert wanted - 0.15 < measured < wanted + (1.3 if sampler == "unipc" else 0.3)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_end_does_not_depend_on_what_is_predicted(name, prediction):
    """From noise to clean data; Heun is left out, as its last step is another for a predicted velocity."""
    path = PATHS[name]
    with jax.enable_x64(True):
        times = TIME_SCHEDULES["karras"](30, path)  # begins where every prediction tells the data
        x = path.sigma(times[0]) * jnp.linspace(-2.0, 2.0, 9).reshape(1, 9, 1)
        for sampler in ("ddim", "dpm++2m", "unipc"):
            ours, other = (run(sampler, model_of(name, p), x, times) for p in (prediction, "v"))
            np.testing.assert_allclose(ours, other, atol=1e-8)
            assert np.isfinite(ours).all()


@pytest.mark.parametrize("name", ["linear", "ve"])
def test_euler_is_ddim_where_the_path_is_straight(name):
    x = jnp.linspace(-2.0, 2.0, 9).reshape(1, 9, 1)
    euler, ddim = (run(s, model_of(name), x, np.linspace(0.9, 0, 8)) for s in ("euler", "ddim"))
    np.testing.assert_allclose(euler, ddim, atol=2e-4)


# ---- Distributions


@pytest.mark.parametrize("name", ["linear", "gvp", "ddpm", "ve"])
@pytest.mark.parametrize("sampler, eta", [("ddpm", 1.0), ("ddim", 0.5), ("sde", 1.0), ("sde", 0.3)])
def test_stochastic_samplers_end_in_the_data(sampler, eta, name):
    particles, path = 20_000, PATHS[name]
    time_schedule = {"ve": "karras", "ddpm": "trailing"}.get(name, "even")
    times = TIME_SCHEDULES[time_schedule](250, path)
    rng = np.random.default_rng(0)
    x = path.sigma(times[0]) * jnp.asarray(rng.standard_normal((1, 1, particles)), jnp.float32)
    ends = np.asarray(run(sampler, model_of(name), x, times, eta, jax.random.key(3)), np.float64).ravel()
    cdf = lambda x: sum(
        w * stats.norm(m, d).cdf(x) for w, m, d in zip(mixture.WEIGHTS, mixture.MEANS, mixture.DEVIATIONS)
    )
    distance = stats.kstest(ends, cdf).statistic
    mean = (mixture.WEIGHTS * mixture.MEANS).sum()
    variance = (mixture.WEIGHTS * (mixture.MEANS**2 + mixture.DEVIATIONS**2)).sum() - mean**2
    off, spread = ends.mean() - mean, ends.var() / variance
    print(f"{sampler} {eta} {name}: KS {distance:.4f}, mean off {off:+.4f}, variance {spread:.4f} of the data's")
    assert abs(off) < 0.04 and abs(spread - 1) < 0.04
    assert distance < 0.025


def test_noise_matters_only_to_the_stochastic():
    x, times = jnp.ones((1, 3, 2)), np.linspace(1, 0, 4)
    for name in OF_ANY_MODEL:
        one, other = (run(name, model_of("linear"), x, times, 1.0, jax.random.key(k)) for k in (0, 1))
        assert (np.abs(one - other).max() > 0.01) == (name in STOCHASTIC)


# ---- Known tokens, Dormand-Prince, settings


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", PATHS)
def test_known_tokens_do_not_move(name, prediction):
    """Even with a model that says nonsense of them; the others arrive, and stay finite."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 2)), jnp.float32)
    denoiser = Denoiser(lambda x, t: x + 1, PATHS[name], prediction)
    time_schedule = TIME_SCHEDULES["even"](4, PATHS[name])
    for sampler in OF_ANY_MODEL.values():
        times = [jnp.array([[0.0, t, 0.5 * t]], jnp.float32) for t in time_schedule]
        y, past = x, sampler.begin(x, times[0])
        for time, after in zip(times, times[1:]):
            y, past = sampler.step(denoiser, y, time, after, past, jnp.ones_like(y), 1.0)
            assert (y[:, 0] == x[:, 0]).all() and np.isfinite(y).all()
        assert (y[:, 1:] != x[:, 1:]).all()


@pytest.mark.parametrize("name", SMOOTH)
def test_dormand_prince_comes_closer_with_its_tolerance(name):
    """The tolerance is of a step: the flow of narrow components makes the error at the end several times as large."""
    path, errors, calls = PATHS[name], [], []
    with jax.enable_x64(True):
        first = float(path.time_of(20.0))
        x = float(path.sigma(jnp.float64(first))) * np.linspace(-2, 2, 9)
        truth = flow_reference(x / float(path.alpha(jnp.float64(first))), 20.0, 1e-9)
        known = jnp.arange(10)[None] == 9
        times = lambda u: jnp.where(known, 0.0, first * u ** (4 if name == "ve" else 1))
        start = jnp.append(jnp.asarray(x), 0.123).reshape(1, 10, 1)
        solve = jax.jit(lambda x, tolerance: dopri5(model_of(name, "v"), x, times, tolerance))
        for tolerance in (1e-3, 1e-6):
            out, n = solve(start, tolerance)
            assert out[0, 9, 0] == 0.123
            errors.append(np.abs(np.asarray(out)[0, :9, 0] - truth).max())
            calls.append(int(n))
    print(f"dopri5 {name}: errors {errors[0]:.1e} {errors[1]:.1e}, {calls} model calls")
    assert errors[1] < 5e-5 and errors[1] < errors[0] / 50 and calls[0] < calls[1]


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(name="rk4"), r"sampler='rk4' must be one of euler, heun, ddim, .*, dpm\+\+2m, unipc, dopri5"),
        (dict(steps=0), "steps=0 must be at least 1"),
        (dict(steps=1.5), "steps=1.5 must be at least 1, and whole"),
        (dict(shift=1e300), r"shift=1e\+300 must be from 0.001 to 1000"),
        (
            dict(time_schedule="log"),
            "time_schedule='log' must be one of even, wan, karras, leading, linspace, trailing",
        ),
        (dict(name="heun", eta=0.5), "eta=0.5 is for the samplers ddim, ddpm, sde, consistency: heun is deterministic"),
        (dict(name="ddim", eta=1.5), r"eta=1.5 must be in \[0, 1\]"),
        (dict(name="dopri5", tolerance=0.0), "tolerance=0.0 must be a number above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**values)


def test_noise_is_asked_of_the_data_only_where_it_tells():
    for name in ("linear", "gvp", "cosine"):
        t = latest_time(PATHS[name], "noise")
        np.testing.assert_allclose(PATHS[name].ratio(jnp.float32(t)), 80, rtol=1e-3)
        assert latest_time(PATHS[name], "velocity") == 1
    for name in ("vp", "ddpm", "ve"):
        assert latest_time(PATHS[name], "noise") == 1

"""Samplers and grids against the numbers of diffusers' schedulers. Fixtures: tests/parity/make_schedulers.py."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parent / "parity"))
import mixture  # noqa: E402
from random_weights import draw_input  # noqa: E402

from minisora_jax.diffusion.denoiser import Denoiser  # noqa: E402
from minisora_jax.diffusion.noise_path import PATHS, SIGMA_MAX, target  # noqa: E402
from minisora_jax.diffusion.noise_path import NoisePath as DiffusionPath
from minisora_jax.diffusion.sampler import SAMPLERS, euler  # noqa: E402
from minisora_jax.diffusion.time import DDPM_STEPS, TIME_SCHEDULES, shift  # noqa: E402

REFERENCE = load_file(Path(__file__).parent / "parity/fixtures/schedulers.safetensors")
SHAPE = (4, 8)


def model_of(path: DiffusionPath, prediction: str):
    """The closed form as a model of that prediction."""

    def model(x_BSP, time_BS):
        time = time_BS[..., None]
        a, s = path.alpha(time), path.sigma(time)
        clean = mixture.clean(x_BSP, a, s, jnp)
        noise = (x_BSP - a * clean) / jnp.maximum(s, 1e-12)
        return target(path, prediction, clean, noise, time)

    return Denoiser(model, path, prediction)


def run(sampler, denoiser, start, times, eta=0.0, noisy=False, last=None):
    """The states before each step and at the end; `last` takes the last step instead."""
    drawn = lambda name: jnp.asarray(draw_input(name, SHAPE).astype(float))[None]  # of the precision in force
    x = start * drawn("x")
    assert x.dtype == jnp.result_type(float)
    times = [jnp.full((1, SHAPE[0]), t, x.dtype) for t in times]
    past, states = SAMPLERS[sampler].begin(x, times[0]), [x]
    step = jax.jit(lambda *args: SAMPLERS[sampler].step(denoiser, *args))
    for i, (time, after) in enumerate(zip(times, times[1:])):
        noise = drawn(f"noise {i}") if noisy else None
        if last and i == len(times) - 2:
            x, past = last(denoiser, x, time, after)
        else:
            x, past = step(x, time, after, past, noise, eta)
        states.append(x)
    return np.concatenate(states)


SYSTEMS = {  # of diffusers, by how the fixture's entries begin
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "flow euler": "FlowMatchEulerDiscreteScheduler",
    "flow heun": "FlowMatchHeunDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "edm euler": "EDMEulerScheduler",
}


@pytest.fixture
def matches(parity, precision):
    """matches(name, ours): each state of the trajectory, relative to its largest value."""

    def check(name, ours):
        theirs = REFERENCE[name]
        largest = np.abs(theirs).max((1, 2), keepdims=True)
        system = next(system for prefix, system in SYSTEMS.items() if name.startswith(prefix))
        parity(system, "forward", ours / largest, theirs / largest, f"{name} {precision}")

    return check


@pytest.fixture(params=["float32", "float64"])
def precision(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def time_schedule(name, path="ddpm", steps=10):
    return TIME_SCHEDULES[name](steps, PATHS[path])


@pytest.mark.parametrize(
    "name, sampler, prediction, spacing, eta",
    [
        ("ddpm", "ddpm", "noise", "leading", 1.0),
        ("ddim", "ddim", "noise", "leading", 0.0),
        ("ddim v", "ddim", "v", "leading", 0.0),
        ("ddim sample", "ddim", "clean", "trailing", 0.0),
        ("ddim eta", "ddim", "noise", "trailing", 1.0),
        ("ddim half", "ddim", "noise", "leading", 0.5),
    ],
)
def test_ddpm_and_ddim(matches, name, sampler, prediction, spacing, eta):
    ours = run(sampler, model_of(PATHS["ddpm"], prediction), 1.0, time_schedule(spacing), eta, noisy=eta > 0)
    matches(name, ours)


@pytest.mark.parametrize("sampler", ["dpm++2m", "unipc"])
@pytest.mark.parametrize("steps", [10, 20])
def test_multistep_solvers_of_ddpm(matches, sampler, steps):
    ours = run(sampler, model_of(PATHS["ddpm"], "noise"), 1.0, time_schedule("trailing", steps=steps))
    matches(f"{sampler} vp {steps}", ours)


def test_dpmpp_2m_karras(matches):
    times = time_schedule("karras")
    sigmas = PATHS["ddpm"].ratio(jnp.asarray(times))
    np.testing.assert_allclose(sigmas, REFERENCE["karras sigmas"], rtol=1e-4)  # float32 there: 1 - 0.9999
    matches("dpm++2m karras", run("dpm++2m", model_of(PATHS["ddpm"], "noise"), 1.0, times))


@pytest.mark.parametrize("prediction", ["velocity", "noise", "clean", "v"])
def test_unipc_of_flows(matches, precision, prediction):
    times = jnp.asarray(REFERENCE["unipc flow sigmas"], float)  # from 1 - 1e-6: a grid of its own
    if prediction == "noise":
        times = times.at[0].set(1 - 1e-6)  # at 1 itself noise says nothing of the data
        if precision == "float32":
            pytest.skip("(x_t - e) / 1e-6 has no digits in float32: latest_time() starts such a model later")
    matches("unipc flow", run("unipc", model_of(PATHS["linear"], prediction), 1.0, times))


def test_dpmpp_2m_of_flows(matches):
    times = REFERENCE["dpm++2m flow sigmas"]  # from 0.999: a grid of its own
    matches("dpm++2m flow", run("dpm++2m", model_of(PATHS["linear"], "velocity"), 1.0, times))


def test_euler_of_flows_is_euler_and_ddim(matches):
    times = shift(jnp.asarray(time_schedule("even", "linear")), 9.0 * 256, 256)
    for sampler in ("euler", "ddim"):
        matches("flow euler", run(sampler, model_of(PATHS["linear"], "velocity"), 1.0, times))


def test_heun_of_flows_but_for_the_last_step(matches):
    times = REFERENCE["flow heun sigmas"]
    ours = run("heun", model_of(PATHS["linear"], "velocity"), 1.0, times, last=euler)
    matches("flow heun", ours)
    # With another prediction than the velocity our last step is Euler's as well.
    matches("flow heun", run("heun", model_of(PATHS["linear"], "clean"), 1.0, times))


def test_euler_on_sigma_is_ddim(matches):
    """diffusers' EulerDiscrete is Euler in sigma / alpha of x_t / alpha, whatever the model's path: DDIM."""
    times = time_schedule("trailing")
    path = PATHS["ddpm"]
    start = path.ratio(jnp.asarray(times[0])) * path.alpha(jnp.asarray(times[0]))
    ours = run("ddim", model_of(path, "noise"), start, times)
    ours = ours / np.asarray(path.alpha(jnp.asarray(times)))[:, None, None]
    matches("euler", ours)


def test_heun_on_sigma_is_heun_on_ve(matches):
    sigmas = REFERENCE["heun sigmas"]
    ours = run("heun", model_of(PATHS["ve"], "noise"), sigmas[0], sigmas / SIGMA_MAX)
    matches("heun", ours)


def test_edm(matches):
    """Its grid, and its preconditioned network as the prediction v on "ve"."""
    times = time_schedule("karras", "ve")
    np.testing.assert_allclose(times * SIGMA_MAX, REFERENCE["edm sigmas"], rtol=2e-5)
    for sampler in ("euler", "ddim"):
        matches("edm euler", run(sampler, model_of(PATHS["ve"], "v"), SIGMA_MAX, times))


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_grids_of_ddpm(spacing):
    timesteps = np.append(REFERENCE[f"timesteps {spacing}"] + 1, 0) / DDPM_STEPS
    np.testing.assert_allclose(time_schedule(spacing), timesteps, atol=1e-12)


def test_the_table_of_ddpm():
    with jax.enable_x64(True):
        alpha = PATHS["ddpm"].alpha(jnp.arange(1.0, DDPM_STEPS + 1)[::37] / DDPM_STEPS)
    np.testing.assert_allclose(alpha**2, REFERENCE["alphas_cumprod"], rtol=1e-5)

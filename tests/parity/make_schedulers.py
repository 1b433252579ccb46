"""Trajectories of diffusers' schedulers, for tests/test_parity_schedulers.py; made by make.py.

The model is the closed form of mixture.py, evaluated at the scheduler's own sigma (not at the timestep it names, which
some round to an integer). Each trajectory holds the states before each step and at the end, (steps + 1, 4, 8), in the
scheduler's own scaling: x_t, or x_t / alpha for those that work on sigma / alpha. Noise is drawn by name.
"""

import diffusers
import mixture
import numpy as np
import torch
from diffusers.schedulers import scheduling_ddpm
from random_weights import draw_input
from reference import save

SHAPE, STEPS = (4, 8), 10


def predict(kind: str, x_t: torch.Tensor, a, s) -> torch.Tensor:
    a, s, x_t = float(a), float(s), x_t.double().numpy()
    x, e = mixture.clean(x_t, a, s), mixture.noise(x_t, a, s)
    velocity = {"flow_prediction": e - x, "v_prediction": (a * e - s * x) / np.hypot(a, s)}
    return torch.from_numpy(velocity.get(kind, {"epsilon": e, "sample": x}.get(kind)))


def trajectory(scheduler, start: float, kind: str, level, steps: int = STEPS, noisy: bool = False, **options):
    """`level(scheduler, i)` is (a, s, scale): the path's point at step i, and what the state is multiplied by there."""
    x = start * torch.from_numpy(draw_input("x", SHAPE)).double()
    states = [x]
    for i, t in enumerate(scheduler.timesteps):
        a, s, scale = level(scheduler, i)
        if noisy:
            fresh = torch.from_numpy(draw_input(f"noise {i}", SHAPE)).double()
            if isinstance(scheduler, diffusers.DDPMScheduler):
                scheduling_ddpm.randn_tensor = lambda *_, fresh=fresh, **__: fresh
            else:
                options["variance_noise"] = fresh
        if hasattr(scheduler, "is_scale_input_called"):
            scheduler.scale_model_input(x, t)
        x = scheduler.step(predict(kind, x * scale, a, s), t, x, **options).prev_sample
        states.append(x.double())
    assert len(states) > steps
    return torch.stack(states).numpy()


def vp(scheduler, i):
    kept = scheduler.alphas_cumprod[scheduler.timesteps[i]].double()
    return kept.sqrt(), (1 - kept).sqrt(), 1.0


def by_sigma(scheduler, i):  # states are x_t / alpha, alpha^2 + sigma^2 = 1
    sigma = scheduler.sigmas[i].double()
    return (sigma**2 + 1) ** -0.5, sigma * (sigma**2 + 1) ** -0.5, (sigma**2 + 1) ** -0.5


def vp_by_sigma(scheduler, i):  # states are x_t
    a, s, _ = by_sigma(scheduler, i)
    return a, s, 1.0


def flow(scheduler, i):
    return 1 - scheduler.sigmas[i].double(), scheduler.sigmas[i].double(), 1.0


def edm(scheduler, i):
    return 1.0, scheduler.sigmas[i].double(), 1.0


def schedulers() -> None:
    results = {}
    ddpm = diffusers.DDPMScheduler(clip_sample=False)
    ddpm.set_timesteps(STEPS)
    results["ddpm"] = trajectory(ddpm, 1.0, "epsilon", vp, noisy=True)
    for name, kind, spacing, eta in (
        ("ddim", "epsilon", "leading", 0.0),
        ("ddim v", "v_prediction", "leading", 0.0),
        ("ddim sample", "sample", "trailing", 0.0),
        ("ddim eta", "epsilon", "trailing", 1.0),
        ("ddim half", "epsilon", "leading", 0.5),
    ):
        ddim = diffusers.DDIMScheduler(clip_sample=False, prediction_type=kind, timestep_spacing=spacing)
        ddim.set_timesteps(STEPS)
        results[name] = trajectory(ddim, 1.0, kind, vp, noisy=eta > 0, eta=eta)
    for spacing in ("linspace", "leading", "trailing"):
        ddpm = diffusers.DDPMScheduler(timestep_spacing=spacing)
        ddpm.set_timesteps(STEPS)
        results[f"timesteps {spacing}"] = ddpm.timesteps.numpy()
    results["alphas_cumprod"] = ddpm.alphas_cumprod.numpy()[::37]

    euler = diffusers.EulerDiscreteScheduler(timestep_spacing="trailing")
    euler.set_timesteps(STEPS)
    results["euler"] = trajectory(euler, float(euler.init_noise_sigma), "epsilon", by_sigma)
    heun = diffusers.HeunDiscreteScheduler(timestep_spacing="trailing")
    heun.set_timesteps(STEPS)
    # Its second evaluation lies at the end of the step, where its list of sigmas has the same value twice.
    every = trajectory(heun, float(heun.init_noise_sigma), "epsilon", by_sigma)
    results["heun"], results["heun sigmas"] = (
        every[[*range(0, 2 * STEPS - 1, 2), -1]],
        heun.sigmas[[0, *range(1, 20, 2)]],
    )
    edm_euler = diffusers.EDMEulerScheduler(sigma_data=1.0, prediction_type="v_prediction")
    edm_euler.set_timesteps(STEPS)
    results["edm euler"] = trajectory(edm_euler, 80.0, "v_prediction", edm)
    results["edm sigmas"] = edm_euler.sigmas.numpy()

    flow_euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow_euler.set_timesteps(sigmas=np.linspace(1.0, 1 / STEPS, STEPS))  # as the pipelines of Flux and SD3 do
    results["flow euler"] = trajectory(flow_euler, 1.0, "flow_prediction", flow)
    flow_heun = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    flow_heun.set_timesteps(STEPS)
    every = trajectory(flow_heun, 1.0, "flow_prediction", flow)
    results["flow heun"], results["flow heun sigmas"] = (
        every[[*range(0, 2 * STEPS - 1, 2), -1]],
        flow_heun.sigmas[[0, *range(1, 20, 2)]],
    )

    for name, scheduler in (
        ("dpm++2m", diffusers.DPMSolverMultistepScheduler),
        ("unipc", diffusers.UniPCMultistepScheduler),
    ):
        for steps in (STEPS, 20):
            solver = scheduler(timestep_spacing="trailing")
            solver.set_timesteps(steps)
            results[f"{name} vp {steps}"] = trajectory(solver, 1.0, "epsilon", vp_by_sigma, steps)
        solver = scheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
        solver.set_timesteps(STEPS)
        results[f"{name} flow"] = trajectory(solver, 1.0, "flow_prediction", flow)
        results[f"{name} flow sigmas"] = solver.sigmas.numpy()
    karras = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True)
    karras.set_timesteps(STEPS)
    results["dpm++2m karras"] = trajectory(karras, 1.0, "epsilon", vp_by_sigma)
    results["karras sigmas"] = karras.sigmas.numpy()
    save("schedulers", results, diffusers=diffusers.__version__)

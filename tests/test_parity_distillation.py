"""The losses of distillation, and their gradients, against the numbers of their authors' own code.

cases/distillation.safetensors holds what that code gave on a small network p = tanh(x A + text T + f(times)) B, on
CPU in float32:

    lcm    the training step of latent-consistency-model's train_lcm_distill_sd_wds.py at a9ad795 (huber, 50 DDIM steps,
           the student as its own target), and four steps of diffusers 0.42.1's LCMScheduler
    meanflow   Gsunshine/meanflow's forward and sample_one_step
    dmd    tianweiy/DMD2's SDGuidance, at timesteps up to 749: above, its clean estimate in float64 and ours in float32
           are further apart (2e-5 of the gradient at 999)
"""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from minisora_jax.data.packing import PackConfig
from minisora_jax.data.rows import Segment, pack_segments
from minisora_jax.diffusion.consistency import consistency_at
from minisora_jax.diffusion.distillation import FAKE, TEACHER, Distillation, DistillConfig
from minisora_jax.diffusion.dmd import fake_at, matching_at
from minisora_jax.diffusion.mean_flow import mean_flow_at
from minisora_jax.diffusion.noise_path import PATHS
from minisora_jax.diffusion.objective import ObjectiveConfig
from minisora_jax.diffusion.sampler import SAMPLERS, Denoiser
from minisora_jax.diffusion.time import TimeConfig

DDPM = ObjectiveConfig("ddpm", "noise")


class Net:
    """The network, with the part of `DiT` that a loss calls."""

    config = SimpleNamespace(out_channels=None, latent_channels=4)

    @staticmethod
    def apply(params, x_BSP, time_BS, batch, interval_BS=None):
        w = params["params"]
        h_BSx = x_BSP @ w["w_in"] + batch.text_BLE[:, :1] @ w["w_text"] + jnp.sin(time_BS[..., None] * w["w_time"])
        if interval_BS is not None:
            h_BSx = h_BSx + interval_BS[..., None] * w["w_interval"]
        return jnp.tanh(h_BSx) @ w["w_out"]


@pytest.fixture(scope="module")
def numbers():
    whole = load_file(Path(__file__).parent / "parity/cases/distillation.safetensors")
    return lambda system: {n.removeprefix(f"{system}/"): x for n, x in whole.items() if n.startswith(f"{system}/")}


@pytest.fixture
def close(parity):
    """close(system, kind, ours, theirs): within 1e-5 of the largest value, and recorded for docs/parity.md."""

    def check(system, kind, ours, theirs):
        parity(system, kind, ours, theirs)
        np.testing.assert_allclose(ours, theirs.reshape(np.shape(ours)), rtol=0, atol=1e-5 * np.abs(theirs).max())

    return check


def packed(clean_BSP, text_BLE):
    """Each row one clip."""
    clips = [
        [Segment(x_SP, np.zeros(len(x_SP), bool), (1, 2, len(x_SP) // 2), text_LE, 8.0)]
        for x_SP, text_LE in zip(clean_BSP, text_BLE)
    ]
    pack = PackConfig(clean_BSP.shape[1], 4, 1, len(clips))
    return jax.tree.map(jnp.asarray, pack_segments(clips, pack))


def per_token(value_B, like_BSP):
    return jnp.broadcast_to(jnp.asarray(value_B, jnp.float32)[:, None], like_BSP.shape[:2])


def kernels(numbers, of):
    return {n.removeprefix(f"{of}/"): jnp.asarray(x) for n, x in numbers.items() if n.startswith(f"{of}/")}


def test_consistency_is_lcms(numbers, close):
    lcm = numbers("lcm")
    of = Distillation(
        DistillConfig(4, 12, "ddim", lcm["scale"].item(), "consistency"),
        Net,
        Net,
        TimeConfig(),
        DDPM,
        jnp.asarray(lcm["empty"]),
    )
    batch = packed(lcm["clean"], lcm["text"])
    times = [per_token((lcm[name] + 1) / 1000, lcm["clean"]) for name in ("timestep", "next")]

    def loss(student):
        params = {"params": student, TEACHER: kernels(lcm, "teacher")}
        return consistency_at(of, params, batch, jnp.asarray(lcm["noise"]), *times).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(kernels(lcm, "student"))
    close("consistency distillation", "forward", value, lcm["loss"])
    for name in gradient:
        close("consistency distillation", "gradient", gradient[name], lcm[f"gradient/{name}"])
    x_BSP = DDPM.noise_path.mix(batch.tokens_BSP, lcm["noise"], times[0][..., None])
    teacher = of.guided_teacher({TEACHER: kernels(lcm, "teacher")}, batch)
    next_BSP, _ = SAMPLERS["ddim"].step(teacher, x_BSP, *times, (), None, 0.0)
    close("consistency distillation", "forward", next_BSP, lcm["next_x"])


def test_the_sampler_is_lcms(numbers, close):
    lcm = numbers("lcm")
    batch, params = packed(lcm["clean"], lcm["text"]), {"params": kernels(lcm, "student")}
    model = lambda x_BSP, time_BS: Net.apply(params, x_BSP, time_BS - 1 / 1000, batch)
    x, denoiser = jnp.asarray(lcm["trajectory"][0]), Denoiser(model, PATHS["ddpm"], "noise")
    times = [(t + 1) / 1000 for t in lcm["timesteps"]] + [0.0]
    fresh = [*lcm["fresh"], np.zeros_like(lcm["fresh"][0])]
    for i, (now, then) in enumerate(zip(times, times[1:])):
        at = [per_token(np.full(len(x), t), x) for t in (now, then)]
        x, _ = SAMPLERS["consistency"].step(denoiser, x, *at, (), jnp.asarray(fresh[i]), 1.0)
        close("LCMScheduler", "forward", x, lcm["trajectory"][i + 1])


def test_mean_flow_is_its_authors(numbers, close):
    mean = numbers("meanflow")
    config = DistillConfig(1, guidance=mean["scale"].item(), method="meanflow")
    of = Distillation(config, Net, Net, TimeConfig(), ObjectiveConfig(), jnp.asarray(mean["empty"]))
    batch, noise_BSP = packed(mean["clean"], mean["text"]), jnp.asarray(mean["noise"])
    teacher, times = kernels(mean, "student"), [per_token(mean[name], noise_BSP) for name in ("time", "r")]

    def loss(student):
        return mean_flow_at(of, {"params": student, TEACHER: teacher}, batch, noise_BSP, *times)[0].mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(teacher)
    close("MeanFlow", "forward", value, mean["loss"])
    for name in gradient:
        close("MeanFlow", "gradient", gradient[name], mean[f"gradient/{name}"])
    denoiser, at = of.student({"params": teacher}, batch), [per_token(np.full(4, t), noise_BSP) for t in (0.8, 0.3)]
    close(
        "MeanFlow",
        "forward",
        SAMPLERS["mean-flow"].step(denoiser, batch.tokens_BSP, *at, (), None, 0.0)[0],
        mean["stepped"],
    )


def test_distribution_matching_is_dmd2s(numbers, close):
    dmd = numbers("dmd")
    config = DistillConfig(4, guidance=dmd["scale"].item(), method="dmd")
    of = Distillation(config, Net, Net, TimeConfig(), DDPM, jnp.asarray(dmd["empty"]))
    noisy_BSP, noise_BSP, fake_noise_BSP = (jnp.asarray(dmd[name]) for name in ("noisy", "noise", "fake_noise"))
    batch = packed(dmd["image"], dmd["text"])
    at, compared, of_fake = (per_token((dmd[n] + 1) / 1000, noisy_BSP) for n in ("at", "timestep", "fake_timestep"))
    teacher = kernels(dmd, "teacher")

    def losses(student, fake):
        params = {"params": student, FAKE: fake, TEACHER: teacher}
        clean_BSP = of.student(params, batch).clean_and_noise(noisy_BSP, at)[0]
        own = matching_at(of, params, batch, clean_BSP, noise_BSP, compared).mean()
        other = fake_at(of, params, batch, clean_BSP, fake_noise_BSP, of_fake).mean()
        return own + other, (own, other)

    grad = jax.jit(jax.value_and_grad(losses, (0, 1), has_aux=True))
    (_, (own, other)), gradients = grad(kernels(dmd, "generator"), kernels(dmd, "fake"))
    close("DMD2", "forward", own, dmd["loss"])
    close("DMD2", "forward", other, dmd["fake_loss"])
    for of_whom, gradient in zip(("generator", "fake"), gradients):
        for name in gradient:
            close("DMD2", "gradient", gradient[name], dmd[f"gradient_{of_whom}/{name}"])

"""Whole samplings against the authors' and diffusers' pipelines: from a published file to latents, and to pixels.

tests/parity/cases holds results of the authors' own code (DiT, Wan). The fixtures of diffusers' pipelines are made by
tests/parity/make_trajectories.py.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

sys.path.insert(0, str(Path(__file__).parent / "parity"))

from published import export_params  # noqa: E402
from random_weights import draw, draw_input  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402
from test_parity_dit import SMALL, loaded, write  # noqa: E402

from minisora_jax.cli import main  # noqa: E402
from minisora_jax.commands import options  # noqa: E402
from minisora_jax.data.rows import patchify  # noqa: E402
from minisora_jax.diffusion.denoiser import Denoiser  # noqa: E402
from minisora_jax.diffusion.guidance import GuidanceConfig  # noqa: E402
from minisora_jax.diffusion.noise_path import PATHS  # noqa: E402
from minisora_jax.diffusion.objective import ObjectiveConfig  # noqa: E402
from minisora_jax.diffusion.sampler import SAMPLERS, SamplerConfig  # noqa: E402
from minisora_jax.diffusion.time import TIME_SCHEDULES, TimeConfig, sampling_times  # noqa: E402
from minisora_jax.generate import sampling  # noqa: E402
from minisora_jax.generate.loading import _by_expert, _load_dit, _low_noise  # noqa: E402
from minisora_jax.generate.packed import PackedRequests  # noqa: E402
from minisora_jax.generate.request import Given, Request  # noqa: E402
from minisora_jax.io.model_dir import config_fields, model_hash  # noqa: E402
from minisora_jax.models.codec import Codec  # noqa: E402
from minisora_jax.models.vae import VAE  # noqa: E402
from minisora_jax.weights import sd_vae  # noqa: E402
from minisora_jax.weights.adapters import Adapter  # noqa: E402
from minisora_jax.weights.dit import OBJECTIVES, TIMES, published_name_map, rules  # noqa: E402
from minisora_jax.weights.presets import CODECS, TRANSFORMERS  # noqa: E402
from minisora_jax.weights.rules import export_lazily  # noqa: E402

CASES = Path(__file__).parent / "parity/cases"


@struct.dataclass
class GivenNoise:
    """Takes the place of `Noise`: the noise of each step, (K, B, S, P)."""

    noise_KBSP: jax.Array

    def draw(self, step, width: int) -> jax.Array:
        return self.noise_KBSP[step]


@dataclasses.dataclass(frozen=True)
class WithNoise(PackedRequests):
    """One request whose noise is given: `draws[step]` of shape (c, t, h, w); step 0 is the start."""

    draws: tuple[np.ndarray, ...] = ()

    def noise(self) -> GivenNoise:
        patches = [patchify(np.moveaxis(draw, 0, -1), self.config.patch) for draw in self.draws]
        each = [np.tile(x.reshape(1, -1, self.config.token_width), (1, self.copies, 1)) for x in patches]
        return GivenNoise(jnp.asarray(np.stack(each), jnp.float32))


def sampled(
    folder, draws, captions, guidance: GuidanceConfig, sampler: SamplerConfig, states=None, first=None
) -> np.ndarray:
    """Latents (c, t, h, w) of the model in a folder, with its own objective and times.

    states: a list that gets those of each step. first: the first latent frames (c, t, h, w), which are given.
    """
    params, dit, config = _load_dit(folder)
    grid = tuple(n // p for n, p in zip(draws[0].shape[1:], dit.patch))
    given = None
    if first is not None:
        latents = np.zeros(draws[0].shape, np.float32)
        latents[:, : first.shape[1]] = first
        mask = np.zeros(grid, bool)
        mask[: first.shape[1]] = True
        given = Given(np.moveaxis(latents, 0, -1), mask)
    request = Request("", (1, 8, 8), given=given)
    packed = WithNoise([request], [grid], [[0]], 2, 2 * int(np.prod(grid)), dit, draws=tuple(draws))
    objective = ObjectiveConfig(**config_fields(config["objective"]))
    times = TimeConfig(**config_fields(config["times"]))
    steps = sampling.sampling_steps

    def recording(*arguments):
        state = steps(*arguments)
        states.append(np.moveaxis(packed.latents(np.asarray(state[0]))[0], -1, 0))
        return state

    low_noise = _low_noise(config, dit, objective, folder, None)
    model = [captions], [(dit, params)], times, objective, guidance, sampler, low_noise
    with pytest.MonkeyPatch.context() as patch:
        if states is not None:
            patch.setattr(sampling, "sampling_steps", recording)
            sampling.sample(packed, *model, lambda *_: None)
    return np.moveaxis(sampling.sample(packed, *model)[0], -1, 0)


def imported(preset: str, small, file, tmp_path, monkeypatch) -> Path:
    """The folder that `minisora import` makes of a small model's file."""
    config = dataclasses.replace(TRANSFORMERS[preset].config, dtype="float32", **small)
    monkeypatch.setitem(TRANSFORMERS, preset, dataclasses.replace(TRANSFORMERS[preset], config=config))
    assert main(["import", preset, str(file), f"--out={tmp_path / 'model'}"]) == 0
    return tmp_path / "model"


@pytest.mark.parametrize("case, channels", [("three_channels", 3), ("all_channels", None)])
def test_dit_samples_what_its_authors_code_does(case, channels, tmp_path, monkeypatch, parity):
    theirs = np.load(CASES / "dit_ddim.npz")
    folder = imported("dit-xl-2-256", dict(width=144, depth=3, heads=2), CASES / "dit_small.pt", tmp_path, monkeypatch)
    captions = [np.array([[207]], np.int32), np.array([[1000]], np.int32)]
    guidance, sampler = GuidanceConfig(1.5, channels=channels), SamplerConfig("ddim", 10, "linspace")
    ours = sampled(folder, [theirs["noise"][0][:, None]], captions, guidance, sampler)
    parity("DiT sampling, authors' DDIM", "trajectory", ours[:, 0], theirs[case][0], case)


# The closed form of tests/parity/cases/wan_unipc.npz: each number by itself is a mixture of two Gaussians.
def wan_velocity(x, s):
    weights, means, variances = np.array([0.3, 0.7]), np.array([-1.0, 1.5]), np.array([0.04, 0.16])
    x = x[..., None]
    total = (1 - s) ** 2 * variances + s**2
    off = x - (1 - s) * means
    share = jax.nn.softmax(jnp.log(weights) - 0.5 * jnp.log(total) - 0.5 * off**2 / total, axis=-1)
    clean = (share * (means + (1 - s) * variances / total * off)).sum(-1)
    return (x[..., 0] - clean) / s[..., 0]


@pytest.mark.parametrize("told", ["sigma", "int"])
@pytest.mark.parametrize("steps", [10, 50])
def test_wan_steps_as_its_authors_unipc_does(steps, told, parity):
    theirs = np.load(CASES / "wan_unipc.npz")
    from test_diffusion import batch  # one clip

    config = TIMES["wan2.1-t2v-1.3b"]
    times = sampling_times(config, steps, batch([(1, 2, 2)], tokens=4), time_schedule="wan")
    np.testing.assert_allclose(times[:, 0, 0], theirs[f"{steps}_shift5_sigmas"], atol=1e-6)
    objective = dataclasses.replace(OBJECTIVES["wan2.1-t2v-1.3b"], whole_timesteps=told == "int")

    def model(x_BSP, time_BS):
        x_BSP, time_BS = objective.model_input(x_BSP, time_BS)
        seen.append(float(time_BS[0, 0]))
        return wan_velocity(x_BSP, time_BS[..., None, None])

    seen: list[float] = []
    denoiser, x = Denoiser(model), jnp.asarray(theirs["start"], jnp.float32)[None]
    past, states = SAMPLERS["unipc"].begin(x, times[0]), [x]
    for now, then in zip(times, times[1:]):
        x, past = SAMPLERS["unipc"].step(denoiser, x, now, then, past, None, 0.0)
        states.append(x)
    if told == "int":
        np.testing.assert_allclose(1000 * np.array(seen), theirs[f"{steps}_shift5_timesteps"], atol=1e-3)
    ours = np.concatenate(states)
    case = f"{steps} steps, {told}"
    parity("Wan sampling, authors' UniPC", "trajectory", ours, theirs[f"{steps}_shift5_{told}"], case)
    # Each number, not only the largest.
    np.testing.assert_allclose(ours, theirs[f"{steps}_shift5_{told}"], atol=1e-4)


def authors_ddpm(x, noises, timesteps, predict):
    """p_sample_loop of guided-diffusion and DiT with ModelVarType.LEARNED_RANGE, float64, respaced to `timesteps`."""
    kept = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))[timesteps[::-1]]  # of the respaced process, rising
    before = np.append(1.0, kept[:-1])
    betas = 1.0 - kept / before
    posterior = betas * (1.0 - before) / (1.0 - kept)
    smallest, largest = np.log(np.append(posterior[1], posterior[1:])), np.log(betas)
    for i, noise in zip(range(len(kept))[::-1], noises):
        eps, v = predict(x, timesteps[::-1][i])
        clean = np.sqrt(1 / kept[i]) * x - np.sqrt(1 / kept[i] - 1) * eps
        mean = betas[i] * np.sqrt(before[i]) / (1 - kept[i]) * clean
        mean = mean + (1 - before[i]) * np.sqrt(1 - betas[i]) / (1 - kept[i]) * x
        share = (v + 1) / 2
        x = mean + (i > 0) * np.exp(0.5 * (share * largest[i] + (1 - share) * smallest[i])) * noise
    return x


@pytest.mark.parametrize("schedule, steps", [("linspace", 10), ("linspace", 250), ("trailing", 8), ("leading", 1000)])
def test_ddpm_renews_the_noise_that_the_model_learned(schedule, steps, parity):
    rng = np.random.default_rng(steps)
    timesteps = np.round(1000 * np.asarray(TIME_SCHEDULES[schedule](steps, PATHS["ddpm"]))[:-1]).astype(int) - 1
    start, noises = rng.standard_normal((1, 3, 4)), rng.standard_normal((steps, 1, 3, 4))
    # Any smooth functions will do: the samplers are compared, not the samples.
    predict = lambda x, k, xp: (0.9 * x + 0.3 * xp.sin(3 * x + k / 500), xp.sin(2 * x - k / 300))
    theirs = authors_ddpm(start, noises, timesteps, lambda x, k: predict(x, k, np))
    told = lambda x, t: predict(x, 1000 * PATHS["ddpm"].model_input(x, t)[1][..., None], jnp)
    denoiser = Denoiser(lambda x, t: told(x, t)[0], PATHS["ddpm"], "noise", with_variance=told)
    times = jnp.asarray(np.append((timesteps + 1) / 1000, 0.0))[:, None, None] * jnp.ones((1, 3))
    with jax.enable_x64(steps == 1000):  # float32 sums a thousand steps to 2e-4
        x = jnp.asarray(start, float)
        step = jax.jit(lambda x, now, then, noise: SAMPLERS["ddpm"].step(denoiser, x, now, then, (), noise, 1.0)[0])
        for i in range(steps):
            x = step(x, times[i].astype(x.dtype), times[i + 1].astype(x.dtype), jnp.asarray(noises[i], x.dtype))
    parity("DDPM sampling, learned variance", "trajectory", x, theirs, f"{schedule} {steps}")


def test_the_model_is_told_the_timestep_of_ddpm():
    """Also in the loss; tokens that are given clean are told 0."""
    from test_diffusion import batch

    from minisora_jax.diffusion.loss import diffusion_loss

    class Told:
        config = dataclasses.replace(TRANSFORMERS["dit-xl-2-256"].config, latent_channels=1, out_channels=None)

        def apply(self, params, x_BSP, time_BS, batch):
            seen.append(1000 * np.asarray(time_BS))
            return jnp.zeros_like(x_BSP)

    seen: list[np.ndarray] = []
    known = lambda i, n: np.arange(n) < 4
    clips = batch([(2, 16, 16)] * 4, tokens=2048, known=known)
    preset = TRANSFORMERS["dit-xl-2-256"]
    for seed in range(20):
        diffusion_loss(Told(), preset.times, {}, clips, jax.random.key(seed), preset.objective)
    given = np.asarray(clips.cond_mask_BS)
    told = np.stack([t[~given & (np.asarray(clips.segment_BS) > 0)] for t in seen])
    np.testing.assert_allclose(told, np.round(told), atol=1e-3)
    assert told.min() >= 0 and told.min() < 40 and told.max() <= 999 and told.max() > 960
    assert all((t[given] == 0).all() for t in seen)


# ---- Pipelines of diffusers (tests/parity/make_trajectories.py)

TRAJECTORIES = load_file(Path(__file__).parent / "parity/fixtures/trajectories.safetensors")
_CLASSES = [np.array([[207]], np.int32), np.array([[1000]], np.int32)]
_TWO = [draw_input("text 7", (2, 7, 10))[i] for i in range(2)]
_WAN = [np.concatenate([text, np.zeros((505, 10), np.float32)]) for text in _TWO]
_SHORTER = [_TWO[0], draw_input("text 3", (2, 3, 10))[0]]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """How a trajectory is sampled here."""

    system: str
    preset: str
    model: str  # a key of test_parity_dit.SMALL
    captions: list[np.ndarray]
    guidance: GuidanceConfig
    sampler: SamplerConfig
    shape: tuple[int, int, int] = (1, 16, 16)
    noise: str = "dit noise"
    fresh: int = 0  # steps with noise of their own
    given: str = ""  # the entry of TRAJECTORIES with the first latent frames


PIPELINES = {
    "dit": Pipeline(
        "DiT, diffusers DiTPipeline, DDIM", "dit-xl-2-256", "dit", _CLASSES, GuidanceConfig(1.5),
        SamplerConfig("ddim", 10, "leading"),
    ),
    "dit ddpm": Pipeline(
        "DiT, diffusers DDPM with learned variance", "dit-xl-2-256", "dit", _CLASSES, GuidanceConfig(4.0, channels=3),
        SamplerConfig("ddpm", 10, "leading"), fresh=10,
    ),
    "sit": Pipeline(
        "SiT, Euler's ODE", "sit-xl-2-256", "sit", _CLASSES, GuidanceConfig(1.5, channels=3), SamplerConfig("euler", 10)
    ),
    "pixart": Pipeline(
        "PixArt-alpha, diffusers PixArtAlphaPipeline, DPM++", "pixart-alpha-512", "plain", _SHORTER,
        GuidanceConfig(4.5), SamplerConfig("dpm++2m", 10, "trailing"), noise="pixart noise",
    ),
    "latte": Pipeline(
        "Latte, diffusers LattePipeline, DDIM", "latte-1", "latte", _TWO, GuidanceConfig(7.5),
        SamplerConfig("ddim", 10, "leading"), (3, 16, 16), "latte noise",
    ),
    "wan first frame": Pipeline(
        "Wan 2.2 TI2V, diffusers WanImageToVideoPipeline, UniPC", "wan2.2-ti2v-5b", "wan", _WAN, GuidanceConfig(5.0),
        SamplerConfig("unipc", 10, "wan"), (3, 4, 6), "wan noise", given="wan first frame given",
    ),
    "wan": Pipeline(
        "Wan 2.1, diffusers WanPipeline, UniPC", "wan2.1-t2v-1.3b", "wan", _WAN, GuidanceConfig(5.0),
        SamplerConfig("unipc", 10, "wan"), (3, 4, 6), "wan noise",
    ),
}  # fmt: skip


def written(model: str, path: Path) -> tuple[Path, dict]:
    """(a file of the published layout, the fields of its small config), with the weights that diffusers had."""
    config = SMALL[model]
    if config.caption == "label":
        config = dataclasses.replace(config, classes=1001)
    layout = "dit" if model == "sit" else published_name_map(config)
    if model == "sit":  # diffusers' class held the weights: the authors' names for them
        config = dataclasses.replace(config, time_input="1000 t")
    write(config, layout, path / "published.safetensors")
    if model == "sit":
        params = loaded(config, layout, path)
        save_file(export_params(params, rules(config, "dit-own")), path / "published.safetensors")
    small = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "time_input"}
    small.pop("dtype")
    return path / "published.safetensors", small


def sample_like(name: str, tmp_path, monkeypatch) -> np.ndarray:
    """The latents after each step (steps, c, t, h, w)."""
    of, states = PIPELINES[name], []
    file, small = written(of.model, tmp_path)
    folder = imported(of.preset, small, file, tmp_path, monkeypatch)
    names = [of.noise, *(f"{of.noise} {i}" for i in range(of.fresh))]
    draws = [draw_input(name, (4, *of.shape)) for name in names]
    first = TRAJECTORIES[of.given] if of.given else None
    sampled(folder, draws, of.captions, of.guidance, of.sampler, states, first)
    return np.stack(states)


@pytest.mark.parametrize("name", PIPELINES)
def test_every_family_samples_as_its_pipeline_does(name, tmp_path, monkeypatch, parity):
    ours, theirs = sample_like(name, tmp_path, monkeypatch), TRAJECTORIES[name]
    assert len(ours) == len(theirs)
    for i, (state, their) in enumerate(zip(ours, theirs)):
        parity(
            PIPELINES[name].system, "trajectory", state.reshape(their.shape), their, f"step {i + 1} of {len(theirs)}"
        )


def two_experts(tmp_path) -> tuple[Path, dict]:
    """A folder in diffusers' layout with both experts, of which the second's weights are 0.8 of the first's."""
    for folder, share in (("transformer", 1.0), ("transformer_2", 0.8)):
        file, small = written("wan", tmp_path)
        (tmp_path / "published" / folder).mkdir(parents=True)
        scaled = {name: np.float32(share) * tensor for name, tensor in load_file(file).items()}
        save_file(scaled, tmp_path / "published" / folder / "diffusion_pytorch_model.safetensors")
    return tmp_path / "published", small


def test_two_experts_sample_as_the_pipeline_does(tmp_path, monkeypatch, parity):
    of, states = PIPELINES["wan"], []
    published, small = two_experts(tmp_path)
    folder = imported("wan2.2-t2v-a14b", small, published, tmp_path, monkeypatch)
    noise, guidance = [draw_input(of.noise, (4, *of.shape))], GuidanceConfig(4.0, low_noise=3.0)
    last = sampled(folder, noise, of.captions, guidance, of.sampler, states)
    theirs = TRAJECTORIES["wan experts"]
    np.testing.assert_allclose(last, states[-1], atol=1e-6)  # as one program for each expert
    for i, (state, their) in enumerate(zip(states, theirs, strict=True)):
        parity("Wan 2.2 A14B, diffusers WanPipeline, UniPC", "trajectory", state, their, f"step {i + 1} of 10")
    alone = sampled(folder / "low_noise", noise, of.captions, GuidanceConfig(3.0), of.sampler)
    assert np.abs(alone - theirs[-1]).max() > 0.01  # the first expert counts


def test_each_expert_of_a_pair_has_its_adapters(tmp_path, monkeypatch):
    """An adapter goes to the expert that it was trained over. One of neither is refused, with the fix."""
    published, small = two_experts(tmp_path)
    folder = imported("wan2.2-t2v-a14b", small, published, tmp_path, monkeypatch)
    times = [json.loads((path / "config.json").read_text())["times"] for path in (folder, folder / "low_noise")]
    assert [(t["low"], t["high"]) for t in times] == [(0.875, 1.0), (0.0, 0.875)]
    digests = model_hash(folder), model_hash(folder / "low_noise")
    adapter = lambda base: Adapter({}, {}, "x", base)
    high, low, other = adapter(digests[0]), adapter(digests[1]), adapter("")
    assert _by_expert(["a", "b", "c"], [low, high, low], digests, folder) == [[high], [low, low]]
    with pytest.raises(ValueError, match="b: .*does not say that it is of one of them. Import it: .*low_noise"):
        _by_expert(["a", "b"], [low, other], digests, folder)


def test_a_pair_is_whole_or_refused(tmp_path, monkeypatch, capsys):
    published, small = two_experts(tmp_path)
    folder = imported("wan2.2-t2v-a14b", small, published, tmp_path, monkeypatch)
    config = json.loads((folder / "config.json").read_text())
    _, dit, _ = _load_dit(folder)
    objective = ObjectiveConfig(**config_fields(config["objective"]))
    with pytest.raises(ValueError, match="low_noise_below=2 must be a time between 0 and 1"):
        _low_noise(config | {"low_noise_below": 2}, dit, objective, folder, None)
    other = dataclasses.replace(dit, heads=1)
    with pytest.raises(ValueError, match="low_noise is not the model's pair: its shape or objective is another"):
        _low_noise(config, other, objective, folder, None)
    (folder / "low_noise" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="low_noise"):
        _low_noise(config, dit, objective, folder, None)
    assert main(["import", "wan2.2-t2v-a14b", str(published / "transformer"), f"--out={tmp_path / 'again'}"]) != 0
    assert "has not the folders of two experts: transformer/ and transformer_2/" in capsys.readouterr().err


def test_a_shift_may_be_given(tmp_path, monkeypatch):
    """The recorded shift is taken, unless another is given; both ways lead to the pipeline's latents."""
    of = PIPELINES["wan"]
    file, small = written(of.model, tmp_path)
    unshifted = dataclasses.replace(TIMES[of.preset], sampling_shift=1.0)
    monkeypatch.setitem(TRANSFORMERS, of.preset, dataclasses.replace(TRANSFORMERS[of.preset], times=unshifted))
    folder = imported(of.preset, small, file, tmp_path, monkeypatch)
    of_shift = lambda shift: sampled(
        folder,
        [draw_input(of.noise, (4, *of.shape))],
        of.captions,
        of.guidance,
        dataclasses.replace(of.sampler, shift=shift),
    )
    theirs = TRAJECTORIES["wan"][-1]
    assert np.abs(of_shift(5.0) - theirs).max() < 1e-4 * np.abs(theirs).max()
    assert np.abs(of_shift(None) - theirs).max() > 1e-2 * np.abs(theirs).max()
    for flag, words in (("--shift=0", "shift=0.0 must be"), ("--guidance-channels=0", "channels=0 must be at least 1")):
        with pytest.raises(ValueError, match=words):
            options.sampling_options(parser_of_sampling().parse_args([flag]))
    chosen = options.sampling_options(parser_of_sampling().parse_args(["--shift=3", "--guidance-channels=3"]))
    assert chosen["sampler"].shift == 3.0 and chosen["guidance"].channels == 3


def parser_of_sampling() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    options.add_sampling(parser)
    return parser


def test_more_channels_than_there_are(tmp_path, monkeypatch):
    of = PIPELINES["wan"]
    file, small = written(of.model, tmp_path)
    folder = imported(of.preset, small, file, tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="guidance of 5 channels: the latents have 4"):
        noise = [draw_input(of.noise, (4, *of.shape))]
        sampled(folder, noise, of.captions, GuidanceConfig(5.0, channels=5), of.sampler)


def test_a_class_becomes_the_same_picture(tmp_path, monkeypatch):
    """From the files of a DiT and of Stable Diffusion's VAE to pixels, within one level of 255."""
    vae = dataclasses.replace(sd_vae.CONFIG, base=32, multipliers=(1, 2, 2), time_down=(False, False))
    monkeypatch.setitem(CODECS, "sd-vae", dataclasses.replace(CODECS["sd-vae"], config=vae))
    shapes = jax.eval_shape(VAE(vae).init, jax.random.key(0), jnp.zeros((1, 1, 16, 16, 3)))
    blank = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes)
    names = {name: tensor.shape for name, tensor in export_lazily(blank, sd_vae.rules(vae)).items()}
    save_file({name: draw(name, shape) for name, shape in names.items()}, tmp_path / "vae.safetensors")
    assert main(["import", "sd-vae", str(tmp_path / "vae.safetensors"), f"--out={tmp_path / 'codec'}"]) == 0
    latents = sample_like("dit", tmp_path, monkeypatch)[-1]
    picture = Codec.load(tmp_path / "codec").decode(np.moveaxis(latents, 0, -1)[None])[0, 0]
    theirs = 255 * TRAJECTORIES["dit picture"]
    assert np.abs(picture - theirs).max() < 1.01 and 10 < picture.std()

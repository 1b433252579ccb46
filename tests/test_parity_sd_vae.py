"""Stable Diffusion's image VAE against diffusers' AutoencoderKL, in three layouts. Fixture: parity/make_codecs.py."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent / "parity"))
from published import export_params, import_params  # noqa: E402
from random_weights import draw, draw_input  # noqa: E402

from minisora_jax.cli import main  # noqa: E402
from minisora_jax.models.codec import Codec  # noqa: E402
from minisora_jax.models.vae import VAE, VAEConfig  # noqa: E402
from minisora_jax.weights import sd_vae  # noqa: E402
from minisora_jax.weights.checkpoint import Checkpoint, WeightsFileError  # noqa: E402
from minisora_jax.weights.presets import CODECS  # noqa: E402

FIXTURE = Path(__file__).parent / "parity/fixtures/sd_vae.safetensors"
SMALL = dataclasses.replace(sd_vae.CONFIG, base=32, multipliers=(1, 2, 2), time_down=(False, False), latent_channels=3)


def abstract(config):
    return jax.eval_shape(VAE(config).init, jax.random.key(0), jnp.zeros((1, 1, 16, 16, 3)))


def to_jax(x_BCHW):
    return jnp.asarray(np.moveaxis(x_BCHW, 1, -1))[:, None]


def published_tensors(layout="diffusers"):
    """The small model's tensors by a layout's names; weights are drawn by diffusers'."""
    flat, tensors = traverse_util.flatten_dict(abstract(SMALL), sep="/"), {}
    for rule, drawn in zip(sd_vae.rules(SMALL, layout), sd_vae.rules(SMALL)):
        stored, shape = (r.to_theirs(np.zeros(flat[r.ours].shape)).shape for r in (rule, drawn))
        for name, known in zip(rule.names, drawn.names):
            tensors[name] = draw(known, shape[bool(rule.fuses) :]).reshape(stored[bool(rule.fuses) :])
    return tensors


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    path = tmp_path_factory.mktemp("sd") / "vae.safetensors"
    save_file(published_tensors(), path)
    return import_params(Checkpoint(path), sd_vae.rules(SMALL), abstract(SMALL))


def moments(params, x_BTHWC):
    return jnp.concatenate(VAE(SMALL).apply(params, x_BTHWC, method="encode")[:2], -1)


def decoded(params, z_Bthwc):
    return VAE(SMALL).apply(params, z_Bthwc, method="decode")[0]


def inputs(H, W):
    x = np.clip(draw_input(f"pixels {H}x{W}", (1, 3, H, W)), -1, 1)
    return to_jax(x), to_jax(draw_input(f"latents {H}x{W}", (1, 3, H // 4, W // 4)))


@pytest.mark.parametrize("H, W", [(16, 16), (20, 36), (12, 4)])
def test_values_are_the_references(params, H, W, parity):
    x, z = inputs(H, W)
    reference = load_file(FIXTURE)
    for what, out in (("moments", moments(params, x)), ("decoded", decoded(params, z))):
        parity("SD VAE", "forward", np.moveaxis(out[:, 0], -1, 1), reference[f"{what} {H}x{W}"], f"{H}x{W}")


def test_gradients_are_the_references(params, parity):
    x, z = inputs(20, 36)
    grads = {}
    for loss, side in ((lambda p: moments(p, x), "encoder/"), (lambda p: decoded(p, z), "decoder/")):
        tree = jax.jit(jax.grad(lambda p, loss=loss: jnp.mean(loss(p) ** 2)))(params)
        grads |= export_params(tree, [r for r in sd_vae.rules(SMALL) if side in r.ours])
    reference = {k.removeprefix("grad/"): v for k, v in load_file(FIXTURE).items() if k.startswith("grad/")}
    assert len(reference) == 7
    for name, grad in reference.items():
        parity("SD VAE", "gradient", grads[name], grad, name)


def test_a_video_is_coded_frame_by_frame(params):
    assert SMALL.time_factor == 1 and SMALL.latent_size((3, 16, 20)) == (3, 4, 5)
    codec = Codec(SMALL, params, np.zeros(3, np.float32), np.full(3, 2.0, np.float32))
    frames = np.random.default_rng(0).integers(0, 256, (1, 3, 16, 20, 3), np.uint8)
    mean, std = codec.encode(frames)
    assert mean.shape == std.shape == (1, 3, 4, 5, 3)
    for t in range(3):
        np.testing.assert_allclose(codec.encode(frames[:, t : t + 1])[0][:, 0], mean[:, t], atol=1e-5)
    whole, _, _ = VAE(SMALL).apply(params, frames / np.float32(127.5) - 1, method="encode")
    np.testing.assert_allclose(whole / 2, mean, atol=1e-5)
    assert codec.decode(mean).shape == frames.shape


@pytest.mark.parametrize("layout", sd_vae.NAME_MAPS)
def test_every_layout_gives_the_same_model(params, layout, tmp_path):
    save_file(published_tensors(layout), tmp_path / "vae.safetensors")
    file = Checkpoint(tmp_path / "vae.safetensors")
    assert sd_vae.name_map_of(file.names) == layout
    again = import_params(file, sd_vae.rules(SMALL, layout), abstract(SMALL))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    exported = export_params(again, sd_vae.rules(SMALL, layout))
    assert all(np.array_equal(exported[k], v) for k, v in published_tensors(layout).items())


def test_every_published_tensor_has_its_place():
    with safe_open(FIXTURE, framework="numpy") as file:
        published, compvis = (json.loads(file.metadata()[k]) for k in ("published", "compvis"))
    flat = traverse_util.flatten_dict(abstract(sd_vae.CONFIG), sep="/")
    shapes, other = {}, {}
    for rule, own in zip(sd_vae.rules(sd_vae.CONFIG), sd_vae.rules(sd_vae.CONFIG, "compvis")):
        blank = np.zeros(flat[rule.ours].shape, np.int8)
        shapes |= {name: list(rule.to_theirs(blank).shape[bool(rule.fuses) :]) for name in rule.names}
        other |= dict(zip(rule.names, own.names))
    assert shapes == published and other == compvis
    assert sum(np.prod(s) for s in published.values()) == 83_653_863


@pytest.mark.parametrize("preset", ["sd-vae", "sdxl-vae"])
def test_import_and_export_from_the_command_line(preset, tmp_path, monkeypatch):
    statistics = {"latent_mean": (0.0,) * 3, "latent_std": CODECS[preset].latent_std[:3]}
    monkeypatch.setitem(CODECS, preset, dataclasses.replace(CODECS[preset], config=SMALL, **statistics))
    whole = {f"first_stage_model.{k}": v for k, v in published_tensors("compvis").items()}
    whole["first_stage_model.loss.logvar"] = whole["model.diffusion_model.out.0.bias"] = np.zeros(1, np.float32)
    save_file(whole, tmp_path / "v1-5.safetensors")
    assert main(["import", preset, str(tmp_path / "v1-5.safetensors"), f"--out={tmp_path / 'codec'}"]) == 0
    assert (
        abs(1 / Codec.load(tmp_path / "codec").latent_std[0] - {"sd-vae": 0.18215, "sdxl-vae": 0.13025}[preset]) < 1e-6
    )
    assert main(["export", str(tmp_path / "codec"), str(tmp_path / "vae")]) == 0
    again, before = Checkpoint(tmp_path / "vae"), published_tensors()
    assert set(again.names) == set(before) and all(np.array_equal(again.read(k), v) for k, v in before.items())


def test_what_does_not_fit_is_named(tmp_path):
    def error(changed):
        save_file(changed, tmp_path / "vae.safetensors")
        file = Checkpoint(tmp_path / "vae.safetensors")
        with pytest.raises(WeightsFileError) as caught:
            import_params(file, sd_vae.rules(SMALL), abstract(SMALL))
        return str(caught.value)

    tensors, key = published_tensors(), "encoder.mid_block.attentions.0.to_k.bias"
    assert f"1 missing ({key})" in error({k: v for k, v in tensors.items() if k != key})
    assert key in error(tensors | {key: np.zeros(7, np.float32)})
    with pytest.raises(ValueError, match="time_down"):
        VAEConfig(images=True)
    with pytest.raises(ValueError, match="Stable Diffusion's layouts have images=True"):
        sd_vae.rules(VAEConfig())
    with pytest.raises(ValueError, match="48 channels do not divide into the 32 groups"):
        abstract(dataclasses.replace(SMALL, base=48))

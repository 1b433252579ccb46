"""Wan 2.1's VAE against diffusers' AutoencoderKLWan: values, gradients, names. Fixtures: tests/parity/make.py."""

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
from random_weights import draw, draw_input  # noqa: E402

from minisora_jax.bundled import CODEC  # noqa: E402
from minisora_jax.cli import main  # noqa: E402
from minisora_jax.models.codec import Codec  # noqa: E402
from minisora_jax.models.vae import VAE  # noqa: E402
from minisora_jax.weights import wan_vae  # noqa: E402
from minisora_jax.weights.checkpoint import Checkpoint, CheckpointError  # noqa: E402
from minisora_jax.weights.presets import CODECS  # noqa: E402
from minisora_jax.weights.rules import export_params, import_params, save_sharded  # noqa: E402

FIXTURE = Path(__file__).parent / "parity/fixtures/wan_vae.safetensors"
SMALL = dataclasses.replace(wan_vae.CONFIG, base=4, latent_channels=3)
RULES = wan_vae.rules(SMALL)


def abstract(config):
    return jax.eval_shape(VAE(config).init, jax.random.key(0), jnp.zeros((1, 5, 16, 16, 3)))


def to_jax(x_BCTHW):
    return jnp.asarray(np.moveaxis(x_BCTHW, 1, -1))


def relative(ours, theirs):
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The small model's weights as a published file would hold them."""
    tensors = {}
    flat = traverse_util.flatten_dict(abstract(SMALL), sep="/")
    for rule in RULES:
        shape = rule.to_theirs(np.zeros(flat[rule.ours].shape)).shape
        tensors[rule.theirs] = draw(rule.theirs, shape)
    path = tmp_path_factory.mktemp("wan") / "diffusion_pytorch_model.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def params(file):
    return import_params(Checkpoint(file), RULES, abstract(SMALL), progress=False)


@pytest.mark.parametrize("size", [(1, 16, 24), (5, 24, 16), (13, 16, 16)])
def test_values_are_the_references(params, size):
    reference, name = load_file(FIXTURE), "x".join(map(str, size))
    x = np.clip(draw_input(f"pixels {name}", (2, 3, *size)), -1, 1)
    mean, logvar, _ = VAE(SMALL).apply(params, to_jax(x), method="encode")
    moments = np.moveaxis(np.concatenate([mean, logvar], -1), -1, 1)
    assert relative(moments, reference[f"moments {name}"]) < 1e-4
    z = draw_input(f"latents {name}", (2, 3, *SMALL.latent_size(size)))
    y, _ = VAE(SMALL).apply(params, to_jax(z), method="decode")
    assert relative(np.moveaxis(np.clip(y, -1, 1), -1, 1), reference[f"decoded {name}"]) < 1e-4


def test_gradients_are_the_references(params):
    reference = load_file(FIXTURE)
    x = to_jax(np.clip(draw_input("pixels 5x24x16", (2, 3, 5, 24, 16)), -1, 1))
    z = to_jax(draw_input("latents 5x24x16", (2, 3, 2, 3, 2)))

    def encoded(params):
        mean, logvar, _ = VAE(SMALL).apply(params, x, method="encode")
        return jnp.mean(jnp.concatenate([mean, logvar], -1) ** 2)

    def decoded(params):
        return jnp.mean(jnp.clip(VAE(SMALL).apply(params, z, method="decode")[0], -1, 1) ** 2)

    grads = {}
    for loss, side in ((encoded, "encoder/"), (decoded, "decoder/")):
        tree = jax.jit(jax.grad(loss))(params)
        grads |= {n: g for rule in RULES if side in rule.ours for n, g in export_params(tree, [rule])}
    checked = [k.removeprefix("grad/") for k in reference if k.startswith("grad/")]
    assert len(checked) == 6
    for name in checked:
        assert relative(grads[name], reference[f"grad/{name}"]) < 1e-4, name


def test_every_published_tensor_has_its_place():
    with safe_open(FIXTURE, framework="numpy") as file:
        published = {k: tuple(v) for k, v in json.loads(file.metadata()["published"]).items()}
    flat = traverse_util.flatten_dict(abstract(wan_vae.CONFIG), sep="/")
    rules = wan_vae.rules(wan_vae.CONFIG)
    assert {rule.ours for rule in rules} == set(flat)
    blank = lambda rule: np.lib.stride_tricks.as_strided(np.zeros(1), flat[rule.ours].shape, [0] * flat[rule.ours].ndim)
    assert {rule.theirs: rule.to_theirs(blank(rule)).shape for rule in rules} == published
    assert sum(np.prod(s) for s in published.values()) == 126_892_531


def test_the_round_trip_is_exact(params, file, tmp_path):
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    save_sharded(whole, export_params(params, RULES), "model")
    save_sharded(shards, export_params(params, RULES), "model", shard_bytes=100_000)
    assert len(list(shards.glob("*.safetensors"))) > 3
    before = load_file(file)
    for directory in (whole, shards):
        again = Checkpoint(directory)
        assert set(again.names) == set(before)
        assert all(np.array_equal(again.read(k), v) for k, v in before.items())


def test_import_and_export_from_the_command_line(file, tmp_path, monkeypatch, capsys):
    preset = dataclasses.replace(CODECS["wan2.1-vae"], config=SMALL, latent_mean=(0.1, 0.2, 0.3), latent_std=(1, 2, 3))
    monkeypatch.setitem(CODECS, "wan2.1-vae", preset)
    assert main(["import", "wan2.1-vae", str(file.parent), f"--out={tmp_path / 'codec'}"]) == 0
    codec = Codec.load(tmp_path / "codec")
    assert codec.hash in capsys.readouterr().out and codec.latent_std.tolist() == [1, 2, 3]
    assert main(["export", str(tmp_path / "codec"), str(tmp_path / "again")]) == 0
    again = Checkpoint(tmp_path / "again")
    assert all(np.array_equal(again.read(k), v) for k, v in load_file(file).items())
    assert main(["export", str(CODEC), str(tmp_path / "not")]) == 2
    assert "Wan 2.1's layout has patch=1" in capsys.readouterr().err


def test_what_does_not_fit_is_named(params, file, tmp_path):
    tensors = load_file(file)
    path = tmp_path / "model.safetensors"
    changed = {k: v for k, v in tensors.items() if k != "quant_conv.bias"} | {"more.weight": np.zeros(3, np.float32)}
    save_file(changed, path)
    with pytest.raises(CheckpointError, match=r"1 missing \(quant_conv.bias\) and 1 extra \(more.weight\)"):
        import_params(Checkpoint(path), RULES, abstract(SMALL), progress=False)
    save_file(tensors | {"quant_conv.bias": np.zeros(8, np.float32)}, path)
    with pytest.raises(
        CheckpointError, match=r"quant_conv.bias of shape \(8,\) gives .*moments/bias.* which is \(6,\)"
    ):
        import_params(Checkpoint(path), RULES, abstract(SMALL), progress=False)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        Checkpoint(path)
    with pytest.raises(FileNotFoundError):
        Checkpoint(tmp_path / "none.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(CheckpointError, match="gone.safetensors first"):
        Checkpoint(tmp_path / "model.safetensors.index.json")

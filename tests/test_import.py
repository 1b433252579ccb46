"""`minisora import` and `minisora export` of text encoders, onto disk and straight onto a mesh."""

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from published import import_params
from safetensors.numpy import load_file, save_file

from minisora_jax.cli import main
from minisora_jax.models.clip import CLIPConfig
from minisora_jax.models.encoder import TextEncoder
from minisora_jax.models.t5 import T5Config
from minisora_jax.models.vae import VAE
from minisora_jax.parallel.mesh import SHARDS, MeshConfig, make_mesh, parameter_spec
from minisora_jax.weights import clip, sd_vae, t5, wan_vae
from minisora_jax.weights.checkpoint import Checkpoint
from minisora_jax.weights.presets import CODECS, TEXT_ENCODERS

SMALL = {
    "t5-v1.1-xxl": T5Config(50, 24, 3, 8, 40, 2, dtype="float32"),
    "byt5-small": T5Config(50, 24, 3, 8, 40, 2, dtype="float32"),
    "umt5-xxl": T5Config(50, 24, 3, 8, 40, 2, shared_bias=False, dtype="float32"),
    "clip-l": CLIPConfig(50, 24, 3, 40, 2, 20, projection=12),
    "clip-bigg": CLIPConfig(50, 24, 3, 40, 2, 20, projection=12, activation="gelu"),
}


def abstract(config):
    ids = jnp.zeros((1, 4), jnp.int32)
    return jax.eval_shape(TextEncoder(config, {}).module.init, jax.random.key(0), ids, ids)


def published_tensors(config, dtype, layout="transformers"):
    flat, tensors = traverse_util.flatten_dict(abstract(config), sep="/"), {}
    rng = np.random.default_rng(0)
    for rule in (t5 if isinstance(config, T5Config) else clip).rules(config, layout):
        shape = flat[rule.ours].shape[bool(rule.layers) :]
        shape = rule.to_theirs(np.zeros(shape)).shape[bool(rule.fuses) :]
        tensors |= {name: rng.standard_normal(shape).astype(dtype) for name in rule.names}
    return tensors


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, config in SMALL.items():
        monkeypatch.setitem(TEXT_ENCODERS, name, dataclasses.replace(TEXT_ENCODERS[name], config=config))


def same_bits(path, tensors):
    file = Checkpoint(path)
    assert set(file.names) == set(tensors)
    for name, tensor in tensors.items():
        stored = file.read(name)
        assert stored.dtype == tensor.dtype and stored.tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("name", SMALL)
def test_there_and_back_is_the_same_to_the_bit(name, dtype, tmp_path, capsys):
    tensors = published_tensors(SMALL[name], dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    assert main(["import", name, str(tmp_path / "model.safetensors"), f"--out={tmp_path / 'ours'}"]) == 0
    encoder = TextEncoder.load(tmp_path / "ours")
    assert encoder.config == SMALL[name] and f"text encoder {encoder.hash}" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--shard-gb=1e-5"]) == 0
    assert (tmp_path / "theirs/model.safetensors.index.json").exists()
    same_bits(tmp_path / "theirs", tensors)
    theirs = json.loads((tmp_path / "theirs/config.json").read_text())
    card = (tmp_path / "theirs/README.md").read_text()
    assert "library_name: transformers" in card and f"import {theirs['architectures'][0]}" in card
    assert f"| converted from the published | `{name}` |" in card
    assert theirs["model_type"] == {"t5": "t5", "by": "t5", "um": "umt5", "cl": "clip_text_model"}[name[:2]]
    ids = np.ones((1, 5), np.int32)
    features = encoder.module.apply(jax.tree.map(lambda x: x.astype(np.float32), encoder.params), ids, ids)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(features))


def test_a_precision_may_be_asked_for(tmp_path):
    tensors = published_tensors(SMALL["umt5-xxl"], np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    flags = [f"--out={tmp_path / 'ours'}", "--dtype=bfloat16"]
    assert main(["import", "umt5-xxl", str(tmp_path / "model.safetensors"), *flags]) == 0
    assert {x.dtype for x in load_file(tmp_path / "ours/model.safetensors").values()} == {np.dtype("bfloat16")}
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "theirs")]) == 0
    same_bits(tmp_path / "theirs", {k: v.astype("bfloat16") for k, v in tensors.items()})


def test_a_clip_without_projection_is_kept_without(tmp_path, caplog):
    tensors = published_tensors(dataclasses.replace(SMALL["clip-l"], projection=None), np.float32)
    pipeline = {f"cond_stage_model.transformer.{k}": v for k, v in tensors.items()}
    save_file(pipeline | {"model.diffusion_model.out.2.bias": np.ones(4)}, tmp_path / "v1-5.safetensors")
    caplog.set_level("INFO", "minisora")
    assert main(["import", "clip-l", str(tmp_path / "v1-5.safetensors"), f"--out={tmp_path / 'ours'}"]) == 0
    assert "no text_projection" in caplog.text
    assert TextEncoder.load(tmp_path / "ours").config.projection is None
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "theirs")]) == 0
    same_bits(tmp_path / "theirs", tensors)


def test_wans_umt5_is_read_in_its_own_layout(tmp_path):
    config = SMALL["umt5-xxl"]
    save_file(published_tensors(config, np.float32, "wan"), tmp_path / "models_t5.safetensors")
    assert main(["import", "umt5-xxl", str(tmp_path / "models_t5.safetensors"), f"--out={tmp_path / 'ours'}"]) == 0
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "theirs")]) == 0
    # The rules of both layouts come in the same order, and so did the random numbers.
    same_bits(tmp_path / "theirs", published_tensors(config, np.float32))


def test_what_cannot_be_done_is_said(tmp_path, capsys):
    save_file(published_tensors(SMALL["clip-l"], np.float32), tmp_path / "model.safetensors")
    assert main(["import", "t5-v1.1-xxl", str(tmp_path), f"--out={tmp_path / 'ours'}"]) == 2
    assert "missing (shared.weight" in capsys.readouterr().err
    assert main(["import", "clip-l", str(tmp_path), f"--out={tmp_path / 'ours'}"]) == 0
    with pytest.raises(SystemExit):
        main(["import", "clip-xxl", str(tmp_path), f"--out={tmp_path / 'ours'}"])
    assert "wan2.2-vae" in capsys.readouterr().err
    (tmp_path / "ours/config.json").write_text('{"kind": "organ"}')
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "theirs")]) == 2
    assert "'organ' model" in capsys.readouterr().err
    with pytest.raises(ValueError, match="not a text encoder"):
        TextEncoder.load(tmp_path / "ours")


def test_help_lists_the_presets(capsys):
    with pytest.raises(SystemExit):
        main(["import", "--help"])
    lines = capsys.readouterr().out.splitlines()
    for name in (*CODECS, *TEXT_ENCODERS):
        assert any(line.split()[:1] == [name] for line in lines)
    assert max(map(len, lines)) <= 120


def test_a_codec_restores_straight_onto_a_mesh(tmp_path):
    config = dataclasses.replace(wan_vae.WAN_22, base=8, decoder_base=16, latent_channels=4)
    shapes = jax.eval_shape(VAE(config).init, jax.random.key(0), jnp.zeros((1, 1, 16, 16, 3)))
    flat, rng = traverse_util.flatten_dict(shapes, sep="/"), np.random.default_rng(0)
    rules = wan_vae.rules(config)
    whole = {k: rng.standard_normal(x.shape).astype(np.float32) for k, x in flat.items()}
    save_file({r.theirs: np.ascontiguousarray(r.to_theirs(whole[r.ours])) for r in rules}, tmp_path / "vae.safetensors")
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    with jax.set_mesh(mesh):
        spread = lambda x: jax.sharding.NamedSharding(mesh, parameter_spec(x.shape, -1))
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spread(x)), shapes)
        placed = import_params(Checkpoint(tmp_path / "vae.safetensors"), rules, target)
    leaf = placed["params"]["decoder"]["stage0_residual0"]["conv1"]["conv"]["kernel"]
    assert leaf.sharding.spec == jax.P(None, None, None, None, SHARDS)
    assert {s.data.shape for s in leaf.addressable_shards} == {(3, 3, 3, 64, 16)} and len(leaf.devices()) == 8
    for name, array in traverse_util.flatten_dict(placed, sep="/").items():
        np.testing.assert_array_equal(array, whole[name])


def test_an_exported_codecs_config_is_the_published_one():
    wan = wan_vae.published_config(wan_vae.WAN_22, wan_vae.WAN_22_MEAN, wan_vae.WAN_22_STD)
    known = {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "dim_mult": [1, 2, 4, 4], "is_residual": True}
    known |= {"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
    known |= {"scale_factor_temporal": 4, "temperal_downsample": [False, True, True], "num_res_blocks": 2}
    assert known.items() <= wan.items() and len(wan["latents_mean"]) == len(wan["latents_std"]) == 48
    sd = sd_vae.published_config(sd_vae.CONFIG, sd_vae.MEAN, [round(x, 6) for x in sd_vae.SD_STD])
    assert sd["scaling_factor"] == 0.18215 and sd["block_out_channels"] == [128, 256, 512, 512]
    trained = sd_vae.published_config(sd_vae.CONFIG, (0.1, 0, 0, 0), (1.0, 2.0, 1.0, 1.0))
    assert trained["scaling_factor"] == 1.0 and trained["latents_std"] == [1.0, 2.0, 1.0, 1.0]


def test_a_models_hash_is_of_its_files(tmp_path):
    save_file(published_tensors(SMALL["clip-l"], np.float32), tmp_path / "model.safetensors")
    assert main(["import", "clip-l", str(tmp_path), f"--out={tmp_path / 'ours'}"]) == 0
    together = b"".join((tmp_path / "ours" / n).read_bytes() for n in ("model.safetensors", "config.json"))
    assert TextEncoder.load(tmp_path / "ours").hash == hashlib.sha256(together).hexdigest()[:16]

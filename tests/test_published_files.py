"""Published files as they are: wrapped, prefixed, sharded, with what training left in them. Other files are named."""

import dataclasses
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from torch_files import call, dict_of, number, save_torch, tensor, text, write_torch

sys.path.insert(0, str(Path(__file__).parent / "parity"))
from random_weights import draw  # noqa: E402
from test_parity_dit import SMALL, published_names  # noqa: E402

from minisora_jax.cli import main  # noqa: E402
from minisora_jax.io.model_dir import load_config  # noqa: E402
from minisora_jax.weights.presets import TRANSFORMERS  # noqa: E402

PRESETS = {"dit-xl-2-256": "dit", "pixart-alpha-512": "plain", "pixart-alpha-1024": "sized", "wan2.1-t2v-1.3b": "wan"}
PRESETS |= {"sit-xl-2-256": "sit", "latte-1": "latte", "wan2.1-i2v-14b": "i2v"}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, model in PRESETS.items():
        monkeypatch.setitem(TRANSFORMERS, name, dataclasses.replace(TRANSFORMERS[name], config=SMALL[model]))
    for name, like, side in (("dit-xl-2-512", "dit", 16), ("pixart-alpha-256", "plain", 4)):
        config = dataclasses.replace(SMALL[like], base_grid=side)
        monkeypatch.setitem(TRANSFORMERS, name, dataclasses.replace(TRANSFORMERS[name], config=config))
    # The other presets of these families keep their full size: their names differ already.


def tensors(model: str, layout: str) -> dict[str, np.ndarray]:
    return {name: draw(name, shape) for name, shape in published_names(SMALL[model], layout).items()}


def imported(preset: str, path, tmp_path) -> dict[str, np.ndarray]:
    out = tmp_path / "ours"
    assert main(["import", preset, str(path), f"--out={out}"]) == 0
    return load_file(out / "model.safetensors")


def refusal(preset: str, path, tmp_path, capsys) -> str:
    assert main(["import", preset, str(path), f"--out={tmp_path / 'no'}"]) == 2
    assert not (tmp_path / "no").exists()
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.fixture
def plain(tmp_path):
    """What each preset's plain file gives."""

    def of(preset: str, layout: str) -> dict[str, np.ndarray]:
        (tmp_path / "plain").mkdir(exist_ok=True)
        save_file(tensors(PRESETS[preset], layout), tmp_path / "plain/x.safetensors")
        return imported(preset, tmp_path / "plain/x.safetensors", tmp_path / "plain")

    return of


PREFIXES = ["module.", "model.", "model.diffusion_model.", "_orig_mod.", "module._orig_mod.", "ema.", "net.denoiser."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("preset, layout", [("dit-xl-2-256", "dit-own"), ("wan2.1-t2v-1.3b", "wan-own")])
def test_prefixes(preset, layout, prefix, plain, tmp_path):
    theirs = {prefix + name: array for name, array in tensors(PRESETS[preset], layout).items()}
    beside = {"optimizer.step": np.ones(1, np.float32)} if prefix not in ("_orig_mod.",) else {}
    save_file(theirs | beside, tmp_path / "x.safetensors")
    same(imported(preset, tmp_path / "x.safetensors", tmp_path), plain(preset, layout))


def test_averaged_weights_are_preferred(plain, tmp_path):
    averaged = tensors("dit", "dit-own")
    both = {f"ema.{k}": v for k, v in averaged.items()} | {f"model.{k}": 2 * v for k, v in averaged.items()}
    save_file(both, tmp_path / "x.safetensors")
    same(imported("dit-xl-2-256", tmp_path / "x.safetensors", tmp_path), plain("dit-xl-2-256", "dit-own"))


def test_a_compiled_submodule_and_shards(plain, tmp_path):
    theirs = {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in tensors("dit", "dit-own").items()}
    folder, weight_map = tmp_path / "sharded", {}
    folder.mkdir()
    for i in range(3):
        part = dict(list(theirs.items())[i::3])
        save_file(part, folder / f"x-{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"x-{i}.safetensors")
    (folder / "x.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    same(imported("dit-xl-2-256", folder, tmp_path), plain("dit-xl-2-256", "dit-own"))


def test_a_training_checkpoint_of_dit(plain, tmp_path):
    """{"model", "ema", "opt", "args": argparse.Namespace}, of which the averaged weights are read."""
    theirs = tensors("dit", "dit-own") | {"pos_embed": np.zeros((1, 64, 24), np.float32)}
    args = call("argparse", "Namespace") + dict_of({"global_seed": number(0)}) + b"b"
    optimiser = dict_of({"state": dict_of({}), "param_groups": b"]"})
    around = lambda tree: b"}(" + b"".join(
        text(k) + v for k, v in {"model": dict_of({}), "ema": tree, "opt": optimiser, "args": args}.items()
    ) + b"u"  # fmt: skip
    file = save_torch(tmp_path / "0400000.pt", theirs, around)
    same(imported("dit-xl-2-256", file, tmp_path), plain("dit-xl-2-256", "dit-own"))


def test_a_checkpoint_of_lightning(plain, tmp_path):
    theirs = {f"model.{k}": v for k, v in tensors("wan", "wan-own").items()}
    harm = call("my_project.configs", "Config", text("x")) + dict_of({"lr": number(1)}) + b"b"
    around = lambda tree: (
        b"}(" + text("callbacks") + harm + text("state_dict") + tree + text("epoch") + number(3) + b"u"
    )
    file = save_torch(tmp_path / "last.ckpt", theirs, around)
    same(imported("wan2.1-t2v-1.3b", file, tmp_path), plain("wan2.1-t2v-1.3b", "wan-own"))
    (tmp_path / "folder").mkdir()
    file.rename(tmp_path / "folder/last.ckpt")
    same(imported("wan2.1-t2v-1.3b", tmp_path / "folder", tmp_path), plain("wan2.1-t2v-1.3b", "wan-own"))


@pytest.mark.parametrize("preset", ["pixart-alpha-512", "pixart-alpha-1024"])
def test_pixart_as_its_authors_and_as_diffusers_write_it(preset, tmp_path):
    """Both layouts hold one model. The names are written out as in diffusers' convert_pixart_to_diffusers.py."""
    theirs = tensors(PRESETS[preset], "pixart")
    buffer = {"caption_projection.y_embedding": np.ones((120, 10), np.float32)}
    save_file(theirs | buffer, tmp_path / "diffusers.safetensors")
    ours = imported(preset, tmp_path / "diffusers.safetensors", tmp_path)

    own = {}
    moved = {"pos_embed.proj": "x_embedder.proj", "adaln_single.linear": "t_block.1", "proj_out": "final_layer.linear"}
    embedder = "adaln_single.emb."
    for i, j in ((1, 0), (2, 2)):
        moved[f"{embedder}timestep_embedder.linear_{i}"] = f"t_embedder.mlp.{j}"
        moved[f"{embedder}resolution_embedder.linear_{i}"] = f"csize_embedder.mlp.{j}"
        moved[f"{embedder}aspect_ratio_embedder.linear_{i}"] = f"ar_embedder.mlp.{j}"
        moved[f"caption_projection.linear_{i}"] = f"y_embedder.y_proj.fc{i}"
    for theirs_name, own_name in moved.items():
        for kind in ("weight", "bias"):
            if f"{theirs_name}.{kind}" in theirs:
                own[f"{own_name}.{kind}"] = theirs[f"{theirs_name}.{kind}"]
    own["final_layer.scale_shift_table"] = theirs["scale_shift_table"]
    for i in range(2):
        a, b = f"transformer_blocks.{i}.", f"blocks.{i}."
        own[f"{b}scale_shift_table"] = theirs[f"{a}scale_shift_table"]
        for kind in ("weight", "bias"):
            parts = lambda *names, a=a, kind=kind: np.concatenate([theirs[f"{a}{n}.{kind}"] for n in names])
            own[f"{b}attn.qkv.{kind}"] = parts("attn1.to_q", "attn1.to_k", "attn1.to_v")
            own[f"{b}attn.proj.{kind}"] = parts("attn1.to_out.0")
            own[f"{b}cross_attn.q_linear.{kind}"] = parts("attn2.to_q")
            own[f"{b}cross_attn.kv_linear.{kind}"] = parts("attn2.to_k", "attn2.to_v")
            own[f"{b}cross_attn.proj.{kind}"] = parts("attn2.to_out.0")
            own[f"{b}mlp.fc1.{kind}"] = parts("ff.net.0.proj")
            own[f"{b}mlp.fc2.{kind}"] = parts("ff.net.2")
    side = 16 if preset.endswith("1024") else 8
    own |= {"pos_embed": np.zeros((1, side**2, 24)), "y_embedder.y_embedding": np.ones((120, 10))}
    file = save_torch(tmp_path / "PixArt-XL-2.pth", own, lambda tree: b"}" + text("state_dict") + tree + b"s")
    same(imported(preset, file, tmp_path), ours)


# ---- What is not this preset


def lora(names: list[str]) -> dict[str, np.ndarray]:
    return {name: np.ones((4, 16) if "A" in name or "down" in name else (16, 4), np.float32) for name in names}


def with_extra(**extra) -> dict[str, np.ndarray]:
    return tensors("wan", "wan-own") | {k.replace("__", "."): v for k, v in extra.items()}


ONE = np.ones(1, np.float32)
STRANGERS = {
    "LoRA, Wan": (lora([f"diffusion_model.blocks.0.self_attn.q.lora_{x}.weight" for x in "AB"]), "a LoRA"),
    "LoRA, PEFT": (lora([f"base_model.model.blocks.0.attn1.to_q.lora_{x}.default.weight" for x in "AB"]), "a LoRA"),
    "LoRA, kohya": (lora([f"lora_unet_blocks_0_self_attn_q.lora_{x}.weight" for x in ("down", "up")]), "a LoRA"),
    "LoRA, diffusers": (lora([f"transformer.blocks.0.attn1.to_q.lora.{x}.weight" for x in ("down", "up")]), "a LoRA"),
    "LoRA, old": (lora([f"unet.mid.attn1.processor.to_q_lora.{x}.weight" for x in ("down", "up")]), "a LoRA"),
    "LoKr": ({"lora_unet_blocks_0.lokr_w1": ONE, "lora_unet_blocks_0.lokr_w2": ONE}, "a LoRA"),
    "LoRA of whole differences": ({"diffusion_model.blocks.0.self_attn.q.diff": ONE}, "a LoRA"),
    "Flux": ({"double_blocks.0.img_attn.qkv.weight": ONE}, "is a Flux or HunyuanVideo transformer"),
    "SD 3 of diffusers": ({"transformer_blocks.0.attn.add_q_proj.weight": ONE}, "a Stable Diffusion 3 or Qwen"),
    "Mochi": ({"blocks.0.attn.qkv_x.weight": ONE}, "is a Mochi transformer"),
    "Open-Sora": ({"spatial_blocks.0.attn.qkv.weight": ONE}, "is an Open-Sora transformer"),
    "VACE": ({"vace_blocks.0.self_attn.q.weight": ONE}, "is a Wan VACE transformer"),
    "CLIP's eyes": ({"vision_model.encoder.layers.0.self_attn.q_proj.weight": ONE}, "is an image encoder"),
    "Llama": ({"model.layers.0.self_attn.q_proj.weight": ONE}, "is a language model"),
    "U-Net": ({"model.diffusion_model.input_blocks.1.0.in_layers.0.weight": ONE}, "is a U-Net"),
    "fp8 with scales": (with_extra(scaled_fp8=ONE, blocks__0__ffn__0__scale_weight=ONE), "8-bit floats with scales"),
    "bitsandbytes": (with_extra(blocks__0__ffn__0__weight__absmax=ONE), "4 bits by bitsandbytes"),
    "bitsandbytes 8": (with_extra(blocks__0__ffn__0__SCB=ONE), "8 bits by bitsandbytes"),
    "GPTQ": ({"blocks.0.ffn.0.qweight": ONE, "blocks.0.ffn.0.qzeros": ONE}, "GPTQ"),
    "int8": (tensors("wan", "wan-own") | {"blocks.0.ffn.0.weight": np.ones((40, 32), np.int8)}, "is of int8"),
    "something else": ({"conv.weight": ONE}, "is not a checkpoint of this preset: tensors"),
}  # fmt: skip


@pytest.mark.parametrize("what", STRANGERS)
def test_a_stranger_is_named(what, tmp_path, capsys):
    content, words = STRANGERS[what]
    save_file(content, tmp_path / "x.safetensors")
    assert words in refusal("wan2.1-t2v-1.3b", tmp_path / "x.safetensors", tmp_path, capsys)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"GGUF\x03\x00\x00\x00" + bytes(64), "a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19." + bytes(64), "a pickle in it is damaged"),
        (b"", "is not a torch file|whole safetensors"),
    ],
)
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_file_of_another_format_is_named(content, words, suffix, tmp_path, capsys):
    (tmp_path / f"x.{suffix}").write_bytes(content)
    error = refusal("dit-xl-2-256", tmp_path / f"x.{suffix}", tmp_path, capsys)
    assert any(word in error for word in words.split("|"))


def test_a_name_does_not_decide_the_format(plain, tmp_path):
    save_file(tensors("dit", "dit-own"), tmp_path / "x.pt")
    same(imported("dit-xl-2-256", tmp_path / "x.pt", tmp_path), plain("dit-xl-2-256", "dit-own"))


@pytest.mark.parametrize("asked, model, layout, name", [
    ("dit-xl-2-256", "wan", "wan-own", "wan2.1-t2v-1.3b"),
    ("wan2.1-t2v-1.3b", "plain", "pixart", "pixart-alpha-512"),
    ("pixart-alpha-512", "sized", "pixart", "pixart-alpha-1024"),
    ("wan2.1-t2v-1.3b", "i2v", "wan", "wan2.1-i2v-14b"),
])  # fmt: skip
def test_another_preset_is_named(asked, model, layout, name, tmp_path, capsys):
    sides = {"plain": 8, "sized": 16}
    table = {"pos_embed": np.zeros((1, sides[model] ** 2, 24), np.float32)} if model in sides else {}
    save_file({f"module.{k}": v for k, v in (tensors(model, layout) | table).items()}, tmp_path / "x.safetensors")
    error = refusal(asked, tmp_path / "x.safetensors", tmp_path, capsys)
    assert f"is not {asked}: this is a {name}: use `minisora import {name}" in error


def test_a_size_of_the_same_names_and_shapes_is_told_by_its_positions(tmp_path, capsys):
    theirs = tensors("dit", "dit-own") | {"pos_embed": np.zeros((1, 256, 24), np.float32)}
    file = save_torch(tmp_path / "x.pt", theirs)
    assert "this is a dit-xl-2-512: use" in refusal("dit-xl-2-256", file, tmp_path, capsys)
    imported("dit-xl-2-512", file, tmp_path)
    folder = tmp_path / "transformer"  # diffusers stores no table; its config.json says it
    folder.mkdir()
    save_file(tensors("plain", "pixart"), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"sample_size": 8, "patch_size": 2}))
    assert "this is a pixart-alpha-256: use" in refusal("pixart-alpha-512", folder, tmp_path, capsys)
    (folder / "config.json").write_text(json.dumps({"sample_size": 16, "patch_size": 2}))
    imported("pixart-alpha-512", folder, tmp_path)
    for content in ("[]", '{"sample_size": "x"}', "{", '{"sample_size": 4, "patch_size": 0}'):
        (folder / "config.json").write_text(content)  # not ours to judge
        imported("pixart-alpha-512", folder, tmp_path)


def test_the_import_records_how_the_authors_sample(tmp_path):
    save_file(tensors("wan", "wan"), tmp_path / "x.safetensors")
    imported("wan2.1-t2v-1.3b", tmp_path / "x.safetensors", tmp_path)
    config = load_config(tmp_path / "ours")
    assert config["times"]["sampling_shift"] == 5.0 and config["objective"]["whole_timesteps"] is True


def test_unknown_classes_alone_are_no_checkpoint(tmp_path, capsys):
    file = write_torch(tmp_path / "x.pt", call("posix", "system", text("exit 1")), {})
    assert "asks for posix.system" in refusal("dit-xl-2-256", file, tmp_path, capsys)


def test_what_torch_saved_in_place_of_tensors_by_name_is_said(tmp_path, capsys):
    alone = write_torch(tmp_path / "x.pt", tensor("0", 4, (4,)), {"0": bytes(16)})
    assert "it is a single tensor" in refusal("dit-xl-2-256", alone, tmp_path, capsys)
    listed = write_torch(tmp_path / "y.pt", b"](" + number(1) + b"e", {})
    assert "it is a list of Python" in refusal("dit-xl-2-256", listed, tmp_path, capsys)
    with zipfile.ZipFile(tmp_path / "z.pt", "w") as file:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            file.writestr(f"z/{name}", b"")
    assert "is a TorchScript program" in refusal("dit-xl-2-256", tmp_path / "z.pt", tmp_path, capsys)


def test_the_folder_of_a_whole_pipeline_names_its_parts(tmp_path, capsys):
    (tmp_path / "Wan" / "transformer").mkdir(parents=True)
    save_file({"w": ONE}, tmp_path / "Wan" / "transformer" / "diffusion_pytorch_model.safetensors")
    told = refusal("wan2.1-t2v-1.3b", tmp_path / "Wan", tmp_path, capsys)
    assert f"give one of its parts, such as {tmp_path / 'Wan' / 'transformer'}" in told

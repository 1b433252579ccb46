"""LoRA against peft on diffusers' Wan (parity/make_lora.py), and the keys of published adapters."""

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
from test_parity_dit import FIXTURES, SMALL, Clip, loaded, packed, predict, published_names, relative, video_clips  # noqa: E402

from minisora_jax.models.dit import DiT  # noqa: E402
from minisora_jax.weights.errors import WeightsFileError  # noqa: E402
from minisora_jax.weights.lora_names import published_adapter, read_published  # noqa: E402

CONFIG = SMALL["wan"]
CASES = [((3, 4, 6), 7, 437.0), ((1, 2, 10), 12, 3.0)]


@pytest.fixture(scope="module")
def theirs():
    path = FIXTURES / "lora.safetensors"
    with safe_open(path, "np") as file:
        facts = {k: json.loads(v) for k, v in file.metadata().items()}
    return load_file(path), facts


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return loaded(CONFIG, "wan", tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def file(theirs, tmp_path_factory):
    """The adapter as diffusers saves it; peft has no key for alpha, so here it is one of kohya's."""
    _, facts = theirs
    path = tmp_path_factory.mktemp("lora") / "adapter.safetensors"
    tensors = {f"transformer.{key}": draw(key, tuple(shape)) for key, shape in facts["keys"].items()}
    alphas = {
        k.replace(".lora_A.weight", ".alpha"): np.array(facts["alpha"], np.float32) for k in tensors if "lora_A" in k
    }
    save_file(tensors | alphas, path)
    return path


def test_values_are_pefts(theirs, base, file, parity):
    results, _ = theirs
    params = base | {"lora": read_published(file, CONFIG)["lora"]}
    for size, length, time in CASES:
        rows = [[clip] for clip in video_clips(size, length, time / 1000)]
        name = "x".join(map(str, size))
        wanted = results[f"t2v {name} {length} {time}"]
        out = np.stack(predict(CONFIG, params, rows))
        parity("LoRA on Wan 2.1 T2V", "forward", out, wanted, name)
        assert relative(out, wanted) < 1e-5
        assert relative(np.stack(predict(CONFIG, base, rows)), wanted) > 0.1


def test_gradients_are_pefts(theirs, base, file, parity):
    results, facts = theirs
    clips = video_clips(*CASES[0][:2], CASES[0][2] / 1000)
    batch, time_BS = packed(CONFIG, [[clip] for clip in clips])
    weights = draw_input("weights of the loss", (2, 4, 3, 4, 6))
    weights_BSP = np.stack([packed(CONFIG, [[Clip(w, clips[0].text_LE, 0.0)]])[0].tokens_BSP[0] for w in weights])

    def loss(lora):
        y_BSP = DiT(CONFIG).apply(base | {"lora": lora}, batch.tokens_BSP, time_BS, batch)
        return jnp.sum(y_BSP * weights_BSP) / weights.size

    grads = jax.jit(jax.grad(loss))(read_published(file, CONFIG)["lora"])
    # b holds the scale, so theirs is the scale times ours: what an export to peft does with b itself.
    named = published_adapter({"lora": jax.device_get(grads)}, CONFIG, "peft", facts["alpha"] / facts["rank"])
    named = {name.removeprefix("transformer."): tensor.whole() for name, tensor in named.items()}
    assert {f"grad/{name}" for name in named} == {name for name in results if name.startswith("grad/")}
    for name, gradient in named.items():
        parity("LoRA on Wan 2.1 T2V", "gradient", gradient, results[f"grad/{name}"], name)


def test_an_export_has_the_keys_that_diffusers_saves(theirs, file):
    _, facts = theirs
    tensors = published_adapter(read_published(file, CONFIG), CONFIG, "peft", 1.0)
    assert {name.removeprefix("transformer."): list(x.shape) for name, x in tensors.items()} == facts["keys"]


def bytes_equal(one, other):
    one, other = (traverse_util.flatten_dict(tree, sep="/") for tree in (one, other))
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("style", ["peft", "comfyui", "kohya"])
def test_what_is_exported_is_read_back(file, tmp_path, style):
    tree = read_published(file, CONFIG)
    if style != "peft":
        tree["diff"] = {"patch_in": {"bias": np.arange(32, dtype=np.float32)}}
    tensors = {name: x.whole() for name, x in published_adapter(tree, CONFIG, style, 1.0).items()}
    save_file(tensors, tmp_path / "x.safetensors")
    assert bytes_equal(read_published(tmp_path / "x.safetensors", CONFIG), tree)
    assert {"peft": "lora_A", "comfyui": "diffusion_model.blocks.1.ffn.2.lora_up.weight"}.get(
        style, "lora_unet_blocks_0"
    ) in "".join(tensors)


# ---- Published key sets, at small sizes: which modules have what, as public converters list them


def module_shapes(config):
    return {name: shape for name, shape in published_names(config, "wan-own").items()}


def few_step(config, prefix="diffusion_model.", alpha=False, parts=("lora_down", "lora_up"), whole=True, rank=4):
    """The keys of the few-step LoRAs for Wan: A and B of every linear layer, with `whole` the biases and norms too."""
    found = {}
    for name, shape in module_shapes(config).items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and len(shape) == 2 and not (whole and module == "head.head"):
            found[f"{prefix}{module}.{parts[0]}.weight"] = (rank, shape[1])
            found[f"{prefix}{module}.{parts[1]}.weight"] = (shape[0], rank)
            if alpha:
                found[f"{prefix}{module}.alpha"] = ()
        elif whole and kind == "weight":
            found[f"{prefix}{module}.diff"] = shape  # norms and the patch embedding; of the head in Wan 2.2's
        elif whole and kind == "bias":
            found[f"{prefix}{module}.diff_b"] = shape
        elif whole:
            found[f"{prefix}{name}.diff"] = shape  # modulation tables
    return found


def kohya(config):
    """musubi-tuner's: linear layers of the blocks only, with alpha."""
    dotted = few_step(config, "", alpha=True, whole=False)
    flat = lambda name: "lora_unet_" + name.split(".lora_")[0].removesuffix(".alpha").replace(".", "_")
    suffix = lambda name: ".alpha" if name.endswith(".alpha") else ".lora_" + name.split(".lora_")[1]
    return {flat(name) + suffix(name): shape for name, shape in dotted.items() if name.startswith("blocks.")}


DEFAULT = ("lora_A.default", "lora_B.default")
KEYS = {
    "lightx2v and AccVideo (down, up, diff, diff_b)": few_step,
    "CausVid (A, B, diff_b)": lambda c: few_step(c, parts=("lora_A", "lora_B")),
    "with alpha": lambda c: few_step(c, alpha=True, whole=False),
    "PEFT (A, B, default)": lambda c: few_step(c, "base_model.model.", parts=DEFAULT, whole=False),
    "DiffSynth, without a prefix": lambda c: few_step(c, "", parts=DEFAULT, whole=False),
    "kohya, musubi-tuner": kohya,
}  # fmt: skip


@pytest.mark.parametrize("model", ["wan", "i2v"])
@pytest.mark.parametrize("keys", KEYS)
def test_published_keys_are_mapped_without_one_missing(keys, model, tmp_path):
    config = SMALL[model]
    shapes = KEYS[keys](config)
    assert len(shapes) > 40
    tensors = {
        name: np.array(4, np.float32) if name.endswith(".alpha") else draw(name, shape)
        for name, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    tree = read_published(tmp_path / "lora.safetensors", config)
    numbers = lambda part: sum(np.count_nonzero(x) for x in jax.tree.leaves(tree.get(part, {})))
    thin = sum(x.size for name, x in tensors.items() if "lora_" in name and not name.endswith(".alpha"))
    assert numbers("lora") == thin and numbers("diff") == sum(x.size for n, x in tensors.items() if ".diff" in n)


def test_the_product_is_the_published_one(tmp_path):
    """W + alpha / rank up down, in torch's layout, through the rules of whole weights."""
    name = "blocks.1.cross_attn.o"
    up, down = draw("up", (32, 4)), draw("down", (4, 32))
    save_file({f"diffusion_model.{name}.lora_up.weight": up, f"diffusion_model.{name}.lora_down.weight": down,
               f"diffusion_model.{name}.alpha": np.array(2, np.float32)}, tmp_path / "x.safetensors")  # fmt: skip
    tree = read_published(tmp_path / "x.safetensors", CONFIG)["lora"]["blocks"]["joint"]["cross_attention"]["out"]
    change = np.tensordot(tree["a"][1], tree["b"][1], axes=1)  # n k d
    np.testing.assert_allclose(change.reshape(32, 32).T, 0.5 * up @ down, atol=1e-6)
    assert not tree["a"][0].any() and not tree["b"][0].any()


def test_ranks_may_differ(tmp_path):
    key = lambda i, part: f"diffusion_model.blocks.{i}.ffn.0.lora_{part}.weight"
    tensors = {key(i, "down"): draw(key(i, "down"), (2 + i, 32)) for i in (0, 1)}
    tensors |= {key(i, "up"): draw(key(i, "up"), (40, 2 + i)) for i in (0, 1)}
    save_file(tensors, tmp_path / "x.safetensors")
    up = read_published(tmp_path / "x.safetensors", CONFIG)["lora"]["blocks"]["joint"]["mlp"]["up"]
    for i in (0, 1):
        np.testing.assert_allclose(
            up["a"][i] @ up["b"][i], (tensors[key(i, "up")] @ tensors[key(i, "down")]).T, atol=1e-6
        )


def test_what_is_no_adapter_of_this_model_is_said(tmp_path):
    def said(tensors, config=CONFIG):
        save_file({name: np.asarray(x, np.float32) for name, x in tensors.items()}, tmp_path / "x.safetensors")
        with pytest.raises(WeightsFileError) as error:
            read_published(tmp_path / "x.safetensors", config)
        return str(error.value)

    pair = lambda module, down, up: {
        f"{module}.lora_down.weight": np.ones(down),
        f"{module}.lora_up.weight": np.ones(up),
    }
    q = "diffusion_model.blocks.0.self_attn.q"
    assert "this one lacks 1 (blocks.0.cross_attn.k_img)" in said(
        pair("diffusion_model.blocks.0.cross_attn.k_img", (2, 32), (32, 2))
    )
    assert "this one lacks 1 (blocks.7.self_attn.q)" in said(
        pair("diffusion_model.blocks.7.self_attn.q", (2, 32), (32, 2))
    )
    assert "(2, 48)" in (text := said(pair(q, (2, 48), (48, 2)))) and "adapter of another model" in text
    assert "their ranks are 2 and 3" in said(pair(q, (2, 32), (32, 3)))
    assert "has one of A and B for blocks.0.self_attn.q" in said({f"{q}.lora_up.weight": np.ones((32, 2))})
    assert "NaN or infinite" in said(pair(q, (2, 32), (32, 2)) | {f"{q}.alpha": np.nan})
    assert "no part of a LoRA that is read here" in said({f"{q}.lokr_w1": np.ones((2, 2))})
    assert "does not fit params/patch_in/bias (32,)" in said({"diffusion_model.patch_embedding.diff_b": np.ones(8)})
    (tmp_path / "pickle.pt").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises((WeightsFileError, ValueError)):
        read_published(tmp_path / "pickle.pt", CONFIG)

"""CLIP's text encoders against transformers: values, pooling, gradients, names. Fixture: tests/parity/make_clip.py."""

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
from random_weights import draw, draw_ids, draw_input  # noqa: E402

from minisora_jax.models.clip import CLIPConfig, CLIPEncoder  # noqa: E402
from minisora_jax.parallel.mesh import BATCH, SHARDS, MeshConfig, make_mesh, to_global, with_shardings  # noqa: E402
from minisora_jax.weights import clip  # noqa: E402
from minisora_jax.weights.checkpoint import Checkpoint, WeightsFileError  # noqa: E402

FIXTURE = Path(__file__).parent / "parity/fixtures/clip.safetensors"
SMALL = {
    "quick": CLIPConfig(50, 24, 3, 40, 3, 20, projection=12),
    "exact": CLIPConfig(50, 24, 3, 40, 3, 20, projection=12, activation="gelu", end=7),
}


def abstract(config):
    ids = jnp.zeros((1, 4), jnp.int32)
    return jax.eval_shape(CLIPEncoder(config).init, jax.random.key(0), ids, ids)


def captions(length):
    """As in make_clip.py: end tokens (7 and 49) twice, of which the first counts."""
    ids = draw_ids(f"ids {length}", (2, length), 49).astype(np.int32)
    ids[ids == 7] = 8
    ids[:, length // 2] = ids[:, -1] = 49
    ids[:, length // 2 + 1] = ids[:, -2] = 7
    return ids


def published_tensors(config):
    """The small model as `transformers` would save it."""
    flat, tensors = traverse_util.flatten_dict(abstract(config), sep="/"), {}
    for rule in clip.rules(config):
        shape = flat[rule.ours].shape[bool(rule.layers) :]
        shape = rule.to_theirs(np.zeros(shape)).shape[bool(rule.fuses) :]
        tensors |= {name: draw(name, shape) for name in rule.names}
    return tensors


def to_openclip(tensors, config):
    """transformers' tensors as OpenCLIP holds them, written out by hand."""
    t, layer = "text_model.", "text_model.encoder.layers.{}."
    out = {
        "token_embedding.weight": tensors[t + "embeddings.token_embedding.weight"],
        "positional_embedding": tensors[t + "embeddings.position_embedding.weight"],
        "text_projection": np.ascontiguousarray(tensors["text_projection.weight"].T),
        "logit_scale": np.ones((), np.float32),
    }
    renamed = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for kind in ("weight", "bias"):
        out[f"ln_final.{kind}"] = tensors[f"{t}final_layer_norm.{kind}"]
        for i in range(config.depth):
            theirs, ours = layer.format(i), f"transformer.resblocks.{i}."
            qkv = [tensors[f"{theirs}self_attn.{x}_proj.{kind}"] for x in "qkv"]
            out[f"{ours}attn.in_proj_{kind}"] = np.concatenate(qkv)
            out[f"{ours}attn.out_proj.{kind}"] = tensors[f"{theirs}self_attn.out_proj.{kind}"]
            out |= {f"{ours}{v}.{kind}": tensors[f"{theirs}{k}.{kind}"] for k, v in renamed.items()}
    return out


def restored(tensors, path, config):
    save_file(tensors, path)
    file = Checkpoint(path)
    rules = clip.rules(config, clip.name_map_of(file.names))
    return import_params(file, rules, abstract(config), ignored=clip.IGNORED)


@pytest.fixture(scope="module", params=SMALL)
def model(request, tmp_path_factory):
    config = SMALL[request.param]
    path = tmp_path_factory.mktemp("clip") / "model.safetensors"
    return request.param, config, restored(published_tensors(config), path, config)


@pytest.mark.parametrize("length, kept", [(20, 20), (7, 7), (13, 9)])
def test_values_are_the_references(model, length, kept, parity):
    name, config, params = model
    segment = np.broadcast_to(np.arange(length) < kept, (2, length)).astype(np.int32)
    out, pooled = (np.asarray(x) for x in CLIPEncoder(config).apply(params, captions(length), segment))
    reference = load_file(FIXTURE)
    parity(
        f"CLIP text, {config.activation}",
        "forward",
        out[:, :kept],
        reference[f"{name} {length} {kept}"],
        f"{kept}/{length}",
    )
    parity(f"CLIP text, {config.activation}", "forward", pooled[:, 0], reference[f"{name} {length} {kept} pooled"])
    assert not out[:, kept:].any()


def test_gradients_are_the_references(model, parity):
    name, config, params = model
    weight = draw_input("weights of the loss", (2, 7, 24))

    def loss(params):
        out, pooled = CLIPEncoder(config).apply(params, captions(7), jnp.ones((2, 7), jnp.int32))
        return jnp.mean(out**2 * weight) + jnp.mean(pooled**2)

    grads = export_params(jax.jit(jax.grad(loss))(params), clip.rules(config))
    reference = {k.split("grad/")[1]: v for k, v in load_file(FIXTURE).items() if k.startswith(f"{name} grad/")}
    assert len(reference) == 7
    for key, grad in reference.items():
        parity(f"CLIP text, {config.activation}", "gradient", grads[key], grad, key)


def packed():
    lengths = (6, 13, 9)
    ids = [captions(n)[:1] for n in lengths]
    segment = np.repeat([1, 2, 3, 0], [*lengths, 4])[None].astype(np.int32)
    return np.pad(np.concatenate(ids, 1), ((0, 0), (0, 4))), segment, ids


@pytest.mark.slow
def test_several_captions_in_a_row_are_read_apart(model):
    _, config, params = model
    row, segment, ids = packed()
    assert row.shape[1] > config.positions  # a row may be longer than a caption
    together, pooled = CLIPEncoder(config).apply(params, row, segment, slots=4)
    alone = [CLIPEncoder(config).apply(params, i, np.ones_like(i)) for i in ids]
    np.testing.assert_allclose(together[:, :28], np.concatenate([x for x, _ in alone], 1), atol=1e-5)
    np.testing.assert_allclose(pooled[:, :3], np.concatenate([p for _, p in alone], 1), atol=1e-5)
    assert not pooled[:, 3].any() and not together[:, 28:].any()
    loss = lambda p: jnp.sum(CLIPEncoder(config).apply(p, row, segment)[0] ** 2)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(jax.grad(loss)(params)))


def test_a_caption_beyond_the_positions_says_so(model):
    _, config, params = model
    ids = np.ones((1, config.positions + 5), np.int32)
    ids[:, config.positions] = ids[:, -1] = 49 if config.end is None else config.end
    segment = np.where(np.arange(ids.shape[1]) <= config.positions, 1, 2)[None]
    out, pooled = CLIPEncoder(config).apply(params, ids, segment, slots=2)
    assert np.isnan(out[0]).all(-1).tolist() == [False] * config.positions + [True] + [False] * 4
    assert np.isnan(pooled[0]).all(-1).tolist() == [True, False]


def test_every_layout_gives_the_same_model(model, tmp_path):
    _, config, params = model
    tensors = published_tensors(config)
    bare = {k.removeprefix("text_model."): v for k, v in tensors.items()}
    whole_clip = tensors | {"vision_model.post_layernorm.bias": np.ones(3), "logit_scale": np.ones(())}
    whole_clip["text_model.embeddings.position_ids"] = np.arange(20)[None]
    for i, stored in enumerate((to_openclip(tensors, config), bare, whole_clip)):
        again = restored(stored, tmp_path / f"{i}.safetensors", config)
        jax.tree.map(np.testing.assert_array_equal, again, params)
    exported = export_params(params, clip.rules(config))
    assert set(exported) == set(tensors) and all(np.array_equal(exported[k], v) for k, v in tensors.items())


def test_it_restores_onto_a_mesh_and_computes_there(model, tmp_path):
    _, config, params = model
    save_file(published_tensors(config), tmp_path / "model.safetensors")
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    row, segment, _ = (np.repeat(x, 8, 0) if isinstance(x, np.ndarray) else x for x in packed())
    with jax.set_mesh(mesh):
        target = with_shardings(abstract(config), mesh)
        placed = import_params(Checkpoint(tmp_path / "model.safetensors"), clip.rules(config), target)
        kernel = placed["params"]["blocks"]["qkv"]["kernel"]
        assert kernel.sharding.spec == jax.P(None, SHARDS, None, None, None)
        assert kernel.addressable_shards[0].data.shape == (3, 6, 3, 3, 8)
        jax.tree.map(np.testing.assert_array_equal, placed, params)
        apply = jax.jit(CLIPEncoder(config).apply, static_argnames="slots")
        out, pooled = apply(placed, to_global(row, mesh, BATCH), to_global(segment, mesh, BATCH), slots=3)
        assert out.sharding.spec[0] == pooled.sharding.spec[0] == ("data", "fsdp")
    expected = CLIPEncoder(config).apply(params, row, segment, slots=3)
    np.testing.assert_allclose(out, expected[0], atol=1e-5)
    np.testing.assert_allclose(pooled, expected[1], atol=1e-5)


@pytest.mark.parametrize(
    "name, key, layout",
    [
        ("clip-l", "clip-l", "transformers"),
        ("clip-l", "bare clip-l", "bare"),
        ("clip-bigg", "clip-bigg", "transformers"),
    ],
)
def test_every_published_tensor_has_its_place(name, key, layout):
    with safe_open(FIXTURE, framework="numpy") as file:
        published = {k: tuple(v) for k, v in json.loads(file.metadata()["published"])[key].items()}
    assert clip.name_map_of(published) == layout
    config = clip.fit(clip.CONFIGS[name], published)
    assert (config.projection is None) == (layout == "bare")
    flat = traverse_util.flatten_dict(abstract(config), sep="/")
    shapes = {}
    for rule in clip.rules(config, layout):
        blank = np.zeros(flat[rule.ours].shape[bool(rule.layers) :], np.int8)
        shapes |= dict.fromkeys(rule.names, rule.to_theirs(blank).shape[bool(rule.fuses) :])
    assert shapes == published
    millions = {"clip-l": 123.65, "bare clip-l": 123.06, "clip-bigg": 694.66}[key]
    assert abs(sum(np.prod(p.shape) for p in flat.values()) / 1e6 - millions) < 0.01


def test_what_does_not_fit_is_named(tmp_path):
    config = SMALL["quick"]
    tensors, key = published_tensors(config), "text_model.encoder.layers.1.self_attn.k_proj.weight"
    with pytest.raises(WeightsFileError, match=f"1 missing .{key}"):
        restored({k: v for k, v in tensors.items() if k != key}, tmp_path / "missing.safetensors", config)
    with pytest.raises(WeightsFileError, match="1 extra .text_model.more"):
        restored(tensors | {"text_model.more": np.zeros(1)}, tmp_path / "extra.safetensors", config)
    with pytest.raises(WeightsFileError, match=key.replace("k_proj", "q_proj") + f" and {key}.*does not fit"):
        restored(tensors | {key: np.zeros((24, 25), np.float32)}, tmp_path / "shape.safetensors", config)
    with pytest.raises(ValueError, match="width=24 must be a multiple of heads=5"):
        dataclasses.replace(config, heads=5)
    with pytest.raises(ValueError, match="quick_gelu, gelu"):
        dataclasses.replace(config, activation="relu")

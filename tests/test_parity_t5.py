"""T5 v1.1, ByT5 and umT5 encoders against transformers: values, gradients, names. Fixtures: parity/make_text.py."""

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

from minisora_jax.models.t5 import T5Config, T5Encoder  # noqa: E402
from minisora_jax.parallel.mesh import BATCH, SHARDS, MeshConfig, make_mesh, to_global  # noqa: E402
from minisora_jax.weights import t5  # noqa: E402
from minisora_jax.weights.checkpoint import Checkpoint  # noqa: E402

FIXTURE = Path(__file__).parent / "parity/fixtures/t5.safetensors"
SMALL = {family: T5Config(50, 24, 3, 8, 40, 3, family == "t5", dtype="float32") for family in ("t5", "umt5")}


def abstract(config):
    ids = jnp.zeros((1, 4), jnp.int32)
    return jax.eval_shape(T5Encoder(config).init, jax.random.key(0), ids, ids)


SYSTEMS = {"t5": "T5 v1.1, ByT5", "umt5": "umT5"}


def published_file(config, path, layout="transformers"):
    """The small model as a published file of a layout; weights are drawn by their transformers names."""
    flat, tensors = traverse_util.flatten_dict(abstract(config), sep="/"), {}
    for rule, named in zip(t5.rules(config, layout), t5.rules(config)):
        shape = flat[rule.ours].shape[1:] if rule.layers else flat[rule.ours].shape
        theirs = rule.to_theirs(np.zeros(shape)).shape
        tensors |= {stored: draw(name, theirs) for stored, name in zip(rule.names, named.names)}
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module", params=SMALL)
def model(request, tmp_path_factory):
    config = SMALL[request.param]
    path = published_file(config, tmp_path_factory.mktemp("t5") / "model.safetensors")
    params = import_params(Checkpoint(path), t5.rules(config), abstract(config))
    return request.param, config, params


@pytest.mark.parametrize("length, kept", [(7, 7), (300, 300), (12, 5)])
def test_values_are_the_references(model, length, kept, parity):
    family, config, params = model
    ids = draw_ids(f"ids {length}", (2, length), 50).astype(np.int32)
    segment = np.broadcast_to(np.arange(length) < kept, (2, length)).astype(np.int32)
    out = np.asarray(T5Encoder(config).apply(params, ids, segment))
    theirs = load_file(FIXTURE)[f"{family} {length} {kept}"]
    parity(SYSTEMS[family], "forward", out[:, :kept], theirs, f"{kept}/{length}")
    assert not out[:, kept:].any()


def test_gradients_are_the_references(model, parity):
    family, config, params = model
    ids = draw_ids("ids 7", (2, 7), 50).astype(np.int32)
    weight = draw_input("weights of the loss", (2, 7, 24))
    loss = lambda p: jnp.mean(T5Encoder(config).apply(p, ids, jnp.ones((2, 7), jnp.int32)) ** 2 * weight)
    grads = export_params(jax.jit(jax.grad(loss))(params), t5.rules(config))
    reference = {k.split("grad/")[1]: v for k, v in load_file(FIXTURE).items() if k.startswith(f"{family} grad/")}
    assert len(reference) == 5
    for name, grad in reference.items():
        parity(SYSTEMS[family], "gradient", grads[name], grad, name)


def test_several_captions_in_a_row_are_read_apart(model):
    _, config, params = model
    lengths = (5, 20, 9)
    ids = [draw_ids(f"caption {n}", (1, n), 50).astype(np.int32) for n in lengths]
    segment = np.repeat(np.arange(1, 4), lengths)[None].astype(np.int32)
    together = T5Encoder(config).apply(params, np.concatenate(ids, 1), segment)
    alone = [T5Encoder(config).apply(params, i, np.ones_like(i)) for i in ids]
    np.testing.assert_allclose(together, np.concatenate(alone, 1), atol=1e-5)


def test_wans_layout_gives_the_same_model(model, tmp_path):
    _, config, params = model
    path = published_file(config, tmp_path / "models_t5.safetensors", "wan")
    file = Checkpoint(path)
    assert t5.name_map_of(file.names) == "wan"
    again = import_params(file, t5.rules(config, "wan"), abstract(config))
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_whole_encoder_decoder_file_will_do(model, tmp_path):
    _, config, params = model
    tensors = load_file(published_file(config, tmp_path / "encoder.safetensors"))
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    tensors |= {"decoder.final_layer_norm.weight": np.ones(24, np.float32), "lm_head.weight": np.ones((50, 24))}
    save_file(tensors, tmp_path / "whole.safetensors")
    file = Checkpoint(tmp_path / "whole.safetensors")
    again = import_params(file, t5.rules(config), abstract(config), ignored=t5.IGNORED)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_it_restores_onto_a_mesh_and_computes_there(model, tmp_path):
    _, config, params = model
    path = published_file(config, tmp_path / "model.safetensors")
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    ids = draw_ids("ids 12", (8, 12), 50).astype(np.int32)
    with jax.set_mesh(mesh):
        placed = import_params(Checkpoint(path), t5.rules(config), abstract_on(mesh, config))
        kernel = placed["params"]["blocks"]["up"]["kernel"]
        assert kernel.sharding.spec == jax.P(None, SHARDS, None) and kernel.addressable_shards[0].data.shape == (
            3,
            6,
            40,
        )
        batch = to_global(ids, mesh, BATCH)
        out = jax.jit(T5Encoder(config).apply)(placed, batch, jnp.ones_like(batch))
        assert out.sharding.spec[0] == ("data", "fsdp")
    np.testing.assert_allclose(out, T5Encoder(config).apply(params, ids, np.ones_like(ids)), atol=1e-5)


def abstract_on(mesh, config):
    """The abstract parameters with the shardings that the model gives them on a mesh."""
    named = lambda x: jax.sharding.NamedSharding(mesh, x.sharding.spec if x.sharding else jax.P())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=named(x)), abstract(config))


@pytest.mark.parametrize("name, millions", [("t5-v1.1-xxl", 4762.3), ("byt5-xxl", None), ("umt5-xxl", 5680.9)])
def test_every_published_tensor_has_its_place(name, millions):
    with safe_open(FIXTURE, framework="numpy") as file:
        published = {k: tuple(v) for k, v in json.loads(file.metadata()["published"])[name].items()}
    config = t5.CONFIGS[name]
    flat = traverse_util.flatten_dict(abstract(config), sep="/")
    rules = t5.rules(config)
    assert {rule.ours for rule in rules} == set(flat)
    assert set(published) == {n for rule in rules for n in rule.names} | {"encoder.embed_tokens.weight"}
    for rule in rules:
        shape = flat[rule.ours].shape[1:] if rule.layers else flat[rule.ours].shape
        blank = np.lib.stride_tricks.as_strided(np.zeros(1, np.int8), shape, [0] * len(shape))
        if rule.pattern != "(n k) d -> d n k":  # which numpy cannot reshape without a copy
            assert {published[n] for n in rule.names} == {rule.to_theirs(blank).shape}
        else:
            assert {published[n] for n in rule.names} == {(shape[1] * shape[2], shape[0])}
    ours = sum(int(np.prod(p.shape)) for p in flat.values())
    assert ours == sum(int(np.prod(s)) for n, s in published.items() if "embed_tokens" not in n)
    assert millions is None or abs(ours / 1e6 - millions) < 0.1

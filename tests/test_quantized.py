"""Sampling with weights of int8 and of NF4: what they hold, what they cost, and what they are applied with."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from scipy.stats import norm

import minisora_jax as ms
from minisora_jax.bundled import MODEL
from minisora_jax.cli import main
from minisora_jax.io.model_dir import load_model
from minisora_jax.models import nf4
from minisora_jax.models.dit import DiT, abstract_batch
from minisora_jax.models.lora import kernels
from minisora_jax.models.quantized import FORMS, IN_BLOCKS, nbytes
from minisora_jax.parallel.mesh import MeshConfig, make_mesh
from minisora_jax.weights.adapters import Adapter, applied

PROMPT = "a red circle moves left on a black background"


@pytest.fixture(scope="module", params=["int8", "nf4"])
def form(request):
    return request.param


@pytest.fixture(scope="module")
def held(form):
    return ms.VideoPipeline.load(dtype=form)


@pytest.fixture(scope="module")
def rounded(held, form):
    """What the held kernels stand for, float32 by NumPy: as near to the bundled model's as the form allows."""
    flat, small = (traverse_util.flatten_dict(tree, sep="/") for tree in (load_model(MODEL)[0], held.params))
    for path, kernel in kernels(held.params, IN_BLOCKS).items():
        name, scale = f"params/{path}/kernel", np.asarray(small[f"{form}/{path}/scale"])
        stand_for = of_int8 if form == "int8" else of_nf4
        flat[name] = stand_for(np.asarray(small[name]), scale, kernel, flat[name])
    return traverse_util.unflatten_dict(flat, sep="/")


def of_int8(q, scale, kernel, w):
    """Within half a step."""
    inputs = tuple(range(len(kernel.layers), len(kernel.layers) + len(kernel.inputs)))
    ours = q.astype(np.float32) * np.expand_dims(scale, inputs)
    assert (np.abs(ours - w) <= 0.5001 * np.expand_dims(scale, inputs)).all()
    np.testing.assert_allclose(np.abs(w).max(inputs), 127 * scale, 1e-6)
    return ours


def of_nf4(codes, scale, kernel, w):
    """The nearest of the levels times the largest weight of a block, which lies along the last axis of inputs."""
    axis = len(kernel.layers) + len(kernel.inputs) - 1
    block = w.shape[axis] // scale.shape[axis]
    assert 64 % block == 0 and w.size / scale.size == block
    each = np.repeat(scale, block, axis)
    np.testing.assert_array_equal(scale, np.maximum.reduceat(np.abs(w), np.arange(0, w.shape[axis], block), axis))
    levels = np.float32(nf4.LEVELS)
    ours = levels[codes.astype(int)] * each
    nearest = np.abs(w[..., None] - levels * each[..., None]).min(-1)
    np.testing.assert_allclose(np.abs(ours - w), nearest, atol=1e-6)
    return ours


def test_levels_are_quantiles_of_the_normal_distribution():
    """As appendix E of the paper makes them: 8 above 0, 7 below, and 0 itself, from the quantile 0.9677083 on."""
    above, below = (norm.ppf(np.linspace(0.9677083, 0.5, n)[:-1]) for n in (9, 8))
    levels = np.sort(np.concatenate([above, [0.0], -below]))
    np.testing.assert_allclose(nf4.LEVELS, levels / levels.max(), atol=2e-7)


def predicted(pipeline, params):
    """The prediction for noise at time 0.5."""
    rng = np.random.default_rng(0)
    batch = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), abstract_batch(pipeline.config, 1, 24, 8))
    x_BSP = rng.standard_normal((1, 24, pipeline.config.token_width)).astype(np.float32)
    return np.asarray(jax.jit(DiT(pipeline.config).apply)(params, x_BSP, jnp.full((1, 24), 0.5), batch))


def test_the_model_is_that_of_the_rounded_weights(held, rounded, form):
    ours = predicted(held, held.params)
    np.testing.assert_allclose(ours, predicted(held, rounded), atol=2e-5)
    whole = predicted(held, load_model(MODEL)[0])
    error = np.linalg.norm(ours - whole) / np.linalg.norm(whole)
    assert (1e-3 < error < 0.03) if form == "int8" else (0.02 < error < 0.3)


def test_what_is_held_is_small(held, form):
    flat = traverse_util.flatten_dict(held.params, sep="/")
    whole = ms.VideoPipeline.load(dtype="float32").params
    share = sum(map(nbytes, flat.values())) / sum(map(nbytes, jax.tree.leaves(whole)))
    assert share < {"int8": 0.32, "nf4": 0.25}[form]
    small = {name for name, x in flat.items() if x.dtype == FORMS[form]}
    assert {name.split("/")[1] for name in small} == {"blocks"} and all(name.endswith("/kernel") for name in small)
    assert sum(flat[name].size for name in small) > 0.75 * sum(x.size for x in jax.tree.leaves(whole))


def test_adapters_go_on_top(held, rounded, form):
    """x (w + a b) by the rounded w; a change of a whole kernel has no place."""
    rng = np.random.default_rng(1)
    path = "blocks/joint/self_attention/out"
    L, *shape = held.params["params"]["blocks"]["joint"]["self_attention"]["out"]["kernel"].shape
    a, b = (0.1 * rng.standard_normal(s).astype(np.float32) for s in ((L, *shape[:-1], 4), (L, 4, shape[-1])))
    nest = lambda **leaves: traverse_util.unflatten_dict({f"{path}/{k}": v for k, v in leaves.items()}, sep="/")
    adapted = applied(held.params, [Adapter(nest(a=a, b=b), {}, "", "", frozenset())])
    flat = traverse_util.flatten_dict(rounded, sep="/")
    flat = flat | {f"params/{path}/kernel": flat[f"params/{path}/kernel"] + np.einsum("lnkr,lrd->lnkd", a, b)}
    wanted = predicted(held, traverse_util.unflatten_dict(flat, sep="/"))
    np.testing.assert_allclose(predicted(held, adapted), wanted, atol=1e-4)
    whole = Adapter({}, nest(kernel=np.ones((L, *shape), np.float32)), "", "", frozenset())
    with pytest.raises(ValueError, match=f"changes {path}/kernel as a whole, which {form} cannot hold: use another"):
        applied(held.params, [whole])


@pytest.mark.slow
def test_a_mesh_changes_nothing(held, form):
    request = ms.Request(PROMPT, (5, 32, 32))
    [alone] = held.sample([request], steps=2, progress=False)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=2, ring=2, tensor=1), jax.devices()[:4])):
        sharded = ms.VideoPipeline.load(dtype=form)
        [cut] = sharded.sample([request], steps=2, progress=False)
        [moved] = held.sample([request], steps=2, progress=False)
    kernel = sharded.params["params"]["blocks"]["joint"]["mlp"]["up"]["kernel"]
    assert kernel.dtype == FORMS[form] and kernel.addressable_shards[0].data.size == kernel.size // 4
    np.testing.assert_allclose(cut, alone, atol=5e-5)
    np.testing.assert_allclose(moved, alone, atol=5e-5)


@pytest.mark.slow
def test_from_the_command_line(tmp_path, capsys):
    flags = ["--frames=1", "--steps=1", f"--out={tmp_path}", "--dtype=int8"]
    assert main(["generate", PROMPT, *flags]) == 0
    [record] = tmp_path.glob("*.json")
    assert json.loads(record.read_text())["model"]["dtype"] == "int8"
    assert main(["generate", f"--reproduce={record}", f"--out={tmp_path / 'again'}"]) == 0
    assert "the same to the bit" in capsys.readouterr().out

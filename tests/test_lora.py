"""LoRA: the thin products are the change of the kernel, only adapters are trained, and a run goes on exactly."""

import dataclasses
import functools
import math
import shutil
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_tiny
from flax import traverse_util

from minisora_jax.cli import main
from minisora_jax.data.latents import Latents
from minisora_jax.data.packing import PackConfig
from minisora_jax.data.rows import Segment, pack_segments
from minisora_jax.diffusion.loss import diffusion_loss
from minisora_jax.diffusion.time import TimeConfig
from minisora_jax.io.model_dir import export_model, load_model
from minisora_jax.models.dit import DiT, DiTConfig, abstract_params
from minisora_jax.models.lora import LoraConfig, delta, init_adapter, kernels, scaled, stacked
from minisora_jax.models.quantized import quantized
from minisora_jax.models.text import encode_bytes
from minisora_jax.parallel.mesh import MeshConfig, make_mesh, to_global, with_shardings
from minisora_jax.plan.compiled import Workload, abstract_state, bytes_held
from minisora_jax.plan.cost_model import arithmetic
from minisora_jax.plan.workload import task_of
from minisora_jax.training.diffusion_task import frozen_of, init_params, train_diffusion
from minisora_jax.training.flops import count_work
from minisora_jax.weights.adapters import parse_adapter
from minisora_jax.weights.dit import CONFIGS

# No two of these axes are equally long, so that a shape tells what an array is.
DIT = DiTConfig(
    latent_channels=3, patch=(1, 2, 2), width=40, depth=2, heads=2, mlp_ratio=2.2, text_width=64, text_depth=1,
    dtype="float32", attention="reference", qk_norm="none", positions="none", micro_conditioning=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)

    def segment(t, h, w, caption):
        tokens = rng.standard_normal((t * h * w, DIT.token_width)).astype(np.float32)
        return Segment(tokens, np.zeros(len(tokens), bool), (t, h, w), encode_bytes(caption), 8.0)

    row = lambda i: [segment(1, 2, 2 + i % 2, "a cat"), segment(2, 2, 1, "a dog runs")]
    return pack_segments([row(i) for i in range(8)], PackConfig(tokens=16, text_tokens=64, slots=2, rows=8))


@pytest.fixture(scope="module")
def params():
    """Random parameters of which no layer is zero."""
    key = jax.random.key(0)
    normal = lambda path, x: 0.1 * jax.random.normal(jax.random.fold_in(key, zlib.crc32(str(path).encode())), x.shape)
    return jax.tree_util.tree_map_with_path(normal, abstract_params(DIT))


def adapter(targets="all", rank=4, seed=1):
    """An adapter with a B that is not zero."""
    lora = init_adapter(LoraConfig(rank, targets=targets), abstract_params(DIT), jax.random.key(seed))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size + seed), x.shape), lora)


def merged(params, lora):
    """The definition: the product of A and B, einsum by einsum, added to each kernel."""
    flat, thin = traverse_util.flatten_dict(params, sep="/"), traverse_util.flatten_dict(lora, sep="/")
    for path in {name[len("lora/") : -2] for name in thin}:
        a, b = thin[f"lora/{path}/a"], thin[f"lora/{path}/b"]
        kernel = flat[f"params/{path}/kernel"]
        layers = 1 if path.startswith("blocks/") else 0
        product = lambda a, b: jnp.tensordot(a, b, axes=1)
        change = jax.vmap(product)(a, b) if layers else product(a, b)
        flat[f"params/{path}/kernel"] = kernel + change.reshape(kernel.shape)
    return traverse_util.unflatten_dict(flat, sep="/")


@jax.jit
def forward(params, batch):
    return DiT(DIT).apply(params, batch.tokens_BSP, jnp.full(batch.segment_BS.shape, 0.3), batch)


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["attention", "all", "text/.*mlp|patch_in"])
def test_merged_is_unmerged(params, batch, targets):
    lora = adapter(targets)
    by_hand = merged(params, lora)
    whole, thin = forward(by_hand, batch), forward(params | lora, batch)
    assert np.abs(whole - forward(params, batch)).max() > 1e-2
    np.testing.assert_allclose(thin, whole, atol=1e-6 * np.abs(whole).max(), rtol=0)
    for path, kernel in kernels(params, targets).items():
        a, b = (traverse_util.flatten_dict(lora, sep="/")[f"lora/{path}/{x}"] for x in "ab")
        change = delta(a, b, bool(kernel.layers))
        after, before = (traverse_util.flatten_dict(t, sep="/")[f"params/{path}/kernel"] for t in (by_hand, params))
        np.testing.assert_allclose(change, after - before, atol=1e-5)


def test_several_are_one_of_a_larger_rank(params, batch):
    one, other = adapter("attention", 4), adapter("all", 3, seed=2)
    both = stacked([scaled(one["lora"], 0.5), scaled(other["lora"], -2.0)])
    by_hand = merged(merged(params, {"lora": scaled(one["lora"], 0.5)}), {"lora": scaled(other["lora"], -2.0)})
    whole = forward(by_hand, batch)
    np.testing.assert_allclose(forward(params | {"lora": both}, batch), whole, atol=2e-6 * np.abs(whole).max(), rtol=0)


def test_a_new_adapter_changes_no_bit(params, batch):
    lora = init_adapter(LoraConfig(4, targets="all"), abstract_params(DIT), jax.random.key(0))
    assert np.array_equal(forward(params | lora, batch), forward(params, batch))
    assert len(lora["lora"]) > 3 and np.abs(lora["lora"]["patch_in"]["a"]).max() > 0.1


def dots(jaxpr):
    """The shapes that the matrix products in a program have, with those of programs within."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.shape
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
                yield from dots(inner)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_gradient_of_a_kernels_shape_is_computed(params, batch, remat):
    model = DiT(dataclasses.replace(DIT, remat=remat))

    def loss(trained, frozen):
        terms = diffusion_loss(model, TimeConfig(), frozen | trained, batch, jax.random.key(0))["loss"]
        return jnp.sum(terms[0])

    shapes = {kernel.inputs + kernel.outputs for kernel in kernels(params).values()}
    shapes |= {shape[::-1] for shape in shapes} | {(*s[1:], s[0]) for s in shapes} | {(s[-1], *s[:-1]) for s in shapes}
    lora, nothing = adapter(), {}
    dense = [s for s in dots(jax.make_jaxpr(jax.grad(loss))(params, nothing).jaxpr) if s in shapes]
    thin = [s for s in dots(jax.make_jaxpr(jax.grad(loss))(lora, params).jaxpr) if s in shapes]
    assert len(dense) >= len(kernels(params)) and not thin


@pytest.mark.slow
@pytest.mark.parametrize("base", ["bfloat16", "int8", "nf4"])
def test_eight_devices_are_one(params, batch, base, tmp_path):
    """Value and gradient, with the base held in that type; the mesh divides rows, tokens, heads and parameters."""
    config = {"kind": "dit", "dit": dataclasses.asdict(DIT)}
    export_model(tmp_path / "base", params, config)
    task = dataclasses.replace(train_tiny.task(3), dit=DIT, lora=LoraConfig(4, 8.0, "all", base))

    def on(mesh_config, devices):
        mesh = make_mesh(mesh_config, devices)
        with jax.set_mesh(mesh):
            places = with_shardings(jax.eval_shape(lambda: init_params(task, jax.random.key(0))), mesh)
            lora = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), adapter(), places)
            frozen = frozen_of(task, tmp_path / "base")
            fixed = frozen.on(mesh)

            @jax.jit
            def value_and_grad(lora, fixed, batch):
                def loss(lora):
                    joined = frozen.join(lora, fixed)
                    values, weights = diffusion_loss(DiT(DIT), TimeConfig(), joined, batch, jax.random.key(1))["loss"]
                    return jnp.sum(values * weights)

                return jax.value_and_grad(loss)(lora)

            one = jax.tree.map(lambda x: x[0], to_global(jax.tree.map(lambda x: x[None], batch), mesh))
            held = fixed["params"]["blocks"]["joint"]["mlp"]["up"]["kernel"].dtype
            return jax.device_get(value_and_grad(lora, fixed, one)), held, lora

    (value, grads), dtype, _ = on(MeshConfig(), jax.devices()[:1])
    (others, cut), _, lora = on(MeshConfig(data=1, fsdp=2, ring=2, tensor=2), jax.devices())
    assert dtype == {"nf4": "uint4"}.get(base, base)
    np.testing.assert_allclose(others, value, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(cut), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4 * np.abs(y).max())
    on_all = [x for x in jax.tree.leaves(lora) if x.addressable_shards[0].data.size < x.size]
    assert len(on_all) > 0.9 * len(jax.tree.leaves(lora))


def test_int8_is_half_a_step_off(params):
    w = params["params"]["blocks"]["joint"]["self_attention"]["out"]["kernel"]
    kernel = kernels(params)["blocks/joint/self_attention/out"]
    q, scale = quantized("int8", jnp.array(w), kernel)
    assert q.dtype == jnp.int8 and scale.shape == (2, 40)
    assert np.abs(q * scale[:, None, None] - w).max() <= 0.5001 * scale.max()


def test_a_merge_does_not_lose_its_base_nor_write_what_is_not_finite(params, tmp_path, capsys):
    config = {"dit": dataclasses.asdict(DIT)}
    export_model(tmp_path / "base", params, {"kind": "dit"} | config)
    export_model(tmp_path / "thin", adapter(), {"kind": "lora", "lora": dataclasses.asdict(LoraConfig(4))} | config)
    before = bytes_of(tmp_path / "base")
    merge = lambda weight, out: main(["merge", f"{tmp_path}/base", f"{tmp_path}/thin:{weight}", f"--out={out}"])
    assert merge(1, f"{tmp_path}/thin/../base/") == 2 and bytes_of(tmp_path / "base") == before
    assert "itself, and would damage it: name a new folder" in capsys.readouterr().err
    onto = f"{tmp_path}/base"
    assert main(["export", onto, onto]) == 2 and main(["export", onto, f"{onto}/model.safetensors"]) == 2
    assert main(["import", "lora", "x.safetensors", f"--base={onto}", f"--out={onto}"]) == 2
    assert capsys.readouterr().err.count("would damage it") == 3 and bytes_of(tmp_path / "base") == before
    assert main(["import", "lora", "x.safetensors", f"--base={tmp_path}/thin", f"--out={tmp_path}/new"]) == 2
    assert "thin holds a 'lora' model, not a diffusion transformer ('dit')" in capsys.readouterr().err
    assert merge("1e39", tmp_path / "out") == 2 and not (tmp_path / "out/model.safetensors").exists()
    assert "NaN or infinite numbers in float32: give lower weights" in capsys.readouterr().err
    assert merge(1, tmp_path / "out") == 0 and len(bytes_of(tmp_path / "out")) > 0.9 * len(before)


# ---- Training


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(a latent cache, a model)."""
    at = tmp_path_factory.mktemp("base")
    train_tiny.make_cache(at / "latents")
    task = train_tiny.task(3)
    params = jax.tree.map(lambda p: p + 0.1, jax.jit(functools.partial(init_params, task))(jax.random.key(0)))
    config = {k: dataclasses.asdict(getattr(task, k)) for k in ("dit", "times", "objective")}
    export_model(at / "model", params, {"kind": "dit"} | config)
    return at


def run(base, workdir, init="model", **changes):
    task = dataclasses.replace(train_tiny.task(4), **changes)
    task = dataclasses.replace(task, run=dataclasses.replace(task.run, save_every=2))
    return train_diffusion(task, workdir, Latents(base / "latents"), {}, {}, init=base / init)


def bytes_of(path):
    return (path / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_trains_adapters_only_and_goes_on_exactly(base, tmp_path):
    work, lora = tmp_path / "run", LoraConfig(2, 4.0)
    before = bytes_of(base / "model")
    export = run(base, work, lora=lora)
    whole, (stored, config) = bytes_of(export), load_model(export)
    assert config["kind"] == "lora" and config["lora"]["rank"] == 2 and set(stored) == {"lora"}
    assert max(np.abs(x).max() for x in jax.tree.leaves(stored["lora"]["blocks"]["joint"]["self_attention"]["q"])) > 0
    assert bytes_of(base / "model") == before
    held = sum(p.stat().st_size for p in (work / "checkpoints" / "4").rglob("*") if p.is_file())
    numbers = sum(x.size for x in jax.tree.leaves(stored))
    assert held < 16 * numbers + 200_000 < len(before)  # parameters, average and two moments, and Orbax's own files

    shutil.rmtree(work / "checkpoints" / "4")
    shutil.rmtree(export)
    assert bytes_of(run(base, work, lora=lora)) == whole


@pytest.mark.slow
def test_a_run_does_not_go_on_over_another_base(base, tmp_path):
    run(base, tmp_path, lora=LoraConfig(2))
    params, config = load_model(base / "model")
    export_model(base / "other", jax.tree.map(lambda p: p + 1, params), config)
    with pytest.raises(ValueError, match="begun with another config .config.base: "):
        run(base, tmp_path, "other", lora=LoraConfig(2))


@pytest.mark.slow
def test_only_what_a_pattern_names_is_trained(base, tmp_path):
    before, _ = load_model(base / "model")
    after, config = load_model(run(base, tmp_path, train_only="mlp/.*bias|patch_out"))
    before, after = (traverse_util.flatten_dict(tree, sep="/") for tree in (before, after))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert config["kind"] == "dit" and before.keys() == after.keys()
    of_mlp = {f"params/blocks/joint/mlp/{part}/bias" for part in ("up", "down")}
    assert changed == of_mlp | {"params/patch_out/kernel", "params/patch_out/bias"}


def test_spatial_and_temporal_layers_of_latte_are_apart():
    latte = abstract_params(CONFIGS["latte-1"])
    spatial, temporal = (set(kernels(latte, targets)) for targets in ("spatial", "temporal"))
    parts = {*(f"self_attention/{x}" for x in ("q", "k", "v", "out")), "mlp/up", "mlp/down"}
    assert temporal == {f"blocks/temporal/{part}" for part in parts}
    of_caption = {f"cross_attention/{x}" for x in ("q", "k", "v", "out")}
    assert spatial == {f"blocks/spatial/{part}" for part in parts | of_caption}
    with pytest.raises(ValueError, match="lora.targets='temporal' matches no kernel"):
        kernels(abstract_params(DIT), "temporal")


def test_what_cannot_be_trained_is_said(base, tmp_path):
    task = train_tiny.task(3)
    cache = Latents(base / "latents")
    with pytest.raises(ValueError, match="change a given model: name it by --init=DIR"):
        train_diffusion(dataclasses.replace(task, lora=LoraConfig(2)), tmp_path, cache, {}, {})
    with pytest.raises(ValueError, match="lora.targets='attn' matches no kernel; give attention, mlp"):
        run(base, tmp_path, lora=LoraConfig(2, targets="attn"))
    with pytest.raises(ValueError, match="train_only='norx' matches no parameter"):
        run(base, tmp_path, train_only="norx")
    with pytest.raises(ValueError, match=r"train_only='x' must be ''"):
        dataclasses.replace(task, lora=LoraConfig(2), train_only="x")
    with pytest.raises(ValueError, match="mup_base_width=16 is for the training of all parameters"):
        dataclasses.replace(task, lora=LoraConfig(2), mup_base_width=16)
    with pytest.raises(ValueError, match="lora.debias=1.0 is for the training of adapters on clips: set lora.rank"):
        dataclasses.replace(task, lora=LoraConfig(debias=1.0))
    with pytest.raises(ValueError, match="lora.debias=-1 must be 0 or more"):
        LoraConfig(2, debias=-1)
    with pytest.raises(ValueError, match="lora.base='fp4' must be one of"):
        LoraConfig(2, base="fp4")
    with pytest.raises(ValueError, match="lora.rank=100000 must be at most 8192"):
        LoraConfig(100_000)
    with pytest.raises(ValueError, match="--lora '' names no adapter"):
        parse_adapter("")


def test_the_flag_is_short_for_the_config(capsys, tmp_path):
    start = ["train", "--config=dit_tiny:data=nowhere", f"--workdir={tmp_path}"]
    assert main([*start, "--lora", "alpha=3"]) != 0
    assert "--lora 'alpha=3' must have each setting once, and a rank of at least 1" in capsys.readouterr().err
    assert main([*start, "--lora", "rank=4,rank=8"]) != 0
    assert "--lora 'rank=4,rank=8' must have each setting once" in capsys.readouterr().err
    assert main([*start, "--lora", ""]) != 0, "an empty variable of a script must not train the whole model"
    assert "--lora '' must be rank=N" in capsys.readouterr().err
    assert main([*start, "--lora", "rank=3,size=9"]) != 0
    assert "--lora 'rank=3,size=9' must be rank=N" in capsys.readouterr().err
    assert main([*start, "--lora", "rank=3,targets=("]) != 0
    assert "lora.targets='(' is no pattern" in capsys.readouterr().err


def test_a_frozen_model_is_spared_one_product_for_each_weight():
    dit = DiTConfig(latent_channels=3, width=40, depth=2, heads=2, caption="label", classes=5, micro_conditioning=False)
    sizes, pack = [np.array([[2, 4, 6, 1], [1, 2, 2, 1]])], PackConfig(tokens=32, text_tokens=4, slots=2, rows=1)
    whole, frozen = (count_work(dit, pack, sizes, frozen) for frozen in (False, True))
    weights = sum(math.prod((*k.layers, *k.inputs, *k.outputs)) for k in kernels(abstract_params(dit)).values())
    tokens = 2 * 2 * 3 + 1  # of 2 x 2 latents
    assert whole["useful_flops"] - frozen["useful_flops"] == 2 * tokens * weights
    assert whole["hardware_flops"] - frozen["hardware_flops"] == 2 * 32 * weights


def test_a_plan_has_adapters_beside_a_frozen_base():
    task = task_of("wan2.1-t2v-1.3b", [], None, "reference")
    work = Workload(task, 1000)
    thin = Workload(dataclasses.replace(task, lora=LoraConfig(32, base="int8")), 1000)
    assert arithmetic(thin).useful < arithmetic(work).useful
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    with jax.set_mesh(mesh):
        state = abstract_state(thin, mesh)
        frozen = with_shardings(frozen_of(thin.task).abstract(), mesh)
    count = sum(x.size for x in jax.tree.leaves(state.params))
    assert count == 32 * 30 * 8 * 2 * 1536  # rank, layers, kernels of two attentions, inputs and outputs
    assert bytes_held(state.opt_state) < 1.1 * 8 * count / 8  # two moments, an eighth of them on each device
    assert bytes_held(frozen) < 1.1 * 1.42e9 / 8 and {x.dtype for x in jax.tree.leaves(frozen["params"]["blocks"])} == {
        np.dtype("int8"),
        np.dtype("float32"),
    }

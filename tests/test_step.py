"""One step is the same on one device, on eight, and in parts."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from minisora_jax.data.packing import PackConfig
from minisora_jax.data.rows import Segment, pack_segments
from minisora_jax.diffusion.loss import diffusion_loss
from minisora_jax.diffusion.time import TimeConfig
from minisora_jax.models.dit import DiT, DiTConfig
from minisora_jax.models.text import encode_bytes
from minisora_jax.models.vae import VAE, VAEConfig
from minisora_jax.parallel.mesh import BATCH, SHARDS, MeshConfig, make_mesh, to_global, with_shardings
from minisora_jax.training.codec_task import CodecTask, loss_terms
from minisora_jax.training.optim import OptimConfig, learning_rate, make_optimizer
from minisora_jax.training.step import init_state, train_step

DIT = DiTConfig(
    latent_channels=4, patch=(1, 1, 1), width=64, depth=2, heads=4, text_width=64, text_depth=1, dtype="float32"
)


def quadratic(params, x_B, key, step):
    """(w - x)^2 / 2 for each row."""
    return {"loss": (0.5 * jnp.sum((params["w"] - x_B[..., None]) ** 2, -1), jnp.ones(x_B.shape))}


def run(loss_fn, params, batch, config: OptimConfig, steps: int = 1):
    optimizer = make_optimizer(config, 100)
    state = init_state(params, optimizer)
    step = jax.jit(functools.partial(train_step, loss_fn=loss_fn, optimizer=optimizer, config=config))
    for _ in range(steps):
        state, metrics = step(state, batch, jax.random.key(0))
    return state, metrics


def test_accumulation_changes_nothing():
    x = np.random.default_rng(0).standard_normal(12).astype(np.float32)
    params = {"w": jnp.array([1.0, -2.0])}
    config = OptimConfig(warmup=1, learning_rate=0.1)
    results = [run(quadratic, params, jnp.asarray(x.reshape(a, -1)), config, 3) for a in (1, 3)]
    np.testing.assert_allclose(results[0][0].params["w"], results[1][0].params["w"], rtol=1e-6)
    np.testing.assert_allclose(results[0][1]["loss"], results[1][1]["loss"], rtol=1e-6)


def test_microbatches_of_unequal_weight_count_by_weight():
    def masked(params, batch, key, step):
        values, weights = batch[..., 0], batch[..., 1]
        return {"loss": (params["w"] * values, weights)}

    batch = jnp.array([[[1.0, 1.0], [2.0, 1.0]], [[9.0, 1.0], [100.0, 0.0]]])  # (A, B, (value, weight))
    _, metrics = run(masked, {"w": jnp.float32(2.0)}, batch, OptimConfig(warmup=1))
    np.testing.assert_allclose(metrics["loss"], 2.0 * (1 + 2 + 9) / 3)
    np.testing.assert_allclose(metrics["grad_norm"], (1 + 2 + 9) / 3, rtol=1e-6)


def test_adamw_is_the_paper_in_float64():
    config = OptimConfig(learning_rate=0.1, warmup=2, weight_decay=0.05, clip=1e9, b1=0.9, b2=0.95, ema=0.5)
    x = np.array([[0.5, -1.0, 2.0]])
    start = np.array([[3.0, -1.0], [0.2, 4.0]])  # rank 2: decayed

    def loss(params, x_B, key, step):
        return {"loss": (jnp.sum((params["w"][None] - x_B[:, None, None]) ** 2, (1, 2)), jnp.ones(x_B.shape))}

    state, _ = run(loss, {"w": jnp.asarray(start, jnp.float32)}, jnp.asarray(x, jnp.float32), config, 4)
    w, ema, m, v = start.copy(), start.copy(), 0.0, 0.0
    schedule = learning_rate(config, 100)
    for t in range(1, 5):
        grad = 2 * (w - x.mean())
        m, v = 0.9 * m + 0.1 * grad, 0.95 * v + 0.05 * grad**2
        rate = float(schedule(t - 1))
        w = w - rate * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8) + 0.05 * w)
        decay = min(0.5, t / (9 + t))
        ema = decay * ema + (1 - decay) * w
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)
    np.testing.assert_allclose(state.ema["w"], ema, rtol=1e-5)


def test_muon_makes_a_matrix_update_orthogonal():
    config = OptimConfig(name="muon", learning_rate=0.1, warmup=1, clip=1e9, b1=0.9)
    rng = np.random.default_rng(0)
    target = jnp.asarray(rng.standard_normal((16, 8)) @ np.diag(np.geomspace(1, 30, 8)), jnp.float32)
    params = {"layer": {"kernel": jnp.zeros((16, 8))}}
    loss = lambda p, x, key, step: {"loss": (jnp.sum((p["layer"]["kernel"] - target) ** 2) * x, jnp.ones(x.shape))}
    state, _ = run(loss, params, jnp.ones((1, 1)), config, 2)  # the first step has learning rate 0
    singular = np.linalg.svd(np.asarray(state.params["layer"]["kernel"]), compute_uv=False)
    # RMS 0.2 of the update at lr 0.1: singular values near 0.1 * 0.2 * sqrt(16), spread by Newton-Schulz alone
    np.testing.assert_allclose(singular, 0.1 * 0.2 * 4.0, rtol=0.45)


def test_no_average_is_kept_where_none_is_wanted():
    config = OptimConfig(ema=0.0, warmup=1, learning_rate=0.1)
    optimizer = make_optimizer(config, 100)
    state = init_state({"w": jnp.array([1.0, -2.0])}, optimizer, config.ema > 0)
    x = jnp.ones((1, 4))
    state, _ = train_step(state, x, jax.random.key(0), loss_fn=quadratic, optimizer=optimizer, config=config)
    assert state.ema is None and state.average is state.params
    kept, _ = run(quadratic, {"w": jnp.array([1.0, -2.0])}, x, config)
    np.testing.assert_array_equal(kept.ema["w"], kept.params["w"])  # an average with decay 0 is the newest
    np.testing.assert_array_equal(kept.params["w"], state.params["w"])


def least_squares(params, x, key, step):
    return {"loss": (0.5 * jnp.sum((params["layer"]["kernel"] - x[0]) ** 2)[None], jnp.ones(1))}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_in_bfloat16_take_half_and_train_alike(name):
    rng = np.random.default_rng(0)
    target = jnp.asarray(rng.standard_normal((1, 1, 128, 256)), jnp.float32)
    zeros = {"layer": {"kernel": jnp.zeros((128, 256))}}
    kinds = dict(learning_rate=0.02, warmup=1, clip=1e9, name=name)
    states = [
        run(least_squares, zeros, target, OptimConfig(**kinds, moments=m), 30)[0] for m in ("float32", "bfloat16")
    ]
    size = lambda state: sum(x.nbytes for x in jax.tree.leaves(state.opt_state))
    assert size(states[1]) < 0.51 * size(states[0])
    full, half = (np.asarray(s.params["layer"]["kernel"]) for s in states)
    assert 0 < np.linalg.norm(full - half) < 0.02 * np.linalg.norm(full)
    with pytest.raises(ValueError, match="b2=0.999 with moments='bfloat16'"):
        OptimConfig(moments="bfloat16", b2=0.999)


def test_factored_moments_are_adafactors():
    """Three steps in float64 from the paper (arXiv:1804.04235, algorithm 4), with momentum after the clip by RMS."""
    rng = np.random.default_rng(0)
    target = rng.standard_normal((128, 256))
    config = OptimConfig(moments="factored", learning_rate=0.1, warmup=1, clip=1e9, final=1.0)
    zeros = {"layer": {"kernel": jnp.zeros((128, 256))}}
    state, _ = run(least_squares, zeros, jnp.asarray(target[None, None], jnp.float32), config, 4)
    assert sum(x.nbytes for x in jax.tree.leaves(state.opt_state)) < 128 * 256 * 2 + 4 * (128 + 256) + 64
    w, row, column, momentum = np.zeros((128, 256)), 0.0, 0.0, 0.0
    for t in range(4):
        g, keep = w - target, 1 - (t + 1.0) ** -0.8
        row = keep * row + (1 - keep) * np.mean(g * g + 1e-30, axis=1)
        column = keep * column + (1 - keep) * np.mean(g * g + 1e-30, axis=0)
        update = g / np.sqrt(np.outer(row, column) / row.mean())
        update /= max(1.0, np.sqrt(np.mean(update**2)))
        momentum = 0.9 * momentum + 0.1 * update
        w = w - float(learning_rate(config, 100)(t)) * momentum
    np.testing.assert_allclose(state.params["layer"]["kernel"], w, atol=0.01 * np.abs(w).max())


@pytest.mark.parametrize("kind", [dict(moments="factored"), dict(name="muon"), dict(name="muon", moments="bfloat16")])
@pytest.mark.parametrize("spec", [P(SHARDS, "tensor"), P(None, SHARDS), P(None, None)], ids=str)
def test_an_optimiser_of_matrices_on_eight_devices_is_that_of_one(kind, spec):
    rng = np.random.default_rng(0)
    kernel, grad = rng.standard_normal((2, 128, 256)).astype(np.float32)
    optimizer = make_optimizer(OptimConfig(learning_rate=0.1, warmup=1, **kind), 100)

    def steps(params, grads):
        state = optimizer.init(params)
        for _ in range(3):
            updates, state = optimizer.update(grads, state, params)
            params = jax.tree.map(jnp.add, params, updates)
        return params, state

    tree = lambda x: {"layer": {"kernel": x}}
    one = jax.jit(steps)(tree(kernel), tree(grad))[0]
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, ring=2, tensor=2), jax.devices())
    with jax.set_mesh(mesh):
        placed = [tree(jax.device_put(x, NamedSharding(mesh, spec))) for x in (kernel, grad)]
        eight, state = jax.jit(steps)(*placed)
    np.testing.assert_allclose(eight["layer"]["kernel"], one["layer"]["kernel"], atol=2e-3)
    largest = max(jax.tree.leaves(state), key=lambda x: x.size)  # the momentum: cut as the kernel is
    assert largest.shape == kernel.shape and largest.sharding.spec == spec


def test_muon_holds_whole_matrices_of_its_own_layers_only():
    """A device's share of 64 layers is 8: it works with a few times that, and never with all."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=8), jax.devices())
    optimizer = make_optimizer(OptimConfig(name="muon"), 100)
    shape, spec = (64, 256, 256), P(None, SHARDS, None)
    abstract = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    tree = {"blocks": {"mlp": {"kernel": abstract}}}
    with jax.set_mesh(mesh):
        state = with_shardings(jax.eval_shape(optimizer.init, tree), mesh)
        compiled = jax.jit(optimizer.update).lower(tree, state, tree).compile()
    whole = 4 * math.prod(shape)
    assert compiled.memory_analysis().temp_size_in_bytes < 0.6 * whole


def test_warmup_then_cosine():
    schedule = learning_rate(OptimConfig(learning_rate=1.0, warmup=10, final=0.1), 110)
    np.testing.assert_allclose([schedule(i) for i in (0, 5, 10, 60, 110)], [0, 0.5, 1, 0.55, 0.1], atol=1e-6)


# ---- On a mesh


def packed(rows: int):
    rng = np.random.default_rng(0)

    def segment(size, text):
        n = int(np.prod(size))
        tokens = rng.standard_normal((n, DIT.token_width)).astype(np.float32)
        return Segment(tokens, rng.uniform(size=n) < 0.2, size, encode_bytes(text), 8.0)

    sizes = [(2, 2, 2), (1, 2, 3)]
    made = [[segment(s, f"row {r} clip {i}") for i, s in enumerate(sizes)] for r in range(rows)]
    batch = pack_segments(made, PackConfig(tokens=16, text_tokens=48, slots=2, rows=rows))
    return jax.tree.map(lambda x: x[None], batch)


@functools.cache  # of one device, once for all meshes
def train_on(mesh_config: MeshConfig, devices, optim: OptimConfig, steps: int = 3):
    model, batch = DiT(DIT), packed(8)
    optimizer = make_optimizer(optim, 100)
    mesh = make_mesh(mesh_config, devices)

    def init(key):
        one = jax.tree.map(lambda x: jnp.asarray(x[0, :1]), batch)
        params = model.init(key, one.tokens_BSP, jnp.zeros((1, 16)), one)
        return init_state(params, optimizer)

    loss_fn = lambda params, b, key, step: diffusion_loss(model, TimeConfig(), params, b, key)
    with jax.set_mesh(mesh):
        state = jax.jit(init)(jax.random.key(0))
        step = jax.jit(functools.partial(train_step, loss_fn=loss_fn, optimizer=optimizer, config=optim))
        for _ in range(steps):
            state, metrics = step(state, to_global(batch, mesh), jax.random.key(1))
        assert step._cache_size() == 1  # a state of other types would be compiled for again, minutes for a large model
        specs = jax.tree.map(lambda p: p.sharding.spec, state.params)
    return jax.device_get(state), jax.device_get(metrics), specs


@pytest.mark.parametrize(
    "name, mesh",
    [
        ("adamw", MeshConfig(data=2, fsdp=4)),
        ("muon", MeshConfig(data=1, fsdp=2, ring=2, ulysses=2)),
        ("adamw", MeshConfig(data=1, ring=2, ulysses=2, tensor=2)),
        ("muon", MeshConfig(data=2, fsdp=2, tensor=2)),
        ("factored", MeshConfig(data=1, fsdp=2, ring=2, tensor=2)),
    ],
    ids=str,
)
def test_eight_devices_step_as_one(name, mesh):
    # A large epsilon-free Adam step turns rounding into whole steps where a gradient is nearly zero; a small
    # learning rate keeps what is compared the gradients and their use.
    kind = dict(moments="factored") if name == "factored" else dict(name=name)
    optim = OptimConfig(**kind, learning_rate=1e-3, warmup=1)
    one, metrics, _ = train_on(MeshConfig(data=1), tuple(jax.devices()[:1]), optim)
    eight, metrics_8, specs = train_on(mesh, tuple(jax.devices()), optim)
    np.testing.assert_allclose(metrics_8["loss"], metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics_8["grad_norm"], metrics["grad_norm"], rtol=1e-4)
    gaps = jax.tree.map(
        lambda a, b: float(np.linalg.norm(a - b) / (np.linalg.norm(a) + 1e-3)), one.params, eight.params
    )
    assert max(jax.tree.leaves(gaps)) < 2e-3
    flat = {"/".join(k.key for k in path): spec for path, spec in jax.tree_util.tree_leaves_with_path(specs)}
    assert flat["params/blocks/joint/mlp/up/kernel"] == P(None, SHARDS, "tensor")
    assert flat["params/blocks/joint/mlp/down/kernel"] == P(None, "tensor", SHARDS)
    cut = [k for k, spec in flat.items() if SHARDS in spec]
    assert all(k.endswith(("kernel", "embedding")) for k in cut) and len(cut) > 10


@pytest.mark.slow
def test_the_codecs_loss_is_the_same_on_eight_devices():
    vae = VAEConfig(
        base=4, multipliers=(1, 2), residual_blocks=1, time_down=(True,), latent_channels=2, patch=2, shortcuts=True
    )
    task = CodecTask(vae=vae, crop_THW=(5, 8, 8), batch=8)
    frames = np.random.default_rng(0).integers(0, 256, (8, 5, 8, 8, 3)).astype(np.uint8)
    params = jax.device_get(jax.jit(VAE(vae).init)(jax.random.key(0), jnp.zeros((1, 5, 8, 8, 3))))

    def value_and_grad(mesh):
        def loss(params, frames):
            values, weights = loss_terms(task, params, frames, jax.random.key(1))["loss"]
            return jnp.sum(values * weights)

        with jax.set_mesh(mesh):
            placed = jax.tree.map(jnp.asarray, params), to_global(frames, mesh, BATCH)
            return jax.device_get(jax.jit(jax.value_and_grad(loss))(*placed))

    (one, grad), (eight, grad_8) = (
        value_and_grad(make_mesh(MeshConfig(), d)) for d in (jax.devices()[:1], jax.devices())
    )
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * (np.abs(a).max() + 1e-3)), grad, grad_8)


def test_a_codecs_state_keeps_its_types():
    task = CodecTask(
        vae=VAEConfig(base=4, multipliers=(1, 2), residual_blocks=1, time_down=(True,)), crop_THW=(5, 8, 8)
    )
    optimizer = make_optimizer(task.run.optim, 100)
    frames = jnp.zeros((1, 2, 5, 8, 8, 3), jnp.uint8)
    loss_fn = lambda params, frames, key, step: loss_terms(task, params, frames, key)

    def two(key):
        state = init_state(VAE(task.vae).init(key, jnp.zeros((1, 5, 8, 8, 3))), optimizer)
        return state, train_step(state, frames, key, loss_fn=loss_fn, optimizer=optimizer, config=task.run.optim)[0]

    before, after = jax.eval_shape(two, jax.random.key(0))
    kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)
    assert kinds(before) == kinds(after)


def test_meshes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="data=3.*needs 3 devices; 8 are here"):
        make_mesh(MeshConfig(data=3))
    with pytest.raises(ValueError, match="at most one may be -1"):
        MeshConfig(data=-1, fsdp=-1)

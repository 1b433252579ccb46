"""One step is the same on one device, on eight, and in parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from minisora_jax.data.packing import PackConfig
from minisora_jax.data.rows import Segment, pack_segments
from minisora_jax.diffusion.loss import diffusion_loss
from minisora_jax.diffusion.time import TimeConfig
from minisora_jax.models.dit import DiT, DiTConfig
from minisora_jax.models.text import encode_bytes
from minisora_jax.models.vae import VAE, VAEConfig
from minisora_jax.parallel.mesh import BATCH, SHARDS, MeshConfig, make_mesh, to_global
from minisora_jax.training.codec_task import CodecTask, loss_terms
from minisora_jax.training.optim import OptimConfig, learning_rate, make_optimizer
from minisora_jax.training.step import init_state, train_step

DIT = DiTConfig(
    latent_channels=4, patch=(1, 1, 1), width=64, depth=2, heads=4, text_width=64, text_depth=1, dtype="float32"
)


def quadratic(params, x_B, key):
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
    def masked(params, batch, key):
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

    def loss(params, x_B, key):
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
    loss = lambda p, x, key: {"loss": (jnp.sum((p["layer"]["kernel"] - target) ** 2) * x, jnp.ones(x.shape))}
    state, _ = run(loss, params, jnp.ones((1, 1)), config, 2)  # the first step has learning rate 0
    singular = np.linalg.svd(np.asarray(state.params["layer"]["kernel"]), compute_uv=False)
    # RMS 0.2 of the update at lr 0.1: singular values near 0.1 * 0.2 * sqrt(16), spread by Newton-Schulz alone
    np.testing.assert_allclose(singular, 0.1 * 0.2 * 4.0, rtol=0.45)


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

    loss_fn = lambda params, b, key: diffusion_loss(model, TimeConfig(), params, b, key)
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
    ],
    ids=str,
)
def test_eight_devices_step_as_one(name, mesh):
    # A large epsilon-free Adam step turns rounding into whole steps where a gradient is nearly zero; a small
    # learning rate keeps what is compared the gradients and their use.
    optim = OptimConfig(name=name, learning_rate=1e-3, warmup=1)
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
    loss_fn = lambda params, frames, key: loss_terms(task, params, frames, key)

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

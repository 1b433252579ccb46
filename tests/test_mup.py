"""muP: rates by hand, nothing changes at the base width, and steps move activations as far at every width."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minisora_jax.data.packing import PackConfig
from minisora_jax.data.rows import Segment, pack_segments
from minisora_jax.diffusion.loss import diffusion_loss
from minisora_jax.diffusion.time import TimeConfig
from minisora_jax.models import dit as dit_module
from minisora_jax.models.dit import DiT, DiTConfig, abstract_params
from minisora_jax.models.text import encode_bytes
from minisora_jax.training.diffusion_task import DiffusionTask
from minisora_jax.training.mup import base_shapes
from minisora_jax.training.optim import OptimConfig, make_optimizer
from minisora_jax.training.step import init_state, train_step

BASE = DiTConfig(
    latent_channels=4, patch=(1, 1, 1), width=64, depth=2, heads=2, text_width=64, text_depth=1, dtype="float32"
)


def at(width: int) -> DiTConfig:
    return dataclasses.replace(BASE, width=width, heads=width // 32)


def first_updates(config: DiTConfig, optim: OptimConfig, base_width: int, gradient: float, params: float = 0.0):
    """The updates of the second step (the first has rate 0) by path, from constant gradients and parameters."""
    optimizer = make_optimizer(optim, 10, base_shapes(config, base_width))
    shapes = abstract_params(config)
    full = lambda value: jax.tree.map(lambda p: jnp.full(p.shape, value, p.dtype), shapes)
    state = jax.jit(optimizer.init)(full(params))
    for _ in range(2):
        updates, state = jax.jit(optimizer.update)(full(gradient), state, full(params))
    return {"/".join(k.key for k in path[1:]): u for path, u in jax.tree_util.tree_leaves_with_path(updates)}


@pytest.mark.slow
def test_rates_are_those_of_table_3():
    optim = OptimConfig(learning_rate=0.5, warmup=1, final=1.0, clip=1e9)
    updates = first_updates(at(256), optim, 64, 1e-2)
    hidden = {  # fan in grows four times
        *(f"blocks/joint/self_attention/{k}/kernel" for k in ("q", "k", "v", "out")),
        *(f"blocks/joint/cross_attention/{k}/kernel" for k in ("q", "out")),
        *("blocks/joint/mlp/up/kernel", "blocks/joint/mlp/down/kernel"),
        *("modulation/kernel", "modulation_out/kernel", "time2/kernel", "patch_out/kernel"),
    }
    assert hidden < set(updates) and {"patch_in/kernel", "blocks/joint/cross_attention/k/kernel"} <= set(updates)
    for name, update in updates.items():
        np.testing.assert_allclose(update, -0.5 / (4 if name in hidden else 1), rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_weight_decay_takes_the_same_share_at_every_width():
    optim = OptimConfig(learning_rate=0.5, warmup=1, final=1.0, weight_decay=0.1)
    updates = first_updates(at(256), optim, 64, 0.0, 2.0)
    jax.tree.map(np.testing.assert_array_equal, updates, first_updates(at(256), optim, 0, 0.0, 2.0))
    for name in ("blocks/joint/mlp/up/kernel", "patch_in/kernel", "patch_out/kernel"):
        np.testing.assert_allclose(updates[name], -0.5 * 0.1 * 2.0, rtol=1e-5)


def test_muon_keeps_the_spectral_norm_that_the_widths_ask_for():
    rng, optim = np.random.default_rng(0), OptimConfig("muon", learning_rate=1.0, warmup=1, final=1.0)
    norms = {}
    for width in (64, 256):
        config = at(width)
        optimizer = make_optimizer(optim, 10, base_shapes(config, 64))
        draw = lambda p: jnp.asarray(rng.standard_normal(p.shape), jnp.float32)
        gradients = jax.tree.map(draw, abstract_params(config))
        state = jax.jit(optimizer.init)(gradients)
        for _ in range(2):
            updates, state = jax.jit(optimizer.update)(gradients, state, gradients)
        blocks, top = updates["params"]["blocks"]["joint"], updates["params"]
        matrices = {
            "hidden": blocks["mlp"]["up"]["kernel"][0],
            "out": blocks["self_attention"]["out"]["kernel"][0].reshape(width, width),
            "input": top["patch_in"]["kernel"],
            "output": top["patch_out"]["kernel"],
        }
        norms[width] = {k: np.linalg.norm(v, 2) * math.sqrt(v.shape[0] / v.shape[1]) for k, v in matrices.items()}
    # Vectors are AdamW's, whose updates of equal gradients are the rate.
    bias = np.abs(top["patch_in"]["bias"])
    np.testing.assert_allclose(bias, 1.0, rtol=5e-3)
    for k in norms[64]:  # Newton-Schulz leaves singular values of 0.7 to 1.2
        np.testing.assert_allclose(norms[256][k], norms[64][k], rtol=0.3, err_msg=k)


@pytest.mark.slow
def test_the_clipped_norm_weighs_gradients_by_their_growth():
    """A gradient in the output kernel alone, of norm 8 at width 256: it weighs sqrt(1 / 4) there."""
    config, gradients = at(256), jax.tree.map(lambda p: jnp.zeros(p.shape), abstract_params(at(256)))
    gradients["params"]["patch_out"]["kernel"] = gradients["params"]["patch_out"]["kernel"].at[0, 0].set(8.0)
    optimizer = make_optimizer(OptimConfig(clip=2.0), 10, base_shapes(config, 64))
    _, state = jax.jit(optimizer.update)(gradients, optimizer.init(gradients), gradients)
    moment = state[1][0].mu["params"]["patch_out"]["kernel"][0, 0]
    np.testing.assert_allclose(moment, 0.1 * 8.0 * 2.0 / 4.0, rtol=1e-6)  # 8 counts as 4, and may be 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_nothing_changes_at_the_base_width(name):
    shapes, rng, results = abstract_params(BASE), np.random.default_rng(0), []
    draw = lambda p: jnp.asarray(rng.standard_normal(p.shape), jnp.float32)
    params, gradients = jax.tree.map(draw, shapes), jax.tree.map(draw, shapes)
    for base_width in (0, 64):
        optimizer = make_optimizer(OptimConfig(name, warmup=1, weight_decay=0.1), 10, base_shapes(BASE, base_width))
        update, state = jax.jit(optimizer.update), jax.jit(optimizer.init)(params)
        for _ in range(2):
            updates, state = update(gradients, state, params)
        results.append((updates, state))
    assert np.abs(results[0][0]["params"]["patch_in"]["kernel"]).min() > 0
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_heads_of_another_width_are_refused():
    with pytest.raises(ValueError, match="mup_base_width=48 must be a multiple of 32, the head width of dit.width=64"):
        DiffusionTask(dit=BASE, mup_base_width=48)


# ---- Coordinate check (Yang et al., figure 5)


def packed():
    rng = np.random.default_rng(0)

    def segment(size, text):
        tokens = rng.standard_normal((math.prod(size), BASE.token_width)).astype(np.float32)
        return Segment(tokens, np.zeros(len(tokens), bool), size, encode_bytes(text), 8.0)

    rows = [[segment((2, 2, 2), f"row {r} clip 0"), segment((1, 2, 4), f"row {r} clip 1")] for r in range(2)]
    batch = pack_segments(rows, PackConfig(tokens=16, text_tokens=48, slots=2, rows=2))
    return jax.tree.map(lambda x: x[None], batch)


BATCH = packed()
ONE = jax.tree.map(lambda x: jnp.asarray(x[0]), BATCH)


def trained(config: DiTConfig, steps: int, optim: OptimConfig, base_width: int, seeds: int):
    """For each seed the state after some steps, and the mean change of each activation by name."""
    model, optimizer = DiT(config), make_optimizer(optim, 1000, base_shapes(config, base_width))
    time_BS = jnp.full(ONE.segment_BS.shape, 0.5)
    loss_fn = lambda params, batch, key, step: diffusion_loss(model, TimeConfig(), params, batch, key)
    init = jax.jit(lambda key: init_state(model.init(key, ONE.tokens_BSP, time_BS, ONE), optimizer))
    step = jax.jit(functools.partial(train_step, loss_fn=loss_fn, optimizer=optimizer, config=optim))
    look = jax.jit(lambda params: activations(model, params, time_BS))
    states, changes = [], []
    for seed in range(seeds):
        state = init(jax.random.key(seed))
        before = look(state.params)
        for _ in range(steps):
            state, _ = step(state, BATCH, jax.random.key(seed))
        changes.append({k: float(jnp.mean(jnp.abs(v - before[k]))) for k, v in look(state.params).items()})
        states.append(state.params)
    return states[0], {k: np.mean([change[k] for change in changes]) for k in changes[0]}


class Unrolled(nn.Module):
    """The scanned blocks one by one, so that their activations can be seen from outside."""

    block: type[nn.Module]
    depth: int
    config: DiTConfig

    @nn.compact
    def __call__(self, x_BSD, inputs, layers):
        for layer in range(self.depth):
            params = jax.tree.map(lambda p, layer=layer: p[layer], self.variables["params"])
            x_BSD, _ = self.block(self.config, name=f"block{layer}", parent=None).apply(
                {"params": params}, x_BSD, inputs, layers[layer]
            )
            self.sow("intermediates", f"block{layer}", x_BSD)
        return x_BSD, None


def activations(model: DiT, params, time_BS) -> dict[str, jax.Array]:
    scanned = dit_module.scan_layers
    dit_module.scan_layers = lambda block, depth, in_axes: (
        lambda config, name: Unrolled(block, depth, config, name=name)
    )
    try:
        y, seen = model.apply(params, ONE.tokens_BSP, time_BS, ONE, mutable="intermediates")
    finally:
        dit_module.scan_layers = scanned
    return {k: v[0] for k, v in seen["intermediates"]["blocks"].items()} | {"output": y}


def spread(widths: tuple[int, ...], name: str, learning_rate: float, base_width: int, seeds: int) -> dict[str, float]:
    """By activation: how far its change at any width is from the mean of all widths, relative to that."""
    optim = OptimConfig(name, learning_rate=learning_rate, warmup=1, final=1.0)
    changes = [trained(at(width), 10, optim, base_width, seeds)[1] for width in widths]
    values = {k: np.array([change[k] for change in changes]) for k in changes[0]}
    print({k: np.round(v, 4).tolist() for k, v in values.items()})
    return {k: float(np.abs(v / v.mean() - 1).max()) for k, v in values.items()}


@pytest.fixture
def keeping_no_programs():
    """jaxlib 0.12.0.1 once died of a segmentation fault as it wrote one of these programs for the cache on disk."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update(name, 1e9)
    yield
    jax.config.update(name, before)


@pytest.mark.slow
@pytest.mark.usefixtures("keeping_no_programs")
@pytest.mark.parametrize("name, learning_rate", [("adamw", 3e-4), ("muon", 2e-3)])
def test_steps_move_activations_as_far_at_every_width(name, learning_rate):
    flat = spread((64, 128, 256, 512), name, learning_rate, 64, 4)
    assert set(flat) == {"block0", "block1", "output"} and max(flat.values()) < 0.10, flat
    standard = spread((64, 512), name, learning_rate, 0, 1)
    assert max(standard.values()) > 0.25, standard

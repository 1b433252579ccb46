"""adaLN by a table of noise levels is adaLN of each token: in value and gradient, on a mesh, and in whole samplings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minisora_jax.data.packing import PackConfig
from minisora_jax.data.row_size import most_frames
from minisora_jax.data.rows import Segment, pack_segments
from minisora_jax.diffusion.time import TimeConfig, training_times
from minisora_jax.models import levels
from minisora_jax.models.dit import DiT, DiTConfig
from minisora_jax.models.levels import noise_levels, table_size
from minisora_jax.models.text import encode_bytes
from minisora_jax.parallel.mesh import MeshConfig, make_mesh, to_global
from minisora_jax.training.flops import count_work

CONFIG = DiTConfig(latent_channels=4, patch=(1, 2, 2), width=64, depth=2, heads=2, text_width=64, dtype="float32")
FAMILIES = {
    "shared": CONFIG,
    "single": dataclasses.replace(CONFIG, modulation="single"),
    "block": dataclasses.replace(CONFIG, modulation="block"),
}
# A clip, a loop or later stretch (its positions begin at 1), an image; some of their tokens are given.
ROWS = [[((3, 8, 8), 0), ((2, 8, 8), 1), ((1, 8, 12), 0)], [((2, 8, 8), 1), ((4, 8, 8), 0)]]
PACK = PackConfig(tokens=512, text_tokens=48, slots=4, rows=2, frames=6)


def packed(frames: int):
    rng = np.random.default_rng(0)

    def segment(size, first):
        n = int(np.prod(size))
        tokens = rng.standard_normal((n, CONFIG.token_width)).astype(np.float32)
        return Segment(tokens, rng.uniform(size=n) < 0.3, size, encode_bytes("a red circle"), 8.0, first)

    rows = [[segment(*clip) for clip in row] for row in ROWS]
    return pack_segments(rows, dataclasses.replace(PACK, frames=frames))


def params_of(config: DiTConfig):
    batch = jax.tree.map(jnp.asarray, packed(0))
    params = jax.jit(DiT(config).init)(jax.random.key(0), batch.tokens_BSP, jnp.zeros(batch.segment_BS.shape), batch)
    leaves, tree = jax.tree.flatten(params)  # zero-initialised layers would hide errors
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([p + 0.1 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys)])


def times(batch):
    """A time for each frame of each clip, 0 for what is given."""
    return training_times(TimeConfig(per_frame=1.0), batch, jax.random.key(2))


def value_and_gradient(config, params, batch):
    def loss(params, batch):
        y_BSP = DiT(config).apply(params, batch.tokens_BSP, times(batch), batch)
        return jnp.sum(jnp.where(batch.segment_BS[..., None] > 0, jnp.sin(y_BSP), 0.0)), y_BSP

    (_, y), by_params = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)
    return np.asarray(y)[np.asarray(batch.segment_BS) > 0], jax.device_get(by_params)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_of_levels_changes_nothing(family):
    config = FAMILIES[family]
    params = params_of(config)
    each, table = (jax.tree.map(jnp.asarray, packed(frames)) for frames in (0, 6))
    assert noise_levels(times(each), each).level_BS is None
    found = noise_levels(times(table), table)
    assert (
        found.time_BU.shape == (2, 12) and len(np.unique(np.asarray(found.time_BU))) == 13
    )  # one for each frame, and 0
    y, gradient = value_and_gradient(config, params, each)
    y_table, gradient_table = value_and_gradient(config, params, table)
    np.testing.assert_allclose(y_table, y, atol=1e-5 * np.abs(y).max())
    for a, b in zip(jax.tree.leaves(gradient_table), jax.tree.leaves(gradient)):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, np.abs(b).max()))


@pytest.mark.slow
def test_a_row_of_one_clip_is_lowered_for_a_mesh():
    """A table of one slot is one number, whose sharding JAX forgets."""
    from minisora_jax.plan.compiled import Workload, lower
    from minisora_jax.training.diffusion_task import DiffusionTask

    config = dataclasses.replace(CONFIG, attention="blockwise", remat="full")
    work = Workload(DiffusionTask(dit=config), 4096, frames=4, text_tokens=16)
    _, lowered = lower(work, make_mesh(MeshConfig(ring=4, ulysses=2)))
    assert "tensor<1x8x64xf32>" in lowered.as_text()


def test_nor_does_a_mesh():
    config = dataclasses.replace(CONFIG, modulation="block")
    params = params_of(config)
    y, gradient = value_and_gradient(config, params, jax.tree.map(jnp.asarray, packed(6)))
    mesh = make_mesh(MeshConfig(data=2, ring=2, ulysses=2))
    with jax.set_mesh(mesh):
        sharded = jax.tree.map(lambda x: x[0], to_global(jax.tree.map(lambda x: x[None], packed(6)), mesh))
        y_mesh, gradient_mesh = value_and_gradient(config, params, sharded)
    np.testing.assert_allclose(y_mesh, y, atol=1e-5 * np.abs(y).max())
    for a, b in zip(jax.tree.leaves(gradient_mesh), jax.tree.leaves(gradient)):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, np.abs(b).max()))


def test_no_row_has_more_frames_than_the_bound():
    rng = np.random.default_rng(0)
    frames, area = rng.integers(1, 9, 200), rng.integers(1, 30, 200)
    pack = dataclasses.replace(PACK, slots=6)
    bound = most_frames(frames * area, frames, pack)
    for _ in range(200):
        row, fits = (
            rng.permutation(200),
            lambda row: len(row) <= pack.slots and (frames * area)[row].sum() <= pack.tokens,
        )
        while not fits(row):
            row = row[:-1]
        assert frames[row].sum() <= bound
    for side in range(1, 200):  # also where a division of floats falls short: 98 * (1 / 49) < 2
        one = np.array([side])
        assert most_frames(one, np.array([1]), dataclasses.replace(PACK, tokens=2 * side)) == 2
    with pytest.raises(ValueError, match=r"row 0 has 6 latent frames, above pack.frames=5: raise it"):
        packed(5)


def test_short_rows_have_no_table():
    assert table_size(6, 2 * 6 * 16) == 12 and table_size(6, 2 * 6 * 16 - 1) == 0 and table_size(0, 4096) == 0


def test_counted_operations_are_those_compiled_with_a_table():
    cfg = dataclasses.replace(CONFIG, depth=1, width=192, modulation="block", text_features=1, attention="reference")
    batch = jax.tree.map(jnp.asarray, packed(6))
    arguments = (batch.tokens_BSP, jnp.zeros((2, 512)), batch)
    params = jax.eval_shape(DiT(cfg).init, jax.random.key(0), *arguments)
    compiled = jax.jit(DiT(cfg).apply).lower(params, *arguments).compile()
    rows = [np.array([[t, 2 * h, 2 * w, 12] for (t, h, w), _ in row]) for row in ROWS]
    counted = count_work(cfg, PACK, rows)
    np.testing.assert_allclose(counted["hardware_flops"] / 3, compiled.cost_analysis()["flops"], rtol=0.06)
    each = count_work(cfg, dataclasses.replace(PACK, frames=0), rows)
    assert counted["useful_flops"] < 0.8 * each["useful_flops"]


@pytest.mark.slow
def test_a_sampling_with_a_table_is_one_without(monkeypatch):
    from minisora_jax.generate import Request, VideoPipeline, sampling

    pipeline = VideoPipeline.load()
    words = "a large red circle moves left slowly on a black background"
    requests = [Request(words, (9, 96, 96)), Request(words, (8, 96, 96), seed=3, loop=True)]
    made = []
    for least in (levels.LEAST_TOKENS, 10**9):
        monkeypatch.setattr(levels, "LEAST_TOKENS", least)
        sampling.sampling_steps.clear_cache()
        made.append(pipeline.sample(requests, steps=3, progress=False))
    sampling.sampling_steps.clear_cache()
    for a, b in zip(*made):
        np.testing.assert_allclose(a, b, atol=2e-5)

"""The held-out loss is that of each clip alone, whatever the rows and the mesh, and follows a training."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_tiny import make_cache, task

from minisora_jax.data.latents import Latents
from minisora_jax.data.packing import PackConfig
from minisora_jax.data.rows import pack_segments, training_segment
from minisora_jax.diffusion.objective import ObjectiveConfig
from minisora_jax.io.retry import Damaged
from minisora_jax.models.dit import DiT, abstract_params
from minisora_jax.parallel.mesh import MeshConfig, make_mesh
from minisora_jax.training.diffusion_task import train_diffusion
from minisora_jax.training.held_out import LEVELS, UNMASKED, held_out_loss

ONE = MeshConfig(data=1)
DIT = dataclasses.replace(task(1).dit, dtype="float32")


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cache") / "latents"
    make_cache(directory)
    return Latents(directory)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: 0.2 * rng.standard_normal(p.shape, np.float32), abstract_params(DIT))


def measured(params, latents, mesh=ONE, devices=1, **pack):
    rows = dataclasses.replace(task(1).pack, **pack)
    with jax.set_mesh(make_mesh(mesh, jax.devices()[:devices])):
        return held_out_loss(DIT, ObjectiveConfig(), rows, latents, Damaged(strict=True))(params)


def test_it_is_the_mean_over_the_tokens_of_each_clip_alone(params, latents):
    total, tokens, model = np.zeros(len(LEVELS)), 0, DiT(DIT)
    predict = jax.jit(lambda x, t, batch: model.apply(params, x, t, batch))
    for i in range(len(latents)):
        rng = np.random.default_rng([2**31, i])
        clip, empty = latents[i], latents.empty_text_LE
        alone = training_segment(clip, (1, 2, 2), UNMASKED, (0.0, 0.0), empty, 0, rng, (0, len(clip.mean_thwc)))
        x, noise = alone.tokens_nP, rng.standard_normal(alone.tokens_nP.shape, np.float32)
        batch = jax.tree.map(jnp.asarray, pack_segments([[alone]], PackConfig(16, 32, 1, 1)))
        rest = [(0, batch.tokens_BSP.shape[1] - len(x)), (0, 0)]
        for k, t in enumerate(LEVELS):
            y = np.asarray(predict(np.pad((1 - t) * x + t * noise, rest)[None], jnp.full((1, 16), t), batch))[
                0, : len(x)
            ]
            total[k] += np.sum(np.mean((y.astype(np.float64) - (noise - x)) ** 2, axis=-1))
        tokens += len(x)
    ours = measured(params, latents)
    np.testing.assert_allclose([ours[f"held_out_loss/t={t}"] for t in LEVELS], total / tokens, rtol=2e-5)
    np.testing.assert_allclose(ours["held_out_loss"], np.mean(total / tokens), rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(data=2, ring=4), MeshConfig(data=2, fsdp=2, ulysses=2)], ids=str)
def test_rows_and_meshes_change_nothing(params, latents, mesh):
    one, other = measured(params, latents, rows=3), measured(params, latents, mesh, 8, rows=8, tokens=32)
    np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=2e-5)


def test_a_training_writes_it(latents, tmp_path):
    small = task(4)
    small = dataclasses.replace(small, run=dataclasses.replace(small.run, evaluate_every=2))
    train_diffusion(small, tmp_path, latents, {}, {}, held_out=latents)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["held_out_loss"] for row in rows if "held_out_loss" in row}
    assert list(losses) == [2, 4] and losses[4] < losses[2]


def test_what_cannot_be_measured_is_said_before_training(latents, tmp_path):
    small = task(1)
    long = dataclasses.replace(small, pack=dataclasses.replace(small.pack, tokens=8), caption_dropout=0.5)
    with pytest.raises(ValueError, match=r"data\.held_out: .* clips do not fit a row"):
        held_out_loss(long.dit, long.objective, long.pack, latents, Damaged())
    other = Latents(latents.shards.directory)
    other.text = {"encoder": "t5"}
    with pytest.raises(ValueError, match=r"data\.held_out=.* text encoder"):
        train_diffusion(small, tmp_path, latents, {}, {}, held_out=other)

"""Preference tuning: the loss is the policy gradient's, advantages compare within groups, and a reward rises."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm
from train_tiny import task

from minisora_jax.bundled import CODEC
from minisora_jax.data.conditioning import ConditioningConfig
from minisora_jax.data.latents import Latents, write_latents
from minisora_jax.data.packing import PackConfig
from minisora_jax.data.rows import Segment, pack_segments
from minisora_jax.diffusion.grpo import GrpoConfig, grpo_loss, roll_out
from minisora_jax.diffusion.objective import ObjectiveConfig
from minisora_jax.diffusion.time import TimeConfig, sampling_times
from minisora_jax.models.codec import Codec
from minisora_jax.models.dit import DiT
from minisora_jax.models.lora import LoraConfig
from minisora_jax.models.text import encode_bytes
from minisora_jax.parallel.mesh import MeshConfig
from minisora_jax.parallel.processes import Preempted
from minisora_jax.training import rollouts
from minisora_jax.training.diffusion_task import train_diffusion
from minisora_jax.types import LatentClip

DIT = dataclasses.replace(task(1).dit, dtype="float32")
EMPTY = jnp.asarray(encode_bytes(""))


def packed():
    """A row of two clips; the second one's first frame is given."""
    rng = np.random.default_rng(2)
    segments = [
        Segment(rng.normal(size=(8, DIT.token_width)).astype(np.float32), np.arange(8) < 4 * i, (2, 2, 2), text, 8.0)
        for i, text in enumerate((encode_bytes("a red cat"), encode_bytes("b")))
    ]
    return jax.tree.map(jnp.asarray, pack_segments([segments], PackConfig(24, 128, 3, 1)))


def random_params(batch, seed):
    rng = np.random.default_rng(seed)
    blank = jax.jit(DiT(DIT).init)(jax.random.key(0), batch.tokens_BSP, jnp.zeros(batch.segment_BS.shape), batch)
    return jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape).astype(np.float32), blank)


@pytest.mark.slow
def test_the_loss_is_the_log_probability_of_the_steps_times_minus_their_advantage():
    """Against scipy's normal distribution around the step of Song et al. 2020, eq. 12 and 16, in float64."""
    batch, config = packed(), GrpoConfig(steps=4, trained=2, eta=0.6)
    old, new = random_params(batch, 3), random_params(batch, 4)
    sample = lambda params: roll_out(
        DiT(DIT), TimeConfig(), config, ObjectiveConfig(), EMPTY, params, batch, jax.random.key(7)
    )
    _, steps = jax.jit(sample)(old)
    step = jax.tree.map(lambda x: x[1], steps)
    advantage = np.where(batch.segment_BS == 1, 0.7, -1.3).astype(np.float32)
    step = dataclasses.replace(step, advantage_BS=jnp.asarray(advantage))
    loss = jax.jit(lambda params: grpo_loss(DiT(DIT), config, EMPTY, params, step, ObjectiveConfig())["loss"])
    apply = jax.jit(DiT(DIT).apply)

    def log_probability(params):
        v = np.asarray(apply(params, step.x_BSP, step.time_BS, batch), np.float64)
        t, t2 = (np.asarray(x, np.float64)[..., None] for x in (step.time_BS, step.next_time_BS))
        moves = (t != t2)[..., 0]
        t, t2 = np.where(t == t2, 0.5, t), np.where(t == t2, 0.4, t2)
        clean, noise = step.x_BSP - t * v, step.x_BSP + (1 - t) * v
        renewed = config.eta**2 * (1 - (t2 / (1 - t2) * (1 - t) / t) ** 2)
        mean, spread = (1 - t2) * clean + t2 * np.sqrt(1 - renewed) * noise, t2 * np.sqrt(renewed)
        return np.where(moves, norm.logpdf(step.next_BSP, mean, spread).mean(-1), 0.0)

    values = {id(params): np.asarray(loss(params)[0]) for params in (old, new)}
    weights = np.asarray(loss(new)[1])
    assert weights.sum() == 8 + 4
    ours = weights * (values[id(new)] - values[id(old)])
    np.testing.assert_allclose(ours, -advantage * weights * (log_probability(new) - log_probability(old)), atol=2e-4)


@pytest.mark.slow
def test_without_noise_a_rollout_is_the_sampling_and_what_is_given_stays():
    batch, config = packed(), GrpoConfig(steps=3, trained=1, eta=1e-5)
    params, path = random_params(batch, 3), ObjectiveConfig().noise_path
    sample = lambda: roll_out(
        DiT(DIT), TimeConfig(), config, ObjectiveConfig(), EMPTY, params, batch, jax.random.key(7)
    )
    clean, steps = jax.jit(sample)()
    times = sampling_times(TimeConfig(), 3, batch, path)
    k = int(np.flatnonzero((np.asarray(times) == np.asarray(steps.time_BS[0])).all((1, 2)))[0])
    x = steps.x_BSP[0]
    for now, then in zip(times[k:], times[k + 1 :]):
        x = x + (then - now)[..., None] * DiT(DIT).apply(params, x, now, batch)
    real = np.asarray(batch.segment_BS > 0)
    np.testing.assert_allclose(clean[real], x[real], atol=1e-4)
    given = np.asarray(batch.cond_mask_BS)
    np.testing.assert_array_equal(clean[given], batch.tokens_BSP[given])


def test_advantages_compare_within_a_group():
    rewards = np.array([[1.0, 5.0], [3.0, 5.0], [2.0, 0.0], [2.0, 1.0]], np.float32)
    expected = [[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]]
    np.testing.assert_allclose(rollouts.advantages(rewards, 2), expected, atol=1e-3)


@pytest.mark.parametrize("wrong", [{"group": 1}, {"trained": 10}, {"trained": 0}, {"eta": 0.0}, {"kl": -1.0}])
def test_numbers_out_of_range_are_named(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=f"grpo.{name}={value}"):
        GrpoConfig(**wrong)


def images(directory):
    rng = np.random.default_rng(0)
    text = {"encoder": "bytes"}
    clips = [
        LatentClip(
            x := rng.normal(0, 1, (1, 2, 2 + 2 * (i % 2), 16)).astype(np.float32), np.full_like(x, 0.1),
            encode_bytes(f"image {i}"), f"image {i}", 8.0, str(i),
        )
        for i in range(32)
    ]  # fmt: skip
    write_latents(directory, clips, codec_hash="test", text=text, empty_text_LE=encode_bytes(""))


def tuned(workdir, init, latents, reward="reward", lora=0, kl=0.0, steps=12, **mesh) -> None:
    """Train by a function of bright.py; the run's losses and rewards are in WORKDIR/metrics.jsonl."""
    own = task(steps)
    optim = dataclasses.replace(own.run.optim, learning_rate=3e-2, accumulate=1, ema=0.9)
    plain = ConditioningConfig(*[0.0] * len(dataclasses.fields(ConditioningConfig)))
    own = dataclasses.replace(
        own, dit=dataclasses.replace(own.dit, latent_channels=16), conditioning=plain, caption_dropout=0.0,
        grpo=GrpoConfig(f"bright.py:{reward}", group=8, steps=4, trained=3, eta=1.0, kl=kl), lora=LoraConfig(rank=lora),
        pack=PackConfig(tokens=4, text_tokens=64, slots=2, rows=8),
        run=dataclasses.replace(own.run, optim=optim, mesh=MeshConfig(**mesh)),
    )  # fmt: skip
    train_diffusion(own, workdir, Latents(latents), {"own": 1}, {}, init=init, codec=Codec.load(CODEC))


def column(workdir, name):
    return [json.loads(line)[name] for line in (workdir / "metrics.jsonl").read_text().splitlines() if name in line]


REWARDS = """
def reward(frames, caption):
    assert caption.startswith('image')
    return frames.mean() / 255

def broken(frames, caption):
    return float('nan')
"""


@pytest.mark.slow
def test_a_reward_rises_on_any_mesh_and_a_run_that_is_ended_goes_on_exactly(tmp_path, monkeypatch):
    """The whole run: rollouts, the bundled codec, a reward by name, update, resume, export; and an adapter with kl."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bright.py").write_text(REWARDS)
    images(tmp_path / "latents")
    start = dataclasses.replace(
        own := task(2), dit=dataclasses.replace(own.dit, latent_channels=16), pack=PackConfig(4, 64, 2, rows=8)
    )
    train_diffusion(start, tmp_path / "start", Latents(tmp_path / "latents"), {}, {})
    init = tmp_path / "start/export"
    tuned(tmp_path / "run", init, tmp_path / "latents")
    rewards = column(tmp_path / "run", "reward")
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.02, rewards

    ended_at = lambda last: lambda self, step: step == last
    preempted = "minisora_jax.training.checkpoint.Checkpoints.preempted"
    for last, mesh in ((3, {}), (6, dict(data=2, fsdp=2, ring=2))):  # it goes on with another mesh
        with monkeypatch.context() as ended, pytest.raises(Preempted):
            ended.setattr(preempted, ended_at(last))
            tuned(tmp_path / "again", init, tmp_path / "latents", **mesh)
    again = column(tmp_path / "again", "reward")
    assert again[:3] == rewards[:3]
    np.testing.assert_allclose(again, rewards[:6], atol=2e-3)

    tuned(tmp_path / "lora", init, tmp_path / "latents", lora=4, kl=0.1, steps=3)
    assert (divergence := column(tmp_path / "lora", "divergence"))[0] == 0 and divergence[-1] > 0
    assert json.loads((tmp_path / "lora/export/config.json").read_text())["kind"] == "lora"
    with pytest.raises(ValueError, match="gave nan for 'image .*': it must return a finite number"):
        tuned(tmp_path / "nan", init, tmp_path / "latents", "broken")

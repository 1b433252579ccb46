"""Distillation: the targets are the papers', runs go on to the bit, and a distilled model is sampled as it was trained.

The losses against their authors' code: test_parity_distillation.py.
"""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_tiny import make_cache, task, train_with

from minisora_jax.bundled import CODEC, MODEL
from minisora_jax.cli import main
from minisora_jax.data.latents import Latents
from minisora_jax.data.packing import PackConfig
from minisora_jax.data.rows import Segment, pack_segments
from minisora_jax.diffusion.consistency import consistency_loss
from minisora_jax.diffusion.distillation import (
    Distillation,
    DistillConfig,
    Distilled,
    sampling_of,
    without_captions,
)
from minisora_jax.diffusion.dmd import dmd_loss
from minisora_jax.diffusion.guidance import GuidanceConfig
from minisora_jax.diffusion.noise_path import PATHS, PREDICTIONS
from minisora_jax.diffusion.objective import ObjectiveConfig
from minisora_jax.diffusion.progressive import one_step_target, progressive_loss
from minisora_jax.diffusion.sampler import SAMPLERS, Denoiser, SamplerConfig
from minisora_jax.diffusion.time import TimeConfig
from minisora_jax.evaluation.tasks import text_to_video
from minisora_jax.generate import VideoPipeline
from minisora_jax.io.model_dir import load_model
from minisora_jax.models.dit import DiT
from minisora_jax.models.lora import LoraConfig
from minisora_jax.models.text import encode_bytes
from minisora_jax.parallel.mesh import MeshConfig, make_mesh, put_batch
from minisora_jax.training import distilling
from minisora_jax.training.diffusion_task import DiffusionTask, train_diffusion
from minisora_jax.training.optim import OptimConfig
from minisora_jax.training.step import init_state, train_step
from minisora_jax.weights.adapters import read_adapter

DIT = dataclasses.replace(task(1).dit, dtype="float32")
METHODS = {
    "progressive": DistillConfig(2, 2, "euler", 2.0),
    "consistency": DistillConfig(2, 3, "ddim", 2.0, "consistency"),
    "meanflow": DistillConfig(2, 1, "euler", 2.0, "meanflow"),
    "dmd": DistillConfig(2, 1, "euler", 2.0, "dmd", fake_updates=2),
}
EMPTY = jnp.asarray(encode_bytes(""))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_one_ddim_step_with_the_target_leads_to_where_the_teacher_came(path, prediction):
    """Whatever the path and the kind of prediction. Tokens at rest have no target."""
    rng = np.random.default_rng(0)
    x, after = (jnp.asarray(rng.normal(size=(1, 4, 3)), jnp.float32) for _ in range(2))
    now, then = jnp.array([[0.9, 0.5, 0.3, 0.0]]), jnp.array([[0.6, 0.2, 0.05, 0.0]])
    objective = ObjectiveConfig(path=path, prediction=prediction)
    p = one_step_target(objective, x, after, now, then)
    moved, _ = SAMPLERS["ddim"].step(Denoiser(lambda *_: p, PATHS[path], prediction), x, now, then, (), None, 0.0)
    scale = np.abs(np.asarray(after)).max() * max(1.0, float(PATHS[path].sigma(now).max()))
    np.testing.assert_allclose(moved[:, :3], after[:, :3], atol=2e-4 * scale)
    assert not p[:, 3].any()


def test_the_target_is_the_papers():
    """Eq. 30-33 of Salimans & Ho, for two DDIM steps of a teacher that predicts x, on their cosine path, in float64."""
    t, mid, end = 0.8, 0.7, 0.6
    a, s = lambda u: np.cos(np.pi / 2 * u), lambda u: np.sin(np.pi / 2 * u)
    teacher = lambda z, u: 0.3 * z + 0.1 * u
    rng = np.random.default_rng(1)
    z = rng.normal(size=5)
    ddim = lambda z, u, v: a(v) * teacher(z, u) + s(v) / s(u) * (z - a(u) * teacher(z, u))
    z_end = ddim(ddim(z, t, mid), mid, end)
    expected = (z_end - s(end) / s(t) * z) / (a(end) - s(end) / s(t) * a(t))
    objective, as_tokens = ObjectiveConfig(path="gvp", prediction="clean"), lambda v: jnp.asarray(v, jnp.float32)
    denoiser = Denoiser(lambda x, u: 0.3 * x + 0.1 * u[..., None], PATHS["gvp"], "clean")
    at = lambda u: jnp.full((1, 1), u)
    x = start = as_tokens(z)[None, None]
    for now, then in ((t, mid), (mid, end)):
        x, _ = SAMPLERS["ddim"].step(denoiser, x, at(now), at(then), (), None, 0.0)
    np.testing.assert_allclose(one_step_target(objective, start, x, at(t), at(end))[0, 0], expected, rtol=2e-5)


def packed(captions, size=(2, 2, 2)):
    rng = np.random.default_rng(2)
    segments = [
        Segment(rng.normal(size=(8, DIT.token_width)).astype(np.float32), np.arange(8) < 4 * i, size, text, 8.0)
        for i, text in enumerate(captions)
    ]
    return jax.tree.map(jnp.asarray, pack_segments([segments], PackConfig(24, 128, 3, 1)))


def random_params(batch):
    rng = np.random.default_rng(3)
    blank = jax.jit(DiT(DIT).init)(jax.random.key(0), batch.tokens_BSP, jnp.zeros(batch.segment_BS.shape), batch)
    return jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape).astype(np.float32), blank)


@pytest.mark.slow
def test_without_captions_is_with_the_empty_one():
    batch, empty = packed([encode_bytes("a red cat"), encode_bytes("b")]), encode_bytes("")
    x, time = batch.tokens_BSP, jnp.full(batch.segment_BS.shape, 0.5)
    params = random_params(batch)
    real = batch.segment_BS > 0
    apply = jax.jit(DiT(DIT).apply)
    ours = apply(params, x, time, without_captions(batch, jnp.asarray(empty)))
    theirs = apply(params, x, time, dataclasses.replace(packed([empty, empty]), tokens_BSP=batch.tokens_BSP))
    np.testing.assert_allclose(ours[real], theirs[real], atol=2e-5)


@pytest.mark.slow
def test_a_student_that_is_its_teacher_errs_by_the_curvature_alone():
    """One substep of Euler is the student's own step: the loss is 0. Guidance and more substeps make it differ."""
    batch, empty = packed([encode_bytes("a red cat"), encode_bytes("b")]), jnp.asarray(encode_bytes(""))
    params = random_params(batch)
    both = params | {"teacher": params["params"]}

    def loss(config, params=both):
        of = Distillation(config, DiT(DIT), DiT(DIT), TimeConfig(), ObjectiveConfig(), empty)
        value, weight = jax.jit(functools.partial(progressive_loss, of))(params, batch, jax.random.key(1))["loss"]
        assert float(weight.sum()) == 8 + 4  # the second clip's first frame is given
        return float((value * weight).sum() / weight.sum())

    assert loss(DistillConfig(4, 1, "euler")) < 1e-9
    assert loss(DistillConfig(4, 1, "euler"), params) < 1e-9  # as with a lora: the base is the teacher
    assert loss(DistillConfig(4, 4, "euler")) > 1e-7 and loss(DistillConfig(4, 1, "euler", 3.0)) > 1e-7


def test_a_student_is_consistent_where_the_teacher_arrives():
    """A model whose clean estimate is the clip itself at all times is consistent: the loss is 0. Time 0 is x itself."""
    batch, empty = packed([encode_bytes("a red cat"), encode_bytes("b")]), jnp.asarray(encode_bytes(""))

    class Exact:
        config = DIT

        @staticmethod
        def apply(params, x_BSP, time_BS, batch, interval_BS):  # x_t = x + t v, and off by `params` where t > 0
            return (x_BSP - batch.tokens_BSP) / jnp.maximum(time_BS, 1e-3)[..., None] + params["params"]

    config = DistillConfig(2, 4, "ddim", 1.0, "consistency")
    of = Distillation(config, Exact, Exact, TimeConfig(), ObjectiveConfig(), empty)

    def loss(off):
        value, weight = consistency_loss(of, {"params": off, "teacher": 0.0}, batch, jax.random.key(1))["loss"]
        return float((value * weight).sum())

    assert loss(0.0) < 1e-6 < 1e-2 < loss(0.5)


@pytest.mark.slow
def test_a_mean_flow_student_starts_as_its_teacher():
    """Whatever interval it is told."""
    batch = packed([encode_bytes("a red cat"), encode_bytes("b")])
    params, x, time = random_params(batch), batch.tokens_BSP, jnp.full(batch.segment_BS.shape, 0.5)
    told = DiT(dataclasses.replace(DIT, interval_input=True))
    zeros = {"interval": {"kernel": jnp.zeros((64, 32)), "bias": jnp.zeros(32)}}
    ours = told.apply({"params": params["params"] | zeros}, x, time, batch, interval_BS=0.3 + 0 * time)
    np.testing.assert_array_equal(ours, DiT(DIT).apply(params, x, time, batch))
    assert not jnp.allclose(
        told.apply({"params": params["params"] | jax.tree.map(jnp.ones_like, zeros)}, x, time, batch), ours
    )


@pytest.mark.slow
def test_a_dmd_student_moves_at_its_turns_alone():
    """Its part of the loss is not computed at the other steps, and the optimiser leaves it and its moments alone."""
    batch = packed([encode_bytes("a red cat"), encode_bytes("b")])
    own = random_params(batch)["params"]
    config = dataclasses.replace(METHODS["dmd"], fake_updates=3)
    of = Distillation(config, DiT(DIT), DiT(DIT), TimeConfig(), ObjectiveConfig(), EMPTY)
    optim = OptimConfig(learning_rate=1e-2, warmup=0)
    optimizer = distilling.two_optimizers(config, optim, 9)
    loss_fn = lambda params, batch, key, step: dmd_loss(of, params | {"teacher": own}, batch, key, step)
    start = {"params": own, "fake": jax.tree.map(lambda x: 1.1 * x, own)}
    step = jax.jit(functools.partial(train_step, loss_fn=loss_fn, optimizer=optimizer, config=optim))
    states = [init_state(start, optimizer)]
    accumulated = jax.tree.map(lambda x: x[None], batch)
    for _ in range(4):
        states.append(step(states[-1], accumulated, jax.random.key(0))[0])
    same = lambda a, b: all(bool((x == y).all()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))
    moved = [not same(a.params["params"], b.params["params"]) for a, b in zip(states, states[1:])]
    assert moved == [True, False, False, True]
    assert not any(same(a.params["fake"], b.params["fake"]) for a, b in zip(states, states[1:]))
    inner = lambda state: state.opt_state.inner_states["params"]
    student_moments = lambda state: [x for x in jax.tree.leaves(inner(state)) if x.ndim]
    assert same(student_moments(states[1]), student_moments(states[3]))
    assert not same(student_moments(states[3]), student_moments(states[4]))


def test_a_model_without_an_interval_is_not_sampled_by_mean_flow():
    x, at = jnp.zeros((1, 2, 3)), jnp.ones((1, 2))
    with pytest.raises(ValueError, match="mean-flow' is for models distilled with method=meanflow: use sampler='heun'"):
        SAMPLERS["mean-flow"].step(Denoiser(lambda x, _: x), x, at, 0 * at, (), None, 0.0)


@pytest.mark.parametrize(
    "method, settings, message",
    [
        ("dmd", dict(lora=LoraConfig(rank=4)), "lora.rank=4 to 0, or use distill.method='consistency'"),
        ("meanflow", dict(lora=LoraConfig(rank=4)), "lora.rank=4 to 0, or use distill.method='consistency'"),
        (
            "meanflow",
            dict(objective=ObjectiveConfig(prediction="noise")),
            "prediction='noise': use distill.method='cons",
        ),
        ("dmd", dict(train_only="mlp"), "train_only='mlp' must be ''"),
    ],
)
def test_a_model_that_a_method_cannot_teach_is_refused(method, settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusionTask(distill=METHODS[method], **settings)


def test_a_run_distils_the_model_that_it_starts_from(tmp_path):
    """The student's error falls, its teacher stays, and the export says how it is to be sampled."""
    make_cache(cache := tmp_path / "latents")
    train_with(cache, tmp_path / "teacher", 20)
    teacher = tmp_path / "teacher/export"
    before = load_model(teacher)[0]
    run = task(40)
    optim = dataclasses.replace(run.run.optim, name="adamw", learning_rate=3e-3)
    student = dataclasses.replace(
        run, distill=DistillConfig(2, 2, "euler", 2.0), run=dataclasses.replace(run.run, optim=optim, log_every=1)
    )
    train_diffusion(student, tmp_path / "run", Latents(cache), {}, {}, init=teacher)
    rows = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert np.mean(rows[-8:]) < 0.6 * np.mean(rows[:4]), rows
    params, config = load_model(tmp_path / "run/export")
    assert config["distilled"] == {"method": "progressive", "steps": 2, "guidance": 2.0} and config["kind"] == "dit"
    jax.tree.map(np.testing.assert_array_equal, before, load_model(teacher)[0])
    assert jax.tree.structure(params) == jax.tree.structure(before)
    with pytest.raises(ValueError, match="distill and grpo change a given model: name it by --init"):
        train_diffusion(student, tmp_path / "none", Latents(cache), {}, {})


LOSSES = {name: distilling.LOSSES[name] for name in METHODS}


def method_loss(method, params, batch):
    """The gradient and the value of a method's loss, of a student with weights of its own."""
    teacher = dataclasses.replace(DIT, attention="blockwise")
    student = distilling.student_dit(METHODS[method], teacher)
    of = Distillation(METHODS[method], DiT(student), DiT(teacher), TimeConfig(), ObjectiveConfig(), EMPTY)

    def loss(params, batch):
        value, weight = LOSSES[method](of, params, batch, jax.random.key(4), 0)["loss"]
        return jnp.sum(value * weight) / jnp.sum(weight)

    return jax.jit(jax.value_and_grad(loss))(params, batch)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_mesh_changes_no_loss(method):
    row = packed([encode_bytes("a red cat"), encode_bytes("b")])
    batch = jax.tree.map(lambda x: np.concatenate([np.asarray(x)] * 2), row)
    params = random_params(row)
    params |= {"teacher": jax.tree.map(lambda x: 0.9 * x, params["params"])}
    if method == "dmd":
        params |= {"fake": jax.tree.map(lambda x: 1.1 * x, params["params"])}
    if method == "meanflow":
        params["params"] |= {"interval": {"kernel": 0.1 * jnp.ones((64, 32)), "bias": jnp.zeros(32)}}
    alone = method_loss(method, params, jax.tree.map(jnp.asarray, batch))
    mesh = make_mesh(MeshConfig(data=2, ring=2, ulysses=2))
    with jax.set_mesh(mesh):
        whole = lambda x: jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        meshed = method_loss(method, jax.tree.map(whole, params), put_batch(batch))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), alone, meshed)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    make_cache(folder / "latents")
    train_with(folder / "latents", folder, 12)
    return folder


def student(method, **settings):
    """Six updates, with a checkpoint after three."""
    run = task(6)
    optim = dataclasses.replace(run.run.optim, learning_rate=3e-3)
    settings |= {"distill": METHODS[method], "run": dataclasses.replace(run.run, optim=optim)}
    return dataclasses.replace(run, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["progressive", "dmd"])
def test_a_run_goes_on_to_the_bit(method, teacher, tmp_path):
    """A run that ends at step 3 and goes on exports what an uninterrupted one does: a model of the student alone."""
    latents, before = Latents(teacher / "latents"), load_model(teacher / "export")[0]
    for name in ("whole", "ended"):
        train_diffusion(student(method), tmp_path / name, latents, {}, {}, init=teacher / "export")
        shutil.rmtree(tmp_path / "ended/checkpoints/6", ignore_errors=True)
    train_diffusion(student(method), tmp_path / "ended", latents, {}, {}, init=teacher / "export")
    (whole, config), (ended, _) = (load_model(tmp_path / name / "export") for name in ("whole", "ended"))
    jax.tree.map(np.testing.assert_array_equal, whole, ended)
    assert config["distilled"] == {"method": method, "steps": 2, "guidance": 2.0}
    jax.tree.map(np.testing.assert_array_equal, before, load_model(teacher / "export")[0])
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(whole)))


@pytest.mark.slow
def test_a_consistent_student_may_be_an_adapter(teacher, tmp_path):
    """As LCM-LoRA: the teacher is the base, and the adapter says how it is sampled."""
    run = student("consistency", lora=LoraConfig(rank=2, targets="all"))
    train_diffusion(run, tmp_path, Latents(teacher / "latents"), {}, {}, init=teacher / "export")
    adapter = read_adapter(str(tmp_path / "export"), run.dit, teacher / "export")
    assert adapter.distilled == Distilled(2, "consistency")


@pytest.mark.slow
def test_a_distilled_model_is_sampled_as_it_was_trained(tmp_path, capsys):
    """In its own steps, without guidance, unless another sampling is asked for. A damaged record is named."""
    assert sampling_of(Distilled(4), None, None, None) == (SamplerConfig("euler", 4), GuidanceConfig(1.0))
    assert sampling_of(Distilled(), None, None, None) == (SamplerConfig("heun", 20), GuidanceConfig(3.0))
    assert sampling_of(Distilled(4), 8, 2, "ddim") == (SamplerConfig("ddim", 8), GuidanceConfig(2.0))
    assert sampling_of(Distilled(2, "consistency"), None, None, None)[0] == SamplerConfig("consistency", 2)
    shutil.copytree(MODEL, model := tmp_path / "model", ignore=shutil.ignore_patterns("checksums.json"))
    config = json.loads((MODEL / "config.json").read_text())
    (model / "config.json").chmod(0o644)
    (model / "config.json").write_text(json.dumps(config | {"distilled": {"steps": 2, "guidance": 3.0}}))
    flags = [f"--model={model}", f"--codec={CODEC}", "--frames=1", "--size=16x16", f"--out={tmp_path / 'out'}"]
    assert main(["generate", "a photo of a small green cross on a navy background", *flags]) == 0
    [record] = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")]
    sampling = record["sampling"]
    assert (sampling["sampler"]["name"], sampling["sampler"]["steps"], sampling["guidance"]["scale"]) == ("euler", 2, 1)
    for bad in ({}, 3, {"steps": -1}, {"steps": "4"}, {"steps": 4, "method": "magic"}):
        (model / "config.json").write_text(json.dumps(config | {"distilled": bad}))
        with pytest.raises(ValueError, match="distilled=.* must (name its steps|have a method of progressive)"):
            VideoPipeline.load(model, CODEC)


@pytest.mark.slow
def test_the_fast_model_is_right_in_four_calls():
    """256 videos had 0.996, 0.961 and 0.915 (minisora_jax/bundled/README.md)."""
    pipeline = VideoPipeline.load("fast")
    assert pipeline.distilled == Distilled(4) and pipeline.unknown_words("a red cat") == ["cat"]
    scores, _ = text_to_video(pipeline, 64, dict(progress=False))
    assert scores["colour"] >= 0.97 and scores["shape"] >= 0.92 and scores["motion"] >= 0.82, scores

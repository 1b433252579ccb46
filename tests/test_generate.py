"""Sampling with the bundled model: a video depends on its prompt, size and seed, and on nothing else."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from minisora_jax.bundled import CODEC, MODEL
from minisora_jax.diffusion.guidance import GuidanceConfig
from minisora_jax.diffusion.objective import ObjectiveConfig
from minisora_jax.diffusion.sampler import SAMPLER_NAMES, SamplerConfig
from minisora_jax.diffusion.time import TIME_SCHEDULES
from minisora_jax.generate import Request, VideoPipeline, run_tasks
from minisora_jax.generate.noise import Noise
from minisora_jax.generate.packed import PackedRequests
from minisora_jax.generate.sampling import features, sampling_steps
from minisora_jax.generate.tasks import inpaint, text_to_video
from minisora_jax.io.model_dir import export_model, load_model
from minisora_jax.jobs.batch import run_jobs
from minisora_jax.jobs.job import Job
from minisora_jax.jobs.starting import start
from minisora_jax.media.video_writer import write_video
from minisora_jax.parallel.mesh import MeshConfig, make_mesh

RED = Request("a large red circle moves left slowly on a black background", (5, 32, 48), seed=1)
BLUE = Request("a photo of a large blue square on a grey background", (1, 48, 32), seed=2)
OPTIONS = dict(steps=3, progress=False)


@pytest.fixture(scope="module")
def pipeline():
    return VideoPipeline.load(MODEL, CODEC)


@pytest.fixture(scope="module")
def alone(pipeline):
    return pipeline.generate([RED], **OPTIONS)[0]


def test_sizes_and_types_are_those_asked_for(pipeline, alone):
    assert alone.shape == (5, 32, 48, 3) and alone.dtype == np.uint8
    assert alone.std() > 5


@pytest.mark.slow
def test_a_video_does_not_depend_on_its_company(pipeline, alone):
    together = pipeline.generate([BLUE, RED], **OPTIONS)
    assert together[0].shape == (1, 48, 32, 3)
    # to one rounding of the pixels, as other shapes are compiled to other orders of summation
    assert np.abs(together[1].astype(int) - alone).max() <= 1


def test_a_mesh_makes_the_same_video(pipeline, alone):
    with jax.set_mesh(make_mesh(MeshConfig(data=2, ring=4))):
        put_batch = pipeline.generate([RED, BLUE], **OPTIONS)[0]
    assert np.abs(put_batch.astype(int) - alone).max() <= 1


def test_seed_prompt_and_guidance_matter(pipeline, alone):
    for change in (dict(seed=3), dict(prompt="a small green cross grows on a navy background")):
        other = pipeline.generate([dataclasses.replace(RED, **change)], **OPTIONS)[0]
        assert np.abs(other.astype(int) - alone).mean() > 3
    unguided = pipeline.generate([RED], guidance=1.0, **OPTIONS)[0]
    assert np.abs(unguided.astype(int) - alone).mean() > 1


def test_samplers_agree_in_the_end(pipeline):
    photo = dataclasses.replace(BLUE, size_THW=(1, 32, 32))
    euler, heun = (
        pipeline.generate([photo], steps=n, sampler=name, guidance=1.0, progress=False)[0].astype(int)
        for name, n in (("euler", 60), ("heun", 30))
    )
    coarse = pipeline.generate([photo], steps=2, sampler="euler", guidance=1.0, progress=False)[0].astype(int)
    assert np.abs(euler - heun).mean() < 0.5 * np.abs(coarse - heun).mean()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpm", "dopri5"])
def test_nor_does_one_of_a_stochastic_or_an_adaptive_sampler(pipeline, name):
    """Of an adaptive one up to its tolerance, as all rows take the same steps."""
    sampler = SamplerConfig(name, steps=4, tolerance=1e-3)
    alone, *_ = pipeline.generate([RED], sampler=sampler, progress=False)
    _, together = pipeline.generate([BLUE, RED], sampler=sampler, progress=False)
    off = np.abs(together.astype(int) - alone)
    print(f"{name}: off by {off.mean():.3f} in the mean, {off.max()} at most, of 255")
    assert off.max() <= 1 if name == "ddpm" else off.mean() < 0.5
    if name == "ddpm":
        other = pipeline.generate([dataclasses.replace(RED, seed=9)], sampler=sampler, progress=False)[0]
        assert np.abs(other.astype(int) - alone).mean() > 3


def test_noise_is_of_the_seed_and_the_step_and_equal_for_twins(pipeline):
    width = pipeline.config.token_width

    def drawn(rows, step, requests=(RED, BLUE)):
        packed = PackedRequests(requests, [(2, 2, 3), (1, 2, 2)], rows, 2, 40, pipeline.config)
        return np.asarray(packed.noise().draw(step, width))

    one = drawn([[0, 1]], 1)[0]
    assert (one[:12] == one[12:24]).all() and (one[24:28] == one[28:32]).all() and not one[32:].any()
    other = drawn([[1], [0]], 1)
    assert (other[0, :8] == one[24:32]).all() and (other[1, :24] == one[:24]).all()
    assert (drawn([[0, 1]], 2)[0, :32] != one[:32]).all()
    huge = [dataclasses.replace(RED, seed=RED.seed + 2**64), BLUE]  # seeds have no largest number
    assert (drawn([[0, 1]], 1, huge)[0, :24] != one[:24]).all() and (drawn([[0, 1]], 1, huge)[0, 24:] == one[24:]).all()


def test_rows_hold_the_frames_of_any_size(pipeline):
    """Of 7 x 7 tokens too, where 98 * (1 / 49) < 2."""
    for h, w in ((7, 7), (7, 14), (1, 103), (5, 11)):
        packed = PackedRequests([BLUE], [(1, h, w)], [[0]], 2, 2 * h * w, pipeline.config)
        captions = features(pipeline.captions, [BLUE], 2, 0)
        assert packed.batch(captions).frames == 2


def test_noise_is_standard_normal():
    """Of tokens, places and steps that follow each other, too: all are independent."""
    seeds, place = np.zeros((1, 4096), np.int32), np.arange(4096, dtype=np.int32)[None]
    noise = Noise.of([7], seeds, place)
    draws = np.stack([noise.draw(step, 16) for step in (0, 1)], -1)[0].astype(float)  # (S, P, steps)
    assert abs(draws.mean()) < 0.01 and abs(draws.std() - 1) < 0.01 and abs((draws**4).mean() - 3) < 0.1
    for x, y in (
        (draws[1:], draws[:-1]),
        (draws[:, 1:], draws[:, :-1]),
        (draws[..., 0], draws[..., 1]),
    ):
        assert abs((x * y).mean()) < 5 / np.sqrt(x.size)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["heun", "ddpm", "unipc"])
def test_steps_are_one_program_whatever_their_number(pipeline, sampler):
    """Unwatched and watched, with 3 steps and with 5: the same program, and the same latents."""
    requests = [
        dataclasses.replace(RED, size_THW=(5, 32, 32)),
        dataclasses.replace(BLUE, size_THW=(8, 32, 32), loop=True),
    ]
    before = sampling_steps._cache_size()
    for steps in (3, 5):
        options = {"steps": steps, "sampler": sampler}
        alone = pipeline.sample(requests, **options, progress=False)
        watched = pipeline.sample(requests, **options, watch=lambda share, look: look(), progress=False)
        for a, b in zip(alone, watched):
            np.testing.assert_array_equal(a, b)
    assert sampling_steps._cache_size() == before + 1


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [n for n in SAMPLER_NAMES if n not in ("euler", "heun", "mean-flow")])
def test_every_sampler_comes_to_a_like_picture(pipeline, sampler):
    """The bundled model is sure enough of this caption that all samplers agree but for the place and the edges."""
    photo = dataclasses.replace(BLUE, size_THW=(1, 32, 32))
    wanted = pipeline.generate([photo], steps=20, progress=False)[0].astype(int)
    ours = pipeline.generate([photo], sampler=SamplerConfig(sampler, 20), progress=False)[0].astype(int)
    assert np.abs(ours.mean((0, 1, 2)) - wanted.mean((0, 1, 2))).max() < 25
    if SamplerConfig(sampler).noise == 0:
        assert np.abs(ours - wanted).mean() < 6


@pytest.mark.parametrize(
    "time_schedule", [g for g in TIME_SCHEDULES if g not in ("even", "leading", "linspace", "trailing")]
)
def test_grids_agree_in_the_end(pipeline, time_schedule):
    photo = dataclasses.replace(BLUE, size_THW=(1, 32, 32))
    even, other = (
        pipeline.generate([photo], sampler=SamplerConfig("unipc", 24, time_schedule=g), guidance=1.0, progress=False)[0]
        for g in ("even", time_schedule)
    )
    assert np.abs(even.astype(int) - other).mean() < 3


@pytest.mark.slow
def test_each_request_may_take_a_share_of_the_guidance(pipeline):
    requests = [dataclasses.replace(RED, guided=share) for share in (0.0, 0.25, 1.0)]
    packed = pipeline.sample(requests, guidance=3.0, **OPTIONS)
    for latents, scale in zip(packed, (1.0, 1.5, 3.0)):
        np.testing.assert_allclose(latents, pipeline.sample([RED], guidance=scale, **OPTIONS)[0], atol=2e-4)


def test_guidance_can_be_limited_and_rescaled(pipeline):
    options = dict(steps=6, progress=False)
    none, full = (pipeline.generate([RED], guidance=g, **options)[0].astype(int) for g in (1.0, 6.0))
    for config in (GuidanceConfig(6.0, interval=(0.2, 0.8)), GuidanceConfig(6.0, rescale=0.9)):
        some = pipeline.generate([RED], guidance=config, **options)[0].astype(int)
        assert np.abs(some - none).mean() > 0.5 and np.abs(some - full).mean() > 0.5
    nowhere = pipeline.generate([RED], guidance=GuidanceConfig(6.0, interval=(1e-9, 2e-9)), **options)[0]
    assert np.abs(nowhere.astype(int) - none).max() <= 1


def test_autoguidance_goes_away_from_a_worse_model(pipeline, tmp_path):
    """By the model itself it is no guidance at all; a worse one makes a difference."""
    none = pipeline.generate([RED], guidance=1.0, **OPTIONS)[0].astype(int)
    itself = VideoPipeline.load(MODEL, CODEC, guide_model=MODEL)
    assert np.abs(itself.generate([RED], guidance=4.0, **OPTIONS)[0] - none).max() <= 1
    params, config = load_model(MODEL)
    guide = jax.tree.map(lambda x: (0.97 * np.asarray(x, np.float32)).astype(x.dtype), params)
    export_model(tmp_path / "guide", guide, config, dtype="float32")
    guided = VideoPipeline.load(MODEL, CODEC, guide_model=tmp_path / "guide")
    assert np.abs(guided.generate([RED], guidance=4.0, **OPTIONS)[0] - none).mean() > 0.5
    config["objective"] = dataclasses.asdict(ObjectiveConfig(prediction="v"))
    export_model(tmp_path / "other", params, config, dtype="float32")
    with pytest.raises(ValueError, match="the guide model has prediction='v', the model 'velocity'"):
        VideoPipeline.load(MODEL, CODEC, guide_model=tmp_path / "other")


@pytest.mark.parametrize(
    "path, prediction, sampler, grid",
    [("ve", "v", "heun", "karras"), ("linear", "noise", "unipc", "even"), ("ddpm", "clean", "ddpm", "trailing")],
)
def test_other_objectives_are_read_back_and_sampled(pipeline, tmp_path, path, prediction, sampler, grid):
    params, config = load_model(MODEL)
    config["objective"] = dataclasses.asdict(ObjectiveConfig(path, prediction, "min-snr"))
    export_model(tmp_path / "model", params, config, dtype="float32")
    other = VideoPipeline.load(tmp_path / "model", CODEC)
    assert other.objective == ObjectiveConfig(path, prediction, "min-snr") and pipeline.objective == ObjectiveConfig()
    options = dict(guidance=GuidanceConfig(2.0, rescale=0.5), sampler=SamplerConfig(sampler, 3, grid), progress=False)
    [latents] = other.sample([RED], **options)
    assert np.isfinite(latents).all() and latents.std() > 0.01


@pytest.mark.parametrize(
    "request_, options, message",
    [
        (dataclasses.replace(RED, size_THW=(6, 32, 32)), {}, r"frames=6 must be 1 \+ 4\*k; use 5 or 9"),
        (dataclasses.replace(RED, size_THW=(5, 40, 32)), {}, "height=40 must be a multiple of 16; use 32 or 48"),
        (RED, {"sampler": "rk4"}, "sampler='rk4' must be one of euler, heun"),
        (RED, {"steps": 0}, "steps=0 must be at least 1"),
    ],
)
def test_what_cannot_be_made_is_refused(pipeline, request_, options, message):
    with pytest.raises(ValueError, match=message):
        pipeline.generate([request_], **(OPTIONS | options))


def test_a_model_with_another_codec_is_refused(tmp_path):
    other = tmp_path / "codec"
    shutil.copytree(CODEC, other, ignore=shutil.ignore_patterns("checksums.json"))
    config = json.loads((other / "config.json").read_text())
    config["latent_mean"][0] += 1.0
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="give the codec it was trained with"):
        VideoPipeline.load(MODEL, other)
    with pytest.raises(ValueError, match="not a diffusion transformer"):
        VideoPipeline.load(CODEC, CODEC)


def test_a_job_that_cannot_be_done_is_left_out_and_the_rest_is_made_and_watched(pipeline, alone, tmp_path):
    """A mask that marks nothing is found out when the job is at work already; looks are by number of job."""
    write_video(tmp_path / "red.mp4", alone, 8)
    write_video(tmp_path / "black.png", np.zeros((1, 32, 48, 3), np.uint8), 8)
    bad = Job(prompt=RED.prompt, video=str(tmp_path / "red.mp4"), mask=str(tmp_path / "black.png"))
    gone = Job(prompt=RED.prompt, image=str(tmp_path / "none.png"))
    good = Job(prompt=RED.prompt, size=(32, 48), frames=5, seed=1)
    seen = []
    watch = lambda share, look: seen.append((share, look()))
    paths = [tmp_path / f"{i}.mp4" for i in range(3)]
    sampling = {"sampler": SamplerConfig("heun", 3), "guidance": GuidanceConfig(3.0)}
    found = run_jobs(
        pipeline, [gone, bad, good], paths, model={}, sampling=sampling, strict=False, watch=watch, progress=False
    )
    assert isinstance(found[0], FileNotFoundError) and "the mask marks nothing" in str(found[1])
    assert found[2]["frames"] == 5 and [p.exists() for p in paths] == [False, False, True]
    assert [share for share, _ in seen] == [1 / 3, 2 / 3, 1.0] and all(list(look) == [2] for _, look in seen)
    estimate = pipeline.decode([seen[-1][1][2]])[0]
    assert np.abs(estimate.astype(int) - alone).mean() < 2  # the last estimate is the result
    with pytest.raises(ValueError, match="the mask marks nothing"):
        run_jobs(pipeline, [bad, good], paths[1:], model={}, sampling=sampling, progress=False)


def test_without_a_name_for_failures_perform_raises_them(pipeline, alone):
    nothing = np.zeros(alone.shape[1:3], bool)
    tasks = lambda: [inpaint(pipeline, RED, alone, nothing), text_to_video(pipeline, RED)]
    with pytest.raises(ValueError, match="the mask marks nothing"):
        run_tasks(pipeline, tasks(), **OPTIONS)
    failed = []
    frames = run_tasks(pipeline, tasks()[:1], failed=lambda i, error: failed.append((i, str(error))), **OPTIONS)
    assert frames == [] and failed == [(0, "the mask marks nothing: white is what is made anew")]


def test_a_rate_that_is_asked_for_is_that_of_the_result(pipeline, alone, tmp_path):
    write_video(tmp_path / "red.mp4", alone, 8)
    video = Job(prompt="red", video=str(tmp_path / "red.mp4"), strength=0.5)
    for job in (video, dataclasses.replace(video, strength=None, extend="forward")):
        assert [start(pipeline, dataclasses.replace(job, fps=fps))[1] for fps in (None, 4)] == [8, 4]

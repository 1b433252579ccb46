"""The step cache against a loop by hand in NumPy, and what `minisora calibrate` measures."""

import dataclasses
import functools
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minisora_jax as ms
from minisora_jax.bundled import MODEL
from minisora_jax.cli import main
from minisora_jax.diffusion.guidance import GuidanceConfig
from minisora_jax.diffusion.sampler import SamplerConfig
from minisora_jax.diffusion.time import sampling_times
from minisora_jax.evaluation.calibration import step_cache
from minisora_jax.generate import sampling
from minisora_jax.generate.experts import LowNoise
from minisora_jax.generate.sampling import PackedRequests, features
from minisora_jax.generate.step_cache import MOST_CHANGE, MOST_SHARE, solve
from minisora_jax.models.dit import DiT, abstract_batch
from minisora_jax.parallel.mesh import in_host_memory

RED = ms.Request("a red circle moves left on a black background", (5, 32, 32))
BLUE = ms.Request("a blue square grows on a grey background", (5, 32, 48), seed=1)


@pytest.fixture(scope="module")
def pipeline():
    return ms.VideoPipeline.load()


# ---- What is sampled


@pytest.mark.parametrize(
    "name, reuse, interval",
    [("heun", "00101011", (0, 1)), ("euler", "0110", (0, 1)), ("heun", "00101001", (0.25, 0.65))],
)
def test_it_is_what_a_loop_by_hand_makes(pipeline, name, reuse, interval):
    packed = PackedRequests([RED], [pipeline.grid(RED)], [[0]], 2, 2 * 8, pipeline.config)
    captions = features(pipeline.captions, [RED], 2, 0)
    batch, (with_S, without_S) = packed.batch(captions), (index[0] for index in packed.twins())
    times = np.asarray(sampling_times(pipeline.times, 4, batch))
    weights = pipeline.params["params"]
    calls, last = iter(reuse), None
    apply = functools.partial(DiT(pipeline.config).apply, capture_intermediates=True, mutable=["intermediates"])
    captured = jax.jit(apply)

    def call(x_SP, time_S):
        """One guided call: the transformer's head in NumPy, on what its blocks add now or added before."""
        nonlocal last
        _, seen = captured(pipeline.params, x_SP[None], time_S[None], batch)
        part = lambda name: np.asarray(seen["intermediates"][name]["__call__"][0][0], np.float64)
        start = part("patch_in") + part("position_in")
        if next(calls) == "0":
            last = np.asarray(seen["intermediates"]["residual"][0][0], np.float64)
            if not interval[0] <= time_S[0] <= interval[1]:  # then only what has a caption is computed
                last = last[with_S]
        h = start + last  # at a call that computes, the head of this must be the model's own output
        h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
        shift, scale = np.split(part("modulation_out"), 2, axis=-1)  # a level for each token of so short a row
        p = (h * (1 + scale) + shift) @ np.float64(weights["patch_out"]["kernel"]) + weights["patch_out"]["bias"]
        w = 3.0 if interval[0] <= time_S[0] <= interval[1] else 1.0
        return p[without_S] + w * (p[with_S] - p[without_S])

    x = np.asarray(packed.noise().draw(0, batch.tokens_BSP.shape[-1]))[0].astype(np.float64)
    for now, then in itertools.pairwise(times[:, 0]):
        step = (then - now)[:, None]
        v = call(x, now)
        if name == "heun":
            v = 0.5 * (v + call(x + step * v, then))
        x = x + step * v
    by_hand = packed.latents(x[None])[0]
    options = dict(guidance=GuidanceConfig(3.0, interval), progress=False)
    ours = pipeline.sample([RED], sampler=SamplerConfig(name, 4, reuse=reuse), **options)[0]
    full = pipeline.sample([RED], sampler=SamplerConfig(name, 4), **options)[0]
    np.testing.assert_allclose(ours, by_hand, atol=2e-4)
    assert np.abs(ours - full).max() > 0.02


@pytest.mark.slow
@pytest.mark.parametrize("name", ["heun", "unipc", "ddpm"])
def test_one_that_reuses_nothing_is_full_sampling(pipeline, name):
    none = "0" * 3 * (2 if name == "heun" else 1)
    sampler, requests = SamplerConfig(name, 3), [RED, BLUE]
    full = pipeline.sample(requests, sampler=sampler, progress=False)
    cached = dataclasses.replace(sampler, reuse=none)
    for watch in (None, lambda share, look: look()):
        for ours, theirs in zip(pipeline.sample(requests, sampler=cached, watch=watch, progress=False), full):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_a_video_does_not_depend_on_its_company(pipeline):
    sampler = SamplerConfig("unipc", 4, reuse="0010")
    [alone] = pipeline.sample([BLUE], sampler=sampler, progress=False)
    _, packed = pipeline.sample([RED, BLUE], sampler=sampler, progress=False)
    np.testing.assert_allclose(packed, alone, atol=2e-5)


@pytest.mark.slow
def test_a_mesh_changes_nothing(pipeline):
    from minisora_jax.parallel.mesh import MeshConfig, make_mesh

    sampler = SamplerConfig("heun", 3, reuse="001010")
    alone = pipeline.sample([RED, BLUE], sampler=sampler, progress=False)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, ring=2), jax.devices()[:4])):
        sharded = ms.VideoPipeline.load().sample([RED, BLUE], sampler=sampler, progress=False)
    for ours, theirs in zip(sharded, alone):
        np.testing.assert_allclose(ours, theirs, atol=5e-5)


@pytest.mark.slow
def test_a_call_that_reuses_costs_a_small_part(pipeline):
    batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_batch(pipeline.config, 1, 256, 64))
    model, time_BS = DiT(pipeline.config), jnp.zeros((1, 256))
    residual_BSD = jnp.zeros((1, 256, pipeline.config.width))

    def flops(*residual):
        call = jax.jit(lambda params, *given: model.apply(params, batch.tokens_BSP, time_BS, batch, *given))
        return call.lower(pipeline.params, *residual).compile().cost_analysis()["flops"]

    computed, reused = flops(), flops(residual_BSD)  # XLA counts the body of a loop once, whatever its length
    assert reused < 0.1 * (computed + (pipeline.config.depth - 1) * (computed - reused))


def test_less_noise_takes_the_last_steps(pipeline):
    """A request of strength 0.5 takes the last half of the steps; the first of them computes."""
    whole = SamplerConfig("heun", 4, reuse="00101110")
    assert whole.last(2).reuse == "0110" and whole.last(4) == whole
    video = pipeline.decode(pipeline.sample([RED], steps=2, progress=False))[0]
    half = SamplerConfig("heun", 4, reuse="00000110")
    made = [pipeline.video_to_video(RED.prompt, video, strength=0.5, sampler=s, progress=False) for s in (whole, half)]
    np.testing.assert_array_equal(*made)


# ---- The schedule


@settings(max_examples=40)
@given(st.lists(st.floats(0.001, 1.0), min_size=2, max_size=11), st.floats(0.05, MOST_SHARE))
def test_the_schedule_is_the_best_of_all(changes, share):
    calls, kept = len(changes), -(-len(changes) // 5)
    reuse = solve(np.array(changes), share)
    count = min(round(share * calls), calls - kept)

    def error(reused):
        total, since = 0.0, 0.0
        for c in range(calls):
            since = since + changes[c] if c in reused else 0.0
            total += since
        return total

    ours = {c for c, letter in enumerate(reuse) if letter == "1"}
    assert len(reuse) == calls and len(ours) == count and min(ours, default=kept) >= kept
    best = min(map(error, map(set, itertools.combinations(range(kept, calls), count))))
    assert error(ours) == pytest.approx(best)


# ---- What is refused


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(name="dopri5", reuse="0"), "dopri5 chooses its own"),
        (dict(steps=3, reuse="010"), "reuse='010' has 3 letters: give 0 or 1 for each of the 6 model calls of 3 steps"),
        (dict(name="unipc", steps=3, reuse="100"), "and 0 first"),
        (dict(name="unipc", steps=3, reuse="0x0"), "give 0 or 1"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**values)


def test_loops_and_guide_models_are_refused(pipeline):
    sampler = SamplerConfig("unipc", 2, reuse="00")
    loop = dataclasses.replace(RED, size_THW=(8, 32, 32), loop=True)
    with pytest.raises(ValueError, match="not for a loop, which is cut elsewhere at each step; leave out --step-cache"):
        pipeline.sample([loop], sampler=sampler, progress=False)
    guided = dataclasses.replace(pipeline, guide=(pipeline.config, pipeline.params))
    with pytest.raises(ValueError, match="not for a guide model: it has room for one; leave out --step-cache"):
        guided.sample([RED], sampler=sampler, progress=False)


# ---- Pairs of experts


def resident(pipeline, monkeypatch) -> list[int]:
    """The bytes on the devices before each call of a program of sampling."""
    seen, steps = [], sampling.sampling_steps
    on_devices = lambda x: x.nbytes if x.sharding.memory_kind == "device" else 0

    def counting(*arguments):
        seen.append(sum(map(on_devices, jax.live_arrays())))
        return steps(*arguments)

    monkeypatch.setattr(sampling, "sampling_steps", counting)
    return seen


@pytest.mark.slow
def test_an_expert_that_is_not_at_work_waits_in_the_hosts_memory(pipeline, monkeypatch):
    """One expert less is on the devices at every step, and nothing else changes. A single model is refused."""
    other = jax.tree.map(lambda x: 0.9 * x, pipeline.params)
    both = dataclasses.replace(pipeline, low_noise=LowNoise(other, 0.6))
    options = dict(steps=4, sampler="unipc", progress=False)
    expected, seen = both.sample([RED], **options), resident(both, monkeypatch)
    both.sample([RED], **options)
    kept, seen[:] = max(seen), []
    waiting = dataclasses.replace(
        both, params=in_host_memory(pipeline.params), low_noise=LowNoise(in_host_memory(other), 0.6)
    )
    del other, both
    np.testing.assert_array_equal(waiting.sample([RED], **options), expected)
    size = sum(x.nbytes for x in jax.tree.leaves(pipeline.params))
    # The fixture's own parameters are on the devices all the time, in place of the pair's first expert.
    assert len(seen) == 2 and max(seen) < kept + 0.2 * size, (seen, kept, size)
    assert pipeline.sample([RED], **options)[0].shape == expected[0].shape
    with pytest.raises(ValueError, match="is one model, and offload is for a pair of experts"):
        ms.VideoPipeline.load(offload=True)


@pytest.mark.slow
def test_the_second_expert_of_a_pair_reuses_nothing_of_the_first(pipeline):
    """Its first call is computed whatever the schedule says, and counts as one with nothing to reuse."""
    pair = dataclasses.replace(pipeline, low_noise=LowNoise(jax.tree.map(lambda x: 0.9 * x, pipeline.params), 0.6))
    sample = lambda reuse, **options: pair.sample(
        [RED], sampler=SamplerConfig("euler", 5, reuse=reuse), progress=False, **options
    )[0]
    changes, full = [], sample("")
    np.testing.assert_allclose(sample("00000", measure=lambda k, c: changes.append(c[0, 0])), full, atol=1e-6)
    assert [change == MOST_CHANGE for change in changes] == [True, False, True, False, False]
    np.testing.assert_allclose(sample("00100"), full, atol=1e-6)
    assert np.abs(sample("00010") - full).max() > 0.01


# ---- The file


def test_the_bundled_model_is_calibrated(pipeline):
    """After a training of it, run `minisora calibrate`."""
    for share in (0.25, 0.5, 0.65):
        reuse = step_cache(MODEL, pipeline.hash, SamplerConfig(), GuidanceConfig(), share).reuse
        assert len(reuse) == 40 and reuse.count("1") == round(40 * share)


@pytest.mark.slow
def test_from_the_command_line(tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    (folder / "step_cache.json").unlink()
    flags = [f"--model={folder}", "--steps=5", "--sampler=unipc"]
    small = ["--frames=5", "--size=32x32"]
    generate = ["generate", RED.prompt, *flags, *small, f"--out={tmp_path / 'made'}"]

    def refused(argv, *sentences):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert all(sentence in error for sentence in sentences), error

    refused([*generate, "--step-cache=0.4"], "step_cache.json does not exist", "minisora calibrate", "--shares 0.4")
    refused(["calibrate", *flags], "give a few prompts")
    refused(["calibrate", "x", *flags, "--shares", "0.9"], "a share of 0.9 of the model calls must be above 0 and at")
    refused(["calibrate", "x", *flags, "--sampler=dopri5"], "dopri5 chooses its own steps")
    refused(["calibrate", "x", *flags, "--size=128x128"], "17x128x128 (frames x height x width) is more than the")
    assert main(["calibrate", RED.prompt, BLUE.prompt, *flags, *small, "--shares", "0.2", "0.4"]) == 0
    [calibration] = json.loads((folder / "step_cache.json").read_text())["calibrations"]
    changes, schedules = np.array(calibration["changes"]), calibration["schedules"]
    assert changes.shape == (5, 2) and (changes[1:] > 0).all() and (changes < 2).all()
    assert [s["reuse"].count("1") for s in schedules] == [1, 2]
    assert 0 < schedules[0]["error"] < schedules[1]["error"] < 1 and schedules[0]["psnr"] > schedules[1]["psnr"] > 15

    assert main([*generate, "--step-cache=0.4"]) == 0
    [record] = (tmp_path / "made").glob("*.json")
    assert json.loads(record.read_text())["sampling"]["sampler"]["reuse"] == schedules[1]["reuse"]
    (folder / "step_cache.json").rename(tmp_path / "kept.json")  # the record alone says what was reused
    assert main(["generate", f"--reproduce={record}", f"--out={tmp_path / 'again'}"]) == 0
    assert "the same to the bit" in capsys.readouterr().out

    (tmp_path / "kept.json").rename(folder / "step_cache.json")
    refused([*generate, "--step-cache=0.3"], "has step caches for 0.2 (PSNR", "and not for 0.3: take one of them")
    for flag, words in (
        ("--steps=6", "sampler.steps=5 (here 6)"),
        ("--guidance=5", "guidance.scale=3.0 (here 5.0)"),
        ("--shift=2", "sampler.shift=None (here 2.0)"),
        ("--sampler=ddim", "sampler.name='unipc' (here 'ddim')"),
    ):
        refused([*generate, "--step-cache=0.4", flag], "was calibrated for other settings", words, "minisora calibrate")
    assert main(["calibrate", RED.prompt, *flags, *small, "--steps=6", "--shares", "0.3"]) == 0
    assert main(["calibrate", RED.prompt, *flags, *small, "--shares", "0.3"]) == 0  # in place of the first
    both = json.loads((folder / "step_cache.json").read_text())["calibrations"]
    assert [(c["sampler"]["steps"], c["videos"]) for c in both] == [(6, 1), (5, 1)]
    for damaged in ("{", "[]", '{"calibrations": [{}]}', '{"calibrations": 3}'):
        (folder / "step_cache.json").write_text(damaged)
        refused([*generate, "--step-cache=0.4"], "step_cache.json", "damaged")

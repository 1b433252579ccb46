"""A call at which guidance does nothing costs half, and changes nothing."""

import dataclasses

import jax
import numpy as np
import pytest

import minisora_jax as ms
from minisora_jax.diffusion.guidance import GuidanceConfig
from minisora_jax.diffusion.sampler import SamplerConfig
from minisora_jax.generate import guided, sampling

RED = ms.Request("a red circle moves left on a black background", (5, 32, 32))
BLUE = ms.Request("a blue square grows on a grey background", (5, 32, 48), seed=1)
HALF = GuidanceConfig(3.0, (0.25, 0.65))


@pytest.fixture(scope="module")
def pipeline():
    return ms.VideoPipeline.load()


@pytest.fixture
def counted(monkeypatch):
    """The tokens of each model call that was run, in order."""
    calls, run_model = [], guided.run_model

    def run(config, params, x_BSP, time_BS, batch, interval_BS=None, keep=False):
        jax.debug.callback(lambda _: calls.append(x_BSP.shape[0] * x_BSP.shape[1]), x_BSP[0, 0, 0], ordered=True)
        return run_model(config, params, x_BSP, time_BS, batch, interval_BS, keep)

    monkeypatch.setattr(guided, "run_model", run)
    sampling.sampling_steps.clear_cache()
    yield calls
    sampling.sampling_steps.clear_cache()


def times_of(pipeline, steps):
    """The time before each step of a request like RED."""
    from minisora_jax.diffusion.time import shift

    return np.asarray(shift(np.linspace(1, 0, steps + 1)[:-1], np.array(8.0), pipeline.times.base_tokens))


@pytest.mark.slow
@pytest.mark.parametrize("interval", [(0.25, 0.65), (0.0, 0.4), (0.9, 1.0), (0.0, 1.0)])
def test_calls_outside_the_interval_cost_half(pipeline, counted, interval):
    guidance, sampler = GuidanceConfig(3.0, interval), SamplerConfig("euler", 6)
    pipeline.sample([RED], sampler=sampler, guidance=guidance, progress=False)
    jax.effects_barrier()
    wanted = [16 if interval[0] <= t <= interval[1] else 8 for t in times_of(pipeline, 6)]
    assert counted == wanted and (8 in wanted or interval == (0.0, 1.0))


def test_without_guidance_no_call_has_twins(pipeline, counted):
    pipeline.sample([RED], sampler=SamplerConfig("euler", 2), guidance=1.0, progress=False)
    jax.effects_barrier()
    assert counted == [8, 8]


@pytest.mark.slow
def test_a_guide_model_is_called_inside_the_interval_only(pipeline, counted):
    weaker = jax.tree.map(lambda x: 0.97 * x, pipeline.params)
    two = dataclasses.replace(pipeline, guide=(pipeline.config, weaker))
    two.sample([RED], sampler=SamplerConfig("euler", 6), guidance=HALF, progress=False)
    jax.effects_barrier()
    inside = [HALF.interval[0] <= t <= HALF.interval[1] for t in times_of(pipeline, 6)]
    assert counted == [8] * (6 + sum(inside)) and 0 < sum(inside) < 6


@pytest.mark.parametrize("kind", ["clips", "loops", "rescaled"])
def test_what_is_left_out_changes_nothing(pipeline, kind, monkeypatch):
    """Twins at all calls, mixed by w = 1 outside the interval, give the same."""
    requests = [RED, BLUE, dataclasses.replace(BLUE, seed=2, negative="a red circle")]
    if kind == "loops":
        requests = [dataclasses.replace(r, size_THW=(8, 32, 32), loop=True) for r in requests]
    options = dict(sampler=SamplerConfig("heun", 4), progress=False)
    options["guidance"] = dataclasses.replace(HALF, rescale=0.5 if kind == "rescaled" else 0.0)
    ours = pipeline.sample(requests, **options)
    monkeypatch.setattr(sampling, "Alone", lambda *_: None)
    whole = pipeline.sample(requests, **options)
    unguided = pipeline.sample(requests, **options | {"guidance": 1.0})
    for a, b, c in zip(ours, whole, unguided):
        np.testing.assert_allclose(a, b, atol=2e-5)
        assert np.abs(a - c).max() > 0.01


@pytest.mark.slow
def test_nor_does_a_mesh(pipeline):
    from minisora_jax.parallel.mesh import MeshConfig, make_mesh

    options = dict(sampler=SamplerConfig("unipc", 4, reuse="0010"), guidance=HALF, progress=False)
    alone = pipeline.sample([RED, BLUE], **options)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, ring=2), jax.devices()[:4])):
        sharded = ms.VideoPipeline.load().sample([RED, BLUE], **options)
    for a, b in zip(sharded, alone):
        np.testing.assert_allclose(a, b, atol=5e-5)

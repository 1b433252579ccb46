"""Sampling with the bundled model: a video depends on its prompt, size and seed, and on nothing else."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from minisora_jax.bundled import CODEC, MODEL
from minisora_jax.generate import Generator, Request

RED = Request("a large red circle moves left slowly on a black background", (5, 32, 48), seed=1)
BLUE = Request("a photo of a large blue square on a grey background", (1, 48, 32), seed=2)
OPTIONS = dict(steps=3, progress=False)


@pytest.fixture(scope="module")
def generator():
    return Generator.load(MODEL, CODEC)


@pytest.fixture(scope="module")
def alone(generator):
    return generator.generate([RED], **OPTIONS)[0]


def test_sizes_and_types_are_those_asked_for(generator, alone):
    assert alone.shape == (5, 32, 48, 3) and alone.dtype == np.uint8
    assert alone.std() > 5


def test_a_video_does_not_depend_on_its_company(generator, alone):
    together = generator.generate([BLUE, RED], **OPTIONS)
    assert together[0].shape == (1, 48, 32, 3)
    # to one rounding of the pixels, as other shapes are compiled to other orders of summation
    assert np.abs(together[1].astype(int) - alone).max() <= 1


def test_seed_prompt_and_guidance_matter(generator, alone):
    for change in (dict(seed=3), dict(prompt="a small green cross grows on a navy background")):
        other = generator.generate([dataclasses.replace(RED, **change)], **OPTIONS)[0]
        assert np.abs(other.astype(int) - alone).mean() > 3
    unguided = generator.generate([RED], guidance=1.0, **OPTIONS)[0]
    assert np.abs(unguided.astype(int) - alone).mean() > 1


def test_samplers_agree_in_the_end(generator):
    photo = dataclasses.replace(BLUE, size_THW=(1, 32, 32))
    euler, heun = (
        generator.generate([photo], steps=n, sampler=name, guidance=1.0, progress=False)[0].astype(int)
        for name, n in (("euler", 60), ("heun", 30))
    )
    coarse = generator.generate([photo], steps=2, sampler="euler", guidance=1.0, progress=False)[0].astype(int)
    assert np.abs(euler - heun).mean() < 0.5 * np.abs(coarse - heun).mean()


@pytest.mark.parametrize(
    "request_, options, message",
    [
        (dataclasses.replace(RED, size_THW=(6, 32, 32)), {}, r"frames=6 must be 1 \+ 4\*k; use 5 or 9"),
        (dataclasses.replace(RED, size_THW=(5, 40, 32)), {}, "height=40 must be a multiple of 16; use 32 or 48"),
        (RED, {"sampler": "rk4"}, "sampler='rk4' must be one of euler, heun"),
        (RED, {"steps": 0}, "steps=0 must be at least 1"),
    ],
)
def test_what_cannot_be_made_is_refused(generator, request_, options, message):
    with pytest.raises(ValueError, match=message):
        generator.generate([request_], **(OPTIONS | options))


def test_a_model_with_another_codec_is_refused(tmp_path):
    other = tmp_path / "codec"
    shutil.copytree(CODEC, other)
    config = json.loads((other / "config.json").read_text())
    config["latent_mean"][0] += 1.0
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="give the codec it was trained with"):
        Generator.load(MODEL, other)
    with pytest.raises(ValueError, match="not a diffusion transformer"):
        Generator.load(CODEC, CODEC)

"""What is given is clean for a model that was trained with it, and held on its noisy path for any other."""

import dataclasses
import logging

import numpy as np
import pytest

from minisora_jax.bundled import CODEC, MODEL
from minisora_jax.data.conditioning import KINDS, ConditioningConfig, recorded_masks
from minisora_jax.evaluation import tasks as measured
from minisora_jax.generate import Given, Request, VideoPipeline, known
from minisora_jax.generate.known import clean_tokens, kinds_of, tasks_of
from minisora_jax.models.dit_config import DiTConfig
from minisora_jax.weights.dit import CONFIGS

CAPTION = "a red circle moves left on a black background"
NOTHING: frozenset[str] = frozenset()


@pytest.fixture(scope="module")
def pipeline():
    return VideoPipeline.load(MODEL, CODEC)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_mask_is_of_the_kind_that_draws_it(kind):
    """Training and sampling mean the same by a name."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = ConditioningConfig().draw((5, 4, 4), rng, kind)
        if 0 < mask.mean() < 1:
            frames = mask.all(axis=(1, 2))
            whole = (mask == frames[:, None, None]).all()
            assert kind in kinds_of(mask) or (kind in ("box", "outside") and whole)


def test_what_a_model_was_not_trained_with_is_held():
    frames = lambda *numbers: np.isin(np.arange(5), numbers)[:, None, None] & np.ones((5, 2, 2), bool)
    prefix, ends = frames(0, 1, 2), frames(0, 4)
    box = np.ones((5, 2, 2), bool)
    box[:, 0, 0] = False
    for trained in (None, KINDS, frozenset({"prefix"}), frozenset({"frames"})):
        np.testing.assert_array_equal(clean_tokens(trained, prefix), prefix)
    assert not clean_tokens(NOTHING, prefix).any() and not clean_tokens(NOTHING, box).any()
    first = frozenset({"first"})  # Wan 2.2 TI2V-5B: its first frame is clean, whatever else is given
    for mask in (prefix, ends, frames(0)):
        np.testing.assert_array_equal(clean_tokens(first, mask), frames(0))
    assert not clean_tokens(first, frames(4)).any()
    assert not clean_tokens(first, prefix, first=1).any()  # a stretch from the middle has no first frame
    np.testing.assert_array_equal(clean_tokens(frozenset({"box"}), box), box)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["heun", "unipc", "dpm++2m", "sde"])
def test_held_latents_end_as_they_are_and_the_rest_depends_on_them(pipeline, sampler):
    able = dataclasses.replace(pipeline, trained=NOTHING)
    latents = np.random.default_rng(1).normal(size=(3, 4, 4, 16)).astype(np.float32)
    mask = np.zeros((3, 2, 2), bool)
    mask[:1] = True

    def sampled(latents, seed=3):
        request = Request(CAPTION, (9, 32, 32), seed, given=Given(latents, mask))
        other = Request("a blue square grows on a navy background", (5, 16, 32))  # in the same row, given nothing
        return able.sample([request, other], steps=4, sampler=sampler, progress=False)

    made, beside = sampled(latents)
    np.testing.assert_allclose(made[0], latents[0], atol=1e-5)
    assert np.abs(made[1:] - latents[1:]).max() > 0.1
    again, beside_again = sampled(latents + 1)
    assert np.abs(again[1:] - made[1:]).max() > 0.01
    np.testing.assert_allclose(beside, beside_again, atol=1e-5)


def test_what_is_held_is_said_once(pipeline, caplog):
    known._say_that_tokens_are_held.cache_clear()
    able = dataclasses.replace(pipeline, trained=NOTHING)
    image = np.zeros((16, 16, 3), np.uint8)
    with caplog.at_level(logging.WARNING, "minisora"):
        for _ in range(2):
            able.image_to_video(CAPTION, image, frames=5, steps=1, progress=False)
    assert [r.getMessage().count("conditioning masks: none") for r in caplog.records] == [1]
    with pytest.raises(ValueError, match="dopri5 has no fixed steps: use --sampler heun"):
        able.image_to_video(CAPTION, image, frames=5, sampler="dopri5", progress=False)


def test_the_record_of_a_model():
    assert recorded_masks({}, "m") is None and recorded_masks({"training": 3}, "m") is None
    assert recorded_masks({"conditioning": []}, "m") == NOTHING
    old = {"training": {"conditioning": {"first": 0.1, "last": 0, "middle": 0.2}, "data": {"path": "a + b*2@between"}}}
    assert recorded_masks(old, "m") == {"first", "between"}
    for bad in ("first", ["middle"], [1], {}):
        with pytest.raises(ValueError, match=r"m/config.json: conditioning="):
            recorded_masks({"conditioning": bad}, "m")
    held = "text_to_video, video_to_video; not trained for, what is given is held: image"
    assert tasks_of(NOTHING, DiTConfig()).startswith(held)
    assert "held" not in tasks_of(KINDS, DiTConfig()) and "not recorded" in tasks_of(None, DiTConfig())
    tasks = {name: tasks_of(NOTHING, config) for name, config in CONFIGS.items() if config.given_channels}
    assert tasks == {
        "wan2.1-i2v-14b": "only image_to_video",
        "wan2.1-flf2v-14b": "only interpolate",
        "wan2.2-i2v-a14b": "only image_to_video and interpolate",
    }


@pytest.mark.slow
def test_without_training_it_is_nearly_as_good(pipeline):
    """Measured with 32 clips and 20 steps: colour and shape 1.0 each, motion .62 (trained: .81)."""
    able = dataclasses.replace(pipeline, trained=NOTHING)
    scores, _ = measured.image_to_video(able, 16, dict(steps=12, progress=False))
    assert min(scores["colour"], scores["shape"]) >= 0.9 and scores["first_frame_psnr"] > 30

"""Rows and samples follow from the data: own clips are trained on as the guide prints it, without a setting."""

import dataclasses

import numpy as np
import pytest

from minisora_jax.api.samples import held_out_examples, sample_requests
from minisora_jax.bundled import CODEC
from minisora_jax.data.latents import open_latents, write_latents
from minisora_jax.data.packing import PackConfig, pack_rows
from minisora_jax.data.row_size import sized_by
from minisora_jax.models.codec import Codec
from minisora_jax.models.text import encode_bytes
from minisora_jax.training.clip_plan import pack_plan, with_row_size
from minisora_jax.training.diffusion_task import DiffusionTask
from minisora_jax.types import LatentClip


@pytest.mark.parametrize(
    "tokens, text, sized",
    [
        ([312] * 4, [36] * 4, (320, 64, 8, 4)),  # four clips of 49 frames of 64x96
        ([312] * 500, [36] * 500, (320, 64, 8, 8)),
        ([4, 80] * 500, [64] * 1000, (256, 512, 16, 8)),  # small clips share rows
        ([32_760], [500], (32_768, 640, 8, 1)),  # 81 frames of 480x832
        ([9] * 3, [700] * 3, (256, 24_896, 64, 1)),  # long captions of small pictures
    ],
)
def test_a_row_holds_the_longest_clip(tokens, text, sized):
    tokens, text = np.array(tokens), np.array(text)
    config = sized_by(tokens, text, PackConfig())
    assert (config.tokens, config.text_tokens, config.slots, config.rows) == sized
    rows = pack_rows(tokens, text, config, 0, 0)  # raises for a clip that does not fit
    assert len(rows) >= config.rows


def test_what_is_given_stays():
    tokens, text = np.array([312] * 4), np.array([36] * 4)
    assert sized_by(tokens, text, PackConfig(tokens=640, slots=3)) == PackConfig(640, 128, 3, 2)
    whole = PackConfig(64, 64, 4, 2)
    assert sized_by(tokens, text, whole) is whole  # and the plan says that the clips do not fit
    with pytest.raises(ValueError, match="pack.tokens=-1 must be at least 0"):
        PackConfig(tokens=-1)


def cache_of(folder, sizes, examples=()):
    rng = np.random.default_rng(0)
    clips = []
    for i, size in enumerate(sizes):
        latents = rng.standard_normal((*size, 16)).astype(np.float32)
        caption = f"clip {i}"
        clips.append(LatentClip(latents, np.ones_like(latents), encode_bytes(caption), caption, 24.0, f"{i}.mp4"))
    write_latents(folder, clips, codec_hash="c", text={"encoder": "bytes"}, empty_text_LE=encode_bytes(""),
                  examples=examples)  # fmt: skip
    return open_latents(folder)


def test_a_curriculum_is_sized_by_the_clips_that_it_reaches(tmp_path):
    latents = cache_of(tmp_path / "cache", [(1, 8, 8)] * 20 + [(13, 8, 12)] * 20)
    task = DiffusionTask()
    whole = with_row_size(task, latents)
    assert whole.pack.tokens == 320 and pack_plan(whole, latents).max_segment_len == 312
    small = dataclasses.replace(task, data=dataclasses.replace(task.data, curriculum=f"{task.run.steps}:1x8x8"))
    assert with_row_size(small, latents).pack.tokens == 256


def test_samples_are_of_held_out_captions_or_of_the_data(tmp_path):
    held_out = [{"prompt": f"held out {i}", "size_THW": [49, 64, 96], "fps": 24.0} for i in range(8)]
    codec, task = Codec.load(CODEC), DiffusionTask()
    kept = cache_of(tmp_path / "kept", [(13, 8, 12)] * 6, held_out)
    requests = sample_requests(4, task, codec, kept)
    assert [r.prompt for r in requests] == ["held out 0", "held out 2", "held out 5", "held out 7"]
    assert {(r.size_THW, r.fps) for r in requests} == {((49, 64, 96), 24.0)}
    own = sample_requests(2, task, codec, cache_of(tmp_path / "own", [(13, 8, 12)] * 6))
    assert [(r.prompt, r.size_THW) for r in own] == [("clip 0", (49, 64, 96)), ("clip 1", (49, 64, 96))]
    given = [{"prompt": "a cat", "size_THW": (17, 48, 48)}]
    assert [r.prompt for r in sample_requests(given, task, codec, kept)] == ["a cat"]
    bad = [{"prompt": 3}, {"prompt": "x", "size_THW": [1e9, 1, 1], "fps": 8}, "?", {**held_out[0], "fps": "fast"}]
    assert cache_of(tmp_path / "bad", [(1, 8, 8)], bad).examples == []


def test_what_a_data_set_holds_out(tmp_path):
    examples = held_out_examples("shapes:train:100")
    assert len({e["prompt"] for e in examples}) == 8 and all(len(e["size_THW"]) == 3 for e in examples)
    assert held_out_examples("shapes:heldout:100") == held_out_examples(str(tmp_path)) == []

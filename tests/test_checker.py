"""The checker is right about true clips, and can say no."""

import collections
import itertools

import numpy as np
import pytest

from minisora_jax.media.resize import resized
from minisora_jax.toy.checker import check
from minisora_jax.toy.ghosts import ghosts
from minisora_jax.toy.grammar import COLOURS, MOTIONS, PHRASES, SHAPES, Object, Scene, parse_caption
from minisora_jax.toy.shapes import Shapes, render


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_true_clips_pass(split):
    clips, hits = Shapes(split, 250), collections.defaultdict(list)
    for i in range(250):
        for attribute, good in check(clips[i].frames_THWC, clips[i].caption).items():
            hits[attribute].append(good)
    assert set(hits) == {"colour", "shape", "motion", "permanence"}
    assert {k: np.mean(v) >= 0.99 for k, v in hits.items()} == dict.fromkeys(hits, True)


@pytest.mark.slow
def test_a_wrong_word_is_noticed():
    clips, rng = Shapes("train", 400), np.random.default_rng(0)
    passed = collections.defaultdict(list)
    swaps = {"colour": list(COLOURS), "shape": list(SHAPES), "motion": [PHRASES[m] for m in MOTIONS[:13]]}
    for i in range(150):
        clip = clips[i]
        said, _, is_image = parse_caption(clip.caption)
        for attribute, words in swaps.items():
            true = getattr(said[0], attribute)
            true = PHRASES[true] if attribute == "motion" else true
            if true not in words or (attribute == "motion" and is_image) or len(said) > 1:
                continue
            wrong = str(rng.choice([w for w in words if w != true]))
            passed[attribute].append(check(clip.frames_THWC, wrong.join(clip.caption.split(true, 1)))[attribute])
    assert all(len(v) > 50 for v in passed.values())
    assert {k: np.mean(v) <= 0.03 for k, v in passed.items()} == dict.fromkeys(passed, True)


def test_an_enlarged_clip_shows_what_it_showed():
    """Not even a pan, whose checkers are larger then, or a still object that slips by a pixel of the small clip."""
    world, seen = Shapes("train", 10**6, size_THW=(9, 64, 64)), collections.Counter()
    for clip in map(world.__getitem__, range(10**6)):
        motion = parse_caption(clip.caption)[0][0].motion
        if not motion.startswith(("pan", "still")) or len(clip.frames_THWC) == 1 or seen[motion] == 3:
            continue
        seen[motion] += 1
        frames = clip.frames_THWC
        if motion == "still":
            frames = np.concatenate([frames[:4], np.roll(frames[4:], 1, axis=2)])
        assert all(check(resized(frames, (128, 128)), clip.caption).values()), clip.caption
        if len(seen) == 3 and set(seen.values()) == {3}:
            break


def test_an_object_that_never_comes_back_is_noticed():
    clip = next(c for c in map(Shapes("train", 500).__getitem__, range(500)) if "behind" in c.caption)
    assert check(clip.frames_THWC, clip.caption)["permanence"]
    gone = clip.frames_THWC.copy()
    hidden = len(gone) // 2
    gone[hidden:] = gone[hidden]  # the wall stays, the object does not return
    assert not check(gone, clip.caption)["permanence"]


def test_noise_shows_nothing():
    noise = np.random.default_rng(0).integers(0, 255, (9, 48, 48, 3)).astype(np.uint8)
    answer = check(noise, "a large red circle moves left slowly on a black background")
    assert not answer["shape"] and not answer["motion"]


def _true_clips(count):
    world = Shapes("train", 10**6, size_THW=(17, 48, 48))
    seen = (c for c in map(world.__getitem__, range(10**6)) if len(c.frames_THWC) == 17 and "behind" not in c.caption)
    return list(itertools.islice(seen, count))


def _colours(caption):
    return [o.colour for o in parse_caption(caption)[0]]


def test_true_clips_have_no_ghosts_and_cross_fades_have():
    clips = _true_clips(60)
    assert [ghosts(c.frames_THWC, _colours(c.caption)) for c in clips] == [{}] * 60
    moving = [c for c in clips if "moves" in c.caption]
    fades = [np.round(c.frames_THWC * 0.5 + c.frames_THWC[::-1] * 0.5).astype(np.uint8) for c in moving]
    found = [ghosts(f, _colours(c.caption)) for f, c in zip(fades, moving)]
    assert np.mean(["transparent" in faults for faults in found]) > 0.9  # objects that pass each other overlap


def test_each_kind_of_ghost_is_named():
    path = {"x_T": np.linspace(10, 38, 17), "y_T": np.full(17, 24.0), "radius_T": np.full(17, 8.0)}
    frames = render(Scene((17, 48, 48), (Object("red", "circle", "right", "small", **path),), "black"))
    colours, fourth = ["red"], np.arange(17)[:, None, None, None] == 4
    empty = np.broadcast_to(np.median(frames, axis=(0, 1, 2)), frames.shape).astype(np.uint8)
    assert ghosts(np.where(fourth, empty, frames), colours)["missing"] == [4]
    assert ghosts(np.where(fourth, frames // 2 + empty // 2, frames), colours) == {"transparent": [4]}
    assert ghosts(np.where(fourth, np.maximum(frames[:1], frames[-1:]), frames), colours)["doubled"] == [4]
    assert ghosts(np.concatenate([frames[:2], frames[-2:]]), colours) == {"jump": [1]}
    assert ghosts(frames, colours) == {} and ghosts(frames, colours, loop=True) == {"jump": [16]}
    stranger = frames.copy()
    stranger[3, :14, :14] = COLOURS["cyan"]
    assert "stranger" in ghosts(stranger, colours)

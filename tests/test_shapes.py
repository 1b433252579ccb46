"""The procedural clips: deterministic, inside their frames, described truly, and split by triples."""

import collections

import numpy as np
import pytest

from minisora_jax.toy.ghosts import ghosts
from minisora_jax.toy.grammar import COLOURS, MOTIONS, SHAPES, caption, held_out, parse_caption
from minisora_jax.toy.scenes import sample_scene
from minisora_jax.toy.shapes import Shapes
from minisora_jax.toy.transitions import sample_arrival, sample_transition


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_clip_is_a_function_of_its_split_and_number(split):
    a, b = Shapes(split, 50)[17], Shapes(split, 30, offset=10)[7]
    assert a.caption == b.caption and a.name == b.name == f"shapes/{split}/17"
    np.testing.assert_array_equal(a.frames_THWC, b.frames_THWC)
    assert not np.array_equal(a.frames_THWC.mean(), Shapes(split, 50)[18].frames_THWC.mean())


def test_training_never_shows_a_held_out_triple():
    for i in range(1500):
        assert not any(held_out(o.triple) for o in sample_scene(i, "train").objects)
        assert any(held_out(o.triple) for o in sample_scene(i, "heldout").objects)


def test_training_shows_every_word_often():
    words = collections.Counter(w for i in range(3000) for o in sample_scene(i).objects for w in o.triple)
    for word in (*COLOURS, *SHAPES):
        assert words[word] > 200, word
    for motion in MOTIONS:
        assert words[motion] > 40, motion


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_caption_says_what_was_drawn(split):
    for i in range(500):
        scene = sample_scene(i, split)
        said, background, is_image = parse_caption(caption(scene))
        assert [o.triple for o in said] == [o.triple for o in scene.objects]
        assert [(o.size, o.speed) for o in said] == [(o.size, o.speed) for o in scene.objects] or is_image
        assert background == scene.background and is_image == (scene.size_THW[0] == 1)


def test_a_caption_outside_the_grammar_is_refused_with_an_example():
    with pytest.raises(ValueError, match="a large red circle moves left slowly"):
        parse_caption("a red circle dances on a black background")


def test_objects_stay_inside_and_apart():
    for i in range(800):
        scene = sample_scene(i)
        T, H, W = scene.size_THW
        assert T % 4 == 1 and H % 16 == 0 and W % 16 == 0
        for o in scene.objects:
            assert (o.x_T - o.radius_T >= 0).all() and (o.x_T + o.radius_T <= W).all()
            assert (o.y_T - o.radius_T >= 0).all() and (o.y_T + o.radius_T <= H).all()
            assert 2 * o.radius_T.max() >= 8
        if len(scene.objects) == 2:
            a, b = scene.objects
            assert a.colour != b.colour
            apart = np.maximum(np.abs(a.x_T - b.x_T), np.abs(a.y_T - b.y_T))
            assert (apart > a.radius_T + b.radius_T).all()


def test_a_wall_hides_its_object_and_gives_it_back():
    seen = 0
    for i in range(600):
        scene = sample_scene(i)
        if scene.wall:
            seen += 1
            o, (left, right) = scene.objects[0], scene.wall
            hidden = (o.x_T - o.radius_T >= left) & (o.x_T + o.radius_T <= right)
            mostly_seen = (o.x_T + 0.5 * o.radius_T <= left) | (o.x_T - 0.5 * o.radius_T >= right)
            assert hidden.sum() >= 2 and mostly_seen[0] and mostly_seen[-1]
    assert seen > 20


def test_a_size_can_be_asked_for():
    assert Shapes("heldout", 5, size_THW=(13, 48, 64))[3].size_THW[0] in (1, 13)
    with pytest.raises(ValueError, match="aspect"):
        sample_scene(0, "train", (5, 32, 128))


def test_a_transition_leads_from_the_end_of_a_clip_to_the_beginning_of_one_of_its_caption():
    clips = Shapes("transitions", 10**6)
    loops = 0
    for i in range(100):
        scene = sample_transition(i)
        assert not any(held_out(o.triple) for o in scene.objects)
        colours = [o.colour for o in parse_caption(clips[i].caption)[0]]
        assert len(clips[i].frames_THWC) == 21 and ghosts(clips[i].frames_THWC, colours) == {}
        for o in scene.objects:
            loops += len(set(np.round(o.x_T, 3))) < 21
    assert loops  # some come back to places where they have been
    with pytest.raises(ValueError, match="transitions have sizes of their own"):
        Shapes("transitions", 9, size_THW=(9, 32, 32))


def test_an_arrival_is_the_end_of_a_clip_that_then_stands_still():
    clips, moved = Shapes("arrivals", 10**6), 0
    for i in range(50):
        clip, scene = clips[i], sample_arrival(i)
        assert clip.frames_THWC.shape[0] == 21 and not any(held_out(o.triple) for o in scene.objects)
        assert not {o.motion for o in scene.objects} & {"bounce", "orbit", "hide-left", "hide-right"}
        still = [np.array_equal(a, b) for a, b in zip(clip.frames_THWC, clip.frames_THWC[1:])]
        assert all(still[8:])
        moved += not all(still)
    assert moved > 25

"""Prompts that change over time: their times, and lines that take the subject of the line before them."""

import contextlib
import time

import numpy as np
import pytest

from minisora_jax.data.epochs import parse_mixture
from minisora_jax.generate import VideoPipeline
from minisora_jax.generate.storyboard import lines, storyboard, whole_lines, with_subject
from minisora_jax.io.filesystem import expand_braces
from minisora_jax.jobs.job import Job
from minisora_jax.jobs.starting import start
from minisora_jax.media.video_writer import write_video
from minisora_jax.toy.checker import check
from minisora_jax.toy.grammar import PHRASES, continued, parse_caption

CIRCLE = "a large red circle grows slowly on a navy background"
BOTH = "a red circle moves up and a blue square stays still on a grey background"


@pytest.mark.parametrize(
    "before, line, whole",
    [
        (CIRCLE, "it moves left", "a large red circle moves left on a navy background"),
        (CIRCLE, "moves left", "a large red circle moves left on a navy background"),
        (CIRCLE, "Then it bounces off the walls quickly.",
         "a large red circle bounces off the walls quickly on a navy background"),
        (CIRCLE, "the circle shrinks on a black background", "a large red circle shrinks on a black background"),
        (CIRCLE, "on a black background", "a large red circle grows slowly on a black background"),
        (CIRCLE, "the camera pans left past it", "the camera pans left past a large red circle on a navy background"),
        (CIRCLE, "a blue square moves left", "a blue square moves left on a navy background"),
        (CIRCLE, BOTH, BOTH),
        (BOTH, "it moves left", "a red circle moves left and a blue square stays still on a grey background"),
        (BOTH, "the square grows", "a red circle moves up and a blue square grows on a grey background"),
        (BOTH, "they bounce off the walls",
         "a red circle bounces off the walls and a blue square bounces off the walls on a grey background"),
        ("a photo of a small white cross on a brown background", "it moves in a circle",
         "a small white cross moves in a circle on a brown background"),
        ("a black cat sits on a sofa", "it jumps down", "a black cat jumps down"),
        ("A man in a red coat walks down a street", "then he stops", "A man in a red coat stops"),
        ("two dogs play in the snow", "they run away", "two dogs run away"),
        ("a man with glasses reads", "turns around", "a man with glasses turns around"),
        ("a photo of a cat", "its eyes close", "a cat's eyes close"),
        ("a cat sits", "a dog enters", "a dog enters"),
        ("a tree in a field", "leaves fall", "leaves fall"),
        ("a cat sits", "it rains", "it rains"),
        ("a cat sits", "The camera zooms in", "The camera zooms in"),
        ("207", "12", "12"),
    ],
)  # fmt: skip
def test_a_line_takes_the_subject_before_it(before, line, whole):
    assert with_subject(line, before) == whole


@pytest.mark.parametrize("phrase", PHRASES.values())
def test_every_motion_of_the_grammar_may_follow(phrase):
    line = f"{phrase} it" if phrase.startswith("the camera") else f"it {phrase}"
    objects, background, _ = parse_caption(with_subject(line, CIRCLE))
    assert [(o.colour, o.shape, o.size, PHRASES[o.motion], background) for o in objects] == [
        ("red", "circle", "large", phrase, "navy")
    ]


def test_a_subject_is_handed_on(caplog):
    caplog.set_level("INFO", "minisora")
    prompt = "a red circle grows on a black background [2s] it moves left [4.5s] shrinks"
    assert storyboard(prompt, 8) == [
        (0, "a red circle grows on a black background"),
        (16, "a red circle moves left on a black background"),
        (36, "a red circle shrinks on a black background"),
    ]
    assert "from 4.5 s on, 'shrinks' is taken as 'a red circle shrinks on a black background'" in caplog.text
    assert VideoPipeline.load().unknown_words(prompt) == []  # "it" is not a word of the model
    for bad in ("a [4s] b [2s] c", "a [4s] [8s] b", "a [1.2.3s] b", "a [-1s] b", "a [1:20s] b", "a [2,5 sec] b"):
        with pytest.raises(ValueError, match="prompt"):
            lines(bad)
        assert isinstance(VideoPipeline.load().unknown_words(bad), list)  # a batch goes on


@pytest.mark.parametrize("time", ["[2.5s]", "[ 2.5 S ]", "[2.5 sec]", "[2.5 seconds]"])
def test_spellings_of_seconds(time):
    assert lines(f"a cat sits {time} a dog enters")[1][0] == 2.5


def test_times_are_kept_or_refused(tmp_path, caplog):
    pipeline, prompt = VideoPipeline.load(), f"{CIRCLE} [4s] it moves left"
    write_video(tmp_path / "a.png", np.zeros((1, 48, 48, 3), np.uint8), 8)
    for values in ({}, {"loop": True}, {"frames": 80}):
        with pytest.raises(ValueError, match="changes at 4 s, and only a long video .* --seconds"):
            start(pipeline, Job(prompt=prompt, **values))
    start(pipeline, Job(prompt=prompt, seconds=6))
    start(pipeline, Job(prompt=prompt, seconds=6, image=str(tmp_path / "a.png")))
    assert "is not shown" not in caplog.text
    start(pipeline, Job(prompt=prompt, seconds=3))
    assert "the prompt changes at 4 s, and the video ends at 3 s: that line is not shown" in caplog.text


@pytest.mark.slow
def test_the_object_stays_in_the_picture():
    story = "a large red circle moves right on a black background [2s] it moves left"
    video = VideoPipeline.load().long_video(story, frames=49, seed=1, progress=False)
    verdict = check(video[-17:], "a large red circle moves left on a black background")
    assert verdict["colour"] and verdict["shape"], verdict


@pytest.mark.parametrize(
    "odd",
    [" ", "a ", "[", "[ ", "[1", "[1 ", "[1s", "1", "\n", "a-", "it ", "and, ", "its ", " on a ", ".", "{,", "*1", "@"],
)
def test_the_time_for_a_prompt_grows_with_its_length_only(odd):
    """A regular expression that begins with any number of spaces took 2.7 s for 32,000 of them."""
    text = f"a{(odd * 32_000)[:32_000]}b"
    began = time.process_time()
    for read in (whole_lines, parse_mixture, lambda t: with_subject(t, t), lambda t: continued(t, t),
                 lambda t: next(expand_braces(t))):  # fmt: skip
        with contextlib.suppress(ValueError):
            read(text)
    assert time.process_time() - began < 0.5

"""Behind the page, with the bundled model: forms, who is served when and with whom, and what is kept."""

import functools
import io
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minisora_jax.bundled import CODEC, MODEL
from minisora_jax.generate import VideoPipeline
from minisora_jax.io.video import read_clip_frames
from minisora_jax.io.video_writer import write_video
from minisora_jax.ui import examples, forms, gallery, job_queue, show
from minisora_jax.ui.forms import FORMS, spec
from minisora_jax.ui.uploads import InvalidInput, validate_upload

WORDS = "a large red circle moves left slowly on a black background"
TINY = {"prompt": WORDS, "size": "32x32", "length": "5 frames", "steps": 2, "guidance": 2}


@pytest.fixture(scope="module")
def pipeline():
    return VideoPipeline.load(MODEL, CODEC)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return examples.draw(tmp_path_factory.mktemp("sent"))


@pytest.fixture
def ask(pipeline, files, tmp_path):
    """ask(verb, **said): what the page would ask for."""
    sent = Path(files["clip"]["video"]).parent
    validate = functools.partial(validate_upload, come_from=sent, folder=tmp_path / "out" / "uploads")
    return lambda task="words", **said: spec(pipeline, task, TINY | said, validate)


@pytest.fixture
def open_line(tmp_path):
    lines = []

    def begin(pipeline):
        model = {"model": None, "hash": pipeline.hash, "codec_hash": pipeline.codec.hash, "mesh": None}
        lines.append(job_queue.JobQueue(pipeline, gallery.Gallery(tmp_path / "out"), model))
        return lines[-1]

    yield begin
    for opened in lines:
        opened.close()


def await_all(tickets, seconds=600):
    until = time.monotonic() + seconds
    while not all(t.over for t in tickets) and time.monotonic() < until:
        time.sleep(0.05)
    assert all(t.over for t in tickets), [t.state for t in tickets]


# ---- Forms


@pytest.mark.parametrize("task", FORMS)
def test_the_first_example_of_each_form_can_begin(ask, files, task):
    for prompt, some in FORMS[task].examples:
        said = {
            "prompt": prompt,
            "length": FORMS[task].length,
            "size": "auto",
            "side": "both",
            "grow": "twice as large",
        }
        found = ask(task, **said, **files.get(some, {}))
        expected = {
            "words": "text_to_video",
            "image": "text_to_video",
            "long": "long_video",
            "loop": "loop" if some else "text_to_video",
        }
        assert found.job.task == expected.get(task, task)
        assert found.volume <= forms.MOST_VOLUME and found.job.size[0] % 16 == 0 == found.job.size[1] % 16
        assert found.job.loop == (task == "loop")


@pytest.mark.parametrize(
    "task, said, words",
    [
        ("words", {"prompt": "  "}, "say in words what is to be seen"),
        ("words", {"prompt": "a" * 601}, "601 letters, and at most 600"),
        ("words", {"size": "8x48"}, "size=8x48: this model makes 16 pixels a side and more"),
        (
            "image_to_video",
            {"image": "picture", "size": "8x48"},
            "size=8x48: this model makes 16 pixels a side and more",
        ),
        ("words", {"size": "large"}, '"large" is no size: write HEIGHTxWIDTH'),
        ("words", {"size": "4096x4096"}, "at most 2048 pixels a side"),
        ("words", {"size": "2048x2048", "length": "60 frames"}, "at most 16 frames are made here"),
        ("words", {"length": "soon"}, '"soon" is no length'),
        ("words", {"length": "0 s"}, '"0 s" is no length'),
        ("words", {"length": "1.2.3 s"}, "is no length"),
        ("long", {"length": "61 s"}, "at most 60 seconds"),
        ("long", {"prompt": "a [5s] b [4s] c", "length": "9 s"}, "the times in the prompt must rise"),
        ("words", {"steps": 10**9}, "steps must be a number from 1 to 100"),
        ("words", {"steps": "many"}, "steps must be a number from 1 to 100"),
        ("words", {"seed": -1}, "seed must be a number from 0"),
        ("words", {"seed": float("nan")}, "seed must be a number from 0"),
        ("words", {"guidance": float("inf")}, "guidance must be a number from 1 to 30"),
        ("words", {"fps": 0}, "fps must be a number from 0.5 to 60"),
        ("words", {"sampler": "magic"}, "there is no sampler magic; there are euler"),
        ("loop", {"sampler": "dopri5"}, "choose another sampler"),
        ("dance", {}, "dance is nothing that can be asked for"),
        ("image_to_video", {}, "choose a picture to begin with"),
        ("interpolate", {"image": "picture"}, "choose the picture to end with"),
        ("inpaint", {"video": "clip"}, "choose a mask"),
        (
            "inpaint",
            {"video": "clip", "mask": "short", "length": ""},
            "short.mp4 has 5 frames, the video 17: give one, or as many",
        ),
        ("image_to_video", {"image": "clip"}, "circle.mp4 is a video; a picture is wanted here"),
        ("outpaint", {"video": "tiny"}, "the video has 8x8 pixels: at least 16 a side are needed"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(ask, files, task, said, words):
    folder = Path(files["clip"]["video"]).parent
    write_video(folder / "short.mp4", np.zeros((5, 32, 32, 3), np.uint8), 8)
    write_video(folder / "tiny.mp4", np.zeros((5, 8, 8, 3), np.uint8), 8)
    paths = {"picture": files["picture"]["image"], "clip": files["clip"]["video"]}
    paths |= {name: str(folder / f"{name}.mp4") for name in ("short", "tiny")}
    with pytest.raises(InvalidInput) as refused:
        ask(task, **{k: paths.get(v, v) if k in forms.FILES else v for k, v in said.items()})
    assert words in str(refused.value) and str(folder.parent) not in str(refused.value)


# ---- The line


def test_those_who_go_together_are_made_together_and_each_gets_their_own(pipeline, ask, open_line):
    served = open_line(pipeline)
    with served._changed:  # so that the line sees them at one time
        tickets = [served.join(ask(seed=i), f"visitor {i}") for i in range(3)]
        other = served.join(ask(steps=3), "another")
        assert [served.before(t) for t in (*tickets, other)] == [0, 1, 2, 3]
    await_all([*tickets, other])
    assert [t.state for t in (*tickets, other)] == ["made"] * 4
    assert [t.company for t in (*tickets, other)] == [3, 3, 3, 1]
    assert len(tickets[0].record["batch"]) == 3 and len({t.file for t in (*tickets, other)}) == 4
    for i, ticket in enumerate(tickets):
        assert ticket.record["job"]["prompt"] == WORDS and ticket.record["job"].get("seed", 0) == i
        frames, fps = read_clip_frames(served.gallery.path(ticket.file))
        assert frames.shape == (5, 128, 128, 3) and fps == 8
    assert len({t.record["pixels"] for t in tickets}) == 3
    again = served.join(served.spec_again(tickets[1].file), "visitor 1")
    await_all([again])
    assert again.words == "Made again: the same to the bit" and again.record["job"]["seed"] == 1
    names = {item.name for item in served.gallery.items()}
    assert names == {t.name for t in (*tickets, other, again)} and not list(served.gallery.out.glob(".beside*"))


def test_one_visitors_failure_touches_nobody_else(pipeline, ask, open_line, files):
    folder = Path(files["clip"]["video"]).parent
    write_video(folder / "black.png", np.zeros((1, 48, 64, 3), np.uint8), 8)
    clip = files["clip"]["video"]
    served = open_line(pipeline)
    with served._changed:
        wishes = [
            ask("inpaint", video=clip, mask=str(folder / "black.png")),
            ask("video_to_video", video=files["two clips"]["second"]),
            ask("video_to_video", video=clip),
        ]
        tickets = [served.join(wish, f"visitor {i}") for i, wish in enumerate(wishes)]
        os.unlink(wishes[1].job.video)
    await_all(tickets)
    assert [t.state for t in tickets] == ["failed", "failed", "made"]
    assert tickets[0].words == "the mask marks nothing: white is what is made anew"
    assert tickets[1].words == "a file could not be read or written here (FileNotFoundError)"
    assert tickets[2].company == 3


def test_a_group_that_fails_is_done_one_by_one(ask, open_line):
    """By autoguidance nobody can have a negative prompt, which is found out for the whole group."""
    served = open_line(VideoPipeline.load(MODEL, CODEC, guide_model=MODEL))
    with served._changed:
        tickets = [served.join(ask(negative="blurry"), "a"), served.join(ask(), "b")]
    await_all(tickets)
    assert [t.state for t in tickets] == ["failed", "made"]
    assert tickets[0].words.startswith("a negative prompt replaces the empty prompt")


def test_nobodys_second_goes_before_somebodys_first(pipeline, ask, open_line):
    served = open_line(pipeline)
    with served._changed:
        mine = [served.join(ask(steps=n), "many") for n in (1, 2, 3)]
        theirs = served.join(ask(steps=4), "one")
        assert [served.before(t) for t in (mine[0], theirs, *mine[1:])] == [0, 1, 2, 3]
        served.join(ask(steps=5), "many")
        with pytest.raises(InvalidInput, match="4 of yours wait already"):
            served.join(ask(), "many")
        served.leave("many")
        assert [t.state for t in mine] == ["stopped"] * 3 and served.before(theirs) == 0
        served.stop_named(theirs.name)
    await_all([*mine, theirs], 5)
    assert not served.gallery.items()


def test_what_is_stopped_at_work_ends_soon_and_leaves_nothing(pipeline, ask, open_line):
    served = open_line(pipeline)
    ticket = served.join(ask(steps=100), "me")
    while not ticket.first_step:
        time.sleep(0.05)
    served.stop(ticket)
    after = served.join(ask(), "me")
    await_all([after])
    assert (ticket.state, after.state) == ("stopped", "made") and ticket.share < 1
    assert [item.name for item in served.gallery.items()] == [after.name]


def test_a_job_is_watched_while_it_is_made(pipeline, ask, open_line, monkeypatch):
    monkeypatch.setattr(job_queue, "PREVIEW_EVERY", 0.0)
    served = open_line(pipeline)
    ticket = served.join(ask(steps=60), "me")
    shown = set()
    while not ticket.over:
        if ticket.preview and ticket.first_step:
            shown.add((ticket.preview, show.ticket(ticket, 0)))
        time.sleep(0.02)
    assert ticket.state == "made" and len({p for p, _ in shown}) >= 2
    preview, words = shown.pop()
    image = Image.open(io.BytesIO(preview))
    assert image.format == "WEBP" and image.n_frames == 5 and image.size == (160, 160)
    assert "steps/s" in words and "s left" in words


# ---- What is kept


def test_the_gallery_keeps_the_newest_and_hands_out_nothing_else(pipeline, ask, open_line, files, monkeypatch):
    monkeypatch.setattr(gallery, "KEPT", 2)
    served = open_line(pipeline)
    kept, out = served.gallery, served.gallery.out
    (out / "mine.mp4").write_text("not of the page")
    tickets = []
    for seed in range(4):
        tickets.append(served.join(ask("video_to_video", seed=seed, video=files["clip"]["video"]), "me"))
        await_all(tickets)
    assert {t.name for t in tickets[-2:]} == {item.name for item in kept.items(9)} and (out / "mine.mp4").exists()
    assert len(list(kept.uploads.iterdir())) == 1  # of which records speak
    name = tickets[-1].name
    for kind in ("webm", "gif", "zip", "mp4.json"):
        assert kept.path(f"{name}.{kind}").is_file()
    with zipfile.ZipFile(kept.path(f"{name}.zip")) as packed:
        assert [n.rpartition("/")[2] for n in packed.namelist()] == [f"{i:05d}.png" for i in range(5)] + ["record.json"]
    original, gif = (read_clip_frames(kept.path(f"{name}.{kind}"))[0].astype(int) for kind in ("mp4", "gif"))
    assert np.abs(original - gif).mean() < 3
    for asked in ("mine.mp4", "../secret", f"{name}.py", f"../{name}.mp4", f"{name}", f"{name}.mp4/../x", name[:-1],
                  f"{tickets[0].name}.mp4", f"{tickets[0].name}.gif", "uploads", f"{name}.mp4.json.json"):  # fmt: skip
        assert kept.path(asked) is None, asked


def test_what_visitors_write_is_escaped():
    evil = "<img src=x onerror=alert(1)>${alert(2)}{{value}}`'\""
    item = gallery.Item("20260101-000000-00000000", ".mp4", {"job": {"prompt": evil}})
    for page in (show.gallery([item]), show.made(item.file, item.record), show.sorry(evil), show.upload(evil)):
        assert "<img src=x" not in page and "${" not in page and "{{" not in page

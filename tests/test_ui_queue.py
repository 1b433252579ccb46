"""Behind the page, with the bundled model: forms, the queue, and the gallery."""

import dataclasses
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
from minisora_jax.media.video import read_clip_frames
from minisora_jax.media.video_writer import write_video
from minisora_jax.ui import examples, forms, gallery, job_queue, show
from minisora_jax.ui.conversions import convert
from minisora_jax.ui.form_fields import FILES, FORMS
from minisora_jax.ui.forms import job_spec
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
    """ask(task, **fields): the job of a form, a small one by default."""
    sent = Path(files["clip"]["video"]).parent
    validate = functools.partial(validate_upload, come_from=sent, folder=tmp_path / "out" / "uploads")
    return lambda task="text_to_video", **fields: job_spec(pipeline, task, TINY | fields, validate)


@pytest.fixture
def open_queue(tmp_path):
    queues = []

    def begin(pipeline):
        model = {"model": None, "hash": pipeline.hash, "codec_hash": pipeline.codec.hash, "mesh": None}
        queues.append(job_queue.JobQueue(pipeline, gallery.Gallery(tmp_path / "out"), model))
        return queues[-1]

    yield begin
    for opened in queues:
        opened.close()


def await_all(tickets, seconds=600):
    until = time.monotonic() + seconds
    while not all(t.over for t in tickets) and time.monotonic() < until:
        time.sleep(0.05)
    assert all(t.over for t in tickets), [t.state for t in tickets]


# ---- Forms


@pytest.mark.parametrize("task", FORMS)
def test_the_first_example_of_each_form_can_begin(ask, files, task):
    for prompt, files_name in FORMS[task].examples:
        fields = {
            "prompt": prompt,
            "length": FORMS[task].length,
            "size": "auto",
            "side": "both",
            "grow": "2 times",
        }
        spec = ask(task, **fields, **files.get(files_name, {}))
        expected = {
            "text_to_image": "text_to_video",
            "loop": "loop" if files_name else "text_to_video",
        }
        assert spec.job.task == expected.get(task, task)
        assert spec.volume <= forms.MOST_VOLUME and spec.job.size[0] % 16 == 0 == spec.job.size[1] % 16
        assert spec.job.loop == (task == "loop")


@pytest.mark.parametrize(
    "task, fields, message",
    [
        ("text_to_video", {"prompt": "  "}, "write a prompt, or choose an example"),
        ("text_to_video", {"prompt": "a" * 601}, "601 characters: shorten it to 600"),
        ("text_to_video", {"size": "8x48"}, "size=8x48: this model makes 16 pixels a side and more"),
        (
            "image_to_video",
            {"image": "picture", "size": "8x48"},
            "size=8x48: this model makes 16 pixels a side and more",
        ),
        ("text_to_video", {"size": "large"}, '"large" is no size: write HEIGHTxWIDTH'),
        ("text_to_video", {"size": "4096x4096"}, "the limit is 2048 pixels a side"),
        ("text_to_video", {"size": "2048x2048", "length": "60 frames"}, "too many: the limit at this size is 16"),
        ("text_to_video", {"length": "soon"}, '"soon" is no length'),
        ("text_to_video", {"length": "0 s"}, '"0 s" is no length'),
        ("text_to_video", {"length": "1.2.3 s"}, "is no length"),
        ("long_video", {"length": "61 s"}, "the limit is 60 seconds"),
        ("long_video", {"prompt": "a [5s] b [4s] c", "length": "9 s"}, "the times in the prompt must rise"),
        ("text_to_video", {"steps": 10**9}, "steps must be a number from 1 to 100"),
        ("text_to_video", {"steps": "many"}, "steps must be a number from 1 to 100"),
        ("text_to_video", {"seed": -1}, "seed must be a number from 0"),
        ("text_to_video", {"seed": float("nan")}, "seed must be a number from 0"),
        ("text_to_video", {"guidance": float("inf")}, "guidance must be a number from 1 to 30"),
        ("text_to_video", {"fps": 0}, "fps must be a number from 0.5 to 60"),
        ("text_to_video", {"sampler": "magic"}, "there is no sampler magic; there are euler"),
        ("loop", {"sampler": "dopri5"}, "choose another sampler"),
        ("dance", {}, "there is no task dance"),
        ("image_to_video", {}, "choose a picture"),
        ("interpolate", {"image": "picture"}, "choose the last picture"),
        ("inpaint", {"video": "clip"}, "choose a mask"),
        (
            "inpaint",
            {"video": "clip", "mask": "short", "length": ""},
            "short.mp4 has 5 frames, the video 17: give one, or as many",
        ),
        ("image_to_video", {"image": "clip"}, "circle.mp4 is a video; choose a picture"),
        ("outpaint", {"video": "tiny"}, "the video has 8x8 pixels: it needs at least 16 a side"),
    ],
)
def test_an_impossible_job_is_refused_with_a_sentence(ask, files, task, fields, message):
    folder = Path(files["clip"]["video"]).parent
    write_video(folder / "short.mp4", np.zeros((5, 32, 32, 3), np.uint8), 8)
    write_video(folder / "tiny.mp4", np.zeros((5, 8, 8, 3), np.uint8), 8)
    paths = {"picture": files["picture"]["image"], "clip": files["clip"]["video"]}
    paths |= {name: str(folder / f"{name}.mp4") for name in ("short", "tiny")}
    with pytest.raises(InvalidInput) as refused:
        ask(task, **{k: paths.get(v, v) if k in FILES else v for k, v in fields.items()})
    assert message in str(refused.value) and str(folder.parent) not in str(refused.value)


@pytest.mark.slow
def test_a_hint_names_the_words_that_the_model_does_not_know(pipeline, ask, open_queue):
    assert ask().hint == "" == ask("long_video", prompt=f"{WORDS} [4s] {WORDS}", length="9 s").hint
    spec = ask(prompt="a red cat and a dog move left on a black background")
    assert spec.hint == (
        'The bundled model does not know "cat", "dog", "move". It was trained on coloured shapes in motion, such as "a '
        'large red circle moves left slowly on a black background".'
    )
    assert '"w4", ...' in ask(prompt=" ".join(f"w{i}" for i in range(9))).hint
    queue = open_queue(pipeline)
    with queue._changed:
        ticket = queue.submit(spec, "me")
        panels = [show.ticket(ticket, 1)]
    while ticket.state == "waiting":
        time.sleep(0.01)
    panels.append(show.ticket(dataclasses.replace(ticket, state="running"), 0))
    await_all([ticket])
    assert ticket.state == "finished", "the job runs all the same"
    assert all("does not know &quot;cat&quot;" in panel for panel in (*panels, show.ticket(ticket, 0)))


# ---- The queue


def test_those_who_go_together_are_made_together_and_each_gets_their_own(pipeline, ask, open_queue):
    queue = open_queue(pipeline)
    with queue._changed:  # so that the queue sees all jobs at once
        tickets = [queue.submit(ask(seed=i), f"visitor {i}") for i in range(3)]
        other = queue.submit(ask(steps=3), "another")
        assert [queue.jobs_ahead(t) for t in (*tickets, other)] == [0, 1, 2, 3]
    await_all([*tickets, other])
    assert [t.state for t in (*tickets, other)] == ["finished"] * 4
    assert [t.group_size for t in (*tickets, other)] == [3, 3, 3, 1]
    assert len(tickets[0].record["batch"]) == 3 and len({t.file for t in (*tickets, other)}) == 4
    for i, ticket in enumerate(tickets):
        assert ticket.record["job"]["prompt"] == WORDS and ticket.record["job"].get("seed", 0) == i
        frames, fps = read_clip_frames(queue.gallery.out / ticket.file)
        assert frames.shape == (5, 128, 128, 3) and fps == 8
    assert len({t.record["pixels"] for t in tickets}) == 3
    again = queue.submit(queue.reproduction(tickets[1].file), "visitor 1")
    await_all([again])
    assert again.message == "Reproduced: the pixels are identical" and again.record["job"]["seed"] == 1
    names = {item.name for item in queue.gallery.items()}
    assert names == {t.name for t in (*tickets, other, again)} and not list(queue.gallery.out.glob(".beside*"))


def test_one_visitors_failure_touches_nobody_else(pipeline, ask, open_queue, files):
    folder = Path(files["clip"]["video"]).parent
    write_video(folder / "black.png", np.zeros((1, 48, 64, 3), np.uint8), 8)
    clip = files["clip"]["video"]
    queue = open_queue(pipeline)
    with queue._changed:
        specs = [
            ask("inpaint", video=clip, mask=str(folder / "black.png")),
            ask("video_to_video", video=files["two clips"]["second"]),
            ask("video_to_video", video=clip),
        ]
        tickets = [queue.submit(spec, f"visitor {i}") for i, spec in enumerate(specs)]
        os.unlink(specs[1].job.video)
    await_all(tickets)
    assert [t.state for t in tickets] == ["failed", "failed", "finished"]
    assert tickets[0].message == "the mask marks nothing: white is what is made anew"
    assert tickets[1].message == "the server could not read or write a file (FileNotFoundError)"
    assert tickets[2].group_size == 3


def test_a_group_that_fails_is_done_one_by_one(ask, open_queue):
    """By autoguidance nobody can have a negative prompt, which is found out for the whole group."""
    queue = open_queue(VideoPipeline.load(MODEL, CODEC, guide_model=MODEL))
    with queue._changed:
        tickets = [queue.submit(ask(negative="blurry"), "a"), queue.submit(ask(), "b")]
    await_all(tickets)
    assert [t.state for t in tickets] == ["failed", "finished"]
    assert tickets[0].message.startswith("a negative prompt replaces the empty prompt")


def test_nobodys_second_goes_before_somebodys_first(pipeline, ask, open_queue):
    queue = open_queue(pipeline)
    with queue._changed:
        mine = [queue.submit(ask(steps=n), "many") for n in (1, 2, 3)]
        theirs = queue.submit(ask(steps=4), "one")
        assert [queue.jobs_ahead(t) for t in (mine[0], theirs, *mine[1:])] == [0, 1, 2, 3]
        queue.submit(ask(steps=5), "many")
        with pytest.raises(InvalidInput, match="4 of your jobs are waiting"):
            queue.submit(ask(), "many")
        queue.leave("many")
        assert [t.state for t in mine] == ["stopped"] * 3 and queue.jobs_ahead(theirs) == 0
        queue.stop_named(theirs.name)
    await_all([*mine, theirs], 5)
    assert not queue.gallery.items()


def test_what_is_stopped_at_work_ends_soon_and_leaves_nothing(pipeline, ask, open_queue):
    queue = open_queue(pipeline)
    ticket = queue.submit(ask(steps=100), "me")
    while not ticket.first_step:
        time.sleep(0.05)
    queue.stop(ticket)
    after = queue.submit(ask(), "me")
    await_all([after])
    assert (ticket.state, after.state) == ("stopped", "finished") and ticket.share < 1
    assert [item.name for item in queue.gallery.items()] == [after.name]


def test_a_job_is_watched_while_it_is_made(pipeline, ask, open_queue, monkeypatch):
    monkeypatch.setattr(job_queue, "PREVIEW_EVERY", 0.0)
    queue = open_queue(pipeline)
    await_all([queue.submit(ask(), "me")])  # compiles the preview: a slow one is followed by a long pause
    ticket = queue.submit(ask(steps=100), "me")
    previews, with_rate = [], False
    while not ticket.over and not (with_rate and len(previews) > 1):
        if ticket.preview and ticket.preview not in previews[-1:]:
            previews.append(ticket.preview)
        panel = show.ticket(ticket, 0)
        with_rate = with_rate or ("steps/s" in panel and "s left" in panel)
        time.sleep(0.005)
    await_all([ticket])
    assert ticket.state == "finished" and with_rate and len(previews) > 1
    image = Image.open(io.BytesIO(previews[-1]))
    assert image.format == "WEBP" and image.n_frames == 5 and image.size == (160, 160)


# ---- What is kept


def test_the_gallery_keeps_the_newest_and_hands_out_nothing_else(pipeline, ask, open_queue, files, monkeypatch):
    monkeypatch.setattr(gallery, "KEPT", 2)
    queue = open_queue(pipeline)
    kept, out = queue.gallery, queue.gallery.out
    (out / "mine.mp4").write_text("not of the page")
    tickets = []
    for seed in range(4):
        tickets.append(queue.submit(ask("video_to_video", seed=seed, video=files["clip"]["video"]), "me"))
        await_all(tickets)
    assert {t.name for t in tickets[-2:]} == {item.name for item in kept.items(9)} and (out / "mine.mp4").exists()
    assert len(list(kept.uploads.iterdir())) == 1  # of which records speak
    name = tickets[-1].name
    for kind in ("webm", "gif", "zip"):
        video, path = kept.path(f"{name}.{kind}")
        assert video == out / f"{name}.mp4" and not path.exists()
        convert(video, path)
    for kind in ("webm", "gif", "zip", "mp4", "mp4.json"):
        assert kept.path(f"{name}.{kind}")[1].is_file()
    with zipfile.ZipFile(out / f"{name}.zip") as packed:
        assert [n.rpartition("/")[2] for n in packed.namelist()] == [f"{i:05d}.png" for i in range(5)] + ["record.json"]
    original, gif = (read_clip_frames(out / f"{name}.{kind}")[0].astype(int) for kind in ("mp4", "gif"))
    assert np.abs(original - gif).mean() < 3
    for file in ("mine.mp4", "../secret", f"{name}.py", f"../{name}.mp4", f"{name}", f"{name}.mp4/../x", name[:-1],
                  f"{tickets[0].name}.mp4", f"{tickets[0].name}.gif", "uploads", f"{name}.mp4.json.json"):  # fmt: skip
        assert kept.path(file) is None, file


def test_what_visitors_write_is_escaped():
    evil = "<img src=x onerror=alert(1)>${alert(2)}{{value}}`'\""
    item = gallery.Item("20260101-000000-00000000", ".mp4", {"job": {"prompt": evil}})
    for page in (
        show.gallery([item]),
        show.result(item.file, item.record, hint=evil),
        show.error(evil),
        show.upload(evil),
    ):
        assert "<img src=x" not in page and "${" not in page and "{{" not in page

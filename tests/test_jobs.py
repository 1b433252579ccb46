"""Jobs in words and paths, batches that go on where they stopped, records that make a video again."""

import dataclasses
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from minisora_jax.bundled import CODEC, MODEL
from minisora_jax.cli import main
from minisora_jax.evaluation.frames import psnr
from minisora_jax.generate import VideoPipeline
from minisora_jax.generate.runner import run_tasks
from minisora_jax.io.atomic import replacing
from minisora_jax.io.filesystem import json_or_none
from minisora_jax.jobs.batch import free_paths, read_jobs, release, run_batch, run_jobs
from minisora_jax.jobs.job import Job
from minisora_jax.jobs.output import beside, read_record
from minisora_jax.jobs.starting import start
from minisora_jax.media.video import read_clip_frames, read_note
from minisora_jax.media.video_writer import VideoWriter, write_video
from minisora_jax.toy.shapes import Shapes

FAST = ["--steps", "2", "--frames", "5", "--size", "32x32", "--upscale", "1"]
RED = "a large red circle moves left slowly on a black background"


@pytest.fixture(scope="module")
def pipeline():
    return VideoPipeline.load(MODEL, CODEC)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    frames = Shapes("train", 50, size_THW=(9, 40, 50))[3].frames_THWC
    write_video(folder / "clip.mp4", frames, 8)
    write_video(folder / "other.webm", frames[::-1], 8)
    Image.fromarray(frames[0]).save(folder / "first.png")
    Image.fromarray(frames[-1]).resize((100, 30)).save(folder / "last.jpg")
    mask = np.zeros((40, 50), np.uint8)
    mask[:, 25:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    (folder / "text.mp4").write_text("no video")
    return folder


@pytest.mark.parametrize(
    "said, task, first_size",
    [
        ({}, "text_to_video", (17, 48, 48)),
        ({"frames": 1, "size": [64, 32]}, "text_to_video", (1, 64, 32)),
        ({"loop": True}, "text_to_video", (9, 48, 48)),  # and then the way back
        ({"loop": True, "seconds": 1}, "text_to_video", (5, 48, 48)),
        ({"seconds": 3}, "long_video", (17, 48, 48)),
        ({"image": "first.png"}, "image_to_video", None),
        ({"image": "first.png", "last": "last.jpg"}, "interpolate", None),
        ({"video": "clip.mp4", "strength": 0.5}, "video_to_video", None),
        ({"video": "clip.mp4", "mask": "mask.png"}, "inpaint", None),
        ({"video": "clip.mp4", "size": [48, 64]}, "outpaint", None),
        ({"video": "clip.mp4", "extend": "both", "seconds": 0.5}, "extend", None),
        ({"video": "clip.mp4", "transition": "other.webm"}, "transition", None),
        ({"video": "clip.mp4", "loop": True}, "loop", None),
    ],
)
def test_what_is_said_is_what_is_meant(pipeline, media, said, task, first_size):
    paths = {k: str(media / v) for k, v in said.items() if k in ("image", "last", "video", "mask", "transition")}
    job = Job.from_dict({"prompt": RED} | said | paths)
    assert job.task == task and Job.from_dict(json.loads(json.dumps(job.to_dict()))) == job
    at_work, fps = start(pipeline, job)
    asks = next(at_work)
    assert fps == 8
    if first_size:
        assert asks.size_THW == first_size
    elif task == "outpaint":
        assert asks.frames_THWC.shape[1:3] == (48, 64)
    elif task != "extend":
        assert asks.frames_THWC.shape[1:3] == (32, 48)  # 40x50 in whole cells


def test_any_size_is_made(pipeline, media, tmp_path):
    jobs = [
        Job(prompt=RED, frames=5, size=(34, 54)),
        Job(prompt=RED, frames=1, size=(33, 49)),
        Job(prompt=RED, video=str(media / "clip.mp4"), mask=str(media / "mask.png"), size=(36, 40)),
    ]
    paths = [tmp_path / "a.mp4", tmp_path / "b.png", tmp_path / "c.webm"]
    model = {"model": None, "hash": pipeline.hash, "codec_hash": pipeline.codec.hash, "mesh": None}
    run_jobs(pipeline, jobs, paths, model=model, sampling=dict(steps=1), upscale=1, progress=False)
    assert [read_clip_frames(p)[0].shape[1:3] for p in paths] == [(34, 54), (33, 49), (36, 40)]


def test_a_picture_may_begin_a_long_video(pipeline, media):
    job = Job(prompt=f"{RED} [2s] a large red circle stays still on a black background", seconds=4,
              image=str(media / "first.png"))  # fmt: skip
    at_work, _ = start(pipeline, job)
    pieces = run_tasks(pipeline, [at_work], steps=1, progress=False)
    assert pieces[0].shape == (33, 32, 48, 3)
    shown = read_clip_frames(media / "first.png")[0][0][4:36, 1:49]
    assert psnr(pieces[0][0], shown) > 25


def test_a_given_video_too_large_for_the_model_is_warned_of(pipeline, media, caplog):
    job = Job(prompt=RED, video=str(media / "clip.mp4"), extend="forward", size=(96, 128))
    start(pipeline, job)
    assert "96x128 is more than the 64x64 of training" in caplog.text
    caplog.clear()
    start(pipeline, dataclasses.replace(job, size=None))
    assert not caplog.text


@pytest.mark.parametrize(
    "said, sentence",
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "x", "colour": 1}, "a job has no colour; it has prompt, negative"),
        ({"prompt": "x", "image": "a", "video": "b", "loop": True}, "do not go together"),
        ({"prompt": "x", "video": "a", "strength": 0.5, "mask": "m"}, "video_to_video and inpaint do not go together"),
        ({"prompt": "x", "last": "a"}, "last='a' needs image"),
        ({"prompt": "x", "strength": 0.5}, "strength=0.5 needs video"),
        ({"prompt": "x", "video": "a"}, "say what to do with it"),
        ({"prompt": "x", "video": "a", "extend": "up"}, "extend='up' must be one of forward, backward, both"),
        ({"prompt": "x", "seconds": 61}, "seconds=61 must be above 0 and at most 60"),
        ({"prompt": "x", "fps": 0}, "fps=0 must be at least 0.1 and at most 120"),
    ],
)
def test_what_cannot_be_meant_is_said(said, sentence):
    with pytest.raises(ValueError, match=sentence):
        Job.from_dict(said)


def test_an_input_that_is_no_plain_file_is_called_so(pipeline, tmp_path):
    for path, words in {
        os.devnull: f"{os.devnull} is a device, not a plain file",
        tmp_path: f"{tmp_path} is a folder, not a plain file",
        tmp_path / "a.png": f"{tmp_path / 'a.png'} does not exist",
    }.items():
        with pytest.raises(OSError, match=re.escape(words)):
            job = Job(RED, image=str(path))
            run_jobs(pipeline, [job], [tmp_path / "out.mp4"], model={}, sampling={}, strict=True)


def test_times_in_a_prompt_rise(pipeline):
    with pytest.raises(ValueError, match="must rise: 0s, 4s, 2s"):
        start(pipeline, Job(prompt="a [4s] b [2s] c", seconds=9))


@pytest.mark.slow
def test_a_batch_goes_on_and_names_what_cannot_be_done(pipeline, media, tmp_path):
    from minisora_jax.diffusion.guidance import GuidanceConfig
    from minisora_jax.diffusion.sampler import SamplerConfig

    small = {"size": (32, 32), "frames": 5}
    jobs = [Job(RED, seed=i, **small) for i in range(3)]
    jobs.insert(1, Job(RED, video=str(media / "text.mp4"), extend="forward"))
    options = dict(model={}, sampling={"sampler": SamplerConfig(steps=2), "guidance": GuidanceConfig()}, progress=False)
    run = lambda out, jobs=jobs: run_batch(pipeline, jobs, out, ".mp4", 2, **options)
    assert run(tmp_path / "whole") == {"made": 3, "failed": 1, "before": 0}
    assert run(tmp_path / "whole") == {"made": 0, "failed": 1, "before": 3}  # what failed is tried again
    lines = [json.loads(line) for line in (tmp_path / "whole/manifest.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == [0, 1, 2, 3, 1] and "VideoError: not a video" in lines[1]["error"]
    damaged = tmp_path / "whole" / lines[2]["file"]
    before = damaged.read_bytes()
    damaged.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert run(tmp_path / "whole") == {"made": 2, "failed": 1, "before": 1}  # what was damaged, with its company
    assert damaged.read_bytes() == before

    # Killed after the first group, and in the middle of a line of the manifest: the rest comes out the same.
    run(tmp_path / "cut", jobs[:2])
    with (tmp_path / "cut/manifest.jsonl").open("a") as manifest:
        manifest.write('{"number": 2, "job"')
    (tmp_path / "cut" / f".left.{os.getpid()}-0123abcd.tmp.mp4").write_bytes(b"of a killed run")
    assert run(tmp_path / "cut") == {"made": 2, "failed": 1, "before": 1}
    assert not list((tmp_path / "cut").glob(".*.tmp*"))
    assert all(map(json_or_none, (tmp_path / "cut/manifest.jsonl").read_text().splitlines()[-3:]))
    pixels = lambda out: {p.name: json.loads(p.read_text())["pixels"] for p in sorted(out.glob("*.mp4.json"))}
    assert pixels(tmp_path / "cut") == pixels(tmp_path / "whole") and len(pixels(tmp_path / "cut")) == 3
    with pytest.raises(ValueError, match="job 0 was .* use another --out"):
        run(tmp_path / "whole", [Job("another", **small)])

    # Whatever letters a file's name has, it is made once; a line that is no job is noted once.
    anywhere = [Job("ein großer roter Kreis", **small), Job("猫" * 64, **small), ValueError("line 3: no job")]
    assert run(tmp_path / "names", anywhere) == {"made": 2, "failed": 1, "before": 0}
    assert run(tmp_path / "names", anywhere) == {"made": 0, "failed": 1, "before": 2}
    assert len((tmp_path / "names/manifest.jsonl").read_text().splitlines()) == 3


def test_on_the_command_line_made_and_made_again(tmp_path, capsys):
    assert main(["generate", RED, "a blue square grows on a grey background", *FAST, "--out", str(tmp_path)]) == 0
    made = sorted(tmp_path.glob("*.mp4"))
    assert len(made) == 2 and (tmp_path / "contact-sheet.png").exists()
    record = read_record(made[1])
    assert record["job"]["prompt"] == RED and len(record["batch"]) == 2 and record["frames"] == 5
    assert json.loads(read_note(made[1]))["job"] == record["job"]
    (tmp_path / (made[1].name + ".json")).unlink()  # the file itself still tells
    assert main(["generate", "--reproduce", str(made[0]), "--out", str(tmp_path / "again"), "--upscale", "1"]) == 0
    assert "the same to the bit" in capsys.readouterr().out
    assert (tmp_path / "again" / made[0].name).read_bytes() == made[0].read_bytes()
    assert main(["generate", "--reproduce", str(made[1]), "--out", str(tmp_path / "again"), "--upscale", "1"]) == 0
    assert "no hash to compare with" in capsys.readouterr().out

    # What is read is never written over.
    extended = ["generate", RED, "--video", str(made[0]), "--extend", "forward", "0.25", "--steps", "2"]
    before = made[0].read_bytes()
    assert main([*extended, "--out", str(tmp_path), "--seed", "1", "--upscale", "1", "--format", "gif"]) == 0
    assert made[0].read_bytes() == before
    assert main(["generate", "--reproduce", str(tmp_path / "contact-sheet.png")]) == 2
    assert "has no record of how it was made" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".png", ""])
def test_files_written_in_pieces_keep_their_note(tmp_path, suffix):
    frames = Shapes("train", 9, size_THW=(9, 32, 32))[2].frames_THWC[: 1 if suffix == ".png" else None]
    note = json.dumps({"prompt": "ein Käfer " * 60})
    with VideoWriter(tmp_path / f"pieces{suffix}", 8, note=note) as writer:
        for some in np.array_split(frames, min(3, len(frames))):
            writer.write(some)
    write_video(tmp_path / f"whole{suffix}", frames, 8, note=note)
    file = tmp_path / (f"pieces{suffix}" if suffix else "pieces/00000.png")
    assert read_note(file) == note
    if suffix:
        assert file.read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
        assert read_clip_frames(file)[0].shape == frames.shape
    else:
        assert len(list((tmp_path / "pieces").iterdir())) == len(frames)
        assert (read_clip_frames(file)[0][0] == frames[0]).all()


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    for name in ("a.mp4", "folder"):
        with pytest.raises(RuntimeError), VideoWriter(tmp_path / name, 8) as writer:
            writer.write(np.zeros((2, 16, 16, 3), np.uint8))
            raise RuntimeError("killed")
    with pytest.raises(ValueError, match="no frames were written"), VideoWriter(tmp_path / "a.gif", 8):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, sentence", [
    (["--upscale", "0"], "--upscale 0 must be from 1 to 64"), (["--upscale", "1000000"], "must be from 1 to 64"),
    (["--guidance", "nan"], "guidance scale=nan must be a number"),
    (["--guidance", "1e30"], "guidance scale=1e+30 must be a number up to 1000"), (["--shift", "nan"], "shift=nan"),
    (["--sampler", "dopri5", "--tolerance", "nan"], "tolerance=nan"), (["--sampler", "sde", "--eta", "nan"], "eta=nan"),
    (["--fps", "1e-300"], "fps=1e-300 must be at least 0.1"),
])  # fmt: skip
def test_a_wrong_number_is_said_before_anything_is_made(tmp_path, capsys, flags, sentence):
    assert main(["generate", RED, "--out", str(tmp_path / "out"), *flags]) == 2
    told = capsys.readouterr().err
    assert sentence in told and "sampling" not in told and not (tmp_path / "out").exists()


def test_a_rate_that_a_format_cannot_show_is_said_before_anything_is_made(tmp_path, capsys):
    flags = ["--out", str(tmp_path / "out"), "--fps", "60", "--format", "gif"]
    assert main(["generate", RED, *flags]) == 2
    told = capsys.readouterr().err
    assert "60 frames per second: a gif shows 0.002 to 50" in told and "sampling" not in told
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("said, sentence", [
    ({"seconds": 2, "frames": 17}, "frames=17 is not used: the length of this task is given in seconds"),
    ({"loop": True, "seconds": 1, "frames": 8}, "frames=8 is not used"),
    ({"video": "clip.mp4", "extend": "forward", "frames": 9}, "frames=9 is not used"),
    ({"video": "clip.mp4", "strength": 0.5, "seconds": 2.5}, "seconds=2.5 is not used: the length of this task"),
    ({"video": "clip.mp4", "strength": 0.5, "frames": 5}, ""), ({"seconds": 2}, ""), ({"frames": 17}, ""),
    ({"video": "clip.mp4", "extend": "forward", "seconds": 1}, ""),
])  # fmt: skip
def test_a_length_that_is_not_used_is_said(pipeline, media, caplog, said, sentence):
    start(pipeline, Job(prompt=RED, **said | ({"video": str(media / "clip.mp4")} if "video" in said else {})))
    assert sentence in caplog.text and ("not used" in caplog.text) == bool(sentence)


def test_frames_that_are_left_out_are_said(pipeline, tmp_path, caplog):
    write_video(tmp_path / "a.mp4", np.zeros((8, 48, 48, 3), np.uint8), 8)
    job = Job(prompt=RED, video=str(tmp_path / "a.mp4"), strength=0.5)
    start(pipeline, job)
    assert "a.mp4: the last 3 of 8 frames are left out: the codec takes 1 + 4*k" in caplog.text
    with pytest.raises(ValueError, match=r"frames=4 must be 1 \+ 4\*k; use 1 or 5"):
        start(pipeline, dataclasses.replace(job, frames=4))
    caplog.clear()
    start(pipeline, dataclasses.replace(job, frames=5))
    assert not caplog.text


def test_flags_are_jobs():
    from argparse import ArgumentParser

    from minisora_jax.commands.generate import _jobs, add_arguments

    def jobs(*argv):
        parser = ArgumentParser()
        add_arguments(parser)
        return _jobs(parser.parse_args(["p", *argv]))

    assert (
        jobs("--transition", "a.mp4", "b.mp4")
        == jobs("--video", "a.mp4", "--transition", "b.mp4")
        == [Job("p", video="a.mp4", transition="b.mp4")]
    )
    assert jobs("--video", "a.mp4", "--extend", "both", "2.5") == [Job("p", video="a.mp4", extend="both", seconds=2.5)]
    assert jobs("--first", "a.png", "--last", "b.png") == [Job("p", image="a.png", last="b.png")]
    for argv, words in (
        (("--transition", "a", "b", "c"), "give the two videos"),
        (("--video", "a", "--extend", "up"), "must be one of forward"),
        (("--video", "a", "--extend", "both", "long"), "seconds are one number"),
    ):
        with pytest.raises(ValueError, match=words):
            jobs(*argv)


def test_a_batch_of_an_older_version_goes_on(pipeline, tmp_path):
    """Its manifest names the field `connect`, which is `transition` now."""
    from minisora_jax.jobs.batch import run_batch

    job = {"prompt": RED, "video": "a.mp4", "connect": "b.mp4"}
    line = {"number": 0, "job": job, "error": "FileNotFoundError: a.mp4 does not exist"}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(line) + "\n")
    counts = run_batch(pipeline, [Job.from_dict(job)], tmp_path, ".mp4", 8, model={}, sampling={})
    assert counts == {"made": 0, "failed": 1, "before": 0}  # and it is tried again
    for damaged in ({"number": 0, "job": 3}, {"number": 0, "job": {"prompt": 5}}, {"number": True, "job": 1}):
        (tmp_path / "manifest.jsonl").write_text(json.dumps(damaged) + "\n")
        assert run_batch(pipeline, [Job.from_dict(job)], tmp_path, ".mp4", 8, model={}, sampling={}) == counts
    with pytest.raises(ValueError, match="both connect and transition"):
        Job.from_dict(job | {"transition": "c.mp4"})


BAD_LINES = [
    '{"prompt": "x", "seed": -1}', '{"prompt": "x", "seed": "3"}', '{"prompt": "x", "seed": 1.5}',
    '{"prompt": "x", "seed": 1%s}' % ("0" * 300), '{"prompt": "x", "seed": 1%s}' % ("0" * 5000),
    '{"prompt": "x", "seed": true}', '{"prompt": "\\ud83d"}', '{"prompt": 3}', '{"prompt": ["x"]}', '{"prompt": null}',
    '{"prompt": "x", "frames": 1e12}', '{"prompt": "x", "frames": 1000000000000}', '{"prompt": "x", "frames": 0}',
    '{"prompt": "x", "frames": -4}', '{"prompt": "x", "size": 1e9}', '{"prompt": "x", "size": [1000000000, 48]}',
    '{"prompt": "x", "size": [48]}', '{"prompt": "x", "size": "48"}', '{"prompt": "x", "size": [0, 48]}',
    '{"prompt": "x", "size": "axb"}', '{"prompt": "x", "size": [48.5, 48]}', '{"prompt": "x", "seconds": NaN}',
    '{"prompt": "x", "seconds": Infinity}', '{"prompt": "x", "fps": "8"}', '{"prompt": "x", "loop": "yes"}',
    '{"prompt": "x", "image": 7}', '{"prompt": "x", "negative": {}}', "[]", "3", '"x"', "not json", "[" * 100_000,
    '{"prompt": "%s"}' % ("a " * 16_000), "\x00", '{"prompt": "x"',
]  # fmt: skip


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_its_own_fault(tmp_path, line):
    path = tmp_path / "jobs.jsonl"
    path.write_text(f'{{"prompt": "{RED}"}}\n{line}\n{{"prompt": "{RED}", "seed": 5}}\n')
    first, bad, last = read_jobs(path)
    assert (first, last) == (Job(RED), Job(RED, seed=5))
    assert isinstance(bad, ValueError) and "jobs.jsonl, line 2: " in str(bad) and len(str(bad)) < 700


def test_a_batch_file_of_any_editor_is_read(tmp_path):
    path = tmp_path / "jobs.jsonl"
    path.write_bytes('\ufeff{"prompt": "a\u2028b"}\r\n\n{"prompt": "c", "size": "64x48"}'.encode())
    assert read_jobs(path) == [Job("a\u2028b"), Job("c", size=(64, 48))]
    for encoding in ("utf-16-le", "utf-16-be"):  # a shell of Windows
        path.write_bytes('\ufeff{"prompt": "日本"}\r\n{"prompt": "c"}\r\n'.encode(encoding))
        assert read_jobs(path) == [Job("日本"), Job("c")]
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no jobs: one a line"):
        read_jobs(path)


def test_only_bad_lines_is_an_error_and_a_fifo_too(tmp_path):
    (tmp_path / "jobs.jsonl").write_text("3\n")
    with pytest.raises(ValueError, match="has no jobs: .* line 1: a job is an object"):
        read_jobs(tmp_path / "jobs.jsonl")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="a named pipe"):
        read_jobs(tmp_path / "pipe")


@pytest.mark.parametrize(
    "prompt", ["\U0001d4d0" * 64, "猫" * 64, "...", "-rf", "a" * 300, "x/../../y", ".hidden"], ids=range(7)
)
def test_a_file_is_named_by_any_prompt(tmp_path, prompt):
    a, b = (free_paths(tmp_path, [Job(prompt)], ".mp4")[0] for _ in range(2))
    assert a != b and a.parent == tmp_path and a.name[0] not in "-."  # the second run sees what the first one reserved
    for path in (a, b):
        with replacing(path) as temporary:
            temporary.write_bytes(b"x")
    release([a, b])
    assert {p.name for p in tmp_path.iterdir()} == {p for q in (a, b) for p in (q.name, q.name + ".json")}
    c = free_paths(tmp_path, [Job(prompt)], ".mp4")
    release(c)
    assert not beside(c[0]).exists()


def test_a_record_from_before_says_that_its_noise_was_another():
    from minisora_jax.jobs.output import different_machine, record_of

    record = record_of([Job("a red circle grows")], 0, {}, {})
    assert different_machine(record) == ""
    assert "jax 0.1 then" in different_machine(record | {"machine": record["machine"] | {"jax": "0.1"}})
    del record["noise"]
    assert "drew other noise from a seed" in different_machine(record)

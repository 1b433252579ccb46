"""Our own files, which are saved larger than they were made, are read at the size at which they were made."""

import json
import shutil

import av
import numpy as np
import pytest

from minisora_jax.curation.prepare import prepare
from minisora_jax.evaluation.frames import psnr
from minisora_jax.generate import VideoPipeline
from minisora_jax.jobs.job import Job
from minisora_jax.jobs.output import Output, beside
from minisora_jax.jobs.starting import start
from minisora_jax.media.video import open_video, read_clip_frames
from minisora_jax.media.video_writer import write_video
from minisora_jax.sources.clips import open_clips
from minisora_jax.toy.shapes import Shapes

RED = "a large red circle moves left slowly on a black background"


def saved(path, frames, upscale=4):
    """A result's file, as `minisora generate` writes it."""
    output = Output(path, 8.0, {"minisora": "0.2.0", "job": {"prompt": RED}}, upscale)
    for piece in np.array_split(frames, min(len(frames), 2)):
        output.write(piece)
    output.close({})
    return path


@pytest.fixture(scope="module")
def frames():
    return Shapes("train", 50, size_THW=(9, 48, 64))[3].frames_THWC


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
@pytest.mark.parametrize("which", ["note", "beside"])
def test_a_result_is_read_as_it_was_made(tmp_path, frames, suffix, which):
    """By the note in the file, or by the record beside it where a copy has lost its note."""
    path = saved(tmp_path / f"a{suffix}", frames)
    record = json.loads(beside(path).read_text())
    assert record["size"] == [48, 64] and record["upscale"] == 4
    if which == "note":
        beside(path).unlink()
    else:
        write_video(path, frames, 8, upscale=4)
    assert read_clip_frames(path)[0].shape == (9, 192, 256, 3)  # as players show it
    with open_video(path, made=True) as video:
        assert (video.info.height, video.info.width, video.info.frames) == (48, 64, 9)
        assert "made at 48x64 pixels and saved at 192x256: it is read at 48x64" in video.info.remarks[0]
        assert psnr(video.read(), frames) > (28 if suffix == ".gif" else 38)  # a gif has 256 colours
        assert video.read(2, 4, fit=lambda H, W: (H // 2, W // 2)).shape == (2, 24, 32, 3)


def test_odd_sides_lose_the_row_that_they_gained(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (5, 11, 13, 1), np.uint8).repeat(3, -1)
    frames = frames.repeat(3, 1).repeat(3, 2)  # 33x39
    for upscale in (1, 3):
        path = saved(tmp_path / f"{upscale}.mp4", frames, upscale)
        back, _ = read_clip_frames(path, made=True)
        assert back.shape == frames.shape and psnr(back, frames) > 30


def test_other_files_are_what_they_are(tmp_path, frames):
    """No record, a record of somebody else's, or one that the file no longer fits: it was cut or made smaller since."""
    write_video(tmp_path / "none.mp4", frames, 8, upscale=4)
    for name, note in {
        "text": "filmed at home",
        "theirs": json.dumps({"size": [48, 64], "upscale": 4}),
        "odd": json.dumps({"minisora": 1, "size": ["48", None], "upscale": True}),
        "zero": json.dumps({"minisora": 1, "size": [0, 0], "upscale": 4}),
    }.items():
        write_video(tmp_path / f"{name}.mp4", frames, 8, upscale=4, note=note)
    made = saved(tmp_path / "made.mp4", frames)
    with av.open(str(made)) as file:
        note = file.metadata["comment"]
    write_video(tmp_path / "smaller.mp4", frames, 8, upscale=2, note=note)
    shapes = {p.stem: read_clip_frames(p, made=True)[0].shape[1:3] for p in tmp_path.glob("*.mp4")}
    assert shapes.pop("made") == (48, 64) and shapes.pop("smaller") == (96, 128)
    assert set(shapes.values()) == {(192, 256)}, shapes


@pytest.mark.parametrize("task", ["image", "video", "extend", "transition", "mask", "loop"])
def test_a_job_takes_it_as_it_was_made(tmp_path, frames, task, caplog):
    caplog.set_level("INFO", "minisora")
    clip, still = str(saved(tmp_path / "a.mp4", frames)), str(saved(tmp_path / "a.png", frames[:1]))
    values = {
        "image": {"image": still},
        "video": {"video": clip, "strength": 0.5},
        "extend": {"video": clip, "extend": "forward"},
        "transition": {"video": clip, "transition": str(shutil.copy(clip, tmp_path / "b.mp4"))},
        "mask": {"video": clip, "mask": still},
        "loop": {"video": clip, "loop": True},
    }
    need = next(start(VideoPipeline.load(), Job(prompt=RED, **values[task]))[0])
    assert need.frames_THWC.shape[1:3] == (48, 64)
    assert "it is read at 48x64" in caplog.text


def test_a_data_set_of_results_has_their_size(tmp_path, frames):
    folder = tmp_path / "mine"
    folder.mkdir()
    saved(folder / "a.mp4", frames)
    (folder / "a.txt").write_text(RED)
    prepare(folder, tmp_path / "clips", workers=0)
    [clip] = open_clips(str(tmp_path / "clips"))
    assert clip.frames_THWC.shape == frames.shape and psnr(clip.frames_THWC, frames) > 38

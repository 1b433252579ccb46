"""A folder of good and broken files: every good clip is kept at its own size, every bad one named with its reason."""

import json
import os
import pickle

import av
import numpy as np
import pytest
from PIL import Image

from minisora_jax.curation.prepare import prepare
from minisora_jax.curation.stages import Curation, Drop, Sizes, clip_length, clips_of, crop_to_cells
from minisora_jax.io.retry import DataError
from minisora_jax.media.video import read_clip_frames
from minisora_jax.media.video_writer import write_video
from minisora_jax.sources.base import Folder, Media
from minisora_jax.sources.clips import Records
from minisora_jax.sources.skips import BadClip
from minisora_jax.sources.spec import open_source

GOOD = {  # name -> the clip's T, H, W, with cells of 8
    "alpha.png": (1, 16, 24, 3),
    "clip.mp4": (9, 32, 48, 3),
    "grey.gif": (5, 24, 16, 3),
    "long.webm": (13, 16, 16, 3),
    "odd.mp4": (5, 32, 40, 3),
    "sub/deep.mkv": (1, 16, 16, 3),
    "upper.MP4": (5, 16, 16, 3),
}
BAD = {
    "audio.mp4": "audio only",
    "directory.mp4": "unreadable file",
    "dangling.mp4": "unreadable file",
    "cut-head.mp4": "truncated",
    "cut-tail.mp4": "truncated",
    "cut.webm": "truncated",
    "cut.png": "truncated",
    "empty-caption.mp4": "empty caption",
    "empty.mp4": "empty file",
    "huge.png": "too large",
    "latin1.mp4": "caption not UTF-8",
    "latin1-row.mp4": "caption not UTF-8",
    "mute.mp4": "no caption",
    "pixel.png": "too small",
    "text.mp4": "not a video",
    "text.png": "not an image",
    "zero.avi": "zero frames",
    "old.rm": "unknown suffix",
    "orphan.txt": "caption without a clip",
    "gone.mp4": "caption without a clip",
    "captions.jsonl:2": "bad caption row",
}


def noise(T, H, W):
    return np.random.default_rng(0).integers(0, 255, (T, H, W, 3), dtype=np.uint8)


def write_raw(path, codec, frames, pix_fmt="yuv420p"):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        if not len(frames):
            container.start_encoding()
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def cut(source, target, share):
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * share)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    (folder / "sub").mkdir()
    rgba = np.full((16, 24, 4), 200, np.uint8)
    rgba[..., 3] = np.where(np.arange(24) < 12, 0, 255)
    Image.fromarray(rgba).save(folder / "alpha.png")
    write_video(folder / "clip.mp4", noise(11, 32, 48), 25)
    write_raw(folder / "grey.gif", "gif", noise(6, 24, 16), "gray")
    write_video(folder / "long.webm", noise(20, 16, 16), 8)
    write_raw(folder / "odd.mp4", "libx264", noise(5, 37, 47), "yuv444p")
    write_raw(folder / "sub/deep.mkv", "ffv1", noise(3, 16, 16), "bgr0")
    write_video(folder / "upper.mp4", noise(5, 16, 16), 8)
    os.rename(folder / "upper.mp4", folder / "upper.MP4")

    write_sound(folder / "audio.mp4")
    (folder / "directory.mp4").mkdir()
    (folder / "dangling.mp4").symlink_to(folder / "nowhere.mp4")
    cut(folder / "odd.mp4", folder / "cut-head.mp4", 0.6)  # its index stood at the end
    cut(folder / "clip.mp4", folder / "cut-tail.mp4", 0.6)  # its index stands at the start
    cut(folder / "long.webm", folder / "cut.webm", 0.4)
    cut(folder / "alpha.png", folder / "cut.png", 0.6)
    for name in ("empty-caption", "latin1", "latin1-row", "mute"):
        write_video(folder / f"{name}.mp4", noise(1, 16, 16), 8)
    (folder / "empty.mp4").touch()
    Image.new("RGB", (300, 200)).save(folder / "huge.png")
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    (folder / "text.mp4").write_text("this is no video\n" * 50)
    (folder / "text.png").write_text("this is no image\n" * 50)
    write_raw(folder / "zero.avi", "mpeg4", noise(0, 16, 16))
    (folder / "old.rm").write_bytes(b"rm")
    (folder / ".hidden.mp4").write_bytes(b"ignored")

    (folder / "orphan.txt").write_text("describes nothing")
    (folder / "clip.txt").write_text("\ufeffnoise,\n  and   more noise — 猫\n", encoding="utf-8")
    (folder / "empty-caption.txt").write_text(" \n")
    (folder / "latin1.txt").write_bytes("un café".encode("latin-1"))
    rows = [
        json.dumps({"file": "sub/deep.mkv", "caption": "deep noise"}),
        "{broken",
        '{"file": "gone.mp4", "caption": "x"}',
    ]
    (folder / "captions.jsonl").write_text("\n".join(rows) + "\n")
    others = [n for n in [*GOOD, *BAD] if (folder / n).suffix.lower() not in (".rm", ".txt")]
    others = [n for n in others if n not in ("clip.mp4", "sub/deep.mkv", "mute.mp4", "gone.mp4", "latin1.mp4")]
    others = [n for n in others if n != "empty-caption.mp4" and ":" not in n and n != "latin1-row.mp4"]
    table = "file,caption\n" + "".join(f'{n},"noise, in {n}"\n' for n in others)
    (folder / "captions.csv").write_bytes(table.encode() + "latin1-row.mp4,café\n".encode("latin-1"))
    return folder


OPTIONS = dict(max_frames=13, max_pixels=200 * 200)


def decode(media, sizes):
    [clip] = clips_of(media, Curation(sizes))
    return clip


def decoded(source):
    """(clips by name, reasons by name) of a source."""
    outcomes = [decode(source[i], Sizes(**OPTIONS)) for i in range(len(source))]
    skipped = {row["name"]: row["reason"] for row in source.report.skipped}
    skipped |= {o.name: o.reason for o in outcomes if isinstance(o, Drop)}
    return {o.name: o for o in outcomes if not isinstance(o, Drop)}, skipped


def test_good_clips_are_kept_and_bad_ones_named(folder):
    clips, skipped = decoded(open_source(folder))
    assert {name: clip.frames_THWC.shape for name, clip in clips.items()} == GOOD
    assert skipped == BAD
    assert clips["clip.mp4"].caption == "noise, and more noise — 猫" and clips["clip.mp4"].fps == 25
    assert clips["sub/deep.mkv"].caption == "deep noise" and clips["odd.mp4"].caption == "noise, in odd.mp4"
    assert (
        clips["alpha.png"].frames_THWC[0, :, :12].max() == 0 and clips["alpha.png"].frames_THWC[0, :, 12:].min() == 200
    )


def test_pixels_are_cut_and_never_resized(folder):
    clips, _ = decoded(open_source(folder))
    whole, _ = read_clip_frames(folder / "odd.mp4")
    np.testing.assert_array_equal(clips["odd.mp4"].frames_THWC, whole[:, 2:34, 3:43])
    np.testing.assert_array_equal(clips["sub/deep.mkv"].frames_THWC, noise(3, 16, 16)[:1])
    assert [clip_length(n) for n in (1, 4, 5, 16, 17)] == [1, 1, 5, 13, 17]
    assert crop_to_cells(noise(1, 100, 33), 16).shape == (1, 96, 32, 3)


def test_a_file_is_read_from_its_bytes_as_from_its_path(folder):
    for name in GOOD:
        path, sizes = folder / name, Sizes(**OPTIONS)
        one, other = (decode(Media(name, "", data), sizes) for data in (path, path.read_bytes()))
        np.testing.assert_array_equal(one.frames_THWC, other.frames_THWC)
        assert (one.fps, one.source, one.still, one.shortened) == (
            other.fps,
            other.source,
            other.still,
            other.shortened,
        )
    for name, reason in BAD.items():
        if (folder / name).is_file() and reason not in ("unknown suffix", "caption without a clip", "not an image"):
            one, other = (
                decode(Media(name, "", data), sizes) for data in (folder / name, (folder / name).read_bytes())
            )
            assert isinstance(one, Drop) == isinstance(other, Drop)
            assert isinstance(one, Drop) is False or one.reason == other.reason


def test_frames_are_media_too():
    frames = noise(7, 20, 30)
    clip = decode(Media("a", "b", frames, 12.0), Sizes(cell=8))
    np.testing.assert_array_equal(clip.frames_THWC, frames[:5, 2:18, 3:27])
    assert clip.fps == 12 and not clip.still and decode(Media("a", "b", frames[:1]), Sizes()).still
    assert decode(Media("a", "b", frames), Sizes()).reason == "no frame rate"
    assert decode(Media("a", "b", frames.astype(float), 12.0), Sizes()).reason == "not a video"


def test_a_pickled_folder_is_its_path_and_insists_on_its_contents(folder, tmp_path):
    source = open_source(folder)
    pickled = pickle.dumps(source)
    assert len(pickled) < 500
    again = pickle.loads(pickled)
    assert [again[i] for i in range(len(again))] == [source[i] for i in range(len(source))]
    assert again.identity == source.identity != open_source(folder, need_caption=False).identity
    write_video(tmp_path / "a.mp4", noise(5, 16, 16), 8)
    (tmp_path / "a.txt").write_text("one")
    pickled = pickle.dumps(open_source(tmp_path))
    (tmp_path / "a.txt").write_text("another")
    with pytest.raises(RuntimeError, match="has changed since this run began"):
        pickle.loads(pickled)


def test_the_report_reads_well_and_is_written(folder, tmp_path):
    report = prepare(folder, tmp_path / "out", **OPTIONS)
    text = report.summary()
    assert text.startswith(f"{len(GOOD)} clips kept, {len(BAD)} skipped: 4 truncated (")
    assert "1 audio only (audio.mp4)" in text
    report.write(tmp_path / "skipped.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert {row["name"]: row["reason"] for row in rows} == BAD
    small = next(row for row in rows if row["reason"] == "too small")
    assert small["detail"] == "1x1 pixels; a cell is 8x8" and small["stage"] == "probe"


def test_strict_stops_at_the_first_bad_file(folder):
    with pytest.raises(BadClip, match="captions.jsonl:2: bad caption row"):
        open_source(folder, strict=True)


def test_captions_may_be_left_out(folder):
    names = dict(Folder(folder, need_caption=False).entries)
    assert names["mute.mp4"] == "" and names["empty-caption.mp4"] == "" and "latin1.mp4" not in names


def test_options_are_checked(folder, tmp_path):
    with pytest.raises(ValueError, match=r"max_frames=16 must be 1 \+ 4\*k; use 13 or 17"):
        Sizes(max_frames=16)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        open_source(tmp_path / "nowhere")


def test_preparing_a_folder_keeps_pixels_and_the_report(folder, tmp_path):
    report = prepare(folder, tmp_path / "out", shard_bytes=30_000, **OPTIONS)
    wanted, skipped = decoded(open_source(folder))
    prepared = Records(tmp_path / "out")
    assert [clip.name for clip in prepared] == list(wanted)
    for clip, found in zip(wanted.values(), prepared, strict=True):
        np.testing.assert_array_equal(found.frames_THWC, clip.frames_THWC)
        assert (found.caption, found.fps) == (clip.caption, clip.fps)
    assert {row["name"]: row["reason"] for row in report.skipped} == skipped
    assert prepare(folder, tmp_path / "out", shard_bytes=30_000, **OPTIONS).summary() == report.summary()


def test_an_interrupted_preparation_loses_and_repeats_nothing(folder, tmp_path, monkeypatch):
    options = dict(shard_bytes=3_000, files_per_part=4, **OPTIONS)
    prepare(folder, tmp_path / "whole", **options)
    get, calls = Folder.__getitem__, []

    def preempted(self, i):
        calls.append(i)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return get(self, i)

    monkeypatch.setattr(Folder, "__getitem__", preempted)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, tmp_path / "cut", **options)
    with pytest.raises(DataError, match="did not finish"):
        Records(tmp_path / "cut")
    with pytest.raises(DataError, match="max_frames=13; this one has max_frames=9"):
        prepare(folder, tmp_path / "cut", **(options | {"max_frames": 9}))
    prepare(folder, tmp_path / "cut", **options)
    assert calls[15] == 12, "the three finished parts of four files are kept"
    files = lambda name: {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}
    assert files("cut") == files("whole")


def test_a_folder_without_a_good_clip_is_an_error(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.mp4").touch()
    (tmp_path / "in/a.txt").write_text("a caption")
    with pytest.raises(DataError, match="no good clip: 0 clips kept, 1 skipped: 1 empty file"):
        prepare(tmp_path / "in", tmp_path / "out")


OLDER = {"tape.mpg": "mpeg2video", "camera.ts": "libx264", "old.wmv": "msmpeg4v3", "web.flv": "flv"}


@pytest.mark.parametrize("name", OLDER)
def test_films_of_older_kinds_are_clips(tmp_path, name):
    frames = noise(9, 32, 48)
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(OLDER[name], rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    clips, skipped = decoded(open_source(tmp_path, need_caption=False))
    assert not skipped and [clip.frames_THWC.shape for clip in clips.values()] == [(9, 32, 48, 3)]

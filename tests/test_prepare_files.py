"""One file's fault is that file's, sizes that are asked for, linked folders, and names that attack a terminal."""

import json
import os
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minisora_jax.cli import main
from minisora_jax.curation.prepare import prepare
from minisora_jax.io.filesystem import printable
from minisora_jax.media.video_writer import write_video
from minisora_jax.sources.clips import Records
from minisora_jax.sources.spec import open_source

CASES = Path(__file__).parent / "cases"


def clip(T=9, H=64, W=96):
    ramp = np.add.outer(np.arange(H), np.arange(W))[..., None] + np.array([0, 40, 80])
    return np.stack([(ramp + 5 * t) % 256 for t in range(T)]).astype(np.uint8)


def names_of(folder):
    return sorted(record.name for record in (Records(folder)[i] for i in range(len(Records(folder)))))


def test_every_case_is_kept_or_named(tmp_path):
    """The whole folder of cases through one run: what cannot be a clip is named, and nothing ends the run."""
    report = prepare(CASES, tmp_path / "out", need_caption=False)
    files = {path.name for path in CASES.iterdir()}
    assert {row["name"]: row["reason"] for row in report.skipped} == {"song_with_cover.mp4": "audio only"}
    assert set(names_of(tmp_path / "out")) == files - {"song_with_cover.mp4"}


def test_whatever_a_library_raises_skips_its_file(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(4):
        write_video(folder / f"{i}.mp4", clip(5), 8)
    errors = iter([KeyError("x"), zlib.error("y"), struct.error("z"), None])

    def measure(*args):
        if error := next(errors):
            raise error
        return {}, "", ""

    monkeypatch.setattr("minisora_jax.curation.stages.measure", measure)
    report = prepare(folder, tmp_path / "out", need_caption=False)
    assert report.kept == 1 and report.counts == {"unexpected error": 3}
    assert [row["detail"] for row in report.skipped] == ["KeyError: 'x'", "error: y", "error: z"]


def test_damaged_rows_and_notes_of_parquet_cost_no_more_than_themselves(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    write_video(tmp_path / "a.mp4", clip(5), 8)
    data = (tmp_path / "a.mp4").read_bytes()
    texts = pa.array([b"a good one", b"\xff\xfe bad", b"another"]).view(pa.string())
    for name, notes in {"a": b"{broken", "b": b"[1]", "c": b'{"info": {"features": 7}}'}.items():
        table = pa.table({"video": [data, b"no video", data], "caption": texts})
        parquet.write_table(table.replace_schema_metadata({b"huggingface": notes}), tmp_path / f"{name}.parquet")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 this is none PAR1")
    report = prepare(f"{tmp_path}/*.parquet", tmp_path / "out")
    assert report.kept == 6 and report.counts == {"caption not UTF-8": 3, "unreadable file": 1}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_as_clips_captions_and_tables_are_named_at_once(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write_video(folder / "good.mp4", clip(5), 8)
    (folder / "good.txt").write_text("a good clip")
    write_video(folder / "piped.mp4", clip(5), 8)
    for name in ("piped.txt", "captions.jsonl", "metadata.csv", "pipe.mp4", "manifest.json"):
        os.mkfifo(folder / name)
    (folder / "pipe.txt").write_text("a pipe")
    os.mkfifo(tmp_path / "a.tar")
    done = []

    def run():
        done.append(prepare(folder, tmp_path / "out"))
        done.append(open_source(tmp_path / "a.tar"))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert len(done) == 2 and done[0].kept == 1, "it hangs"
    assert done[1].report.counts == {"unreadable file": 1} and "a named pipe" in done[1].report.skipped[0]["detail"]
    assert {row["name"]: row["reason"] for row in done[0].skipped} == {
        "captions.jsonl": "unreadable caption",
        "manifest.json": "unknown suffix",
        "metadata.csv": "unreadable caption",
        "piped.mp4": "unreadable caption",
        "pipe.mp4": "unreadable file",
    }


def test_linked_folders_are_followed_and_circles_named(tmp_path):
    folder = tmp_path / "in"
    (folder / "real").mkdir(parents=True)
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    write_video(folder / "real/a.mp4", clip(5), 8)
    write_video(tmp_path / "elsewhere/deep/b.mp4", clip(5), 8)
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "again").symlink_to(folder / "real")  # its files are listed by their own names
    (folder / "real/up").symlink_to(folder)
    (folder / "self").symlink_to(folder / "self")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "elsewhere")
    source = open_source(folder, need_caption=False)
    assert [source[i].name for i in range(len(source))] == ["link/deep/b.mp4", "real/a.mp4"]
    assert {row["name"]: row["reason"] for row in source.report.skipped} == {
        "real/up": "unreadable folder",
        "self": "unknown suffix",
    }


def test_captions_of_an_editor_of_windows_are_read(tmp_path):
    for name in ("a", "b"):
        write_video(tmp_path / f"{name}.mp4", clip(5), 8)
    (tmp_path / "a.txt").write_bytes("\ufeffun café\r\n".encode("utf-16-le"))
    (tmp_path / "captions.csv").write_bytes("\ufefffile,caption\r\nb.mp4,日本\r\n".encode("utf-16-be"))
    source = open_source(tmp_path)
    assert [source[i].caption for i in range(len(source))] == ["un café", "日本"] and not source.report.counts


def test_a_picture_of_a_camera_of_two_lenses_is_a_clip(tmp_path):
    first, second = (Image.fromarray(frame) for frame in clip(2))
    first.save(tmp_path / "DSCF1.MPO", save_all=True, append_images=[second])
    prepare(tmp_path, tmp_path / "out", need_caption=False)
    assert names_of(tmp_path / "out") == ["DSCF1.MPO"] and len(Records(tmp_path / "out")[0].frames_THWC) == 1


def test_size_rate_and_compression_that_are_asked_for(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 60, (33, 256, 384, 3), dtype=np.uint8)
    write_video(folder / "fast.mp4", clip(33, 256, 384) // 2 + noise, 32)
    write_video(folder / "slow.mp4", clip(5, 48, 64), 4)
    Image.fromarray(clip(1, 200, 100)[0]).save(folder / "photo.png")
    settings = dict(need_caption=False, max_side=192, fps=8)
    prepare(folder, tmp_path / "plain", **settings)
    report = prepare(folder, tmp_path / "small", **settings, crf=12)
    for name in ("plain", "small"):
        clips = {c.name: c for c in (Records(tmp_path / name)[i] for i in range(3))}
        shapes = {key: (c.frames_THWC.shape, c.fps) for key, c in clips.items()}
        assert shapes == {
            "fast.mp4": ((5, 128, 192, 3), 8),  # 8 of its 33 frames in a second, cut to 1 + 4k
            "slow.mp4": ((5, 48, 64, 3), 4),
            "photo.png": ((1, 192, 96, 3), 8),
        }
        np.testing.assert_array_equal(Records(tmp_path / name).sizes[:, :3].max(0), (5, 192, 192))
    plain, small = (Records(tmp_path / name)[0].frames_THWC.astype(int) for name in ("plain", "small"))
    assert 0 < np.abs(plain - small).mean() < 12 and report.bytes < sum(
        p.stat().st_size for p in (tmp_path / "plain").glob("*.array_record")
    )
    again = prepare(folder, tmp_path / "again", **settings, crf=12)
    shards = [sorted((tmp_path / name).glob("*.array_record")) for name in ("small", "again")]
    assert [p.read_bytes() for p in shards[0]] == [p.read_bytes() for p in shards[1]] and again.bytes == report.bytes
    with pytest.raises(ValueError, match="crf=99 must be 0 to 51"):
        prepare(folder, tmp_path / "x", crf=99)
    with pytest.raises(ValueError, match="max_side=4 must be at least one cell, 8 pixels"):
        prepare(folder, tmp_path / "x", max_side=4)


def test_a_word_is_said_where_the_data_set_is_much_larger(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (1, 64, 64, 3), dtype=np.uint8).repeat(17, axis=0)
    write_video(tmp_path / "in/a.mp4", noise, 8)
    assert main(["prepare", f"{tmp_path}/in", f"{tmp_path}/out", "--no-captions", "--workers", "0"]) == 0
    out = capsys.readouterr().out
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["bytes"][0] == (tmp_path / "in/a.mp4").stat().st_size
    assert ("--crf make it smaller" in out) == (manifest["bytes"][1] > 3 * manifest["bytes"][0])


def test_a_clip_beyond_the_budget_is_refused_by_its_header(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    write_video(tmp_path / "in/a.mp4", clip(9, 128, 128), 8)
    write_video(tmp_path / "in/b.mp4", clip(9, 32, 32), 8)
    monkeypatch.setattr("minisora_jax.media.video.MAX_BYTES", 5 * 128 * 128 * 3)
    report = prepare(tmp_path / "in", tmp_path / "out", need_caption=False)
    assert report.counts == {"too large": 1} and "9 frames of 128x128 of a.mp4 take" in report.skipped[0]["detail"]
    assert prepare(tmp_path / "in", tmp_path / "out2", need_caption=False, max_side=64).kept == 2


def test_names_with_control_codes_do_not_reach_the_terminal(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    write_video(folder / "a.mp4", clip(5), 8)
    for name in ("\x1b[2J\x1b]0;owned\x07.mp4", "\u202etxt.mp4", "line\nbreak.mp4"):
        (folder / name).write_bytes(b"nothing")
    assert main(["prepare", str(folder), f"{tmp_path}/out", "--no-captions", "--workers", "0"]) == 0
    text = capsys.readouterr()
    assert not {"\x1b", "\x07", "\u202e"} & set(text.out + text.err) and "\\x1b[2J" in text.out
    assert main(["generate", "x", "--video", "\x1b[31mred.mp4", "--strength", "0.5", "--out", f"{tmp_path}/g"]) == 2
    assert "\x1b" not in capsys.readouterr().err
    assert printable("a 猫\u3000\x9b1\ud800") == "a 猫\u3000\\x9b1\\ud800"


def test_a_share_that_holds_nothing_out_is_said(tmp_path, caplog):
    for i in range(3):
        write_video(tmp_path / f"{i}.mp4", clip() + np.uint8(i), 8)
    prepare(tmp_path, tmp_path / "out", need_caption=False, held_out=0.01)
    assert "none of 3 clips is held out" in caplog.text and not (tmp_path / "out/heldout").exists()

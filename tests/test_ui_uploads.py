"""Files from strangers: good ones are renamed, each kind of bad one gets its sentence and leaves nothing behind."""

import os
import struct
import subprocess
import sys
import zipfile
import zlib

import av
import numpy as np
import pytest
from PIL import Image

from minisora_jax.media.video_writer import write_video
from minisora_jax.ui import show
from minisora_jax.ui.uploads import MOST_BYTES, InvalidInput, validate_upload

LONG = np.zeros((601, 16, 16, 3), np.uint8)
GREY = np.full((5, 32, 48, 3), 120, np.uint8)
NOISE = np.random.default_rng(0).integers(0, 255, (24, 64, 64, 3), dtype=np.uint8)


def png_header(path, width, height):
    """A png that says it is so large, and has a row."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b""))


def cut(path, frames, share):
    write_video(path, frames, 8)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def sound(path, container):
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream("aac" if container == "mp4" else "pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())


def no_frames(path):
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        file.start_encoding()


def damaged(path, frames):
    """Wrong bytes in its middle."""
    write_video(path, frames, 8)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 600] = bytes(600)
    path.write_bytes(bytes(data))


def zipped(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.txt", "hello")


SVG = b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
BAD = {  # name -> (how it is made, where it is put, what is said of it)
    "empty.mp4": (lambda p: p.write_bytes(b""), "video", "empty.mp4 is empty"),
    "text.mp4": (lambda p: p.write_text("hello " * 40), "video", "text.mp4 is text; choose a video"),
    "umlaut.png": (lambda p: p.write_text("ü" * 300), "picture", "umlaut.png is text; choose a picture"),
    "bytes.mp4": (lambda p: p.write_bytes(bytes(range(256))), "video", "is of an unknown type"),
    "cut.mp4": (lambda p: cut(p, NOISE, 0.5), "video", "cut.mp4 stops before its end"),
    "head.mp4": (lambda p: cut(p, NOISE, 0.01), "video", "head.mp4 stops before its end"),
    "cut.webm": (lambda p: cut(p, NOISE, 0.6), "video", "cut.webm stops before its end"),
    "cut.gif": (lambda p: cut(p, NOISE, 0.6), "video", "cut.gif stops before its end"),
    "cut.png": (lambda p: cut(p, NOISE[:1], 0.5), "picture", "cut.png stops before its end"),
    "damaged.png": (lambda p: damaged(p, NOISE[:1]), "picture", "damaged.png is damaged"),
    "wrong.png": (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)), "picture", "is no readable picture"),
    "wrong.jpg": (lambda p: p.write_bytes(b"\xff\xd8\xff" + bytes(99)), "picture", "is no readable picture"),
    "sound.mp4": (lambda p: sound(p, "mp4"), "video", "sound.mp4 has sound and no picture"),
    "sound.wav": (lambda p: sound(p, "wav"), "video", "sound.wav is a sound file; choose a video"),
    "bomb.png": (lambda p: png_header(p, 60000, 60000), "picture", "too large"),
    "huge.png": (lambda p: png_header(p, 5000, 5000), "picture", "5000 x 5000 pixels: make it smaller"),
    "dot.png": (lambda p: Image.new("RGB", (1, 1)).save(p), "picture", "1 x 1 pixels: it needs at least 8 a side"),
    "thin.png": (lambda p: Image.new("RGB", (400, 10)).save(p), "picture", "more than 8 times the other"),
    "long.mp4": (lambda p: write_video(p, LONG, 8), "video", "the limit is 600 frames"),
    "long.webm": (lambda p: write_video(p, LONG, 8), "video", "the limit is 600 frames"),
    "fast.mp4": (lambda p: write_video(p, GREY, 1000), "video", "has 1e+03 frames per second"),
    "none.gif": (lambda p: p.write_bytes(b"GIF89a\x10\0\x10\0\0\0\0;"), "video", "none.gif"),
    "zero.avi": (no_frames, "video", "zero.avi has no frame in it"),
    "drawing.svg": (lambda p: p.write_bytes(SVG), "picture", "drawing.svg is an SVG drawing; choose a picture"),
    "page.html": (lambda p: p.write_text("<!doctype html><b>hi"), "video", "page.html is a web page"),
    "packed.zip": (zipped, "video", "packed.zip is a zip archive"),
    "letter.pdf": (lambda p: p.write_bytes(b"%PDF-1.7 "), "picture", "letter.pdf is a PDF"),
    "phone.heic": (lambda p: p.write_bytes(b"\0\0\0\x18ftypheic" + bytes(80)), "picture", "a HEIC picture; choose"),
    "program.mp4": (lambda p: p.write_bytes(b"\x7fELF" + bytes(80)), "video", "program.mp4 is a program"),
    "list.mp4": (lambda p: p.write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"), "video", "is a playlist"),
    "concat.mp4": (lambda p: p.write_text("ffconcat version 1.0\nfile /etc/passwd\n"), "video", "is text"),
    "clip.png": (lambda p: write_video(p.with_suffix(".mp4"), GREY, 8) or os.rename(p.with_suffix(".mp4"), p),
                 "picture", "clip.png is a video; choose a picture"),
    "photo.mp4": (lambda p: Image.new("RGB", (32, 32)).save(p, "png"), "video", "is a picture; choose a video"),
    "large.mp4": (lambda p: p.write_bytes(b"") or os.truncate(p, MOST_BYTES + 1), "video", "the limit is 64 MiB"),
    "folder.mp4": (lambda p: p.mkdir(), "video", "folder.mp4 was not uploaded here"),
    "gone.mp4": (lambda p: None, "video", "gone.mp4 was not uploaded here"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_upload_gets_its_sentence(tmp_path, name):
    make, kind, words = BAD[name]
    sent, ours = tmp_path / "sent", tmp_path / "ours"
    sent.mkdir()
    make(sent / name)
    with pytest.raises(InvalidInput) as refused:
        validate_upload(str(sent / name), kind, sent, ours)
    message = str(refused.value)
    assert words in message and name in message and str(tmp_path) not in message
    assert "\n" not in message and len(message) < 200
    assert not ours.exists() or not list(ours.iterdir())


def test_good_files_are_named_by_what_they_hold(tmp_path):
    sent, ours = tmp_path / "sent", tmp_path / "ours"
    sent.mkdir()
    for suffix in (".mp4", ".webm", ".gif"):
        write_video(sent / f"a{suffix}", GREY, 8)
    os.rename(sent / "a.webm", sent / "b.mp4")  # what a browser's user calls it is not what it is
    Image.new("RGB", (33, 47)).save(sent / "odd.jpg")
    for name, kind, (frames, height, width), suffix in (
        ("a.mp4", "video", (5, 32, 48), ".mp4"),
        ("b.mp4", "video", (5, 32, 48), ".webm"),
        ("a.gif", "video", (5, 32, 48), ".gif"),
        ("odd.jpg", "picture", (1, 47, 33), ".jpg"),
        ("odd.jpg", "mask", (1, 47, 33), ".jpg"),
        ("a.mp4", "mask", (5, 32, 48), ".mp4"),
    ):
        checked = validate_upload(str(sent / name), kind, sent, ours)
        assert (checked.frames, checked.height, checked.width) == (frames, height, width)
        assert os.path.dirname(checked.path) == str(ours) and checked.path.endswith(suffix)
        assert checked.thumbnail[8:12] == b"WEBP" and f"{width} x {height} pixels" in checked.description
    assert len(list(ours.iterdir())) == 4  # what is sent twice is kept once


def test_only_what_was_uploaded_is_taken(tmp_path):
    """Neither a path from elsewhere, nor one that climbs out, nor a link that leads out."""
    sent = tmp_path / "sent"
    (sent / "in").mkdir(parents=True)
    secret = tmp_path / "secret.png"
    Image.new("RGB", (32, 32)).save(secret)
    os.symlink(secret, sent / "link.png")
    for path in ("/etc/passwd", str(secret), f"{sent}/../secret.png", f"{sent}/in/../../secret.png",
                 f"{sent}/link.png", "../../etc/passwd", "secret.png", f"{sent}/a\0.png", "", str(sent),
                 f"{tmp_path}/sent-not/a.png"):  # fmt: skip
        with pytest.raises(InvalidInput, match="was not uploaded here"):
            validate_upload(path, "picture", sent, tmp_path / "ours")


@pytest.mark.parametrize("name", ["a\nb.png", "<b>x.png", "\u202egnp.exe.png", "é" * 80 + ".png", "${1}{{2}}.png"])
def test_odd_names_do_no_harm(tmp_path, name):
    Image.new("RGB", (32, 32)).save(tmp_path / name)
    assert validate_upload(str(tmp_path / name), "picture", tmp_path, tmp_path / "ours").frames == 1
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(InvalidInput) as refused:
        validate_upload(str(tmp_path / name), "picture", tmp_path, tmp_path / "ours")
    panel = show.error(str(refused.value))
    assert len(str(refused.value)) < 80 and "\n" not in panel and "\u202e" not in panel
    assert "<b>" not in panel and "${" not in panel and "{{" not in panel


def test_a_name_that_is_no_text_is_taken(tmp_path):
    name = os.fsdecode(b"\xff\xfe.png")
    Image.new("RGB", (32, 32)).save(os.path.join(tmp_path, "a.png"))
    os.rename(tmp_path / "a.png", tmp_path / name)
    assert validate_upload(str(tmp_path / name), "picture", tmp_path, tmp_path / "ours").width == 32


def test_without_gradio_the_command_says_what_to_install():
    hide = "find, util.find_spec = util.find_spec, lambda n, *a: None if n == 'gradio' else find(n, *a)"
    script = (
        f"import sys; from importlib import util; {hide}; from minisora_jax.cli import main; sys.exit(main(['ui']))"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 2 and "uv sync --extra ui" in ended.stderr
    assert "Traceback" not in ended.stderr

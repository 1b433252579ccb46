"""Media as players show it: time, aspect, orientation, colour, streams; and files that attack."""

import io
import os
import socket
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from minisora_jax.media.colour import ByLight
from minisora_jax.media.container import _deinterlaced
from minisora_jax.media.picture import Picture
from minisora_jax.media.sniff import Format, sniff
from minisora_jax.media.video import STILL_FPS, VideoError, open_video, probe, read_clip_frames
from minisora_jax.media.video_writer import write_video

CASES = Path(__file__).parent / "cases"


def squares(T=9, H=48, W=64, step=4):
    """A bright square moving right; its left edge is `step` t."""
    frames = np.full((T, H, W, 3), 30, np.uint8)
    for t in range(T):
        frames[t, 12:28, step * t : step * t + 16] = (220, 60, 40)
    return frames


def left_edges(frames):
    return [int(np.argmax(frame[20, :, 0] > 125)) for frame in frames]


def write(path, frames, *, codec="ffv1", pix_fmt="bgr0", stamps=None, rate=8, options=None, prepare=None, **container):
    """Frames at time stamps in 1/1000 s."""
    with av.open(str(path), "w", **container) as file:
        stream = file.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        if stamps is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if prepare:
            prepare(stream)
        for t, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if stamps is not None:
                frame.pts, frame.time_base = stamps[t], Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


# ---- Time


@pytest.mark.parametrize("name", ["pause.mp4", "pause.webm"])
def test_a_pause_is_shown_as_a_pause(name):
    """25 frames in 5 s, of which a player holds one for 4 s."""
    frames, fps = read_clip_frames(CASES / name)
    assert fps == pytest.approx(5) and len(frames) == 25
    moves = np.abs(np.diff(frames.astype(int), axis=0)).mean((1, 2, 3)) > 0.5
    still = max(len(run) for run in "".join("m" if m else "s" for m in moves).split("m"))
    assert 17 <= still <= 21, "the pause of about 4 s, at 5 frames per second"


def test_the_last_frames_own_duration_counts():
    frames, fps = read_clip_frames(CASES / "held_last.webm")
    assert len(frames) / fps == pytest.approx(5.96, abs=0.01)
    assert np.abs(frames[5:].astype(int) - frames[-1]).max() <= 3, "0.96 s of motion, 5 s of the last picture"


def test_frames_are_taken_by_their_stamps(tmp_path):
    """Of frames at 0, 100, 200, 300, 900, 1000 ms, about 1 s, a player shows number 3 for 0.6 s."""
    write(tmp_path / "a.mkv", squares(6), stamps=[0, 100, 200, 300, 900, 1000], rate=10)
    frames, fps = read_clip_frames(tmp_path / "a.mkv")
    assert fps == pytest.approx(6 / 1.1, rel=0.01)
    shown = [max(i for i, at in enumerate([0, 100, 200, 300, 900, 1000]) if at <= 1000 * k / fps + 2) for k in range(6)]
    assert left_edges(frames) == [4 * i for i in shown]
    part, _ = read_clip_frames(tmp_path / "a.mkv", start=2, max_frames=3)
    np.testing.assert_array_equal(part, frames[2:5])


@pytest.mark.parametrize("rate, source", [(4, [0, 2, 4, 6, 8, 10, 12, 14]), (16, [i // 2 for i in range(32)])])
def test_another_rate_keeps_the_speed(tmp_path, rate, source):
    write_video(tmp_path / "a.mp4", squares(16, W=96), 8)
    frames, fps = read_clip_frames(tmp_path / "a.mp4", fps=rate)
    assert fps == rate and left_edges(frames) == [4 * i for i in source]
    part, _ = read_clip_frames(tmp_path / "a.mp4", fps=rate, start=3, max_frames=2)
    np.testing.assert_array_equal(part, frames[3:5])


@pytest.mark.parametrize("suffix", [".webp", ".png"])
def test_animated_pictures_are_videos(tmp_path, suffix):
    frames, fps = read_clip_frames(CASES / "anim.webp")
    assert frames.shape == (25, 64, 96, 3) and fps == pytest.approx(10)
    images = [Image.fromarray(frame) for frame in squares(5)]
    images[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=images[1:], duration=200, lossless=True)
    frames, fps = read_clip_frames(tmp_path / f"a{suffix}")
    assert fps == pytest.approx(5)
    np.testing.assert_array_equal(frames, squares(5))


@pytest.mark.parametrize("sizes", [[(48, 64)] * 2, [(48, 64), (24, 32), (8, 8)], [(48, 64), *[(32, 32)] * 6]])
def test_a_jpeg_of_several_pictures_is_its_first(tmp_path, sizes):
    """Phones add gain maps and depth."""
    colours = [(200, 60, 40), (30, 30, 220)]
    first, *others = [Image.new("RGB", (W, H), colours[k > 0]) for k, (H, W) in enumerate(sizes)]
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=others, quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "MPO" and image.n_frames == len(sizes), "the case is what it is meant to be"
    data = (tmp_path / "a.jpg").read_bytes()
    at = data.index(b"MPF\0") + 4
    for file in (tmp_path / "a.jpg", data[: at + 8] + b"\xff" * 40 + data[at + 48 :]):  # and with a damaged list
        with open_video(file) as video:
            assert video.still and (video.info.frames, video.info.fps) == (1, STILL_FPS)
            frames = video.read()
        assert frames.shape == (1, 48, 64, 3) and np.abs(frames.astype(int) - colours[0]).max() <= 4


def test_one_frame_is_a_still_in_formats_of_animations(tmp_path):
    image, other = (Image.fromarray(frame) for frame in squares(5)[::4])
    image.save(tmp_path / "a.gif")
    image.save(tmp_path / "timed.gif", duration=5000)
    image.save(tmp_path / "a.webp", save_all=True, lossless=True, duration=40)
    other.save(tmp_path / "a.png", save_all=True, default_image=True, append_images=[image])  # `other` is not shown
    for name in ("a.gif", "timed.gif", "a.webp", "a.png"):
        with open_video(tmp_path / name) as video:
            assert video.still and (video.info.frames, video.info.fps, video.count(30)) == (1, STILL_FPS, 1)
            np.testing.assert_array_equal(video.read(), squares(1))


def test_an_animation_keeps_its_frame_size():
    """No format that is read today may change it; TIFF, read as an animation, does."""
    pages, file = [Image.new("RGB", size) for size in ((64, 48), (32, 32))], io.BytesIO()
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    picture = Picture(file.getvalue(), file, Format("a TIFF", pillow="TIFF", animates=True))
    with pytest.raises(VideoError, match=r"corrupt frames: .* midway: \[\(32, 32\), \(48, 64\)\]"):
        [pixels() for _, pixels in picture.frames(0.0, None)]


# ---- Space


def test_pixels_are_square():
    frames, _ = read_clip_frames(CASES / "anamorphic_sar.mp4")
    assert frames.shape == (25, 64, 96, 3) and probe(CASES / "anamorphic_sar.mp4").width == 96


def test_a_gif_keeps_its_pixels(tmp_path):
    write_video(tmp_path / "a.gif", squares(3), 8)
    data = bytearray((tmp_path / "a.gif").read_bytes())
    data[12] = 200  # its aspect field, (200 + 15) / 64
    (tmp_path / "a.gif").write_bytes(data)
    assert read_clip_frames(tmp_path / "a.gif")[0].shape == (3, 48, 64, 3)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("x", [1, -1])
@pytest.mark.parametrize("y", [1, -1])
def test_all_eight_orientations(tmp_path, transpose, x, y):
    """The point (x, y) of the stored picture is shown at (a x + c y, b x + d y): libavutil/display.h."""
    one = 1 << 16
    matrix = (
        (0, y * one, 0, x * one, 0, 0, 0, 0, 1 << 30) if transpose else (x * one, 0, 0, 0, y * one, 0, 0, 0, 1 << 30)
    )
    frames = squares(2)
    write(tmp_path / "a.mov", frames, codec="png", pix_fmt="rgb24",
          prepare=lambda stream: stream.set_display_matrix(matrix))  # fmt: skip
    shown = np.empty((2, 64, 48, 3) if transpose else frames.shape, np.uint8)
    H, W = shown.shape[1:3]
    for row in range(48):
        for column in range(64):
            p, q = (x * row, y * column) if transpose else (x * column, y * row)
            shown[:, q if q >= 0 and y > 0 else H - 1 + q, p if p >= 0 and x > 0 else W - 1 + p] = frames[
                :, row, column
            ]
    np.testing.assert_array_equal(read_clip_frames(tmp_path / "a.mov")[0], shown)
    assert (probe(tmp_path / "a.mov").height, probe(tmp_path / "a.mov").width) == (H, W)


@pytest.mark.parametrize("name, axis", [("hflip.mov", 2), ("vflip.mov", 1)])
def test_mirrored_matrices(name, axis):
    base, _ = read_clip_frames(CASES / "base.mp4")
    np.testing.assert_array_equal(read_clip_frames(CASES / name)[0], np.flip(base, axis))


def test_a_tiled_avif_is_whole():
    assert read_clip_frames(CASES / "grid.avif")[0].shape == (1, 512, 768, 3)


@pytest.mark.parametrize("name", ["bad_exif.png", "bad_exif.webp"])
def test_a_picture_with_broken_exif_is_used_as_it_is(name):
    assert read_clip_frames(CASES / name)[0].shape == (1, 64, 96, 3)


def test_frames_are_resized_as_they_are_decoded(tmp_path):
    write_video(tmp_path / "a.mp4", squares(3, H=96, W=128), 8)
    frames, _ = read_clip_frames(tmp_path / "a.mp4", fit=lambda H, W: (H // 2, W // 2))
    assert frames.shape == (3, 48, 64, 3)
    assert np.abs(frames[0, 8:12, 2:6].astype(int) - (220, 60, 40)).max() < 12


def test_interlaced_video_is_deinterlaced_and_said(tmp_path):
    """Two fields of different moments in one frame: its rows do not comb after reading."""
    fields = squares(16, W=160, step=8)
    woven = fields[::2].copy()
    woven[:, 1::2] = fields[1::2, 1::2]
    write(tmp_path / "a.mp4", woven, codec="libx264", pix_fmt="yuv420p", options={"x264-params": "tff=1", "crf": "4"})
    with open_video(tmp_path / "a.mp4") as video:
        assert any("interlaced" in remark for remark in video.info.remarks)
        frames = video.read()
    comb = lambda x: np.abs(x[:, 13:27:2].astype(int) - x[:, 12:26:2]).mean()
    assert len(frames) == 8 and comb(frames[2:6]) < 0.3 * comb(woven[2:6])


def test_fields_that_come_later_are_deinterlaced_too(tmp_path):
    """A stream whose first frames are progressive: those pass as they are, and none is lost."""
    frames = squares(12, W=160, step=8)
    woven = frames.copy()
    woven[:, 1::2] = np.roll(frames, -1, axis=0)[:, 1::2]
    write(tmp_path / "a.mp4", frames, codec="libx264", pix_fmt="yuv420p", options={"crf": "4"})
    options = {"x264-params": "tff=1", "crf": "4"}
    write(tmp_path / "b.mp4", woven, codec="libx264", pix_fmt="yuv420p", options=options)
    with av.open(str(tmp_path / "a.mp4")) as first, av.open(str(tmp_path / "b.mp4")) as then:
        mixed = [*first.decode(video=0)][:4] + [*then.decode(video=0)][4:]
        shown = list(_deinterlaced(iter(enumerate(mixed)), then.streams.video[0]))
        pixels = np.stack([frame.to_ndarray(format="rgb24") for _, frame in shown])
    comb = lambda x: np.abs(x[:, 13:27:2].astype(int) - x[:, 12:26:2]).mean()
    assert [stamp for stamp, _ in shown] == list(range(12))
    assert np.abs(pixels[:4].astype(int) - frames[:4]).mean() < 3 and comb(pixels[5:-1]) < 0.3 * comb(woven[5:-1])


# ---- Colour


def level(code, levels, full):
    """A code value of 8, 10 or 12 bits from 0 to 1."""
    scale = levels / 256
    return code * (levels - 1) if full else (16 + 219 * code) * scale


KR_KB = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 9: (0.2627, 0.0593)}


def encoded(path, rgb, *, matrix, bits=8, full=False, transfer=None, primaries=None):
    """A flat picture of non-linear RGB, 0 to 1, as planar YCbCr 4:4:4 of the standard's own equations."""
    kr, kb = KR_KB[matrix]
    r, g, b = rgb
    y = kr * r + (1 - kr - kb) * g + kb * b
    cb, cr = (b - y) / (2 * (1 - kb)), (r - y) / (2 * (1 - kr))
    levels, scale = 2**bits, 2 ** (bits - 8)
    chroma = lambda c: c * (levels - 1) + levels / 2 if full else (128 + 224 * c) * scale
    planes = [round(level(y, levels, full)), round(chroma(cb)), round(chroma(cr))]
    dtype = np.uint8 if bits == 8 else np.uint16
    frame = av.VideoFrame(32, 32, "yuv444p" if bits == 8 else f"yuv444p{bits}le")
    for plane, value in zip(frame.planes, planes):
        plane.update(np.full(plane.buffer_size // dtype().itemsize, min(max(value, 0), levels - 1), dtype).tobytes())
    with av.open(str(path), "w") as file:
        stream = file.add_stream("ffv1", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = frame.format.name
        context = stream.codec_context
        context.colorspace, context.color_range = matrix, 2 if full else 1
        if transfer:
            context.color_trc, context.color_primaries = transfer, primaries
        frame.colorspace, frame.color_range = matrix, 2 if full else 1
        file.mux(stream.encode(frame))
        file.mux(stream.encode())


COLOURS = [(0.9, 0.3, 0.2), (0.2, 0.7, 0.3), (0.2, 0.3, 0.8), (0.5, 0.5, 0.5), (1.0, 1.0, 1.0), (0.05, 0.05, 0.05)]


@pytest.mark.parametrize("matrix", [1, 5, 9])
@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("full", [False, True])
def test_matrix_range_and_depth_of_sdr(tmp_path, matrix, bits, full):
    for colour in COLOURS:
        encoded(tmp_path / "a.mkv", colour, matrix=matrix, bits=bits, full=full)
        frame = read_clip_frames(tmp_path / "a.mkv")[0][0]
        assert np.abs(frame.astype(int) - np.round(255 * np.array(colour)).astype(int)).max() <= 3


def light_to_bt709(light):
    """Display light over white (100 cd/m2) in BT.2020 -> levels of BT.709, by ITU-R BT.2087 and BT.1886."""
    to_709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])
    return np.round(255 * np.clip(to_709 @ np.asarray(light), 0, 1) ** (1 / 2.4))


def pq(light):
    """Non-linear PQ of light over 100 cd/m2 (SMPTE ST 2084)."""
    y = (np.asarray(light, float) / 100) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * y) / (1 + 2392 / 128 * y)) ** (2523 / 32)


@pytest.mark.parametrize(
    "light", [(1, 1, 1), (0.2, 0.2, 0.2), (0.5, 0.2, 0.1), (0.1, 0.4, 0.3), (4, 4, 4), (0.01,) * 3]
)
@pytest.mark.parametrize("transfer", [16, 18, 14])
def test_high_dynamic_range_becomes_standard(tmp_path, light, transfer):
    """PQ, HLG and SDR of BT.2020; also 400 cd/m2, which are clipped to white."""
    if transfer == 16:
        code = pq(light)
    elif transfer == 18:  # the scene's light E of the display's 1000 E^1.2
        scene = (np.asarray(light, float) / 10) ** (1 / 1.2)
        log = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
        code = np.where(scene <= 1 / 12, np.sqrt(3 * scene), log)
    else:
        code = np.clip(np.asarray(light, float), 0, 1) ** (1 / 2.4)
    encoded(tmp_path / "a.mkv", code, matrix=9, bits=10, transfer=transfer, primaries=9)
    frame = read_clip_frames(tmp_path / "a.mkv")[0][0]
    assert np.abs(frame.astype(int) - light_to_bt709(light)).max() <= 6, (frame[0, 0], light_to_bt709(light))


def test_hdr_video_is_as_its_sdr_source():
    """pq2020.mp4 is base.mp4 in HDR10: FFmpeg's zscale gives (255, 54, 53), (129, 129, 129), (255, 255, 55) here."""
    frame = read_clip_frames(CASES / "pq2020.mp4")[0][0].astype(int)
    for (row, column), zscale in {(2, 2): (255, 54, 53), (32, 48): (129, 129, 129), (60, 90): (255, 255, 55)}.items():
        assert np.abs(frame[row, column] - zscale).max() <= 6


# ---- Streams and names


def test_a_cover_picture_is_no_video():
    with pytest.raises(VideoError, match="audio only.*a cover picture"):
        probe(CASES / "song_with_cover.mp4")


@pytest.mark.parametrize("suffix, codec", [(".mkv", "mjpeg"), (".mov", "png"), (".avi", "mjpeg")])
@pytest.mark.parametrize("frames", [0, 1, 3], ids=["song", "film of one frame", "film"])
def test_a_picture_as_an_ordinary_track_is_no_video(tmp_path, suffix, codec, frames):
    """A cover of 96x96 without the flag of covers, before a smaller film or beside sound alone."""
    path = tmp_path / f"a{suffix}"
    with av.open(str(path), "w") as file:
        cover = file.add_stream(codec, rate=8)
        cover.height, cover.width, cover.pix_fmt = 96, 96, "yuvj420p" if codec == "mjpeg" else "rgb24"
        film = file.add_stream("mpeg4", rate=8) if frames else file.add_stream("pcm_s16le", rate=48_000, layout="mono")
        if frames:
            film.height, film.width, film.pix_fmt = 48, 64, "yuv420p"
        file.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((96, 96, 3), np.uint8), format="rgb24")))
        for pixels in squares(frames):
            file.mux(film.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        if not frames:
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 48_000), np.int16), "s16", "mono")
            sound.sample_rate = 48_000
            file.mux(film.encode(sound))
        file.mux(cover.encode())
        file.mux(film.encode())
    with av.open(str(path)) as file:
        assert not any(v.disposition & av.stream.Disposition.attached_pic for v in file.streams.video)
    if not frames:
        with pytest.raises(VideoError, match="audio only.*a cover picture"):
            probe(path)
        return
    info = probe(path)
    assert (info.frames, info.height, info.width, info.remarks) == (frames, 48, 64, ())


def test_films_of_picture_codecs_stay_films(tmp_path):
    write(tmp_path / "a.mkv", squares(3), codec="mjpeg", pix_fmt="yuvj420p")
    write(tmp_path / "b.mkv", squares(1), codec="mjpeg", pix_fmt="yuvj420p")
    assert [probe(tmp_path / name).frames for name in ("a.mkv", "b.mkv")] == [3, 1]
    with av.open(str(tmp_path / "c.avi"), "w") as file:  # as cameras wrote it
        film, audio = file.add_stream("mjpeg", rate=8), file.add_stream("pcm_s16le", rate=48_000, layout="mono")
        film.height, film.width, film.pix_fmt = 48, 64, "yuvj420p"
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 18_000), np.int16), "s16", "mono")
        sound.sample_rate = 48_000
        file.mux(audio.encode(sound))
        for pixels in squares(3):
            file.mux(film.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(film.encode())
    assert probe(tmp_path / "c.avi").frames == 3


def test_sound_files_and_heic_are_named(tmp_path):
    (tmp_path / "song.mp4").write_bytes(b"\0\0\0\x20ftypM4A \0\0\0\0" + bytes(99))
    (tmp_path / "song.mkv").write_bytes(b"ID3\4" + bytes(99))
    for name in ("song.mp4", "song.mkv"):
        with pytest.raises(VideoError, match="audio only: .* is a sound file"):
            probe(tmp_path / name)
    for name in ("photo.heic", "photo.jpg", "photo.mp4"):
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99))
        with pytest.raises(VideoError, match="not an image: .* is a HEIC picture: convert it to JPEG or PNG"):
            probe(tmp_path / name)


@pytest.mark.parametrize("name", ["TIFF", "JPEG 2000", "icon", "Netpbm", "DirectDraw", "QOI"])
def test_pictures_of_other_formats_are_named(tmp_path, name):
    suffix = {"TIFF": "tif", "JPEG 2000": "jp2", "icon": "ico", "Netpbm": "ppm", "DirectDraw": "dds", "QOI": "qoi"}[
        name
    ]
    Image.fromarray(squares(1)[0]).save(tmp_path / f"a.{suffix}")
    Image.fromarray(squares(1)[0]).save(tmp_path / "b.j2k")
    assert sniff((tmp_path / "b.j2k").read_bytes()).name == "a JPEG 2000 picture"  # without a box around it
    for path in (tmp_path / f"a.{suffix}", tmp_path / "a.mp4", tmp_path / "a.jpg"):
        path.write_bytes((tmp_path / f"a.{suffix}").read_bytes())
        with pytest.raises(VideoError, match=f"not an image: .* is .*{name}.*: convert it to JPEG or PNG"):
            probe(path)


SOUNDS = {"aiff": "pcm_s16be", "au": "pcm_s16be", "caf": "pcm_s16be", "ac3": "ac3", "wav": "pcm_s16le", "tta": "tta",
          "w64": "pcm_s16le", "rf64": "pcm_s16le", "mp3": "mp3", "mp2": "mp2", "adts": "aac", "flac": "flac",
          "ipod": "aac", "wv": "wavpack", "ogg": "libopus", "mka": "aac", "mp4": "aac", "asf": "wmav2"}  # fmt: skip


@pytest.mark.parametrize("kind", SOUNDS)
def test_sound_is_called_sound(tmp_path, kind):
    options = {"rf64": "always"} if kind == "rf64" else {}
    container = {"rf64": "wav", "mka": "matroska"}.get(kind, kind)
    for name in ("a.mp4", "a.png"):
        with av.open(str(tmp_path / name), "w", format=container, options=options) as file:
            stream = file.add_stream(SOUNDS[kind], rate=48_000, layout="stereo", bit_rate=128_000)
            resampler = av.AudioResampler(stream.codec_context.format.name, "stereo", 48_000, stream.frame_size or 1024)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 19_200), np.int16), "s16", "stereo")
            frame.sample_rate = 48_000
            for block in [*resampler.resample(frame), *resampler.resample(None)]:
                file.mux(stream.encode(block))
            file.mux(stream.encode())
        with pytest.raises(VideoError, match="audio only"):
            probe(tmp_path / name)


def test_stamps_that_give_no_rate_are_damage(tmp_path):
    write(tmp_path / "a.mkv", squares(3), stamps=[0, 10**9, 2 * 10**9], rate=10)
    with pytest.raises(VideoError, match="not a video: .*it shows 3 frames in 2e"):
        probe(tmp_path / "a.mkv")


def test_of_several_streams_the_largest_is_read_and_said(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as file:
        streams = []
        for H, W in ((32, 48), (64, 96), (16, 16)):
            stream = file.add_stream("ffv1", rate=8)
            stream.height, stream.width, stream.pix_fmt = H, W, "bgr0"
            streams.append(stream)
        for _ in range(3):
            for stream in streams:
                pixels = np.full((stream.height, stream.width, 3), 90, np.uint8)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        for stream in streams:
            file.mux(stream.encode())
    info = probe(tmp_path / "a.mkv")
    assert (info.height, info.width) == (64, 96) and "3 video streams: number 2, of 64x96" in info.remarks[0]


def test_content_tells_what_a_file_is_and_not_its_name(tmp_path):
    write_video(tmp_path / "a.mp4", squares(3), 8)
    (tmp_path / "a.mp4").rename(tmp_path / "video.png")
    Image.fromarray(squares(1)[0]).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "picture.mp4")
    write_video(tmp_path / "b.webm", squares(3), 8)
    (tmp_path / "b.webm").rename(tmp_path / "no-suffix")
    assert [probe(tmp_path / name).frames for name in ("video.png", "picture.mp4", "no-suffix")] == [3, 1, 3]
    (tmp_path / "text.mp4").write_text("this is no video")
    with pytest.raises(VideoError, match="not a video: .*text.mp4 is text"):
        probe(tmp_path / "text.mp4")


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".png"])
def test_names_that_look_like_protocols(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    folder = Path("2026-11-26T10:30")
    folder.mkdir()
    for path in (f"take:1{suffix}", f"data:{suffix}", folder / f"pipe:{suffix}"):
        write_video(path, squares(1), 8)
        assert Path(path).is_file() and read_clip_frames(path)[0].shape == (1, 48, 64, 3)


def test_a_broken_duration_tag_is_no_matter():
    assert read_clip_frames(CASES / "bad.webm")[0].shape == (25, 64, 96, 3)


# ---- Attacks


def test_text_never_makes_ffmpeg_read_or_connect(tmp_path):
    """Playlists, ffconcat, SDP and DASH, with the suffixes of videos; a demuxer would join the secret video."""
    write_video(tmp_path / "secret.mp4", squares(3), 8)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
        texts = {
            "hls.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n",
            "hls-file.webm": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path}/secret.mp4\n#EXT-X-ENDLIST\n",
            "concat.mkv": "ffconcat version 1.0\nfile secret.mp4\n",
            "a.mov": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
            "dash.avi": f'<?xml version="1.0"?><MPD><Period><BaseURL>{url}</BaseURL></Period></MPD>',
            "list.gif": f"[playlist]\nFile1={url}\n",
            "rtsp.mp4": f"[Reference]\nRef1={url}\n",
        }
        for name, text in texts.items():
            (tmp_path / name).write_text(text)
            for file in (tmp_path / name, text.encode()):
                with pytest.raises(VideoError, match="not a video"):
                    read_clip_frames(file)
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_and_devices_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    done = []

    def read():
        for path in (tmp_path / "a.mp4", "/dev/zero"):
            with pytest.raises(VideoError, match="a named pipe, not a plain file|a device, not a plain file"):
                probe(path)
        done.append(True)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(10)
    assert done, "it hangs"


def test_a_bomb_is_refused_by_its_header(tmp_path, monkeypatch):
    write_video(tmp_path / "a.webm", np.zeros((24, 256, 256, 3), np.uint8), 8)
    monkeypatch.setattr("minisora_jax.media.video.MAX_BYTES", 24 * 256 * 256 * 3 - 1)
    with pytest.raises(VideoError, match="too large: 24 frames of 256x256 of .*: take fewer frames, or a smaller size"):
        read_clip_frames(tmp_path / "a.webm")
    assert len(read_clip_frames(tmp_path / "a.webm", max_frames=20)[0]) == 20
    assert len(read_clip_frames(tmp_path / "a.webm", fit=lambda H, W: (64, 64))[0]) == 24
    for name in ("container", "picture"):
        monkeypatch.setattr(f"minisora_jax.media.{name}.MAX_PIXELS", 1000)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    for name in ("a.webm", "a.png"):
        with pytest.raises(VideoError, match="too large"):
            probe(tmp_path / name)


def test_signatures():
    heads = {
        b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miaf": "an AVIF picture",
        b"\0\0\0\x20ftypmif1\0\0\0\0mif1avifmiaf": "an AVIF picture",
        b"\0\0\0\x20ftypheic\0\0\0\0heicmif1": "a HEIC picture",
        b"\0\0\0\x20ftypmif1\0\0\0\0mif1heic": "a HEIC picture",
        b"ffconcat version 1.0\n": "text",
        b"#EXTM3U\n": "a playlist",
        b"  <svg xmlns='x'>": "an SVG drawing",
        b"\xff\xd8\xff\xe0": "a JPEG picture",
    }
    assert {head: sniff(head).name for head in heads} == heads


def test_wide_colour_is_converted_in_strips():
    """The strips of `ByLight` join without a seam."""
    pixels = np.repeat(np.arange(600, dtype=np.uint16)[:, None, None] * 100, 3, axis=2).repeat(4, axis=1)
    whole = ByLight.of(16, 9)(pixels)
    assert (np.diff(whole[:, 0].astype(int), axis=0) >= 0).all() and len(np.unique(whole)) > 100

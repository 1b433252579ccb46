"""What a job makes of the videos it is given: size, rate, mask, sound, memory, and odd names."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from minisora_jax.generate import VideoPipeline
from minisora_jax.jobs import starting
from minisora_jax.jobs.job import Job
from minisora_jax.jobs.sounds import sounds_of
from minisora_jax.media.sound import RATE, Sound, samples_of
from minisora_jax.media.video import probe, read_clip_frames
from minisora_jax.media.video_writer import VideoWriter, write_video

CASES = Path(__file__).parent / "cases"


@pytest.fixture(scope="module")
def pipeline():
    return VideoPipeline.load()


def tone(path, seconds, hertz, fps=8, side=48):
    """A grey video with a tone, from one channel."""
    with av.open(str(path), "w") as file:
        video, audio = file.add_stream("libx264", rate=fps), file.add_stream("aac", rate=44100)
        video.width = video.height = side
        video.pix_fmt, audio.codec_context.layout = "yuv420p", "mono"
        for _ in range(round(seconds * fps)):
            grey = np.full((side, side, 3), 100, np.uint8)
            file.mux(video.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        file.mux(video.encode())
        wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * 44100)) / 44100)
        frame = av.AudioFrame.from_ndarray(wave.astype(np.float32)[None], "fltp", "mono")
        frame.sample_rate, frame.pts, frame.time_base = 44100, 0, Fraction(1, 44100)
        file.mux(audio.encode(frame))
        file.mux(audio.encode())


def heard(path, seconds):
    """The frequency, and the amplitude, in the middle of each second."""
    samples, found = samples_of(path, 100)[0], []
    for k in range(seconds):
        part = samples[round((k + 0.2) * RATE) : round((k + 0.8) * RATE)]
        spectrum = np.abs(np.fft.rfft(part)) if len(part) else np.zeros(1)
        loud = float(np.sqrt(2) * part.std()) if len(part) else 0.0
        found.append((round(int(spectrum.argmax()) / 0.6) if loud > 0.01 else 0, loud))
    return found


# ---- Size and rate


def test_a_mask_stays_on_its_object(pipeline):
    """sq.mkv is 64x128 with a square of 16 to 48 by 16 to 48 marked; --size 48x48 covers, then crops."""
    job = Job("x", video=str(CASES / "sq.mkv"), mask=str(CASES / "mask.png"), size=(48, 48))
    frames, fps = starting._whole_video(pipeline, job, job.size)
    mask = starting._mask(pipeline, job, frames.shape[1:3], len(frames), fps)[0].mean(-1) > 127
    whole, marks = (read_clip_frames(CASES / name)[0][0].astype(int) for name in ("sq.mkv", "mask.png"))
    inside = np.median(whole[marks.mean(-1) > 127], axis=0)  # the object's colour, where the mask marks it
    outside = np.median(whole[marks.mean(-1) <= 127], axis=0)
    object_ = np.abs(frames[0].astype(int) - inside).sum(-1) < np.abs(frames[0].astype(int) - outside).sum(-1)
    assert mask.shape == (48, 48) and (mask & object_).sum() >= 0.9 * object_.sum() > 0
    smaller = Job("x", video=str(CASES / "sq.mkv"), mask=str(CASES / "mask.png"))
    frames, fps = starting._whole_video(pipeline, smaller, None)
    same = starting._mask(pipeline, smaller, frames.shape[1:3], 1, fps)
    np.testing.assert_array_equal(same[0], marks[: frames.shape[1], : frames.shape[2]])


def test_videos_of_two_rates_meet_at_their_own_speed(pipeline, caplog):
    """a25.mp4 lasts 1 s and b8.mp4 2.125 s: the second gets 53 frames at 25 frames per second."""
    with caplog.at_level("INFO"):
        second, fps = starting._read(pipeline, str(CASES / "b8.mp4"), (48, 48), fps=25.0)
    own, _ = read_clip_frames(CASES / "b8.mp4")
    assert fps == 25 and len(second) == round(2.125 * 25)
    assert "shown at 25 frames per second, which is 8 in the file" in caplog.text
    for k in (0, 10, 30, 52):
        np.testing.assert_array_equal(second[k], own[int(k / 25 * 8 + 1e-6)])
    job = Job("x", video=str(CASES / "a25.mp4"), transition=str(CASES / "b8.mp4"))
    assert starting.start(pipeline, job)[1] == 25
    frames, fps = starting._video(pipeline, Job("x", video=str(CASES / "a25.mp4"), extend="forward", fps=5), None)
    assert (len(frames), fps) == (5, 5), "a rate that is asked for keeps the speed"


@pytest.mark.slow
def test_names_like_protocols_work_from_input_to_output(tmp_path, monkeypatch):
    """`take:1.mp4` in, `--out 2026-11-26T10:30` out, through the command."""
    from minisora_jax.cli import main

    monkeypatch.chdir(tmp_path)
    Path("take:1.mp4").write_bytes((CASES / "base.mp4").read_bytes())
    argv = ["generate", "a red circle moves left", "--video", "take:1.mp4", "--strength", "0.3", "--frames", "5"]
    assert main([*argv, "--size", "32x32", "--steps", "1", "--out", "2026-11-26T10:30"]) == 0
    (result,) = Path("2026-11-26T10:30").glob("*.mp4")
    assert probe(result).frames == 5


# ---- Sound


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_sound_is_heard_with_its_frames(tmp_path, suffix):
    tone(tmp_path / "a.mp4", 2, 440)
    tone(tmp_path / "b.mp4", 1, 1000)
    sounds = [Sound(tmp_path / "a.mp4", 1.0, 2.0), Sound(tmp_path / "b.mp4", None, 1.0)]
    with VideoWriter(tmp_path / f"out{suffix}", 8, sounds=sounds) as writer:
        writer.write(np.zeros((48, 32, 32, 3), np.uint8))
    found = heard(tmp_path / f"out{suffix}", 6)
    assert [round(hertz, -1) for hertz, _ in found] == [0, 440, 440, 0, 0, 1000]
    assert all(abs(loud - 0.5) < 0.05 for hertz, loud in found if hertz)
    assert probe(tmp_path / f"out{suffix}").frames == 48


def test_jobs_put_sound_where_frames_are_kept(tmp_path, caplog):
    tone(tmp_path / "a.mp4", 2, 440)
    tone(tmp_path / "b.mp4", 1, 1000)
    write_video(tmp_path / "mute.mp4", np.zeros((8, 48, 48, 3), np.uint8), 8)
    a, b, mute, out = (str(tmp_path / name) for name in ("a.mp4", "b.mp4", "mute.mp4", "out.mp4"))
    cases = [
        (Job("x", video=a, strength=0.5), [Sound(a, 0.0, 2.0)]),
        (Job("x", video=a, extend="forward", seconds=3), [Sound(a, 0.0, 2.0)]),
        (Job("x", video=a, extend="both", seconds=3), [Sound(a, 3.0, 2.0)]),
        (Job("x", video=a, transition=b), [Sound(a, 0.0, 2.0), Sound(b, None, 1.0)]),
        (Job("x", video=mute, transition=b), [Sound(b, None, 1.0)]),
        (Job("x", video=a, loop=True), [Sound(a, 0.0, 2.0)]),
        (Job("x", video=mute, loop=True), []),
        (Job("x"), []),
    ]
    for job, sounds in cases:
        assert sounds_of(job, Path(out), 8.0) == sounds
    with caplog.at_level("INFO"):
        assert sounds_of(cases[0][0], Path("out.gif"), 8.0) == []
    assert "has sound, which is lost" in caplog.text


def test_damaged_sound_costs_no_result(tmp_path, caplog):
    tone(tmp_path / "a.mp4", 2, 440)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    with av.open(str(tmp_path / "a.mp4")) as file:
        for packet in file.demux(file.streams.audio[0]):
            if packet.size:
                data[packet.pos : packet.pos + packet.size] = bytes([255]) * packet.size
    (tmp_path / "a.mp4").write_bytes(data)
    with VideoWriter(tmp_path / "out.mp4", 8, sounds=[Sound(tmp_path / "a.mp4", 0.0, 2.0)]) as writer:
        writer.write(np.zeros((16, 32, 32, 3), np.uint8))
    assert probe(tmp_path / "out.mp4").frames == 16 and "the result is silent where" in caplog.text


# ---- Memory

LARGE = """
import re, sys
from minisora_jax.media.video import read_clip_frames
frames, _ = read_clip_frames(sys.argv[1], fit=lambda H, W: (48, 64))
print(len(frames), int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_long_4k_video_is_read_small(tmp_path):
    """300 frames of 2160x3840, 7.5 GB as pixels, are read at 48x64 within 600 MB."""
    row = np.zeros((1, 2160, 3840, 3), np.uint8)
    with VideoWriter(tmp_path / "a.mp4", 30) as writer:
        for t in range(300):
            row[0, :, 4 * t : 4 * t + 400] = t % 200
            writer.write(row)
    done = subprocess.run([sys.executable, "-c", LARGE, str(tmp_path / "a.mp4")], capture_output=True, text=True)
    frames, peak = done.stdout.split()
    assert int(frames) == 300 and float(peak) < 600, f"{peak} MiB"

"""Frames survive files: sizes, rates, colours, seeks, transparency, and the atomic appearance of what is written."""

import av
import numpy as np
import pytest
from PIL import Image

from minisora_jax.media import video, video_writer
from minisora_jax.media.contact_sheet import contact_sheet
from minisora_jax.media.video_writer import write_video


def moving_square(T=9, H=48, W=64):
    """A bright square moving right by 4 pixels a frame; its position tells the frame number."""
    frames = np.full((T, H, W, 3), 30, np.uint8)
    for t in range(T):
        frames[t, 12:28, 4 * t : 4 * t + 16] = (220, 60, 40)
    return frames


def difference(a, b):
    return np.abs(a.astype(int) - b.astype(int)).mean()


@pytest.mark.parametrize("suffix, tolerance", [(".mp4", 3.0), (".webm", 4.0), (".gif", 1.0)])
def test_round_trip_keeps_size_rate_and_picture(tmp_path, suffix, tolerance):
    frames = moving_square()
    path = tmp_path / f"clip{suffix}"
    write_video(path, frames, 12.5)
    back, fps = video.read_clip_frames(path)
    assert back.shape == frames.shape and back.dtype == np.uint8
    assert fps == pytest.approx(12.5, rel=0.01)
    assert difference(back, frames) < tolerance
    info = video.probe(path)
    assert (info.height, info.width) == (48, 64)


def test_an_avi_with_places_left_empty_has_the_rate_of_the_frames_that_are_there(tmp_path):
    path = tmp_path / "sparse.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=15)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for t, pixels in enumerate(moving_square()):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = 6 * t
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert (
        video.probe(path).fps == pytest.approx(2.5) and video.probe(path).frames == 9
    )  # its header counts the empty ones too
    back, fps = video.read_clip_frames(path, start=2)
    assert fps == pytest.approx(2.5) and difference(back, moving_square()[2:]) < 4.0


def test_flat_colours_survive_mp4(tmp_path):
    for rgb in [(215, 40, 40), (40, 175, 60), (50, 90, 235), (245, 245, 245), (10, 10, 10)]:
        write_video(tmp_path / "c.mp4", np.full((3, 32, 32, 3), rgb, np.uint8), 8)
        back, _ = video.read_clip_frames(tmp_path / "c.mp4")
        assert np.abs(back.astype(int) - rgb).max() <= 4


def test_one_frame_is_a_lossless_png(tmp_path):
    frame = moving_square()[:1]
    write_video(tmp_path / "a.png", frame, 8)
    back, _ = video.read_clip_frames(tmp_path / "a.png")
    np.testing.assert_array_equal(back, frame)
    with pytest.raises(ValueError, match="9 frames; a .png holds one"):
        write_video(tmp_path / "b.png", moving_square(), 8)


def test_odd_sizes_and_upscale(tmp_path):
    write_video(tmp_path / "odd.mp4", moving_square(H=33, W=47)[:3], 8)
    assert video.read_clip_frames(tmp_path / "odd.mp4")[0].shape == (3, 34, 48, 3)
    write_video(tmp_path / "tiny.mp4", moving_square(H=32, W=32)[:3], 8, upscale=4)
    assert video.read_clip_frames(tmp_path / "tiny.mp4")[0].shape == (3, 128, 128, 3)
    write_video(tmp_path / "pixel.mp4", np.zeros((1, 1, 1, 3), np.uint8), 8)
    assert video.read_clip_frames(tmp_path / "pixel.mp4")[0].shape == (1, 2, 2, 3)


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_start_and_max_frames_name_exact_frames(tmp_path, suffix):
    frames = moving_square(T=30, W=160)
    write_video(tmp_path / f"a{suffix}", frames, 29.97)
    whole, _ = video.read_clip_frames(tmp_path / f"a{suffix}")
    for start, count in [(0, 5), (1, 5), (7, 9), (24, 100), (29, 1)]:
        part, _ = video.read_clip_frames(tmp_path / f"a{suffix}", start=start, max_frames=count)
        np.testing.assert_array_equal(part, whole[start : start + count])
    with pytest.raises(video.VideoError, match="zero frames"):
        video.read_clip_frames(tmp_path / f"a{suffix}", start=30)


def test_a_still_gif_keeps_its_frames(tmp_path):
    write_video(tmp_path / "still.gif", np.zeros((10, 32, 32, 3), np.uint8), 8)
    back, fps = video.read_clip_frames(tmp_path / "still.gif")
    assert back.shape == (10, 32, 32, 3) and fps == pytest.approx(8, rel=0.05)


def noise_file(path, codec):
    """40 frames that do not compress, so that a cut file loses frames wherever it is cut."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.width = stream.height = 64
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for _ in range(40):
            pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


CONTAINERS = [("a.mp4", "libx264"), ("a.mov", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.gif", "gif")]


@pytest.mark.parametrize("name, codec", CONTAINERS)
@pytest.mark.parametrize("kept", [0.05, 0.6])
def test_a_cut_file_is_called_truncated(tmp_path, name, codec, kept):
    noise_file(tmp_path / name, codec)
    assert len(video.read_clip_frames(tmp_path / name)[0]) == 40
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(video.VideoError, match="truncated"):
        video.read_clip_frames(tmp_path / name)


def test_seeks_are_exact_where_frames_lean_on_the_next_key_frame(tmp_path):
    frames = moving_square(T=48, W=224)
    with av.open(str(tmp_path / "open.mp4"), "w") as container:
        options = {"g": "12", "bf": "3", "x264-params": "open-gop=1"}
        stream = container.add_stream("libx264", rate=30, options=options)
        stream.height, stream.width, stream.pix_fmt = 48, 224, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    whole, _ = video.read_clip_frames(tmp_path / "open.mp4")
    for start in range(46):
        part, _ = video.read_clip_frames(tmp_path / "open.mp4", start=start, max_frames=2)
        np.testing.assert_array_equal(part, whole[start : start + 2])


@pytest.mark.parametrize("degrees", [90, -90, 180])
def test_quarter_turns_are_applied(tmp_path, degrees):
    frames = moving_square(T=2)
    with av.open(str(tmp_path / "turned.mov"), "w") as container:
        stream = container.add_stream("png", rate=8)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "rgb24"
        stream.set_display_rotation(degrees)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(tmp_path / "turned.mov")) as container:
        counterclockwise = next(container.decode(video=0)).rotation  # FFmpeg's convention for showing a frame
    assert abs(counterclockwise) == abs(degrees)
    back, _ = video.read_clip_frames(tmp_path / "turned.mov")
    np.testing.assert_array_equal(back, np.rot90(frames, counterclockwise // 90, axes=(1, 2)))


def test_alpha_is_composited_onto_black_and_grey_becomes_rgb(tmp_path):
    rgba = np.full((16, 16, 4), 200, np.uint8)
    rgba[:8, :, 3] = 0
    rgba[8:, :, 3] = 128
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    back, _ = video.read_clip_frames(tmp_path / "alpha.png")
    assert back[0, :8].max() == 0 and set(np.unique(back[0, 8:])) == {100}
    Image.fromarray(np.full((16, 16), 77, np.uint8)).save(tmp_path / "grey.png")
    assert (video.read_clip_frames(tmp_path / "grey.png")[0] == 77).all()
    Image.fromarray(np.full((16, 16), 77 * 256, np.uint16)).save(tmp_path / "grey16.png")
    assert (video.read_clip_frames(tmp_path / "grey16.png")[0] == 77).all()

    with av.open(str(tmp_path / "alpha.mov"), "w") as container:  # PNG in mov: a video with transparency
        stream = container.add_stream("png", rate=8)
        stream.width = stream.height = 16
        stream.pix_fmt = "rgba"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgba, format="rgba")))
        container.mux(stream.encode())
    back, _ = video.read_clip_frames(tmp_path / "alpha.mov")
    assert back.shape == (3, 16, 16, 3) and back[:, :8].max() == 0 and set(np.unique(back[:, 8:])) == {100}


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    write_video(path, moving_square(), 8)
    before = path.read_bytes()
    monkeypatch.setattr(video_writer, "_enlarge", lambda *a: (_ for _ in ()).throw(RuntimeError("disk on fire")))
    with pytest.raises(RuntimeError):
        write_video(path, moving_square(), 8)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"uint8 \(T, H, W, 3\)"):
        write_video(tmp_path / "a.mp4", np.zeros((3, 8, 8, 3), np.float32), 8)
    with pytest.raises(ValueError, match=".mp4, .webm, .gif, .png, and folders"):
        write_video(tmp_path / "a.wmv", moving_square(), 8)
    for fps in (0, float("nan"), float("inf"), 1e-9, 1e9):
        with pytest.raises(ValueError, match="must be from 0.001 to 10000"):
            write_video(tmp_path / "a.mp4", moving_square(), fps)
    for fps in (0.0015, 60):
        with pytest.raises(ValueError, match="a gif shows 0.002 to 50"):
            write_video(tmp_path / "a.gif", moving_square(), fps)
    write_video(tmp_path / "a.gif", moving_square(), 0.002)


def test_contact_sheet_shows_every_clip(tmp_path):
    clips = [
        (moving_square(), "a red square moves right " * 12),
        (moving_square(T=1, H=32, W=32), "a photo"),
        (np.zeros((5, 300, 200, 3), np.uint8), ""),
    ]
    contact_sheet(tmp_path / "sheet.png", clips, columns_of_frames=4)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    red = (sheet == (220, 60, 40)).all(-1)
    assert red.sum() >= 5 * 16 * 16  # four frames of the first clip and one of the second, at least at full size
    assert (sheet == 0).all(-1).sum() >= 4 * 112 * 74

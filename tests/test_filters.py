"""Measurements against pictures whose answer is known; shots at the frames where they were joined; duplicates found."""

import dataclasses
import sys
import types

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisora_jax.curation import filters, shots
from minisora_jax.curation.duplicates import BITS, clip_hash, repeated
from minisora_jax.curation.filters import CURATED, MEASURES, Filters, measure
from minisora_jax.curation.stages import Curation, Drop, Sizes, clips_of
from minisora_jax.io.user_function import UserFunctionError, load_function, number_by
from minisora_jax.media.video import read_clip_frames
from minisora_jax.media.video_writer import write_video
from minisora_jax.sources.base import Media

FPS = 12.0


def texture(seed=0, H=96, W=128):
    """A smooth random picture, uint8 (H, W, 3)."""
    noise = np.random.default_rng(seed).normal(size=(H, W, 3))
    smooth = cv2.GaussianBlur(noise, (0, 0), 5)
    return np.clip(128 + 60 * smooth / smooth.std(), 0, 255).astype(np.uint8)


def sliding(pixels, T=13, H=96, W=128, seed=0):
    """A picture that moves right by so many pixels a frame."""
    wide = texture(seed, H, W + 13 * 8)
    return np.stack([wide[:, 104 - pixels * t : 104 - pixels * t + W] for t in range(T)])


def scores(frames, still=False, filters=CURATED, **changed):
    return measure(frames, FPS, still, dataclasses.replace(filters, **changed))


@pytest.mark.parametrize("pixels", [1, 2, 4])
def test_motion_is_the_flow_in_per_cent_of_the_diagonal_a_second(pixels):
    found, reason, _ = scores(sliding(pixels), filters=Filters(min_motion=0))
    assert not reason
    assert found["motion"] == pytest.approx(100 * pixels / 160 * FPS, rel=0.1)  # a diagonal of 160 pixels


def test_a_small_and_a_large_copy_move_alike():
    large = np.stack([cv2.resize(frame, (512, 384)) for frame in sliding(2)])
    small, big = (scores(x, filters=Filters(min_motion=0))[0]["motion"] for x in (sliding(2), large))
    assert big == pytest.approx(small, rel=0.1)


def test_the_cheap_measurements_by_hand():
    frames = np.zeros((3, 16, 24, 3), np.uint8)
    frames[1] = 51  # a luma of 0.2
    found, _, _ = scores(frames, filters=Filters())
    assert found == {"seconds": 0.25, "side": 16, "brightness": 0.2, "change": 0.2, "sharpness": 0.0}
    frames[1, ::2, ::2] = 255
    grey = frames[1].astype(float).mean(-1)
    laplacian = sum(np.roll(grey, s, a) for a in (0, 1) for s in (-1, 1)) - 4 * grey
    assert scores(frames, filters=Filters())[0]["sharpness"] == pytest.approx(laplacian[1:-1, 1:-1].var(), rel=1e-4)
    assert set(scores(frames, still=True, filters=Filters())[0]) == {"side", "brightness", "sharpness"}


def test_an_object_that_the_detector_takes_for_text_is_none(monkeypatch):
    """As a cup before a wall, in one box of 380 of 480 rows; real films have them."""
    line, cup = [[8, 80], [120, 80], [120, 90], [8, 90]], [[40, 10], [125, 12], [122, 90], [38, 88]]
    for boxes, share in (([line], 112 * 10 / (96 * 128)), ([cup], 0.0), ([line, cup], 112 * 10 / (96 * 128))):
        found = types.SimpleNamespace(boxes=np.array(boxes, np.float32))
        monkeypatch.setattr(filters, "_text_detector", lambda found=found: lambda *_, **__: found)
        assert scores(sliding(2, T=9), filters=Filters(max_text=1))[0]["text"] == pytest.approx(share, abs=1e-5)


@pytest.mark.slow
def test_each_filter_refuses_what_it_is_for_and_no_good_clip():
    good = sliding(2, T=9)
    bad = {
        "too short": good[:5],
        "low resolution": good[:, :64],
        "black frames": good // 32,
        "static": np.repeat(good[:1], 9, 0),
        "blurred": np.stack([cv2.GaussianBlur(frame, (0, 0), 9) for frame in good]),
        "text overlay": np.stack(
            [cv2.putText(f.copy(), "BREAKING NEWS", (4, 60), 0, 0.45, (255, 255, 255), 2) for f in good]
        ),
    }
    limits = dict(min_side=96, min_sharpness=1.0)
    assert scores(good, **limits)[1] == ""
    assert {reason: scores(frames, **limits)[1] for reason, frames in bad.items()} == {reason: reason for reason in bad}
    title = [cv2.putText(f.copy(), "NEWS", (4, 70), 0, 1.5, (255, 255, 255), 8) for f in good]  # a third as high as it
    assert scores(np.stack(title), **limits)[1] == "text overlay"
    noise = np.random.default_rng(0).normal(0, 4, good.shape)  # a sensor's: it changes, and nothing moves
    still = np.clip(good[:1] + noise, 0, 255).astype(np.uint8)
    _, reason, detail = scores(still, **limits)
    assert reason == "little motion" and detail.startswith("motion is 0.") and detail.endswith("requires at least 0.5")


def test_the_score_of_a_users_own_model(tmp_path):
    (tmp_path / "mine.py").write_text("def redness(frames):\n    return frames[..., 0].mean() / len(frames)\n")
    spec = f"{tmp_path}/mine.py:redness"
    frames = np.full((5, 8, 8, 3), (100, 0, 0), np.uint8)
    filters = Filters(aesthetic=spec)
    assert scores(frames, filters=filters)[0]["aesthetic"] == 20
    assert scores(frames, filters=filters, min_aesthetic=21)[1] == "low aesthetic score"
    (tmp_path / "nan.py").write_text("def f(frames):\n    return float('nan')\n")
    assert scores(frames, filters=Filters(aesthetic=f"{tmp_path}/nan.py:f", min_aesthetic=0))[1], "NaN meets no limit"
    with pytest.raises(ValueError, match="has no function blueness"):
        load_function(f"{tmp_path}/mine.py:blueness")
    with pytest.raises(ValueError, match="there is no file nowhere.py"):
        load_function("nowhere.py:f")
    (tmp_path / "syntax.py").write_text("def f(frames:\n")
    with pytest.raises(UserFunctionError, match=r"syntax.py raised SyntaxError: .*line 1"):
        load_function(f"{tmp_path}/syntax.py:f")
    with pytest.raises(ValueError, match="min_aesthetic=5 needs a model"):
        Filters(min_aesthetic=5)


def test_bad_limits_and_missing_packages_are_said(monkeypatch):
    for wrong in (dict(min_motion=-1), dict(max_text=float("nan")), dict(duplicates=64)):
        with pytest.raises(ValueError):
            Filters(**wrong)
    assert {m.limit for m in MEASURES} == {f.name for f in dataclasses.fields(Filters)} - {"aesthetic", "duplicates"}
    for module, curation in {
        "cv2": Curation(filters=Filters(min_motion=1)),
        "rapidocr": Curation(filters=Filters(max_text=1)),
        "imagehash": Curation(filters=Filters(duplicates=1)),
        "scenedetect": Curation(shots=True),
    }.items():
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(ImportError, match=rf"needs {module}: uv sync --extra curate"):
                curation.check()
    Curation().check()


# ---- Shots


def test_shots_end_where_they_were_joined():
    film = np.concatenate([sliding(1, T=13, seed=1), sliding(1, T=9, seed=2), sliding(0, T=11, seed=3)])
    assert shots.find_shots(iter(film), FPS) == [(0, 13), (13, 22), (22, 33)]
    assert shots.find_shots(iter(sliding(8)), FPS) == [(0, 13)], "fast motion is no cut"
    assert shots.find_shots(iter(film[:1]), FPS) == [(0, 1)] and shots.find_shots(iter(()), FPS) == []


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(1, 30))
def test_pieces_cover_every_frame_once(lengths, most):
    ends = np.cumsum([0, *lengths])
    cut = shots.pieces(list(zip(ends[:-1], ends[1:])), most)
    assert [t for start, end in cut for t in range(start, end)] == list(range(ends[-1]))
    assert all(0 < end - start <= most for start, end in cut)
    assert all(any(a <= start and end <= b for a, b in zip(ends, ends[1:])) for start, end in cut)


def test_a_film_gives_a_clip_for_each_shot_and_piece(tmp_path):
    film = np.concatenate([sliding(1, T=13, seed=1), sliding(1, T=10, seed=2)])
    write_video(tmp_path / "film.mp4", film, FPS)
    media = Media("film.mp4", "a caption", tmp_path / "film.mp4")
    clips = list(clips_of(media, Curation(Sizes(16, 9), shots=True)))
    whole, _ = read_clip_frames(tmp_path / "film.mp4")
    spans = {"film.mp4#0-9": (0, 9), "film.mp4#9-13": (9, 10), "film.mp4#13-22": (13, 22), "film.mp4#22-23": (22, 23)}
    assert [clip.name for clip in clips] == list(spans)
    for clip, (start, end) in zip(clips, spans.values()):
        np.testing.assert_array_equal(clip.frames_THWC, whole[start:end])
        assert clip.caption == "a caption" and not clip.still and not clip.shortened
    assert len({clip.source for clip in clips}) == 1
    short = list(clips_of(media, Curation(Sizes(16, 9), True, Filters(min_seconds=0.5))))
    assert [isinstance(clip, Drop) for clip in short] == [False, True, False, True]
    assert short[1].reason == "too short" and short[1].detail == "seconds is 0.083333; the filter requires at least 0.5"
    damaged = (tmp_path / "film.mp4").read_bytes()[:-500]
    [drop] = clips_of(Media("cut.mp4", "", damaged), Curation(Sizes(16, 9), shots=True))
    assert (drop.stage, drop.reason) == ("probe", "truncated")


# ---- Duplicates


@given(st.data())
def test_repeated_is_the_comparison_of_all_pairs(data):
    distance = data.draw(st.sampled_from([0, 3, 18, 40]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    centres = rng.integers(0, 2, (4, BITS))
    flips = rng.integers(0, distance + 4, 30)
    clips = centres[rng.integers(0, 4, 30)].copy()
    for clip, count in zip(clips, flips):
        clip[rng.choice(BITS, count, replace=False)] ^= 1
    kept, wanted = [], {}
    for i, clip in enumerate(clips):
        first = next((k for k in kept if (clips[k] != clip).sum() <= distance), None)
        if first is None:
            kept.append(i)
        else:
            wanted[i] = first
    hashes = [f"{int(''.join(map(str, clip)), 2):048x}" for clip in clips]
    assert repeated(hashes, distance) == wanted


def test_copies_are_near_and_other_clips_far(tmp_path):
    clip = sliding(2)
    write_video(tmp_path / "a.mp4", clip, FPS)
    encoded, _ = read_clip_frames(tmp_path / "a.mp4")
    small = np.stack([cv2.resize(frame, (64, 48), interpolation=cv2.INTER_AREA) for frame in clip])
    dim = (clip * 0.8).astype(np.uint8)
    others = [sliding(2, seed=seed) for seed in range(1, 6)]
    hashes = [clip_hash(x) for x in (clip, encoded, small, dim, *others)]
    assert all(len(h) == 48 for h in hashes)
    assert repeated(hashes, CURATED.duplicates) == {1: 0, 2: 0, 3: 0}


def test_a_users_function_that_fails_is_said():
    def raises(frames):
        raise KeyError("oops")

    for function, words in (
        (raises, "my.py:f raised KeyError: 'oops'; MINISORA_TRACEBACK=1 shows where"),
        (lambda: 1.0, "my.py:f raised TypeError: .* 0 positional arguments but 1 was given"),
        (lambda frames: None, "my.py:f gave None, and must give a number"),
        (lambda frames: "good", "my.py:f gave 'good', and must give a number"),
        (lambda frames: np.ones(2), "my.py:f gave array.*and must give a number"),
    ):
        with pytest.raises(UserFunctionError, match=words):
            number_by(function, "my.py:f", np.zeros((1, 2, 2, 3), np.uint8))
    assert number_by(lambda frames: np.float32(2), "my.py:f", None) == 2.0

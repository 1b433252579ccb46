"""Batches are a function of (seed, step): a resumed run sees what the uninterrupted one would have."""

import tracemalloc

import jax
import numpy as np
import pytest
from train_tiny import make_cache

from minisora_jax.curation.prepare import prepare
from minisora_jax.data.conditioning import ConditioningConfig
from minisora_jax.data.latents import Latents, Mixture
from minisora_jax.data.loader import crop_batches, packed_batches
from minisora_jax.data.packing import PackConfig, PackPlan, token_counts
from minisora_jax.media.video_writer import write_video
from minisora_jax.sources.clips import Part, hold_out, open_clips, size_and_frames
from minisora_jax.toy.shapes import Shapes
from minisora_jax.types import Clip

PATCH = (1, 2, 2)
PACK = PackConfig(tokens=16, text_tokens=128, slots=8, rows=2)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cache") / "latents"
    make_cache(directory)
    return Latents(directory)


def plan(latents, seed: int = 3) -> PackPlan:
    return PackPlan(*token_counts(latents.sizes, PATCH), PACK, seed, per_step=4)


def packed(latents, steps, seed: int = 3, dropout: float = 0.2):
    options = dict(patch=PATCH, conditioning=ConditioningConfig(), caption_dropout=dropout)
    return list(packed_batches(latents, plan(latents, seed), steps, **options))


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_starting_late_gives_the_later_batches(latents):
    whole, late = packed(latents, range(0, 12)), packed(latents, range(7, 12))
    assert equal(whole[7:], late)
    assert not equal(whole[0][0], whole[1][0])
    assert not equal(whole[0][0], packed(latents, range(1), seed=4)[0][0])


def test_batches_have_one_shape_and_their_counts_match(latents):
    for batch, sizes in packed(latents, range(6)):
        assert batch.tokens_BSP.shape == (2, 2, 16, 16) and batch.text_BLE.shape == (2, 2, 128, 1)
        assert len(sizes) == 4  # rows of a step
        for row, segments in zip(sizes, batch.segment_BS.reshape(4, 16)):
            assert np.count_nonzero(segments) == sum(t * h * w // 4 for t, h, w, _ in row)
            assert segments.max() == len(row)


def test_captions_are_padded_to_what_is_asked(latents):
    options = dict(patch=PATCH, conditioning=ConditioningConfig(), caption_dropout=0.0)
    (plain, _), (padded, sizes) = (
        next(iter(packed_batches(latents, plan(latents), range(1), **options, caption_tokens=n))) for n in (0, 20)
    )
    counts = [np.bincount(b.text_segment_BL.reshape(4, -1)[0])[1:] for b in (plain, padded)]
    assert set(counts[0]) == {16} and set(counts[1]) == {20} and {size[3] for row in sizes for size in row} == {20}
    assert (padded.text_BLE[0, 0, :16] == plain.text_BLE[0, 0, :16]).all() and not padded.text_BLE[0, 0, 16:20].any()


def test_a_set_of_a_mixture_may_fix_the_masks_of_its_clips(latents):
    mixture = Mixture([latents, latents], [1.0, 1.0], ["", "between"])
    options = dict(patch=PATCH, conditioning=ConditioningConfig(*[0.0] * 10), caption_dropout=0.0)
    rows, fixed = plan(mixture), 0
    for step, (batch, _) in enumerate(packed_batches(mixture, rows, range(6), **options)):
        for clips, segments, known in zip(
            rows.rows(step), batch.segment_BS.reshape(4, 16), batch.cond_mask_BS.reshape(4, 16)
        ):
            for n, i in enumerate(clips, 1):
                if i < len(latents):
                    assert not known[segments == n].any()
                elif mixture.sizes[i][0] > 2:  # at least two latent frames are shown, whichever stretch it is
                    assert known[segments == n].any() and not known[segments == n].all()
                    fixed += 1
    assert fixed > 5
    with pytest.raises(ValueError, match="@middle: the kinds of conditioning mask are first, last"):
        list(packed_batches(Mixture([latents], [1.0], ["middle"]), plan(latents), range(1), **options))


def test_an_epoch_shows_every_clip_once(latents):
    seen, step, planned = [], 0, plan(latents)
    while planned.epoch(step) == 0:
        seen += [int(i) for row in planned.rows(step) for i in row]
        step += 1
    assert len(seen) == len(set(seen)) and len(seen) > 0.9 * len(latents)


def test_captions_are_dropped_at_their_rate(latents):
    empty = sum(int((np.diff(np.r_[0, s]) > 0).sum()) for b, _ in packed(latents, range(1)) for s in b.segment_BS[0])
    assert empty  # there are segments
    lengths = {True: [], False: []}
    for dropped in (True, False):
        share = 0.999 if dropped else 0.0
        for batch, _ in packed(latents, range(4), dropout=share):
            lengths[dropped] += [int((batch.text_segment_BL[0, 0] == 1).sum())]
    assert set(lengths[True]) == {4} and min(lengths[False]) > 4


def test_crops_are_cuts_of_clips():
    clips = [c for c in map(Shapes("train", 20, size_THW=(9, 48, 48)).__getitem__, range(20)) if len(c.frames_THWC) > 1]
    options = dict(crop_THW=(5, 32, 16), batch=3, accumulate=2, seed=0)
    whole, late = list(crop_batches(clips, range(4), **options)), list(crop_batches(clips, range(2, 4), **options))
    assert whole[0].shape == (2, 3, 5, 32, 16, 3) and whole[0].dtype == np.uint8
    assert equal(whole[2:], late)
    cut = whole[0][0, 0].transpose(3, 0, 1, 2)
    views = (np.lib.stride_tricks.sliding_window_view(c.frames_THWC, (5, 32, 16), (0, 1, 2)) for c in clips)
    assert any((v == cut).all((3, 4, 5, 6)).any() for v in views)


def test_crops_of_enlarged_clips():
    ramp = np.broadcast_to(np.arange(0, 256, 4, dtype=np.uint8)[None, None, :, None], (5, 64, 64, 3))
    options = dict(crop_THW=(5, 32, 32), batch=200, accumulate=1, seed=0, enlarge=4.0)
    crops = next(crop_batches([Clip(ramp, "", 8.0, "ramp")], range(1), **options))[0]
    assert crops.shape == (200, 5, 32, 32, 3) and (crops == crops[:, :1]).all()
    inner = crops[:, 0, 0, 8:25, 0].astype(float)
    factor = 4.0 / ((inner[:, -1] - inner[:, 0]) / 16)
    assert factor.min() > 0.95 and factor.max() < 4.3
    np.testing.assert_allclose(np.quantile(factor, [0.25, 0.75, 0.9]), 4.0 ** np.array([0, 0.5, 0.8]), rtol=0.15)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Data sets of one film each, short and long, in pixels and in H.264."""
    folder = tmp_path_factory.mktemp("films")
    x = np.arange(64)
    for frames in (61, 901):
        wave = 127 + 120 * np.sin((x[:, None, None] + 2 * x[None, :, None]) / 9 + np.arange(frames) / 7)  # (H, W, T)
        source = folder / f"source{frames}"
        source.mkdir()
        write_video(source / "film.mp4", np.stack([wave.transpose(2, 0, 1).astype(np.uint8)] * 3, axis=-1), fps=25)
        for name, crf in (("pixels", None), ("h264", 18)):
            options = dict(need_caption=False, max_frames=frames, workers=0, crf=crf)
            prepare(str(source), str(folder / f"{name}{frames}"), **options)
    return lambda name: open_clips(folder / name)


@pytest.mark.parametrize("name", ["pixels901", "h264901"])
def test_a_window_is_that_part_of_the_film(films, name):
    clips = films(name)
    whole = clips[0].frames_THWC
    assert whole.shape == (901, 64, 64, 3)
    for start, count in ((0, 1), (0, 9), (244, 17), (511, 9), (884, 17), (896, 17)):
        np.testing.assert_array_equal(clips.window(0, start, count), whole[start : start + count])
    options = dict(crop_THW=(9, 32, 16), batch=3, accumulate=1, seed=5, enlarge=2.0)
    ours, theirs = (next(crop_batches(c, range(1), **options)) for c in (clips, [clips[0]]))
    np.testing.assert_array_equal(ours, theirs)
    part = hold_out(Part([clips[0], clips[0]], 0, 2))[0]  # a part of whole clips is read as they are
    np.testing.assert_array_equal(size_and_frames(part, 0)[1](3, 2), whole[3:5])


def test_the_memory_of_a_crop_does_not_grow_with_the_film(films):
    def most(name):
        clips = films(name)
        clips.window(0, 0, 1)  # opens the file
        tracemalloc.start()
        frames = clips.window(0, int(clips.sizes[0, 0]) - 20, 9)
        peak = tracemalloc.get_traced_memory()[1] / frames.nbytes
        tracemalloc.stop()
        return peak

    short, long, pixels = most("h26461"), most("h264901"), most("pixels901")
    # The film's compressed bytes and the stamps of its frames grow; its pixels are a hundred times a window's.
    assert short < 4 and long < 8 < 90 < pixels, (short, long, pixels)


def test_clips_that_are_all_too_small_are_an_error():
    batches = crop_batches(
        Shapes("train", 5, size_THW=(5, 32, 32)), range(1), crop_THW=(5, 64, 64), batch=1, accumulate=1, seed=0
    )
    with pytest.raises(ValueError, match=r"all smaller than crop_THW=\(5, 64, 64\): lower it"):
        next(batches)

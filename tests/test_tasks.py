"""Every verb with the bundled model: what is given is kept, sizes are exact, windows and circles close."""

import dataclasses

import numpy as np
import pytest

from minisora_jax.bundled import CODEC, MODEL
from minisora_jax.data.conditioning import KINDS
from minisora_jax.evaluation.frames import psnr, seam
from minisora_jax.generate import Given, Request, VideoPipeline, tasks
from minisora_jax.generate.frame_ops import (
    EASE,
    FAITHFUL,
    FEATHER,
    colour_distance,
    colour_drift,
    eased,
    evened,
    jump,
    largest_step,
    steps,
)
from minisora_jax.generate.runner import Decode, Encode, Frames, run_tasks
from minisora_jax.generate.transitions import STEADY, UNLIKE
from minisora_jax.generate.windows import WINDOW_SEED
from minisora_jax.media.resize import resized
from minisora_jax.toy.grammar import FPS, Object, Scene
from minisora_jax.toy.shapes import Shapes, render

OPTIONS = dict(steps=2, progress=False)


@pytest.fixture(scope="module")
def pipeline():
    return dataclasses.replace(VideoPipeline.load(MODEL, CODEC), window=3)


@pytest.fixture(scope="module")
def clip():
    world = Shapes("heldout", 99, size_THW=(9, 32, 32))
    return next(c for c in map(world.__getitem__, range(99)) if c.size_THW[0] == 9)


def request(clip, frames=9, **more) -> Request:
    return Request(clip.caption, (frames, 32, 32), seed=3, fps=FPS, **more)


def done(pipeline, *asked, **options):
    return run_tasks(pipeline, asked, **(OPTIONS | options))


@pytest.fixture(scope="module")
def made(pipeline, clip):
    """All verbs in one go: they share their compilations, and company changes nothing but rounding."""
    x, r, mask = clip.frames_THWC, request(clip), np.zeros((32, 32), bool)
    mask[:, 20:] = True
    asked = {
        "text_to_video": tasks.text_to_video(pipeline, r),
        "image_to_video": tasks.image_to_video(pipeline, r, x[0]),
        "interpolate": tasks.interpolate(pipeline, r, x[0], x[-1]),
        "video_to_video": tasks.video_to_video(pipeline, r, x, 0.05),
        "anew": tasks.video_to_video(pipeline, r, x, 1.0),
        "inpaint": tasks.inpaint(pipeline, r, x, mask),
        "outpaint": tasks.outpaint(pipeline, request(clip), x[:, :, :16]),
        "both": tasks.extend(pipeline, r, x, before=5, after=10),
        "still": tasks.extend(pipeline, r, x[:1], before=3, after=2),
        "far": tasks.extend(pipeline, r, x, before=17),
        "transition": tasks.transition(pipeline, r, x, x[::-1], between=5),
        "loop-video": tasks.transition(pipeline, r, x, x, between=7, loop=True),
        "loop": tasks.text_to_video(pipeline, request(clip, 8, loop=True)),
        "long_video": tasks.long_video(pipeline, r, 30),
        "short": tasks.long_video(pipeline, r, 6),
    }
    return dict(zip(asked, done(pipeline, *asked.values())))


@pytest.mark.slow
def test_sizes_are_those_asked_for(made):
    lengths = {name: len(v) for name, v in made.items()}
    assert lengths == {
        "text_to_video": 9, "image_to_video": 9, "interpolate": 9, "video_to_video": 9, "anew": 9, "inpaint": 9,
        "outpaint": 9,
        "both": 5 + 9 + 10, "still": 3 + 1 + 2, "far": 17 + 9, "transition": 9 + 7 + 9, "loop-video": 9 + 7,
        "loop": 8, "long_video": 30, "short": 6,
    }  # fmt: skip
    assert all(v.shape[1:] == (32, 32, 3) and v.dtype == np.uint8 for v in made.values())


@pytest.mark.slow
def test_what_is_given_is_kept(pipeline, clip, made):
    x = clip.frames_THWC
    [coded] = pipeline.decode(pipeline.encode([x[:1]]))
    assert np.abs(made["image_to_video"][0].astype(int) - coded[0]).max() <= 1
    assert np.abs(made["interpolate"][0].astype(int) - coded[0]).max() <= 1
    ease = EASE
    assert (made["both"][5 + ease : 14 - ease] == x[ease:-ease]).all() and (made["far"][17 + ease :] == x[ease:]).all()
    assert (made["transition"][: 9 - ease] == x[:-ease]).all() and (
        made["transition"][-9 + ease :] == x[::-1][ease:]
    ).all()
    assert all(psnr(v, x) > 31 for v in (made["both"][5:14], made["far"][17:], made["transition"][:9]))
    assert (made["inpaint"][:, :, : 20 - FEATHER] == x[:, :, : 20 - FEATHER]).all()
    assert (made["inpaint"][:, :, 20:] != x[:, :, 20:]).any()
    assert (made["outpaint"][:, :, 8 + FEATHER : 24 - FEATHER] == x[:, :, FEATHER : 16 - FEATHER]).all()


@pytest.mark.slow
def test_strength_is_how_far_a_video_may_go(pipeline, clip, made):
    [coded] = pipeline.decode(pipeline.encode([clip.frames_THWC]))
    assert psnr(made["video_to_video"], coded) > 25
    assert np.abs(made["anew"].astype(int) - made["text_to_video"]).max() <= 1  # all anew is text to video
    assert psnr(made["anew"], coded) < psnr(made["video_to_video"], coded) - 5


@pytest.mark.slow
def test_company_changes_nothing(pipeline, clip, made):
    [alone] = done(pipeline, tasks.extend(pipeline, request(clip), clip.frames_THWC, before=5, after=10))
    assert np.abs(alone.astype(int) - made["both"]).max() <= 2


def test_a_clip_decoded_piece_by_piece_is_the_clip(pipeline, clip):
    latents = np.random.default_rng(0).standard_normal((5, 4, 4, 16)).astype(np.float32)
    decode = pipeline.codec.decoder()
    pieces = np.concatenate([decode(latents[:2]), decode(latents[2:3]), decode(latents[3:])])
    assert np.abs(pieces.astype(int) - pipeline.codec.decode(latents[None])[0]).max() <= 1


def test_a_clip_encoded_piece_by_piece_is_the_clip(pipeline, clip):
    encoder, x = pipeline.codec.encoder(), clip.frames_THWC
    pieces = np.concatenate([encoder(x[:5]), encoder(x[5:])])
    np.testing.assert_allclose(pieces, pipeline.encode([x])[0], atol=1e-5)


def test_sizes_grow_in_time_first_and_twofold_at_most(pipeline):
    assert pipeline.known_size == (9, 64, 64)
    assert pipeline.sizes_up_to((5, 48, 64)) == [(5, 48, 64)]
    assert pipeline.sizes_up_to((17, 128, 96)) == [(9, 64, 48), (17, 64, 48), (17, 128, 96)]
    grown = pipeline.sizes_up_to((1, 2048, 1152))
    assert grown[0] == (1, 64, 32) and grown[-1] == (1, 2048, 1152) and len(grown) == 6
    assert all(b <= 2 * a + pipeline.cell for one, two in zip(grown, grown[1:]) for a, b in zip(one, two))


@pytest.mark.slow
def test_what_is_larger_than_training_is_what_was_made_at_its_size(pipeline, clip):
    """Videos, loops, an animated picture and windows of 64 x 128, each next to itself at 32 x 64."""
    at = lambda H, W, T=9, **more: Request(clip.caption, (T, H, W), seed=3, fps=FPS, **more)
    image = resized(clip.frames_THWC[:1], (64, 128))[0]
    verbs_at = lambda H, W: [
        tasks.text_to_video(pipeline, at(H, W)),
        tasks.text_to_video(pipeline, at(H, W, 8, loop=True)),
        tasks.image_to_video(pipeline, at(H, W), resized(image[None], (H, W))[0]),
        tasks.long_video(pipeline, at(H, W), 22),
        tasks.long_video(pipeline, at(H, W), 14, first_HWC=resized(image[None], (H, W))[0]),
        tasks.upscale(pipeline, at(H, W, 17), resized(clip.frames_THWC, (32, 64))),
    ]
    large, small = (done(pipeline, *verbs_at(*size), steps=4) for size in ((64, 128), (32, 64)))
    assert [v.shape for v in large] == [(n, 64, 128, 3) for n in (9, 8, 9, 22, 14, 17)]
    for a, b in zip(large, small):
        assert psnr(resized(a, (32, 64)), b) > 24
    assert psnr(large[2][0], image) > 24 and psnr(large[4][0], image) > 24
    assert seam(large[1]) < 1.2 * max(seam(small[1]), 1.0)  # upscaling tears no loop


def test_a_decoded_circle_has_no_beginning(pipeline):
    z = np.random.default_rng(1).standard_normal((1, 3, 4, 4, 16)).astype(np.float32)
    frames, turned = pipeline.codec.decode_loop(z).astype(int), pipeline.codec.decode_loop(np.roll(z, 1, axis=1))
    assert frames.shape == (1, 12, 32, 32, 3)
    assert np.abs(np.roll(frames, 4, axis=1) - turned).max() <= 1
    [shown] = pipeline.decode([z[0]], [True])
    assert np.abs(np.roll(frames[0], -2, axis=0) - shown).max() <= 1  # begins within the first latent frame
    once = pipeline.codec.decode(z)[0, -8:]
    assert np.abs(frames[0, -8:] - once).mean() > 0.2  # what came before does matter


def test_loops_turn_and_nothing_else_does(pipeline, clip):
    from minisora_jax.generate.packed import PackedRequests
    from minisora_jax.generate.sampling import _turned, features

    asked = [request(clip, 8, loop=True), request(clip, 8, middle=True), request(clip)]
    grids = [pipeline.grid(r) for r in asked]
    assert grids == [(2, 2, 2), (2, 2, 2), (3, 2, 2)]
    packed = PackedRequests(asked, grids, [[0, 1, 2]], 2, 64, pipeline.config)
    batch = packed.batch(features(pipeline.captions, asked, 2, 0))
    times = lambda b: np.asarray(b.position_BS3)[0, :, 0]
    circle = packed.per_token(lambda i: [2, 0, 0][i]).astype(np.int32)
    assert (
        set(times(batch)[:16]) == {1, 2}
        and set(times(batch)[16:32]) == {1, 2}
        and set(times(batch)[32:56]) == {0, 1, 2}
    )
    turned = times(_turned(batch, circle, 0.5))
    assert (turned[:16] == 3 - times(batch)[:16]).all() and (turned[16:] == times(batch)[16:]).all()
    with pytest.raises(ValueError, match="dopri5 has no fixed steps"):
        pipeline.sample(asked[:1], sampler="dopri5", progress=False)


def test_windows_follow_each_other_and_their_prompts(pipeline, clip):
    """The verb driven by hand: what it asks for, window by window."""
    task = tasks.long_video(pipeline, request(clip), 27, [(0, "first"), (14, "then")])
    asked, answer, shown = [], None, 0
    while True:
        try:
            wants = task.send(answer)
        except StopIteration:
            break
        if isinstance(wants, Frames):
            shown, answer = shown + len(wants.frames_THWC), None
        else:
            asked.append(wants)
            t = pipeline.grid(wants)[0]
            answer = np.full((t, 4, 4, 16), len(asked), np.float32)
    assert shown == 27 and [r.prompt for r in asked] == ["first", "first", "then", "then"]
    assert [r.middle for r in asked] == [False, True, True, True]
    assert [r.seed for r in asked] == [3, 3 + WINDOW_SEED, 3 + 2 * WINDOW_SEED, 3 + 3 * WINDOW_SEED][: len(asked)]
    for n, window in enumerate(asked[1:], 1):
        assert window.given.cond_mask_thw[:1].all() and not window.given.cond_mask_thw[1:].any()
        assert (window.given.latents_thwc[0] == n).all()  # the end of the window before


def test_frames_before_are_made_from_the_last_window_to_the_first(pipeline, clip):
    task = tasks.extend(pipeline, request(clip), clip.frames_THWC, before=17)
    wants = next(task)
    assert isinstance(wants, Encode) and (wants.frames_THWC[:5] == clip.frames_THWC[0]).all()
    wants, windows = task.send(np.zeros((1 + len(wants.frames_THWC) // 4, 4, 4, 16), np.float32)), []
    while isinstance(wants, Request):
        windows.append(wants)
        wants = task.send(np.full((pipeline.grid(wants)[0], 4, 4, 16), len(windows), np.float32))
    assert isinstance(wants, Decode) and len(windows) > 1
    assert [w.middle for w in windows] == [True] * (len(windows) - 1) + [False]
    assert all(w.given.cond_mask_thw[-1].all() and not w.given.cond_mask_thw[0].any() for w in windows)
    order = wants.latents_thwc[:, 0, 0, 0]
    assert (np.diff(order[order > 0]) <= 0).all() and order[0] == len(windows)


@pytest.mark.slow
def test_what_it_should_not_be_matters(pipeline, clip):
    plain, empty, other = (
        pipeline.generate([request(clip, 1, negative=n)], **OPTIONS)[0].astype(int)
        for n in ("", "", "a photo of a large white square on a grey background")
    )
    assert (plain == empty).all() and np.abs(plain - other).mean() > 0.5


@pytest.mark.parametrize(
    "text_to_video, message",
    [
        (lambda g, r, x: tasks.image_to_video(g, r, x[0, :16]), "the image is 16x32, the video asked for 32x32"),
        (lambda g, r, x: tasks.video_to_video(g, r, x[:5], 0.5), "the whole video has 5 frames, the video asked for 9"),
        (lambda g, r, x: tasks.video_to_video(g, r, x, 1.5), "strength=1.5 must be above 0"),
        (lambda g, r, x: tasks.inpaint(g, r, x, np.zeros((32, 32))), "the mask marks nothing"),
        (lambda g, r, x: tasks.outpaint(g, r, x), "does not lie within 32x32 with room"),
        (lambda g, r, x: tasks.extend(g, r, x), "extend by at least one frame"),
        (
            lambda g, r, x: tasks.interpolate(g, dataclasses.replace(r, size_THW=(5, 32, 32)), x[0], x[1]),
            "use 9 or more",
        ),
        (
            lambda g, r, x: tasks.text_to_video(g, dataclasses.replace(r, loop=True)),
            "frames=9 of a loop must be a multiple of 4; use 8",
        ),
    ],
)
def test_what_cannot_be_done_is_said(pipeline, clip, text_to_video, message):
    with pytest.raises(ValueError, match=message):
        done(pipeline, text_to_video(pipeline, request(clip), clip.frames_THWC))


@pytest.mark.parametrize("values, message", [
    ({"prompt": None}, "prompt=None must be text"), ({"negative": "\ud800"}, "without lone surrogates"),
    ({"size_THW": (17, *"48x64")}, "give three whole numbers"), ({"size_THW": (17.0, 48, 48)}, "three whole numbers"),
    ({"seed": -1}, "seed=-1 must be"), ({"seed": None}, "seed=None must be a whole number"), ({"seed": 0.5}, "seed=0"),
    ({"fps": 0}, "fps=0 must be"), ({"fps": float("nan")}, "fps=nan must be"), ({"fps": -5}, "fps=-5 must be a number"),
    ({"fps": float("inf")}, "fps=inf must be a number above 0"), ({"fps": "8"}, "fps='8' must be a number"),
])  # fmt: skip
def test_a_request_of_wrong_values_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Request(**{"prompt": "a", "size_THW": (17, 48, 48)} | values)
    Request("a", (np.int64(17), 48, 48), np.uint32(3), np.float32(8))


def test_pixels_of_another_form_are_refused(pipeline):
    frames = np.zeros((9, 48, 48, 3), np.uint8)
    for image in (frames[0] / 255.0, frames[0, ..., 0], frames[0, ..., [0, 0, 0, 0]], frames[0, :0], "cat.png"):
        with pytest.raises(ValueError, match=r"an image is .*: give uint8 \(H, W, 3\), as ms.read_video"):
            pipeline.image_to_video("a", image)
        with pytest.raises(ValueError, match="an image is"):
            pipeline.interpolate("a", frames[0], image)
        with pytest.raises(ValueError, match="an image is"):
            pipeline.long_video("a", frames=9, first=image)
    for video in (frames / 255.0, frames[0], frames[:0], frames.tolist(), None):
        for task in (pipeline.video_to_video, pipeline.extend, lambda p, v: pipeline.outpaint(p, v, (64, 64)),
                     lambda p, v: pipeline.transition(p, frames, v)):  # fmt: skip
            with pytest.raises(ValueError, match=r"a video is .*: give uint8 \(T, H, W, 3\)"):
                task("a", video)
    with pytest.raises(ValueError, match="frames=0 must be at least 1"):
        pipeline.long_video("a", frames=0)


def test_what_is_given_must_fit(pipeline):
    with pytest.raises(ValueError, match="nothing is left to make"):
        Given(np.zeros((1, 2, 2, 16)), np.ones((1, 1, 1), bool))
    wrong = Given(np.zeros((2, 4, 4, 16)), np.zeros((2, 2, 2), bool))
    with pytest.raises(ValueError, match=r"the given latents have \(2, 2, 2\) tokens"):
        pipeline.sample([Request("x", (9, 32, 32), given=wrong)], **OPTIONS)


def test_what_jumps_is_evened():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    jumps = np.stack([a, a, a, a, b, b, b, np.roll(b, 1, 0), np.roll(b, 1, 0)])
    even = evened(jumps)
    assert even.shape == jumps.shape and (even[0] == jumps[0]).all() and (even[-1] == jumps[-1]).all()
    found = steps(even)
    assert largest_step(jumps) > 3 and found.max() < 1.15 * found.mean()
    slide = np.stack([np.roll(a, t, 0) for t in range(9)])  # what is even stays
    assert np.abs(evened(slide).astype(int) - slide).mean() < 4


def test_a_long_way_at_an_even_speed_is_no_jump_and_a_cut_is():
    slow = np.stack([np.full((8, 8, 3), 10 + v, np.uint8) for v in range(9)])
    way = np.stack([np.full((8, 8, 3), 20 + 10 * v, np.uint8) for v in range(9)])
    assert jump(np.concatenate([slow, way, slow + 100]), slice(9, 17)) == 1.0
    assert jump(np.concatenate([slow, slow + 100]), slice(6, 12)) > 50


def test_colours_drift_where_an_object_melts_away_and_not_where_it_moves_or_grows():
    def shown(x, radius, opacity=1.0):
        path = {"x_T": np.full(1, x), "y_T": np.full(1, 24.0), "radius_T": np.full(1, radius)}
        frame = render(Scene((1, 48, 48), (Object("red", "circle", "still", **path),), "navy"))[0]
        empty = render(Scene((1, 48, 48), (), "navy"))[0]
        return np.round(opacity * frame + (1 - opacity) * empty.astype(float)).astype(np.uint8)

    way = np.stack([shown(10 + 2.5 * t, 6 + 0.5 * t) for t in range(12)])
    assert colour_drift(way) < STEADY
    for frame in (shown(20, 8, 0.4), shown(20, 3), np.maximum(way[0], way[-1])):
        worse = way.copy()
        worse[6] = frame
        assert colour_drift(worse) > 1.5 * STEADY
    assert colour_distance(way[0], way[-1]) < UNLIKE < colour_distance(way[0], 255 - way[0])


def test_what_fades_is_said(pipeline, clip):
    other = 255 - clip.frames_THWC  # another scene, to which no picture of this one leads
    notes = {}
    note = lambda i, entries: notes.update({i: entries})
    asked = tasks.transition(pipeline, request(clip), clip.frames_THWC, other, between=3)
    still = tasks.extend(pipeline, request(clip), clip.frames_THWC, after=2)
    done(pipeline, asked, still, note=note)
    assert notes == {0: {"faded": True}}


def test_a_loop_of_a_model_that_leads_over_moves_as_told_and_comes_back(pipeline, clip):
    able = dataclasses.replace(pipeline, trained=KINDS, window=5)
    frames = done(able, tasks.text_to_video(able, request(clip, 24, loop=True)))[0]
    assert frames.shape == (24, 32, 32, 3)
    plain = done(able, tasks.long_video(able, dataclasses.replace(request(clip, 1)), 13))[0]
    assert psnr(frames[4:9], plain[4:9]) > 40  # its first 13 frames are a video of its caption, eased at both ends


def test_a_given_video_passes_into_the_codecs_own_and_stays_near_itself():
    rng = np.random.default_rng(0)
    given = rng.integers(60, 200, (9, 16, 16, 3)).astype(np.uint8)
    near, far = given + 4, (given.astype(int) + rng.integers(-20, 20, given.shape)).astype(np.uint8)
    for coded in (near, far):
        shown = eased(given, coded, at_end=True)
        assert (shown[:-EASE] == given[:-EASE]).all() and (shown[-1] != given[-1]).any()
        assert all(psnr(a, b) > FAITHFUL - 0.2 for a, b in zip(shown, given))
        assert (eased(given[::-1], coded[::-1], at_end=False) == shown[::-1]).all()
    elsewhere = (given.astype(int) + rng.integers(-60, 60, given.shape)).astype(np.uint8)
    assert (eased(given, elsewhere, at_end=True) == given).all()  # blending it would make ghosts
    assert (eased(given, near, at_end=True)[-1] == given[-1] + 3).all()  # four fifths of 4

"""Frames one after another with kept keys and values, against the whole clip in the order of frames."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_motion import random_params

from minisora_jax.data.actions import by_latent_frame
from minisora_jax.data.packing import PackConfig
from minisora_jax.data.rows import Segment, pack_segments, patchify
from minisora_jax.diffusion.loss import diffusion_loss
from minisora_jax.diffusion.time import TimeConfig
from minisora_jax.generate import streaming
from minisora_jax.generate.streaming import Stream, StreamConfig
from minisora_jax.models.dit import DiT, DiTConfig
from minisora_jax.models.past import empty_cache, past_of
from minisora_jax.models.text import encode_bytes
from minisora_jax.parallel.kernels.reference import FRAMES
from minisora_jax.parallel.mesh import MeshConfig, batch_specs, make_mesh, to_global

CONFIG = DiTConfig(
    latent_channels=4,
    width=48,
    depth=2,
    heads=2,
    text_width=64,
    text_depth=1,
    dtype="float32",
    positions="space",
    micro_conditioning=False,
    causal=True,
    action_width=4,
)
SIZES = ((5, 2, 2), (3, 1, 3), (4, 2, 1))


def clip(i: int, frames: slice = slice(None)) -> Segment:
    """Clip i, or some of its frames."""
    t, h, w = SIZES[i]
    rng = np.random.default_rng(i)
    tokens = rng.standard_normal((t, h * w, CONFIG.token_width)).astype(np.float32)[frames]
    actions = by_latent_frame(rng.standard_normal((t, 3)).astype(np.float32), t)[frames]
    given = np.zeros(len(tokens) * h * w, bool)
    text = encode_bytes(("a dog", "two cats", "a room")[i])
    size = (len(tokens), h, w)
    return Segment(tokens.reshape(len(given), -1), given, size, text, 8.0, frames.start or 0, actions_tx=actions)


def packed(segments, tokens, frames=0):
    pack = PackConfig(tokens=tokens, text_tokens=192, slots=len(segments), rows=1, frames=frames)
    return jax.tree.map(jnp.asarray, pack_segments([segments], pack, action_width=CONFIG.action_width))


def times(sizes) -> np.ndarray:
    """A time for each frame of each clip."""
    return np.concatenate([np.repeat(0.1 * (1 + np.arange(t)) + 0.05 * i, h * w) for i, (t, h, w) in enumerate(sizes)])


def run(params, batch, time, cfg=CONFIG, **options):
    time_BS = jnp.zeros(batch.segment_BS.shape).at[0, : len(time)].set(jnp.asarray(time, jnp.float32))
    return jax.jit(lambda params, batch: DiT(cfg).apply(params, batch.tokens_BSP, time_BS, batch, **options))(
        params, batch
    )


@pytest.mark.parametrize("attention", ["blockwise", "reference"])
def test_kept_keys_and_values_are_the_whole_clip(attention):
    """Each frame, with the frames before it kept, is what it is in a causal pass over the whole clip."""
    cfg = dataclasses.replace(CONFIG, attention=attention)
    params, (t, h, w) = random_params(cfg), SIZES[0]
    wanted = np.asarray(run(params, packed([clip(0)], 20), times(SIZES[:1]), cfg))[0].reshape(t, h * w, -1)

    places = h * w * t
    cache = empty_cache(cfg, 1, places)
    segment_BM, position_BM3 = np.zeros((1, places), np.int32), np.zeros((1, places, 3), np.int32)
    position_BM3[0] = np.stack(np.meshgrid(range(t), range(h), range(w), indexing="ij"), -1).reshape(-1, 3)
    order = [3, 0, 4, 1, 2]  # frames may be kept in any place
    for frame in range(t):
        at = order[frame] * h * w
        batch = packed([clip(0, slice(frame, frame + 1))], h * w)
        past = past_of(cfg, jnp.asarray(segment_BM), jnp.asarray(position_BM3), jnp.int32(at))
        time_BS = jnp.asarray(times(SIZES[:1])[None, frame * h * w : (frame + 1) * h * w], jnp.float32)
        step = jax.jit(lambda c, b, p, t: DiT(cfg).apply(params | c, b.tokens_BSP, t, b, past=p, mutable=["cache"]))
        got, cache = step(cache, batch, past, time_BS)
        np.testing.assert_allclose(got[0], wanted[frame], atol=1e-5 * np.abs(wanted).max())
        segment_BM[0, at : at + h * w] = FRAMES
        position_BM3[0, at : at + h * w] = np.asarray(batch.position_BS3)[0]


@pytest.mark.parametrize("frames", [0, 12])  # without and with a table of noise levels
def test_a_clip_does_not_depend_on_its_row(frames, monkeypatch):
    """Actions and causal order of one clip, alone and among others."""
    monkeypatch.setattr("minisora_jax.models.levels.LEAST_TOKENS", 1)
    params = random_params(CONFIG)
    together = np.asarray(run(params, packed([clip(i) for i in range(3)], 40, frames), times(SIZES)))[0]
    at = 0
    for i, size in enumerate(SIZES):
        n = int(np.prod(size))
        alone = np.asarray(run(params, packed([clip(i)], n), times(SIZES)[at : at + n]))[0]
        np.testing.assert_allclose(together[at : at + n], alone, atol=1e-5 * np.abs(alone).max())
        at += n


def test_a_frame_depends_on_its_action_and_on_no_later_frame():
    params, original = random_params(CONFIG), clip(0)
    of = lambda segment: np.asarray(run(params, packed([segment], 20), times(SIZES[:1])))[0].reshape(5, 4, -1)
    wanted = of(original)
    for change in ("tokens_nP", "actions_tx"):
        array = getattr(original, change).copy()
        array.reshape(5, -1)[2] += 1
        changed = of(dataclasses.replace(original, **{change: array}))
        np.testing.assert_array_equal(changed[:2], wanted[:2])
        assert all(np.abs(changed[frame] - wanted[frame]).max() > 1e-3 for frame in (2, 3, 4))


def test_a_new_model_of_actions_is_the_model_without():
    without = dataclasses.replace(CONFIG, action_width=0)
    batch = packed([clip(0)], 20)
    params = jax.jit(lambda: DiT(CONFIG).init(jax.random.key(0), batch.tokens_BSP, jnp.zeros((1, 20)), batch))()
    params["params"]["patch_out"]["kernel"] += 0.1
    got = run(params, batch, times(SIZES[:1]))
    params["params"].pop("action")
    wanted = run(params, dataclasses.replace(batch, actions_BUx=None), times(SIZES[:1]), without)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_actions_of_a_latent_frame_are_those_of_its_pixel_frames(factor):
    actions = np.arange(1, 2 * (1 + 3 * factor) + 1, dtype=np.float32).reshape(-1, 2)
    vectors = by_latent_frame(actions, 4)
    assert vectors.shape == (4, 2 * factor + 1)
    assert np.all(vectors[:, -1] == 1) and not vectors[0, : 2 * (factor - 1)].any()
    np.testing.assert_array_equal(vectors[0, -3:-1], actions[0])
    np.testing.assert_array_equal(vectors[1:, :-1].reshape(-1, 2), actions[1:])
    with pytest.raises(ValueError, match="do not fit"):
        by_latent_frame(actions, 9)


@pytest.mark.slow
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_causal_training_on_a_mesh(share):
    """Loss and gradient of causal and mixed clips with actions, on a mesh and on one device."""
    cfg = dataclasses.replace(CONFIG, causal=share == 1.0)
    segments = [clip(i) for i in range(3)]
    pack = PackConfig(tokens=40, text_tokens=192, slots=3, rows=2, frames=12)
    batch = pack_segments([segments, segments[::-1]], pack, action_width=cfg.action_width)
    params, times = random_params(cfg), TimeConfig(causal=share)

    def loss(params, batch):
        value_BS, weight_BS = diffusion_loss(DiT(cfg), times, params, batch, jax.random.key(0))["loss"]
        return jnp.sum(value_BS * weight_BS)

    value, grads = jax.jit(jax.value_and_grad(loss))(params, jax.tree.map(jnp.asarray, batch))
    mesh = make_mesh(MeshConfig(data=2, ring=4))
    with jax.set_mesh(mesh):
        value2, grads2 = jax.jit(jax.value_and_grad(loss))(params, to_global(batch, mesh, batch_specs(batch)))
    np.testing.assert_allclose(value2, value, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(grads2), jax.tree.leaves(grads)):
        np.testing.assert_allclose(np.asarray(ours), theirs, atol=1e-4 * max(float(np.abs(theirs).max()), 1e-3))


# ---- Streams


def stream(params, settings, cfg=CONFIG, rows=1, **options):
    return Stream(params, cfg, (4, 4), encode_bytes(""), settings, rows=rows, **options)


def text(*captions):
    return np.stack([encode_bytes(caption) for caption in captions])


def frames_of(made, count, actions=None, captions=("a dog",)):
    actions = np.zeros((count, len(captions), 4), np.float32) if actions is None else actions
    return np.stack([made.next(actions[i], text(*captions)) for i in range(count)])


def test_a_stream_is_the_sampler_on_whole_clips():
    """Each frame by Euler steps of a causal pass over all frames before it, which are kept clean."""
    params, settings = random_params(CONFIG), StreamConfig(steps=3, window=8, past_time=0.0)
    actions = np.random.default_rng(0).standard_normal((3, 1, 4)).astype(np.float32)
    times = TimeConfig(base_tokens=1)  # frames of 4 tokens: their times are shifted by 2
    made, made_before = frames_of(stream(params, settings, seed=5, times=times), 3, actions), []
    for frame in range(3):
        key = jax.random.split(jax.random.fold_in(jax.random.key(5), frame), 3)[0]
        x = np.asarray(jax.random.normal(key, (1, 4, CONFIG.token_width)))[0]
        for now, then in ((1.0, 4 / 5), (4 / 5, 1 / 2), (1 / 2, 0.0)):
            tokens = np.concatenate([*made_before, x])
            size = (frame + 1, 2, 2)
            whole = Segment(
                tokens,
                np.zeros(len(tokens), bool),
                size,
                encode_bytes("a dog"),
                8.0,
                actions_tx=actions[: frame + 1, 0],
            )
            velocity = run(params, packed([whole], len(tokens)), [0.0] * 4 * frame + [now] * 4)
            x = x + (then - now) * np.asarray(velocity)[0, -4:]
        made_before.append(x)
        ours = patchify(made[frame], CONFIG.patch).reshape(4, -1)
        np.testing.assert_allclose(ours, x, atol=2e-5 * np.abs(x).max())


def test_memory_and_cost_of_a_frame_stay_the_same():
    """Beyond the window nothing grows and nothing is compiled again; the oldest frame leaves, the first ones stay."""
    settings = StreamConfig(steps=1, window=4, sinks=1)
    made = stream(random_params(CONFIG), settings)
    frames_of(made, 5)
    sizes, compiled = jax.tree.map(jnp.shape, made.cache), streaming._next._cache_size()
    frames_of(made, 7)
    assert jax.tree.map(jnp.shape, made.cache) == sizes and streaming._next._cache_size() == compiled
    assert len(made.kept) == 4 and made.kept[0] == 0 and sorted(made.kept) == [0, 1, 2, 3] and made.frame == 12


@pytest.mark.slow
def test_words_of_another_length_compile_nothing_and_padding_is_not_read(monkeypatch):
    cfg = dataclasses.replace(CONFIG, depth=1)
    params, settings = random_params(cfg), StreamConfig(steps=1)
    make = lambda words: frames_of(stream(params, settings, cfg), 1, captions=(words,))
    short, compiled = make("a dog"), streaming._next._cache_size()
    assert np.abs(make("two cats in a room") - short).max() > 1e-2
    assert streaming._next._cache_size() == compiled
    monkeypatch.setattr(streaming, "TEXT_BLOCK", 1)
    np.testing.assert_allclose(make("a dog"), short, atol=1e-5 * np.abs(short).max())
    assert streaming._next._cache_size() == compiled + 1


@pytest.mark.parametrize("sinks", [0, 1])
def test_what_leaves_the_window_is_forgotten_and_sinks_are_not(sinks):
    """In a model of one layer, whose keys and values depend on their own frame alone."""
    cfg, rest = dataclasses.replace(CONFIG, depth=1), np.random.default_rng(1).standard_normal((3, 1, 4, 4, 4))
    params, made = random_params(cfg), []
    for first in (0.0, 1.0):
        of = stream(params, StreamConfig(steps=1, window=3, sinks=sinks, past_time=0.0), cfg)
        for latents in (np.full((1, 4, 4, 4), first), *rest):
            of.give(latents.astype(np.float32), None, text("a dog"))
        made.append(frames_of(of, 1))
    assert (np.abs(made[0] - made[1]).max() > 1e-3) == bool(sinks)


def test_rows_are_streams_of_their_own_and_guidance_is_of_caption_and_actions():
    params = random_params(CONFIG)
    actions = np.random.default_rng(0).standard_normal((2, 2, 4)).astype(np.float32)
    both = frames_of(stream(params, StreamConfig(steps=2), rows=2), 2, actions, ("a dog", "a cat"))
    assert np.abs(both[:, 0] - both[:, 1]).max() > 0.1
    plain = frames_of(stream(params, StreamConfig(steps=2)), 1, actions[:, :1])
    unconditional = frames_of(stream(params, StreamConfig(steps=2)), 1, None, ("",))
    guided = frames_of(stream(params, StreamConfig(steps=2, guidance=1.0 + 1e-6)), 1, actions[:, :1])
    np.testing.assert_allclose(guided, plain, atol=1e-4)
    none = frames_of(stream(params, StreamConfig(steps=2, guidance=0.0)), 1, actions[:, :1])
    np.testing.assert_allclose(none, unconditional, atol=1e-4)


def test_models_that_cannot_stream_are_told_why():
    params = random_params(CONFIG)
    with pytest.raises(ValueError, match="dit.causal=False and times.causal=0"):
        stream(params, StreamConfig(), dataclasses.replace(CONFIG, causal=False))
    with pytest.raises(ValueError, match="positions='learned': streaming is for"):
        stream(params, StreamConfig(), dataclasses.replace(CONFIG, positions="learned"))
    with pytest.raises(ValueError, match="sinks=4 from 0 to"):
        StreamConfig(window=4, sinks=4)
    with pytest.raises(ValueError, match="sampler='unipc' must be one of euler"):
        StreamConfig(sampler="unipc")

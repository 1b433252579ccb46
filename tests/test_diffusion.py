"""Noise levels to train on and to sample at, and the loss, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from minisora_jax.data.packing import PackConfig
from minisora_jax.data.rows import Segment, pack_segments
from minisora_jax.diffusion.loss import appearance_debiased, diffusion_loss
from minisora_jax.diffusion.noise_path import PATHS, PREDICTIONS, target
from minisora_jax.diffusion.objective import WEIGHTS, ObjectiveConfig, weight
from minisora_jax.diffusion.time import TimeConfig, sampling_times, shift, tokens_of_segment, training_times
from minisora_jax.models.dit import DiT, DiTConfig
from minisora_jax.models.text import encode_bytes
from minisora_jax.parallel.mesh import BATCH, MeshConfig, batch_specs, make_mesh, to_global


def batch(sizes, tokens=64, rows=1, known=lambda i, n: np.zeros(n, bool)):
    segments = [
        Segment(np.zeros((n, 4), np.float32), known(i, n), size, encode_bytes("x"), 8.0)
        for i, size in enumerate(sizes)
        for n in [int(np.prod(size))]
    ]
    config = PackConfig(tokens=tokens, text_tokens=4 * len(sizes), slots=len(sizes), rows=rows)
    return jax.tree.map(jnp.asarray, pack_segments([segments] * rows, config))


@given(st.integers(1, 100_000), st.floats(0.01, 0.99))
def test_shift_is_that_of_sd3(tokens, t):
    s = np.sqrt(tokens / 256)
    np.testing.assert_allclose(shift(t, jnp.float32(tokens), 256), s * t / (1 + (s - 1) * t), rtol=1e-4)
    assert shift(0.0, jnp.float32(tokens), 256) == 0 and shift(1.0, jnp.float32(tokens), 256) == 1
    assert shift(t, jnp.float32(tokens), 0) == t


def test_times_are_logit_normal_and_shifted_by_the_clips_own_size():
    sizes = [(1, 2, 2), (2, 4, 4)]
    b = batch(sizes, rows=3000, tokens=40)
    config = TimeConfig(mean=0.3, std=1.2, base_tokens=16, per_frame=0.0)
    time = np.asarray(training_times(config, b, jax.random.key(0)), np.float64)
    assert np.asarray(tokens_of_segment(b)[0, [0, 5, 39]]).tolist() == [4, 32, 0]
    for at, n in ((0, 4), (5, 32)):
        s, t = np.sqrt(n / 16), time[:, at]
        unshifted = t / (s - (s - 1) * t)
        logit = np.log(unshifted / (1 - unshifted))
        assert stats.kstest(logit, stats.norm(0.3, 1.2).cdf).pvalue > 1e-3


@pytest.mark.parametrize("path", ["linear", "vp", "ve"])
def test_laws_of_time(path):
    b = batch([(1, 2, 2)] * 8, rows=500, tokens=32)
    draw = lambda **fields: np.asarray(
        training_times(TimeConfig(base_tokens=0, per_frame=0.0, **fields), b, jax.random.key(2), PATHS[path]), float
    )[:, ::4].ravel()
    assert stats.kstest(draw(distribution="uniform"), stats.uniform.cdf).pvalue > 1e-3
    levels = np.log(PATHS[path].ratio(jnp.asarray(draw(distribution="edm", mean=-1.2, std=1.2))))
    assert stats.kstest(levels, stats.norm(-1.2, 1.2).cdf).pvalue > 1e-3
    with pytest.raises(ValueError, match="times.distribution='cosine' must be one of logit-normal, uniform, edm"):
        TimeConfig(distribution="cosine")


@pytest.mark.parametrize("low, high", [(0.875, 1.0), (0.0, 0.875), (0.2, 0.6)])
@pytest.mark.parametrize("distribution", ["logit-normal", "uniform", "edm"])
def test_an_expert_is_trained_on_its_own_times(distribution, low, high):
    """They have the distribution of all times, cut to the range."""
    b = batch([(1, 2, 2)] * 8, rows=1500, tokens=32)
    draw = lambda **fields: np.asarray(
        training_times(
            TimeConfig(base_tokens=0, per_frame=0.0, distribution=distribution, std=1.5, **fields), b, jax.random.key(3)
        )
    )[:, ::4].ravel()
    every, cut = draw(), draw(low=low, high=high)
    assert low <= cut.min() + 1e-5 and cut.max() <= high + 1e-5
    assert stats.kstest(cut, every[(every >= low) & (every <= high)]).pvalue > 1e-3
    with pytest.raises(ValueError, match="times.low=0.9 and times.high=0.2 must rise"):
        TimeConfig(low=0.9, high=0.2)


def test_on_the_linear_path_edms_law_is_the_logit_normal():
    b = batch([(2, 2, 2)], rows=50, tokens=8)
    one, other = (
        training_times(TimeConfig(0.3, 1.2, distribution=distribution), b, jax.random.key(0))
        for distribution in ("edm", "logit-normal")
    )
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_times_are_equal_within_a_clip_or_a_frame_and_zero_where_known():
    known = lambda i, n: np.arange(n) < 4 if i == 0 else np.zeros(n, bool)
    b = batch([(3, 2, 2), (2, 2, 3)], rows=200, tokens=24, known=known)
    one = np.asarray(training_times(TimeConfig(per_frame=0.0), b, jax.random.key(1)))
    assert (
        (one[:, :4] == 0).all()
        and (np.ptp(one[:, 4:12], axis=1) == 0).all()
        and (np.ptp(one[:, 12:], axis=1) == 0).all()
    )
    each = np.asarray(training_times(TimeConfig(per_frame=1.0), b, jax.random.key(1)))
    frames = each[:, 12:].reshape(200, 2, 6)
    assert (np.ptp(frames, axis=2) == 0).all() and (frames[:, 0, 0] != frames[:, 1, 0]).all()


def test_sampling_times_run_from_noise_to_clean():
    known = lambda i, n: np.arange(n) < 2
    times = np.asarray(sampling_times(TimeConfig(base_tokens=16), 10, batch([(2, 2, 2)], tokens=10, known=known)))
    assert times.shape == (11, 1, 10)
    assert (times[:, 0, :2] == 0).all() and (times[0, 0, 2:8] == 1).all() and (times[-1] == 0).all()
    assert (np.diff(times[:, 0, 2:8], axis=0) < 0).all()


def test_the_loss_counts_only_what_is_to_be_made():
    known = lambda i, n: np.arange(n) < 2
    b = batch([(1, 2, 2)], tokens=6, known=known)
    model = DiT(DiTConfig(latent_channels=4, patch=(1, 1, 1), width=32, depth=1, heads=1, text_width=64, text_depth=0))
    params = model.init(jax.random.key(0), b.tokens_BSP, jnp.zeros((1, 6)), b)
    values, weights = diffusion_loss(model, TimeConfig(), params, b, jax.random.key(1))["loss"]
    assert weights[0].tolist() == [0, 0, 1, 1, 0, 0]
    # The head starts at zero, so the error is that of the velocity itself: the noise, as the tokens are zero.
    noise = jax.random.normal(jax.random.split(jax.random.key(1))[0], b.tokens_BSP.shape)
    np.testing.assert_allclose(values[0, 2:4], (noise**2).mean(-1)[0, 2:4], rtol=1e-5)


@pytest.mark.parametrize("scheme", WEIGHTS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_every_objective_is_its_weighted_error(path, prediction, scheme):
    """With a model that says zero: w(t) times the square of what it should have said; finite at known tokens."""
    known = lambda i, n: np.arange(n) < 2
    b = batch([(1, 2, 2), (2, 2, 2)], tokens=14, known=known)
    seen = {}

    class Zero:
        config = DiTConfig(latent_channels=4, patch=(1, 1, 1))

        def apply(self, params, x_BSP, time_BS, batch):
            seen["x"], seen["time"] = x_BSP, time_BS
            return jnp.zeros_like(x_BSP)

    objective, key = ObjectiveConfig(path, prediction, scheme), jax.random.key(1)
    values, weights = diffusion_loss(Zero(), TimeConfig(base_tokens=0), {}, b, key, objective)["loss"]
    assert weights[0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0] and np.isfinite(values).all()
    noise_key, time_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, b.tokens_BSP.shape)
    time = training_times(TimeConfig(base_tokens=0), b, time_key, PATHS[path])
    wanted = target(PATHS[path], prediction, 0.0, noise, time[..., None])
    expected = weight(objective, time) * (wanted**2).mean(-1)
    np.testing.assert_allclose(jnp.where(weights > 0, values, 0), jnp.where(weights > 0, expected, 0), rtol=1e-5)
    sigma = PATHS[path].sigma(time)[..., None]
    scale = jnp.sqrt(1 + sigma**2) if path == "ve" else 1.0
    np.testing.assert_allclose(seen["x"] * scale, sigma * noise, rtol=1e-4, atol=1e-6)
    assert (seen["time"][0, :2] == 0).all() and (seen["time"] <= 1).all()


@pytest.mark.parametrize("path", PATHS)
def test_the_loss_is_the_same_on_a_mesh(path):
    class Half:
        config = DiTConfig(latent_channels=4, patch=(1, 1, 1))

        def apply(self, params, x_BSP, time_BS, batch):
            return 0.5 * x_BSP * time_BS[..., None]

    def loss(b, key):
        values, weights = diffusion_loss(
            Half(), TimeConfig(distribution="edm"), {}, b, key, ObjectiveConfig(path, "v", "edm")
        )["loss"]
        return values * weights

    b = batch([(1, 2, 2), (2, 2, 2)], tokens=14, rows=8)
    alone = jax.jit(loss)(b, jax.random.key(0))
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    with jax.set_mesh(mesh):
        both = jax.jit(loss)(to_global(jax.tree.map(np.asarray, b), mesh, BATCH), jax.random.key(0))
        assert both.sharding.spec[0] == ("data", "fsdp")
    np.testing.assert_allclose(both, alone, rtol=1e-5, atol=1e-6)


# Losses of the lines of showlab/MotionDirector (MotionDirector_train.py, commit 0146a50) that compute them, run in
# PyTorch: p_theta = sin(0.37 i), p = 1.25 sin(0.37 i + 0.5), i counting (frame, y, x, channel) of 12 channels.
MOTION_DIRECTOR = {
    # (frames, height, width), anchor frame: the debiased loss, and its sum with the usual one
    ((3, 2, 2), 2): (0.3936700224876404, 0.5776351690292358),
    ((4, 1, 3), 0): (0.40438127517700195, 0.5883464217185974),
    ((1, 2, 2), 0): (0.03195202723145485, 0.21818207204341888),
}


def test_the_debiased_loss_is_motion_directors():
    """Three clips in one row, each with its own anchor frame."""
    b = batch([size for size, _ in MOTION_DIRECTOR], tokens=30)
    numbers = [np.arange(12 * np.prod(size)).reshape(-1, 12) for size, _ in MOTION_DIRECTOR]
    error = [np.sin(0.37 * i) - 1.25 * np.sin(0.37 * i + 0.5) for i in numbers]
    errors_BSP = jnp.asarray(np.concatenate([*error, np.full((2, 12), 9.0)])[None], jnp.float32)
    anchors = [(index + 0.5) / size[0] for size, index in MOTION_DIRECTOR]
    anchor_BS = jnp.asarray(np.repeat([*anchors, 0], [*map(len, error), 2])[None])
    squares = appearance_debiased(errors_BSP, b, anchor_BS, 1.0)[0] ** 2
    for segment, (wanted, total) in enumerate(MOTION_DIRECTOR.values(), 1):
        of_clip = np.flatnonzero(b.segment_BS[0] == segment)
        np.testing.assert_allclose(squares[of_clip].mean(), wanted, rtol=1e-5)
        np.testing.assert_allclose(wanted + (errors_BSP[0][of_clip] ** 2).mean(), total, rtol=1e-5)


@pytest.mark.slow
def test_the_debiased_loss_in_training():
    """Each clip has one anchor frame, all come about equally often, and an error in a given token is none."""
    sizes, count = [(3, 2, 2), (4, 1, 3)], 24
    b = batch(sizes, tokens=count, rows=600, known=lambda i, n: (np.arange(n) < 3) & (i == 1))

    class Told:
        config = DiTConfig(latent_channels=4, patch=(1, 1, 1))

        def apply(self, params, x_BSP, time_BS, batch):
            return jnp.zeros_like(x_BSP)

    key, beta = jax.random.key(3), 0.7
    given = {"times": TimeConfig(base_tokens=0), "params": {}, "batch": b, "key": key}
    plain, debiased = (np.asarray(diffusion_loss(Told(), **given, debias=x)["loss"][0]) for x in (0.0, beta))
    noise = np.array(jax.random.normal(jax.random.split(key)[0], b.tokens_BSP.shape), np.float64)
    noise[:, 12:15] = 0  # given
    chosen = [[], []]
    for row in range(600):
        for clip, (start, (frames, *_)) in enumerate(zip((0, 12), sizes)):
            error = noise[row, start : start + 12].reshape(frames, -1, 4)
            rest = (debiased - plain)[row, start : start + 12].reshape(frames, -1)
            gaps = []
            for anchor in error:
                wanted = ((np.sqrt(beta**2 + 1) * error - beta * anchor) ** 2).mean(-1)
                gaps.append(np.abs((wanted - rest)[clip:]).max())  # the first frame of the second clip is given
            assert min(gaps) < 1e-5
            chosen[clip].append(int(np.argmin(gaps)))
    for counts, frames in zip(chosen, (3, 4)):
        assert stats.chisquare(np.bincount(counts, minlength=frames)).pvalue > 1e-3

    mesh = make_mesh(MeshConfig(data=2, ring=4))
    with jax.set_mesh(mesh):
        given["batch"] = to_global(jax.tree.map(np.asarray, b), mesh, batch_specs(b))
        on_mesh = jax.jit(lambda b: diffusion_loss(Told(), **(given | {"batch": b}), debias=beta)["loss"][0])
        np.testing.assert_allclose(on_mesh(given["batch"]), debiased, rtol=1e-5, atol=1e-6)

"""The codec's algebra: causal, streaming exactly, frames 1 + 4k <-> latents 1 + k."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisora_jax.models.vae import VAE, VAEConfig
from minisora_jax.models.vae_layers import Conv, average_down, duplicate_up, patchify, unpatchify

PLAIN = VAEConfig(base=4, multipliers=(1, 2, 2), residual_blocks=1, time_down=(True, True), latent_channels=3)
WAN_LIKE = VAEConfig(base=4, multipliers=(1, 1, 2, 2), residual_blocks=1, latent_channels=2)
TINY = dataclasses.replace(PLAIN, patch=2, shortcuts=True)
WAN_22_LIKE = dataclasses.replace(WAN_LIKE, multipliers=(1, 2, 2), time_down=(True, True), patch=2, shortcuts=True)
WAN_22_LIKE = dataclasses.replace(WAN_22_LIKE, halve_up=False, decoder_base=6)
CONFIGS = {"plain": PLAIN, "wan": WAN_LIKE, "wan2.2": WAN_22_LIKE, "tiny": TINY}


def make(config: VAEConfig):
    """(module, parameters with no zeros in them, so that every layer counts)."""
    vae, rng = VAE(config), np.random.default_rng(0)
    shapes = jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, 5, 16, 16, 3)))

    def draw(path, p):
        scale = 1.0 / np.sqrt(np.prod(p.shape[:-1])) if path[-1].key == "kernel" else 0.1
        return jnp.asarray(scale * rng.standard_normal(p.shape) + (path[-1].key == "scale"), jnp.float32)

    return vae, jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module", params=CONFIGS)
def codec(request):
    return make(CONFIGS[request.param])


def clip(frames: int, seed: int = 0) -> jax.Array:
    return jax.random.uniform(jax.random.key(seed), (2, frames, 16, 32, 3), minval=-1.0)


@pytest.mark.parametrize("chunks", [(1, 4, 4), (5, 4), (1, 8)])
def test_streaming_equals_whole(codec, chunks):
    # Random weights amplify rounding; test_codec.py holds the trained codec to 1e-5.
    vae, params = codec
    apply, x = jax.jit(vae.apply, static_argnames="method"), clip(9)
    mean, logvar, _ = apply(params, x, method="encode")
    y, _ = apply(params, mean, method="decode")

    past, parts, at = None, [], 0
    for n in chunks:
        *moments, past = apply(params, x[:, at : at + n], past, method="encode")
        parts.append(moments)
        at += n
    for whole, pieces in zip((mean, logvar), zip(*parts)):
        np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, rtol=0, atol=3e-5 * np.abs(whole).max())

    past, frames, at = None, [], 0
    for n in chunks:
        latents = 1 + (n - 1) // 4 if at == 0 else n // 4
        part, past = apply(params, mean[:, at : at + latents], past, method="decode")
        assert part.shape[1] == n
        frames.append(part)
        at += latents
    np.testing.assert_allclose(jnp.concatenate(frames, axis=1), y, rtol=0, atol=3e-5 * np.abs(y).max())


def test_the_future_changes_nothing_before_it(codec):
    vae, params = codec
    x = clip(9)
    other = x.at[:, 5:].set(clip(9, seed=1)[:, 5:])
    mean, changed = (vae.apply(params, v, method="encode")[0] for v in (x, other))
    np.testing.assert_allclose(mean[:, :2], changed[:, :2], atol=1e-6)
    assert np.abs(mean[:, 2] - changed[:, 2]).max() > 1e-3
    y, changed = (vae.apply(params, z, method="decode")[0] for z in (mean, mean.at[:, 2].add(1.0)))
    np.testing.assert_allclose(y[:, :5], changed[:, :5], atol=1e-6)
    assert np.abs(y[:, 5:] - changed[:, 5:]).max() > 1e-3


def test_an_image_is_the_first_frame_of_a_clip(codec):
    vae, params = codec
    x = clip(5)
    image, video = (vae.apply(params, v, method="encode")[0] for v in (x[:, :1], x))
    assert image.shape[1] == 1
    np.testing.assert_allclose(image, video[:, :1], atol=1e-6)


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_shapes_are_those_announced(codec, frames):
    vae, params = codec
    x = clip(frames)
    mean, logvar, _ = jax.eval_shape(lambda: vae.apply(params, x, method="encode"))
    size = vae.config.latent_size(x.shape[1:4])
    assert mean.shape == logvar.shape == (2, *size, vae.config.latent_channels)
    y = jax.eval_shape(lambda: vae.apply(params, jnp.zeros(mean.shape), method="decode")[0])
    assert y.shape == x.shape


@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 40), st.sampled_from(sorted(CONFIGS)))
def test_sizes_go_there_and_back(k, h, w, name):
    config = CONFIGS[name]
    pixels = config.pixel_size((1 + k, h, w))
    assert pixels == (1 + 4 * k, h * config.space_factor, w * config.space_factor)
    assert config.latent_size(pixels) == (1 + k, h, w)


def test_sizes_off_the_grid_name_the_fix():
    with pytest.raises(ValueError, match=r"frames=16 must be 1 \+ 4\*k; use 13 or 17"):
        TINY.latent_size((16, 32, 32))
    with pytest.raises(ValueError, match="height=20 must be a multiple of 8"):
        TINY.latent_size((17, 20, 32))
    with pytest.raises(ValueError, match="time_down"):
        dataclasses.replace(PLAIN, time_down=(True,))


@pytest.mark.parametrize("kernel, stride", [((3, 3, 3), (1, 1)), ((3, 1, 1), (2, 1)), ((1, 3, 3), (1, 2))])
def test_stacked_taps_are_a_3d_convolution(kernel, stride):
    x = jax.random.normal(jax.random.key(0), (2, 7, 6, 8, 5))
    conv = Conv(4, kernel, stride=stride)
    params = conv.init(jax.random.key(1), x)
    space = ((kernel[1] - 1) // 2,) * 2
    reference = jax.lax.conv_general_dilated(
        x,
        params["params"]["kernel"],
        (stride[0], stride[1], stride[1]),
        ((0, 0), space, space),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )
    np.testing.assert_allclose(conv.apply(params, x), reference, atol=1e-5)


def test_patchify_inverts():
    x = jax.random.normal(jax.random.key(0), (1, 2, 4, 6, 3))
    deep = patchify(x, 2)
    assert deep.shape == (1, 2, 2, 3, 12)
    np.testing.assert_array_equal(deep[0, 0, 0, 0].reshape(3, 2, 2), x[0, 0, :2, :2].T)  # channel, column, row
    np.testing.assert_array_equal(unpatchify(deep, 2), x)


def test_average_down_is_average_pooling_where_the_width_stays():
    x_BTHWC = np.random.default_rng(0).normal(size=(2, 4, 4, 6, 3)).astype(np.float32)
    pooled = x_BTHWC.reshape(2, 2, 2, 2, 2, 3, 2, 3).mean(axis=(2, 4, 6))
    np.testing.assert_allclose(average_down(jnp.asarray(x_BTHWC), 2, 2, 3), pooled, atol=1e-6)


def test_shortcuts_keep_means_and_values():
    x = jnp.ones((1, 5, 4, 4, 4)) * jnp.arange(4.0)
    down = average_down(x, 2, 2, 16)
    assert down.shape == (1, 3, 2, 2, 16)
    np.testing.assert_allclose(down[:, 1:].mean(-1), 1.5)  # every group averages all-present neighbours
    up = duplicate_up(jnp.arange(3.0).reshape(1, 3, 1, 1, 1) + jnp.zeros((1, 3, 2, 2, 8)), 2, 2, 4, first=True)
    assert up.shape == (1, 5, 4, 4, 4)
    np.testing.assert_array_equal(up[0, :, 0, 0, 0], [0, 1, 1, 2, 2])

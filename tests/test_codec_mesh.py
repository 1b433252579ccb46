"""The codec with its pictures cut over devices: the same as whole, in value and gradient, in a share of the memory."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minisora_jax.models.codec import Codec, _decode
from minisora_jax.models.vae import VAE, VAEConfig
from minisora_jax.parallel.halo import fetch_frames, put_frames, put_params, shard_height
from minisora_jax.parallel.mesh import BATCH, MeshConfig, make_mesh, to_global
from minisora_jax.training.codec_task import CodecTask, loss_terms, train_codec
from minisora_jax.training.loop import RunConfig

PLAIN = VAEConfig(base=4, multipliers=(1, 2), residual_blocks=1, time_down=(True,), latent_channels=3)
WAN_21 = dataclasses.replace(PLAIN, multipliers=(1, 1, 2), time_down=(False, True), latent_channels=2)
WAN_22 = dataclasses.replace(WAN_21, patch=2, shortcuts=True, halve_up=False, decoder_base=6)
IMAGES = VAEConfig(base=32, multipliers=(1, 1), residual_blocks=1, time_down=(False,), latent_channels=2)
IMAGES = dataclasses.replace(IMAGES, images=True, halve_up=False)
# With the latent rows of a picture: 8 divide over 2, 4 and 8 devices; 6 over 2; 5 over none.
CONFIGS = {"plain": (PLAIN, 8), "wan2.1": (WAN_21, 6), "wan2.2": (WAN_22, 5), "images": (IMAGES, 6)}
MESHES = {2: dict(ring=2, data=4), 4: dict(ring=2, ulysses=2, fsdp=2), 8: dict(ring=4, ulysses=2)}


def mesh_of(devices: int):
    """A context with the mesh on which pictures are cut into so many; of 1: no mesh."""
    return contextlib.nullcontext() if devices == 1 else jax.set_mesh(make_mesh(MeshConfig(**MESHES[devices])))


def make(config: VAEConfig):
    """Parameters with no zeros in them, so that every layer counts."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(VAE(config).init, jax.random.key(0), jnp.zeros((1, 5, 16, 16, 3)))

    def draw(path, p):
        scale = 1.0 / np.sqrt(np.prod(p.shape[:-1])) if path[-1].key == "kernel" else 0.1
        return np.asarray(scale * rng.standard_normal(p.shape) + (path[-1].key == "scale"), np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def whole_clips(config: VAEConfig, params, x_BTHWC, z_Bthwc, devices: int):
    """(mean, logvar, decoded), the whole clips at once, as float32."""
    clips, units = len(z_Bthwc), z_Bthwc.shape[2]

    @jax.jit
    def run(params, x_BTHWC, z_Bthwc):
        vae = VAE(config)
        encode = lambda p, x: vae.apply(p, x, method="encode")[:2]
        decode = lambda p, z: vae.apply(p, z, method="decode")[0]
        return *shard_height(encode, units, params, x_BTHWC), shard_height(decode, units, params, z_Bthwc)

    with mesh_of(devices):
        out = run(put_params(params), put_frames(x_BTHWC, units), put_frames(z_Bthwc, units))
        return [fetch_frames(y, clips, units) for y in out]


def clips_of(config: VAEConfig, units: int, frames: int, clips: int = 1):
    """Random (x_BTHWC, z_Bthwc) of pictures `units` latent rows high."""
    rng, t = np.random.default_rng(1), 1 + (frames - 1) // config.time_factor
    x = rng.uniform(-1, 1, (clips, frames, units * config.space_factor, 3 * config.space_factor, 3))
    return x.astype(np.float32), rng.standard_normal((clips, t, units, 3, config.latent_channels), np.float32)


def worst(ours, theirs) -> float:
    """The largest difference, relative to the largest value."""
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_cut_over_devices_are_the_whole(name):
    config, units = CONFIGS[name]
    params, clips = make(config), clips_of(config, units, frames=1 + 2 * config.time_factor)
    one = whole_clips(config, params, *clips, 1)
    for devices in (4,) if config.images else MESHES:
        many = whole_clips(config, params, *clips, devices)
        assert [y.shape for y in many] == [y.shape for y in one]
        assert worst(many, one) < 1e-5, devices


def test_streaming_on_a_mesh_is_the_codec_of_one_device():
    config = PLAIN
    stats = np.full(config.latent_channels, 0.1, np.float32), np.full(config.latent_channels, 2.0, np.float32)
    codec = Codec(config, make(config), *stats)
    x, z = clips_of(config, 5, frames=7, clips=2)
    frames = np.asarray((x + 1) * 127.5, np.uint8)
    one = codec.encode(frames), codec.decode(z)
    with mesh_of(4):
        many, parts = codec.encode(frames), list(codec.stream(z))
        assert worst(many, one[0]) < 1e-5
        assert [p.shape[1] for p in parts] == [1, 2, 2, 2]
        decoded = np.concatenate(parts, axis=1)
        assert decoded.shape == one[1].shape and decoded.dtype == np.uint8
        # to one rounding of the pixels
        assert np.abs(decoded.astype(int) - one[1]).max() <= 1 and (decoded != one[1]).mean() < 1e-3


def test_bfloat16_is_as_far_from_float32_on_a_mesh_as_on_one_device():
    params, clips = make(PLAIN), clips_of(PLAIN, 8, frames=3)
    half = dataclasses.replace(PLAIN, dtype="bfloat16")
    exact = whole_clips(PLAIN, params, *clips, 1)
    one, many = (worst(whole_clips(half, params, *clips, n), exact) for n in (1, 4))
    assert many < 1.5 * one < 0.1


def test_gradients_are_those_of_one_device():
    config, units = IMAGES, 7  # with every layer that looks across rows, and with padding
    params, (x, z) = make(config), clips_of(config, units, frames=2, clips=2)

    def loss(params, x_BTHWC, z_Bthwc, weight_BTHWC):
        vae = VAE(config)
        mean = shard_height(lambda p, x: vae.apply(p, x, method="encode")[0], units, params, x_BTHWC)
        y = shard_height(lambda p, z: vae.apply(p, z, method="decode")[0], units, params, mean + z_Bthwc)
        return jnp.sum(weight_BTHWC * (y - x_BTHWC) ** 2)

    def gradients(devices):
        with mesh_of(devices):
            pictures = [put_frames(v, units) for v in (x, z, np.ones_like(x))]  # zero weight below the picture
            value, (d_params, d_x) = jax.jit(jax.value_and_grad(loss, (0, 1)))(put_params(params), *pictures)
            return [float(value), *jax.tree.leaves(jax.device_get(d_params)), fetch_frames(d_x, 2, units)]

    one, many = gradients(1), gradients(4)
    assert abs(many[0] / one[0] - 1) < 1e-5
    largest = max(np.abs(d).max() for d in one[1:])  # that of a bias before a norm of one channel a group is 0
    for a, b in zip(many[1:], one[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max() + 1e-6 * largest)


@pytest.mark.slow
def test_a_training_loss_is_that_of_one_device():
    task = CodecTask(vae=PLAIN, crop_THW=(3, 8, 4), batch=4)
    params, key = make(PLAIN), jax.random.key(0)
    frames = np.random.default_rng(0).integers(0, 256, (4, *task.crop_THW, 3), np.uint8)

    def terms(devices):
        with mesh_of(devices):
            x = frames if devices == 1 else to_global(frames, jax.sharding.get_mesh(), BATCH)
            loss = jax.jit(lambda p, x: loss_terms(task, p, x, key)["loss"][0])(put_params(params), x)
            return np.asarray(loss)

    assert worst([terms(4)], [terms(1)]) < 1e-5


def test_a_crop_that_does_not_divide_is_refused(tmp_path):
    run = RunConfig(steps=1, mesh=MeshConfig(**MESHES[8]))
    with pytest.raises(ValueError, match="a crop of 12 latent rows .*mesh.ring=4 x mesh.ulysses=2: give it 8 or 16"):
        train_codec(CodecTask(vae=WAN_22, crop_THW=(3, 96, 16), run=run), tmp_path, [], [], {})


def test_a_device_holds_its_share():
    config = dataclasses.replace(PLAIN, base=8)
    params, (_, z) = make(config), clips_of(config, 32, frames=3)

    def bytes_of_a_step(devices):
        with mesh_of(devices):
            half = put_params({"params": {"decoder": params["params"]["decoder"]}})
            z_Bthwc = put_frames(z[:, :1].repeat(8, axis=3), 32)
            past = jax.eval_shape(lambda p, z: _decode(config, 32, p, z, None)[1], half, z_Bthwc)
            memory = _decode.lower(config, 32, half, z_Bthwc, past).compile().memory_analysis()
            return memory.temp_size_in_bytes

    one, two, eight = (bytes_of_a_step(n) for n in (1, 2, 8))
    assert two < 0.7 * one and eight < 0.25 * one, (one, two, eight)

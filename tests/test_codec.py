"""Training and exporting a codec, and the one that is bundled."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minisora_jax.bundled import CODEC, MODEL
from minisora_jax.models.codec import Codec, to_float
from minisora_jax.models.vae import VAE as VideoVAE
from minisora_jax.models.vae import VAEConfig
from minisora_jax.toy.shapes import Shapes
from minisora_jax.training.codec_task import CodecTask, reconstruct, train_codec
from minisora_jax.training.loop import RunConfig
from minisora_jax.training.optim import OptimConfig

VAE = VAEConfig(base=4, multipliers=(1, 2), residual_blocks=1, time_down=(True,), latent_channels=4, patch=2)
TASK = CodecTask(
    vae=VAE,
    crop_THW=(5, 16, 16),
    batch=8,
    run=RunConfig(steps=6, log_every=2, save_every=6, sample_every=0, optim=OptimConfig(learning_rate=3e-3, warmup=1)),
)
CLIPS = Shapes("train", 8, size_THW=(5, 32, 32))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("codec")
    return train_codec(TASK, workdir, CLIPS, CLIPS, {"a": 1}), workdir / "export"


@pytest.mark.slow
def test_an_export_loads_as_it_was(trained):
    codec, directory = trained
    again = Codec.load(directory)
    assert again.hash == codec.hash and again.config == VAE
    frames = CLIPS[0].frames_THWC[None]
    np.testing.assert_array_equal(again.encode(frames)[0], codec.encode(frames)[0])
    # Latents have about unit variance, by the statistics stored with it.
    flat = np.concatenate([again.encode(CLIPS[i].frames_THWC[None])[0].reshape(-1, 4) for i in range(8)])
    np.testing.assert_allclose(flat.mean(0), 0, atol=0.05)
    np.testing.assert_allclose(flat.std(0), 1, atol=0.05)


@pytest.mark.slow
def test_decoder_only_keeps_the_meaning_of_latents(trained, tmp_path):
    codec, directory = trained
    task = dataclasses.replace(TASK, start=str(directory), decoder_only=True)
    tuned = train_codec(task, tmp_path, CLIPS, CLIPS, {"a": 2})
    assert tuned.latents == codec.latents == codec.hash != tuned.hash  # caches and models of the one are of the other
    frames = CLIPS[0].frames_THWC[None]
    for before, after in zip(codec.encode(frames), tuned.encode(frames)):
        np.testing.assert_array_equal(before, after)
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), codec.params["params"]["decoder"], tuned.params["params"]["decoder"]
    )
    assert max(jax.tree.leaves(moved)) > 1e-4


@pytest.mark.slow
def test_what_cannot_be_started_from_is_refused(trained, tmp_path):
    with pytest.raises(ValueError, match="set start to an exported codec"):
        dataclasses.replace(TASK, decoder_only=True)
    other = dataclasses.replace(TASK, vae=dataclasses.replace(VAE, base=6), start=str(trained[1]))
    with pytest.raises(ValueError, match="has another shape"):
        train_codec(other, tmp_path, CLIPS, CLIPS, {})
    with pytest.raises(ValueError, match="not a codec"):
        Codec.load(MODEL)
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"):
        Codec.load(tmp_path)


@pytest.mark.slow
def test_streaming_decodes_what_whole_decoding_does(trained):
    codec = trained[0]
    mean, _ = codec.encode(CLIPS[0].frames_THWC[None])
    chunks = list(codec.stream(mean))
    assert [c.shape[1] for c in chunks] == [1, 2, 2]
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), codec.decode(mean))


def test_the_bundled_codec_streams_to_a_hundred_thousandth():
    codec = Codec.load(CODEC)
    vae, clip = VideoVAE(codec.config), Shapes("heldout", 1, size_THW=(9, 32, 48))[0]
    encode = jax.jit(lambda x: vae.apply(codec.params, x, method="encode")[0])
    decode = jax.jit(lambda z, past: vae.apply(codec.params, z, past, method="decode"))
    mean = encode(to_float(jnp.asarray(clip.frames_THWC[None])))
    whole, _ = decode(mean, None)
    past, parts = None, []
    for i in range(mean.shape[1]):
        part, past = decode(mean[:, i : i + 1], past)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=0, atol=1e-5)


def test_scores_are_the_textbooks():
    codec = Codec.load(CODEC)
    clips = [Shapes("heldout", 4, size_THW=(5, 32, 32))[i] for i in range(2)]
    scores, pairs = reconstruct(codec, clips)
    mse = [np.mean((c.frames_THWC / 255.0 - f / 255.0) ** 2) for c, f in pairs]
    np.testing.assert_allclose(scores["psnr"], np.mean(-10 * np.log10(mse)), rtol=1e-4)
    assert 0.5 < scores["ssim"] <= 1


@pytest.mark.slow
def test_the_bundled_codec_is_as_good_as_its_page_says():
    clips = [Shapes("heldout", 16)[i] for i in range(16)]
    assert reconstruct(Codec.load(CODEC), clips)[0]["psnr"] > 31.0


def test_the_bundle_is_small_and_names_no_machine():
    files = [p for d in (CODEC, MODEL) for p in Path(d).iterdir()]
    assert sum(p.stat().st_size for p in files) < 15 * 2**20
    for path in files:
        if path.suffix in (".json", ".jsonl"):
            assert '"/' not in path.read_text(encoding="utf-8")

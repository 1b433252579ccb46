"""CLIP's vision encoder against transformers: pixels, values, names, files (parity/make_image_to_video.py)."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent / "parity"))

from headers import published  # noqa: E402
from published import export_params  # noqa: E402
from random_weights import draw  # noqa: E402
from test_parity_image_to_video import CLIP, clip_names, picture, publish  # noqa: E402

from minisora_jax.cli import main  # noqa: E402
from minisora_jax.models.clip_vision import (  # noqa: E402
    CLIPVision,
    CLIPVisionConfig,
    ImageEncoder,
    clip_pixels,
    image_encoder_of,  # noqa: E402
)
from minisora_jax.weights import clip_vision  # noqa: E402
from minisora_jax.weights.checkpoint import Checkpoint  # noqa: E402
from minisora_jax.weights.dit import CONFIGS  # noqa: E402
from minisora_jax.weights.presets import IMAGE_ENCODERS, ImagePreset  # noqa: E402
from minisora_jax.weights.rules import export_lazily  # noqa: E402

THEIRS = load_file(Path(__file__).parent / "parity/fixtures/clip_vision.safetensors")
SIZES = ((32, 48), (60, 28), (28, 28))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The small encoder, imported from a folder as transformers 5 saves it."""
    monkeypatch.setitem(IMAGE_ENCODERS, "clip-vision-h", ImagePreset("small", CLIP, clip_vision))
    publish(tmp_path / "image_encoder/model.safetensors", clip_names("bare"))
    assert main(["import", "clip-vision-h", str(tmp_path / "image_encoder"), f"--out={tmp_path / 'clip'}"]) == 0
    return tmp_path / "clip"


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_the_image_processors(size):
    name = f"{size[0]}x{size[1]}"
    ours = clip_pixels(picture(f"picture {name}", *size), CLIP.side)
    np.testing.assert_allclose(np.moveaxis(ours, -1, 0), THEIRS[f"pixels {name}"], atol=1e-6)


def test_values_are_the_references(folder, parity):
    encoder = ImageEncoder.load(folder)
    images = {f"{h}x{w}": picture(f"picture {h}x{w}", h, w) for h, w in SIZES}
    pixels_BHWC = np.stack([clip_pixels(image, CLIP.side) for image in images.values()])
    tokens_BIE, pooled_BE = CLIPVision(CLIP).apply(encoder.params, pixels_BHWC)
    np.testing.assert_allclose(encoder.encode(list(images.values())), tokens_BIE, atol=1e-5)
    for name, tokens_IE, pooled_E in zip(images, tokens_BIE, pooled_BE):
        for kind, ours in (("features", tokens_IE), ("pooled", pooled_E)):
            parity("CLIP vision", "forward", ours, theirs := THEIRS[f"{kind} {name}"], name)
            assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


def test_every_published_tensor_has_its_place():
    config = clip_vision.CONFIGS["clip-vision-h"]
    pixels = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = jax.eval_shape(CLIPVision(config).init, jax.random.key(0), pixels)
    blank = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes)
    ours = {name: x.shape for name, x in export_lazily(blank, clip_vision.rules(config, "bare")).items()}
    assert ours == published("clip_vision", "clip-vision-h")
    assert config.tokens == 257 and config.width == CONFIGS["wan2.1-i2v-14b"].image_features
    assert CONFIGS["wan2.1-flf2v-14b"].image_positions == 2 * config.tokens


@pytest.mark.parametrize("layout, beside", [
    ("transformers", {"visual_projection.weight": (4, 32), "vision_model.embeddings.position_ids": (1, 5)}),
    ("transformers", {"text_model.final_layer_norm.weight": (8,), "logit_scale": (), "text_projection.weight": (4, 8)}),
    ("wan-own", {"head": (32, 4)}),
    ("wan-own visual.", {"visual.head": (32, 4), "textual.norm.weight": (8,), "log_scale": ()}),
])  # fmt: skip
def test_other_layouts_hold_the_same(layout, beside, folder, tmp_path):
    """Alone and within a whole CLIP."""
    encoder, (layout, _, prefix) = ImageEncoder.load(folder), layout.partition(" ")
    tensors = {prefix + k: v for k, v in export_params(encoder.params, clip_vision.rules(CLIP, layout)).items()}
    save_file(tensors | {k: np.asarray(draw(k, shape)) for k, shape in beside.items()}, tmp_path / "other.safetensors")
    assert main(["import", "clip-vision-h", str(tmp_path / "other.safetensors"), f"--out={tmp_path / 'again'}"]) == 0
    again = ImageEncoder.load(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, again.params, encoder.params)


def test_it_is_exported_as_it_came(folder, tmp_path):
    assert main(["export", str(folder), str(tmp_path / "out")]) == 0
    after = Checkpoint(tmp_path / "out")
    names = clip_names("transformers")
    assert set(after.names) == set(names)
    for name, shape in names.items():
        np.testing.assert_array_equal(after.read(name), draw(name.removeprefix("vision_model."), shape))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["CLIPVisionModel"] and config["image_size"] == 28


def test_what_it_is_not(folder, tmp_path, capsys):
    with pytest.raises(ValueError, match="--image-encoder=DIR .`minisora import clip-vision-h` writes it"):
        image_encoder_of(CONFIGS["wan2.1-i2v-14b"], None)
    with pytest.raises(ValueError, match="the model attends to no image tokens: leave it out"):
        image_encoder_of(CONFIGS["wan2.2-i2v-a14b"], folder)
    with pytest.raises(ValueError, match="makes 5 tokens of width 32 of an image, and the model reads .* width 128"):
        image_encoder_of(CONFIGS["wan2.1-i2v-14b"], folder)
    other = dataclasses.replace(CONFIGS["wan2.1-flf2v-14b"], image_features=32)
    with pytest.raises(ValueError, match="reads tokens of width 32, 514 of two images"):
        image_encoder_of(other, folder)
    with pytest.raises(ValueError, match="holds a 'clip_vision' model, not a codec"):
        from minisora_jax.models.codec import Codec

        Codec.load(folder)
    assert main(["import", "clip-h", str(tmp_path / "image_encoder"), f"--out={tmp_path / 'text'}"]) != 0
    assert "this is a clip-vision-h: use `minisora import clip-vision-h" in capsys.readouterr().err
    (folder / "checksums.json").unlink()
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(saved | {"clip_vision": saved["clip_vision"] | {"mlp": 44}}))
    with pytest.raises(ValueError, match=r"clip does not fit: for params/blocks/down/kernel it has \(2, 48, 32\)"):
        ImageEncoder.load(folder)
    for fields, words in ((dict(depth=1), "depth=1 must be at least 2"), (dict(side=30), "side=30 must be a multiple")):
        with pytest.raises(ValueError, match=words):
            CLIPVisionConfig(**fields)

"""CLIP's vision encoder (Radford et al. 2021, arXiv:2103.00020): an image as tokens, which Wan's models attend to.

x = norm([class, patches W] + position)
x = x + attention(norm(x)),   x = x + act(norm(x) W_1) W_2,   for all layers but the last
tokens = x,   pooled = norm(x of the class after the last layer)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from minisora_jax.io.hub import local_folder
from minisora_jax.io.model_dir import (
    check_shapes,
    export_model,
    in_words,
    load_model,
    model_hash,
    require_kind,
    saved_settings,
)
from minisora_jax.media.resize import resized
from minisora_jax.models.clip import ACTIVATIONS, CLIPBlock
from minisora_jax.models.dit_config import DiTConfig
from minisora_jax.models.layers import Einsum, LayerNorm, scan_layers

KIND = "clip_vision"
# Of the levels 0..1 of red, green and blue in CLIP's training.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """Shape of the encoder. The defaults are those of OpenCLIP's ViT-H/14.

    Raises:
        ValueError: The heads do not divide the width, a patch not the image, or the activation is unknown.
    """

    width: int = 1280
    heads: int = 16
    mlp: int = 5120
    depth: int = 32
    side: int = 224  # of an image, in pixels
    patch: int = 14  # side of a token, in pixels
    activation: str = "gelu"
    dtype: str = "float32"  # of the computation

    def __post_init__(self) -> None:
        for whole, part in (("width", "heads"), ("side", "patch")):
            if getattr(self, part) < 1 or getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{whole}={getattr(self, whole)} must be a multiple of {part}={getattr(self, part)}, at least 1"
                )
        if self.depth < 2:
            raise ValueError(f"depth={self.depth} must be at least 2: the tokens are those before the last layer")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} must be one of {', '.join(ACTIVATIONS)}")

    @property
    def tokens(self) -> int:
        """Tokens of an image: one of its class, and its patches."""
        return 1 + (self.side // self.patch) ** 2


class CLIPVision(nn.Module):
    """The whole encoder: the tokens of each image before the last layer, and one pooled vector."""

    config: CLIPVisionConfig

    @nn.compact
    def __call__(self, pixels_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(tokens (B, I, D), pooled (B, D)) of images as `clip_pixels` returns them."""
        cfg = self.config
        B, D, p, n = len(pixels_BHWC), cfg.width, cfg.patch, cfg.side // cfg.patch
        patches_BIx = pixels_BHWC.reshape(B, n, p, n, p, 3).swapaxes(2, 3).reshape(B, n * n, p * p * 3)
        patches_BID = Einsum("bix,xd->bid", (p * p * 3, D), bias=False, name="patch_in")(patches_BIx.astype(cfg.dtype))
        of_class_D = self.param("class", nn.initializers.normal(0.02), (D,)).astype(cfg.dtype)
        positions_ID = self.param("positions", nn.initializers.normal(0.02), (cfg.tokens, D)).astype(cfg.dtype)
        x = jnp.concatenate([jnp.broadcast_to(of_class_D, (B, 1, D)), patches_BID], axis=1) + positions_ID
        x, segment_BI = LayerNorm(epsilon=1e-5, name="norm_in")(x), jnp.ones((B, cfg.tokens), jnp.int32)
        blocks = scan_layers(CLIPBlock, cfg.depth - 1, in_axes=nn.broadcast)
        x, _ = blocks(cfg, causal=False, name="blocks")(x, segment_BI)
        last, _ = CLIPBlock(cfg, causal=False, name="last")(x, segment_BI)
        return x, LayerNorm(epsilon=1e-5, name="norm")(last[:, 0])


def abstract_params(config: CLIPVisionConfig) -> Any:
    """The parameter tree {"params": ...} as `jax.ShapeDtypeStruct`s, float32."""
    pixels = jax.ShapeDtypeStruct((1, config.side, config.side, 3), jnp.float32)
    return jax.eval_shape(CLIPVision(config).init, jax.random.key(0), pixels)


def clip_pixels(image_HWC: np.ndarray, side: int) -> np.ndarray:
    """The middle square of an image as CLIP reads it, float32 (side, side, 3), as in transformers' CLIPImageProcessor.

    Args:
        image_HWC: uint8.
        side: Pixels. The image's shorter side is brought to it, bicubic.
    """
    H, W, _ = image_HWC.shape
    sides = (side * H // min(H, W), side * W // min(H, W))
    scaled_HWC = resized(image_HWC[None], sides)[0]
    y, x = ((n - side) // 2 for n in sides)
    levels = scaled_HWC[y : y + side, x : x + side].astype(np.float32) / 255
    return (levels - np.array(MEAN, np.float32)) / np.array(STD, np.float32)


@dataclasses.dataclass(frozen=True, repr=False)
class ImageEncoder:
    """A vision encoder with its weights, as `minisora import` writes it."""

    config: CLIPVisionConfig
    params: dict  # {"params": ...}, in the precision of the files
    hash: str = ""  # of the exported files

    def __repr__(self) -> str:
        return f"ImageEncoder({in_words(self.params, self.hash)})"

    @classmethod
    def load(cls, directory: str | Path) -> ImageEncoder:
        """The encoder in `directory`. Raises ValueError if it holds another kind of model, or one of another shape."""
        directory = local_folder(directory)
        params, config = load_model(directory, dtype=None)
        require_kind(config, KIND, directory)
        settings = saved_settings(CLIPVisionConfig, config, KIND, directory)
        check_shapes(params, abstract_params(settings), directory)
        return cls(settings, jax.tree.map(jnp.asarray, params), model_hash(directory))

    def export(self, directory: str | Path, record: dict, dtype: str | None = None, progress: str = "") -> str:
        """Write the encoder to `directory`; its hash. The arguments are those of `TextEncoder.export`."""
        config = {"kind": KIND, KIND: dataclasses.asdict(self.config), "training": record}
        return export_model(directory, self.params, config, dtype=dtype, progress=progress)

    def encode(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """The tokens (B, I, E) of uint8 images (H, W, 3), float32."""
        pixels_BHWC = np.stack([clip_pixels(image_HWC, self.config.side) for image_HWC in images])
        return np.asarray(self._tokens(self.params, pixels_BHWC), np.float32)

    @functools.cached_property
    def _tokens(self):
        return jax.jit(lambda params, pixels_BHWC: CLIPVision(self.config).apply(params, pixels_BHWC)[0])


def image_encoder_of(config: DiTConfig, directory: str | Path | None) -> ImageEncoder | None:
    """The image encoder that a model attends to; None if it attends to none.

    Args:
        config: The model's config.
        directory: Where the encoder is, or None.

    Raises:
        ValueError: The model needs one and none is given, or its tokens are not those that the model reads.
    """
    if not config.image_features:
        if directory is not None:
            raise ValueError(f"--image-encoder={directory}: the model attends to no image tokens: leave it out")
        return None
    if directory is None:
        raise ValueError(
            f"the model attends to image tokens of width {config.image_features}: give their encoder by "
            f"--image-encoder=DIR (`minisora import clip-vision-h` writes it)"
        )
    encoder = ImageEncoder.load(directory)
    made = encoder.config
    if made.width != config.image_features or config.image_positions not in (0, 2 * made.tokens):
        reads = f"tokens of width {config.image_features}"
        reads += f", {config.image_positions} of two images" if config.image_positions else ""
        raise ValueError(
            f"the image encoder {directory} makes {made.tokens} tokens of width {made.width} of an image, and the "
            f"model reads {reads}: give the one that it was trained with by --image-encoder=DIR"
        )
    return encoder

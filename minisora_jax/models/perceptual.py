"""LPIPS: how different two pictures look (Zhang et al. 2018, arXiv:1801.03924), version 0.1 with VGG16.

    f_k      = features of VGG16 after the last ReLU of stage k, divided by their length at each position
    distance = sum_k  mean over positions  sum_c  head_kc (f_kc(a) - f_kc(b))^2

VGG16 (Simonyan & Zisserman 2014, arXiv:1409.1556) was trained on ImageNet, and the heads on judgements of people.
Neither is part of this package: `minisora import lpips` reads both from their files. With other weights it is a
distance of some kind, but not LPIPS.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from minisora_jax.io.model_dir import check_shapes, export_model, in_words, load_model, model_hash, saved_settings
from minisora_jax.parallel.halo import over_clips

KIND = "lpips"
# LPIPS's own constants for pixels in [-1, 1]: ImageNet's mean and spread of each colour.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
TINY = 1e-10  # added to lengths


@dataclasses.dataclass(frozen=True)
class LPIPSConfig:
    """Shape of the network. The defaults are VGG16's."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 512)  # channels of each stage
    depths: tuple[int, ...] = (2, 2, 3, 3, 3)  # convolutions of each stage

    @property
    def smallest(self) -> int:
        """The fewest pixels of a side: each stage but the first halves it."""
        return 2 ** (len(self.widths) - 1)


class LPIPSNet(nn.Module):
    """Two sets of frames (R, H, W, 3) in [-1, 1] -> the distance of each pair (R,), float32."""

    config: LPIPSConfig

    @nn.compact
    def __call__(self, a_RHWC: jax.Array, b_RHWC: jax.Array) -> jax.Array:
        R = len(a_RHWC)
        x = (jnp.concatenate([a_RHWC, b_RHWC]) - jnp.asarray(SHIFT)) / jnp.asarray(SCALE)
        distance = jnp.zeros(R)
        for stage, (width, depth) in enumerate(zip(self.config.widths, self.config.depths)):
            if stage:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for i in range(depth):
                x = nn.relu(nn.Conv(width, (3, 3), padding=1, name=f"stage{stage}_conv{i}")(x))
            head = self.param(f"head{stage}", nn.initializers.constant(1 / width), (width,))
            features = _unit(x)
            distance += jnp.mean((features[:R] - features[R:]) ** 2 @ head, axis=(1, 2))
        return distance


def _unit(x: jax.Array) -> jax.Array:
    """x divided by its length over channels. Where x is zero it stays zero, with a gradient of zero."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    length = jnp.sqrt(jnp.where(square > 0, square, 1.0))  # the root has no derivative at 0
    return jnp.where(square > 0, x / (length + TINY), 0.0)


def frame_distances(config: LPIPSConfig, params: dict, a_BTHWC: jax.Array, b_BTHWC: jax.Array) -> jax.Array:
    """The distance of each clip's frames, averaged over its frames: (B,).

    On a mesh each device takes its own clips, and their frames whole.

    Args:
        config: The network's shape.
        params: {"params": ...} of LPIPSNet.
        a_BTHWC: Frames in [-1, 1].
        b_BTHWC: Frames of the same shape.

    Raises:
        ValueError: The frames are too small for the network.
    """
    if min(a_BTHWC.shape[2:4]) < config.smallest:
        H, W = a_BTHWC.shape[2:4]
        raise ValueError(f"LPIPS needs frames of at least {config.smallest} x {config.smallest} pixels, not {H} x {W}")

    def of_clips(params, a_BTHWC, b_BTHWC):
        B, T = a_BTHWC.shape[:2]
        frames = lambda x: x.reshape(B * T, *x.shape[2:])
        distances = LPIPSNet(config).apply(params, frames(a_BTHWC), frames(b_BTHWC))
        return jnp.mean(jnp.asarray(distances).reshape(B, T), axis=1)

    return over_clips(of_clips, params, a_BTHWC, b_BTHWC)


@dataclasses.dataclass(frozen=True, repr=False)
class LPIPS:
    """LPIPS with its weights."""

    config: LPIPSConfig
    params: dict  # {"params": ...} of LPIPSNet
    hash: str = ""  # of the exported files

    def __repr__(self) -> str:
        return f"LPIPS({in_words(self.params, self.hash)})"

    @classmethod
    def load(cls, directory: str | Path) -> LPIPS:
        """What `minisora import lpips` wrote to `directory`.

        Raises:
            ValueError: The directory holds another kind of model, or one of another shape.
        """
        params, config = load_model(directory)
        if config.get("kind") != KIND:
            raise ValueError(f"{directory} holds a {config.get('kind')!r} model, not LPIPS: `minisora import lpips`")
        settings = saved_settings(LPIPSConfig, config, KIND, directory)
        check_shapes(params, abstract_params(settings), directory)
        return cls(settings, params, model_hash(directory))

    def export(self, directory: str | Path, record: dict, dtype: str | None = None, progress: str = "") -> str:
        """Write it to `directory`, so that `load` reads it; returns the hash of the written files.

        Args:
            directory: The directory to write.
            record: The weights' origin, stored in its config.
            dtype: dtype of the stored weights; None: as they are.
            progress: Label of the progress bar; "": no bar.
        """
        config = {"kind": KIND, KIND: dataclasses.asdict(self.config), "training": record}
        return export_model(directory, self.params, config, dtype=dtype, progress=progress)

    def distance(self, a_THWC: np.ndarray, b_THWC: np.ndarray) -> float:
        """The mean distance of the frames of two videos, uint8 of one size. It takes one frame at a time."""
        pairs = (np.stack([a, b])[:, None, None] / np.float32(127.5) - 1 for a, b in zip(a_THWC, b_THWC))
        return float(np.mean([_distance(self.config, self.params, *pair)[0] for pair in pairs]))


@functools.partial(jax.jit, static_argnums=0)
def _distance(config: LPIPSConfig, params: dict, a_BTHWC: jax.Array, b_BTHWC: jax.Array) -> jax.Array:
    return frame_distances(config, params, a_BTHWC, b_BTHWC)


def abstract_params(config: LPIPSConfig) -> Any:
    """The parameter tree {"params": ...} as `jax.ShapeDtypeStruct`s, float32."""
    frames = jax.ShapeDtypeStruct((1, config.smallest, config.smallest, 3), jnp.float32)
    return jax.eval_shape(LPIPSNet(config).init, jax.random.key(0), frames, frames)

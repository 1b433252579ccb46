"""The types every part of minisora_jax speaks, and the dimension key of their arrays.

An array whose rank is known carries its axes as a suffix (`tokens_BSP`):

    B  packed rows            T H W C  frames, height, width, channels of pixels
    S  tokens per row         t h w c  the same of latents
    G  clip slots per row     P  patch vector (patch_t * patch_h * patch_w * c)
    L  text tokens per row    E  text feature width      D  model width
    N  attention heads        K  head width              F  mlp width
    I  image tokens per row

This module imports nothing of minisora_jax, and importing it touches no device.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import struct


@dataclasses.dataclass(frozen=True)
class Clip:
    """One captioned clip of pixels on the host. An image is a clip of one frame."""

    frames_THWC: np.ndarray  # uint8 RGB, T = 1 + 4 k
    caption: str
    fps: float
    name: str  # where it came from: a path, or "shapes/train/17"

    @property
    def size_THW(self) -> tuple[int, int, int]:
        return self.frames_THWC.shape[:3]


@dataclasses.dataclass(frozen=True)
class LatentClip:
    """One clip after the codec: the posterior's moments, and its caption's features."""

    mean_thwc: np.ndarray  # float32, normalised to about unit variance by the codec's statistics
    std_thwc: np.ndarray  # float32, the posterior's standard deviation on the same scale
    text_LE: np.ndarray  # caption features; for the byte "encoder" E = 1 and the entries are ByT5 ids
    caption: str
    fps: float
    name: str


@struct.dataclass
class PackedBatch:
    """Several clips of any size in each row of S tokens: the one batch type of training, evaluation and sampling.

    Segment ids run 1, 2, ... along a row and are contiguous; 0 is padding. Text tokens carry the id of
    the clip they describe, so every mask follows from the ids and none is ever stored. Slot g of the
    per-slot tables belongs to segment g + 1.
    """

    tokens_BSP: jax.Array  # float32 clean latents (zeros where nothing is known, when sampling)
    segment_BS: jax.Array  # int32
    position_BS3: jax.Array  # int32 (t, y, x) on the clip's own patch grid
    cond_mask_BS: jax.Array  # bool: clean conditioning tokens, held at time 0 and outside the loss
    text_BLE: jax.Array  # text features (float32), or ByT5 ids (int32, E = 1)
    text_segment_BL: jax.Array  # int32
    fps_BG: jax.Array  # float32 frames per second of the clip in slot g; 0 where the slot is empty
    size_BG3: jax.Array  # int32 (t, h, w) of the clip's patch grid; 0 where the slot is empty
    image_BIE: jax.Array | None = None  # an image encoder's tokens, for models that attend to them
    image_segment_BI: jax.Array | None = None  # int32
    max_segment_len: int = struct.field(
        pytree_node=False, default=0
    )  # a promise: no clip has more tokens; 0: not known


@struct.dataclass
class TrainState:
    """Everything a training run carries from step to step, arrays only. The data state is `step` itself."""

    step: jax.Array  # int32 ()
    params: Any
    ema: Any  # exponential moving average of params
    opt_state: Any

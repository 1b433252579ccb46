"""The dimension key of all arrays, and the types that every part of minisora_jax shares.

An array whose rank is known carries its axes as a suffix: `tokens_BSP`. One letter is one axis in the whole package:

    B  packed rows, or clips of one size       T H W C  frames, height, width, channels of pixels, and of the
    S  tokens of a row (attention's queries)            codec's layers between pixels and latents
    M  keys and values of attention            t h w c  frames, height, width, channels of latents
    G  clip slots of a row                     P  patch vector: patch_t * patch_h * patch_w * c
    L  text tokens of a row                    E  width of text or image features
    I  image tokens of a row                   D  model width
    N  attention heads                         K  head width
    F  mlp width                               k  K / 2, the pairs of channels that a rotation turns
    R  B * T, frames folded into rows          V  entries of a lookup table
    A  microbatches of gradient accumulation;  x  an axis that the docstring names
       of `actions_TA`, the width of an action

A digit is an axis of that length: `position_BS3` holds (t, y, x) on a clip's grid of patches.

This module imports nothing of minisora_jax, and importing it touches no device.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import numpy as np
from flax import struct


@dataclasses.dataclass(frozen=True, repr=False)
class Clip:
    """One captioned clip of pixels on the host. An image is a clip of one frame."""

    frames_THWC: np.ndarray  # uint8 RGB, T = 1 + 4 k
    caption: str
    fps: float  # frames per second
    name: str  # the clip's origin: a path, or "shapes/train/17"
    # float32: row i is the action that led to frame i, and row 0 is zeros; None: the clip has no actions
    actions_TA: np.ndarray | None = None

    def __repr__(self) -> str:
        sides = "x".join(map(str, self.size_THW))
        return f"Clip({self.name!r}, {sides} (frames x height x width), {self.fps:g} fps, {self.caption!r})"

    @property
    def size_THW(self) -> tuple[int, int, int]:
        """(frames, height, width) in pixels."""
        T, H, W, _ = self.frames_THWC.shape
        return T, H, W


class ClipSequence(Protocol):
    """Clips by number, such as a prepared data set or the procedural clips. It takes no slices."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Clip: ...


@dataclasses.dataclass(frozen=True, repr=False)
class GivenFrames:
    """Given frames as models with `DiTConfig.given_channels` read them, see data/given_frames.py."""

    channels_thwc: np.ndarray  # float32: which frames of a latent frame are given, and the latents of the given video
    image_IE: np.ndarray | None = None  # float32: the image encoder's tokens of the given frames, if they are read

    def __repr__(self) -> str:
        tokens = "" if self.image_IE is None else f", {len(self.image_IE)} image tokens"
        return f"GivenFrames({'x'.join(map(str, self.channels_thwc.shape))}{tokens})"


@dataclasses.dataclass(frozen=True, repr=False)
class LatentClip:
    """One clip after the codec: the moments of its posterior, and the features of its caption."""

    mean_thwc: np.ndarray  # float32, normalised to about unit variance by the codec's statistics
    std_thwc: np.ndarray  # float32, the posterior's standard deviation on the same scale
    text_LE: np.ndarray  # caption features, or ByT5 ids where the model reads bytes (E = 1)
    caption: str
    fps: float  # frames per second of the pixels
    name: str
    frames: GivenFrames | None = None  # for models that read given frames as channels
    actions_TA: np.ndarray | None = None  # float32, as those of the `Clip`: a row for each frame of pixels

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.mean_thwc.shape))
        return f"LatentClip({self.name!r}, latents {shape}, {self.fps:g} fps, {self.caption!r})"


@struct.dataclass
class PackedBatch:
    """The one batch type of training, evaluation and sampling: rows of S tokens, each packed with clips of any size.

    Segment ids count 1, 2, ... along a row and are contiguous; 0 is padding. Text tokens carry the id of the clip that
    they describe. Every attention mask follows from the ids, so no mask is stored. Slot g of the tables over G
    describes segment g + 1.
    """

    tokens_BSP: jax.Array  # float32 clean latents; when sampling, zeros where no latents are given
    segment_BS: jax.Array  # int32
    position_BS3: jax.Array  # int32 (t, y, x) on the clip's own grid of patches
    cond_mask_BS: jax.Array  # bool: True for tokens that are given clean; they stay at time 0 and outside the loss
    text_BLE: jax.Array  # text features (float32), or ByT5 ids (int32, E = 1)
    text_segment_BL: jax.Array  # int32
    fps_BG: jax.Array  # float32 frames per second of the clip in slot g; 0 where the slot is empty
    size_BG3: jax.Array  # int32 (t, y, x) size of the clip's grid of patches; 0 where the slot is empty
    image_BIE: jax.Array | None = None  # an image encoder's tokens, for models that attend to them
    image_segment_BI: jax.Array | None = None  # int32
    given_BSx: jax.Array | None = None  # channels of given frames, for models with `DiTConfig.given_channels`
    actions_BUx: jax.Array | None = None  # actions of each latent frame of the row, see data/actions.py
    causal_BG: jax.Array | None = None  # bool: the clip's attention is in the order of frames; None: of no clip
    # An upper bound on the tokens of every segment; 0: unknown. It is not checked.
    max_segment_len: int = struct.field(pytree_node=False, default=0)
    # An upper bound on the latent frames of a row, all clips together. It promises that the tokens of a frame have one
    # time, but for those that are given. 0: each token may have a time of its own.
    frames: int = struct.field(pytree_node=False, default=0)


@struct.dataclass
class TrainState:
    """All arrays that a training run carries from step to step. The data state is `step` itself."""

    step: jax.Array  # int32 ()
    params: Any
    ema: Any  # exponential moving average of params; None where none is kept
    opt_state: Any

    @property
    def average(self) -> Any:
        """The parameters to evaluate and to export: the average, or the newest where none is kept."""
        return self.params if self.ema is None else self.ema

"""Given frames as channels of the model's input: how Wan's image-to-video models read a first and a last frame.

Other models take given frames as tokens at time 0. These have `DiTConfig.given_channels`. Beside the noisy latents of a
latent frame they read, at all times:

    4 channels    1 where a frame of the latent frame is given, else 0 (a clip's first frame counts for all four)
    16 channels   the codec's latents of a video of the given frames, with grey between them

Wan 2.1 attends to an image encoder's tokens of the given frames as well, beside the caption.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from minisora_jax.data.rows import patchify
from minisora_jax.models.dit_config import DiTConfig
from minisora_jax.types import PackedBatch

if TYPE_CHECKING:
    from minisora_jax.generate.packed import PackedRequests

GREY = 127.5  # 0 to the codec
FLAGS = {"image_to_video": "--image FIRST", "interpolate": "--first FIRST --last LAST"}


def require_able(config: DiTConfig, task: str) -> None:
    """Raise ValueError if the model cannot do this task of generate/tasks.py. The message says what it can do."""
    if config.given_channels and task not in (able := able_tasks(config)):
        can = " and ".join(f"{name} ({FLAGS[name]})" for name in able)
        raise ValueError(f"this model makes videos from given frames: it can do {can}, and not {task}")


def able_tasks(config: DiTConfig) -> list[str]:
    """The tasks of a model with given channels. Wan 2.1 has one for one image and one for two; Wan 2.2's does both."""
    if not config.image_features:
        return list(FLAGS)
    return ["interpolate"] if config.image_positions else ["image_to_video"]


def given_video(frames: Mapping[int, np.ndarray], size_THW: tuple[int, int, int]) -> np.ndarray:
    """The given frames with grey between them, float16 (T, H, W, 3) from 0 to 255, in which each level is exact.

    Args:
        frames: uint8 (H, W, 3) by number.
        size_THW: frames, height and width of the video.
    """
    if len(frames) >= size_THW[0]:
        raise ValueError(f"frames={size_THW[0]}: the whole video is given, and nothing is left to make")
    video_THWC = np.full((*size_THW, 3), GREY, np.float16)
    for number, frame_HWC in frames.items():
        video_THWC[number] = frame_HWC
    return video_THWC


def as_channels(latents_thwc: np.ndarray, given_T: np.ndarray) -> np.ndarray:
    """The channels of given frames (t, h, w, frames of a latent frame + c), float32.

    Args:
        latents_thwc: the codec's latents of `given_video`.
        given_T: bool: the frames that are given.
    """
    t = len(latents_thwc)
    of_each = (len(given_T) - 1) // (t - 1)
    mask_tx = np.concatenate([np.repeat(given_T[:1], of_each - 1), given_T]).reshape(t, of_each)
    mask_thwx = np.broadcast_to(mask_tx[:, None, None], (*latents_thwc.shape[:3], of_each))
    return np.concatenate([mask_thwx, latents_thwc], axis=-1, dtype=np.float32)


def with_frames(batch: PackedBatch, packed: PackedRequests) -> PackedBatch:
    """The batch of packed requests with the given frames of each, if the model reads them so.

    Raises:
        ValueError: a request gives none, has those of another size, or gives them to a model that does not read them.
    """
    config, requests = packed.config, [packed.requests[i] for i, _, _ in packed.places]
    if not config.given_channels:
        if any(request.frames for request in requests):
            raise ValueError("Request.frames is for models with given_channels: use Request.given")
        return batch
    given_BSx = np.zeros((*batch.segment_BS.shape, config.given_width), np.float32)
    for request, (i, b, at) in zip(requests, packed.places):
        if request.frames is None or request.given is not None:
            require_able(config, "a request without frames" if request.given is None else "one with given latents")
            continue
        given_thwx = patchify(request.frames.channels_thwc, config.patch)
        if given_thwx.shape != (*packed.grids[i], config.given_width):
            raise ValueError(
                f"the given frames have {given_thwx.shape[:3]} tokens of {given_thwx.shape[-1]} numbers; the request "
                f"has {packed.grids[i]}, and the model reads {config.given_width}"
            )
        n = packed.copies * packed.tokens(i)
        given_BSx[b, at : at + n] = np.tile(given_thwx.reshape(-1, config.given_width), (packed.copies, 1))
    batch = dataclasses.replace(batch, given_BSx=given_BSx)
    return _with_image_tokens(batch, packed) if config.image_features else batch


def _with_image_tokens(batch: PackedBatch, packed: PackedRequests) -> PackedBatch:
    """The batch with the image tokens of each segment."""
    rows = [[_image_tokens(packed, i) for i in row for _ in range(packed.copies)] for row in packed.rows]
    longest = max(sum(map(len, row)) for row in rows)
    image_BIE = np.zeros((len(rows), longest, packed.config.image_features), np.float32)
    image_segment_BI = np.zeros((len(rows), longest), np.int32)
    for b, row in enumerate(rows):
        segments = np.repeat(np.arange(1, len(row) + 1), [len(x_IE) for x_IE in row])
        image_BIE[b, : len(segments)], image_segment_BI[b, : len(segments)] = np.concatenate(row), segments
    return dataclasses.replace(batch, image_BIE=image_BIE, image_segment_BI=image_segment_BI)


def _image_tokens(packed: PackedRequests, i: int) -> np.ndarray:
    """The image tokens (I, E) of request i."""
    config, frames = packed.config, packed.requests[i].frames
    shape = () if frames is None or frames.image_IE is None else frames.image_IE.shape
    if not shape or shape[1] != config.image_features or config.image_positions not in (0, shape[0]):
        wanted = f"{config.image_positions or 'any number'} of width {config.image_features}"
        raise ValueError(f"the image tokens of given frames are {shape or 'missing'}: the model reads {wanted}")
    assert frames is not None and frames.image_IE is not None
    return frames.image_IE

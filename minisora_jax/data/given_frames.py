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
from typing import Any

import numpy as np

from minisora_jax.models.clip_vision import ImageEncoder
from minisora_jax.models.codec import Codec
from minisora_jax.types import GivenFrames

GREY = 127.5  # 0 to the codec
KINDS = {"first": (0,), "ends": (0, -1)}  # numbers of the frames of a clip that are given


@dataclasses.dataclass(frozen=True)
class FrameEncoder:
    """Makes the given frames of training clips, for the latent cache.

    Raises:
        ValueError: There is no such kind.
    """

    kind: str  # of KINDS
    codec: Codec
    images: ImageEncoder | None = None  # for models that attend to image tokens

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"--given={self.kind}: the given frames of a clip are {' or '.join(KINDS)}")

    @property
    def record(self) -> dict[str, Any]:
        """What a cache says of its given frames: their kind, channels, and the (I, E) of their image tokens or None."""
        count, vae = len(KINDS[self.kind]), self.codec.config
        record = {"frames": self.kind, "channels": vae.time_factor + vae.latent_channels, "image": None}
        if self.images:
            shape = [count * self.images.config.tokens, self.images.config.width]
            record |= {"image": shape, "image_encoder": self.images.hash}
        return record

    def leaves_some(self, frames: int) -> bool:
        """Whether a clip of so many frames has others than the given ones."""
        return frames > len(KINDS[self.kind])

    def encode(self, frames_BTHWC: np.ndarray) -> list[GivenFrames]:
        """The given frames of clips of one size, uint8 (B, T, H, W, 3)."""
        B, T = frames_BTHWC.shape[:2]
        numbers = [number % T for number in KINDS[self.kind]]
        videos = [given_video({n: clip[n] for n in numbers}, clip.shape[:3]) for clip in frames_BTHWC]
        latents_Bthwc, _ = self.codec.encode(np.stack(videos))
        channels = [as_channels(latents, np.isin(np.arange(T), numbers)) for latents in latents_Bthwc]
        if self.images is None:
            return [GivenFrames(x) for x in channels]
        tokens_BIE = self.images.encode([clip[n] for clip in frames_BTHWC for n in numbers])
        tokens_BIE = tokens_BIE.reshape(B, -1, tokens_BIE.shape[-1])
        return [GivenFrames(x, tokens_IE) for x, tokens_IE in zip(channels, tokens_BIE)]


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

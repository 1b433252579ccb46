"""Rows of a batch from the clips that a plan puts in them: latents as tokens, and tokens side by side."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from minisora_jax.data.conditioning import ConditioningConfig
from minisora_jax.data.packing import PackConfig
from minisora_jax.models.text import PAD
from minisora_jax.types import LatentClip, PackedBatch


def padded_text(text_LE: np.ndarray, tokens: int) -> np.ndarray:
    """A caption's features with zeros up to `tokens`, which Wan's models attend to as they do to the caption's own."""
    return np.pad(text_LE, ((0, tokens - len(text_LE)), (0, 0))) if len(text_LE) < tokens else text_LE


@dataclasses.dataclass(frozen=True)
class Segment:
    """One clip ready to be put in a row, at any place in it."""

    tokens_nP: np.ndarray  # float32
    known_n: np.ndarray  # bool
    size_thw: tuple[int, int, int]  # of the patch grid, n = t * h * w
    text_LE: np.ndarray
    fps: float
    first: int = 0  # its first frame's place in time: above 0 where the codec's own first frame is not among them
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)  # of its tokens in t, y, x

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        """The size of the grid that it is put onto."""
        (t, h, w), (a, b, c) = self.size_thw, self.spacing
        return 1 + round((t - 1) * a), max(1, round(h * b)), max(1, round(w * c))


def patchify(latents_thwc: np.ndarray, patch: tuple[int, int, int]) -> np.ndarray:
    """(t, h, w, c) -> (t/pt, h/ph, w/pw, pt * ph * pw * c), the patch ordered (t, y, x, channel)."""
    t, h, w, c = latents_thwc.shape
    pt, ph, pw = patch
    x = latents_thwc.reshape(t // pt, pt, h // ph, ph, w // pw, pw, c)
    return x.transpose(0, 2, 4, 1, 3, 5, 6).reshape(t // pt, h // ph, w // pw, pt * ph * pw * c)


def unpatchify(patches_thwP: np.ndarray, patch: tuple[int, int, int]) -> np.ndarray:
    """The inverse of `patchify`."""
    t, h, w, P = patches_thwP.shape
    pt, ph, pw = patch
    x = patches_thwP.reshape(t, h, w, pt, ph, pw, P // (pt * ph * pw))
    return x.transpose(0, 3, 1, 4, 2, 5, 6).reshape(t * pt, h * ph, w * pw, -1)


@functools.lru_cache(256)
def grid_positions(size_thw: tuple[int, int, int], first: int = 0, spacing: tuple = (1.0, 1.0, 1.0)) -> np.ndarray:
    """(t * h * w, 3): the (t, y, x) of each token of a grid, in row order. Not to be written to.

    int32 on its own grid; float32 where it is put onto another, frames from the first on, pictures edge on edge.
    """
    places = np.stack(np.meshgrid(*map(np.arange, size_thw), indexing="ij"), axis=-1).reshape(-1, 3).astype(np.int32)
    places += np.array([first, 0, 0], np.int32)
    if spacing == (1.0, 1.0, 1.0):
        return places
    middle = np.array([0.0, 0.5, 0.5], np.float32)
    return (places + middle) * np.array(spacing, np.float32) - middle


def pack_segments(rows: list[list[Segment]], config: PackConfig, max_segment_len: int = 0) -> PackedBatch:
    """A PackedBatch of NumPy arrays from the segments of each row, none of which has more than `longest` tokens."""
    B, S, L, G = len(rows), config.tokens, config.text_tokens, config.slots
    some = next(segment for row in rows for segment in row)
    on_others = any(segment.spacing != (1.0, 1.0, 1.0) for row in rows for segment in row)
    text, token_width = some.text_LE, some.tokens_nP.shape[1]
    batch = PackedBatch(
        tokens_BSP=np.zeros((B, S, token_width), np.float32),
        segment_BS=np.zeros((B, S), np.int32),
        position_BS3=np.zeros((B, S, 3), np.float32 if on_others else np.int32),
        cond_mask_BS=np.zeros((B, S), bool),
        text_BLE=np.full((B, L, text.shape[1]), PAD, text.dtype),
        text_segment_BL=np.zeros((B, L), np.int32),
        fps_BG=np.zeros((B, G), np.float32),
        size_BG3=np.zeros((B, G, 3), np.int32),
        max_segment_len=max_segment_len,
    )
    for b, segments in enumerate(rows):
        if len(segments) > G:
            raise ValueError(f"{len(segments)} clips in a row of {G} slots: raise pack.slots")
        at, text_at = 0, 0
        for g, s in enumerate(segments):
            n, m = len(s.tokens_nP), len(s.text_LE)
            if n > max_segment_len > 0:
                raise ValueError(f"a clip of {n} tokens where the longest was to have {max_segment_len}")
            if at + n > S or text_at + m > L:
                raise ValueError(f"row {b} is full: {at + n} of {S} video and {text_at + m} of {L} caption tokens")
            batch.tokens_BSP[b, at : at + n] = s.tokens_nP
            batch.segment_BS[b, at : at + n] = g + 1
            batch.position_BS3[b, at : at + n] = grid_positions(s.size_thw, s.first, s.spacing)
            batch.cond_mask_BS[b, at : at + n] = s.known_n
            batch.text_BLE[b, text_at : text_at + m] = s.text_LE
            batch.text_segment_BL[b, text_at : text_at + m] = g + 1
            batch.fps_BG[b, g], batch.size_BG3[b, g] = s.fps, s.grid_thw
            at, text_at = at + n, text_at + m
    return batch


def training_segment(
    clip: LatentClip,
    patch: tuple[int, int, int],
    cond_mask: ConditioningConfig,
    drop_caption: float,
    empty_text_LE: np.ndarray,
    caption_tokens: int,
    rng: np.random.Generator,
    shown: tuple[int, int],
) -> Segment:
    """A clip as training sees it: a posterior sample, some tokens known, the caption sometimes left out.

    shown: from and to which latent frame. Places in time are 0, 1, ..., or 1, 2, ... for a stretch without the first.
    """
    noise = rng.standard_normal(clip.mean_thwc.shape, np.float32)
    grid = patchify(clip.mean_thwc + clip.std_thwc * noise, patch)
    grid = grid[shown[0] : shown[1]]
    size = grid.shape[:3]
    text = padded_text(empty_text_LE if rng.random() < drop_caption else clip.text_LE, caption_tokens)
    known_n = cond_mask.draw(size, rng).reshape(-1)
    return Segment(grid.reshape(-1, grid.shape[-1]), known_n, size, text, clip.fps, min(shown[0], 1))

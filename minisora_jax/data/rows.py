"""Build the arrays of packed rows: latents become tokens, and the tokens of several clips fill a row."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from minisora_jax.data.actions import by_latent_frame
from minisora_jax.data.conditioning import ConditioningConfig
from minisora_jax.data.packing import PackConfig
from minisora_jax.models.text import PAD
from minisora_jax.types import LatentClip, PackedBatch


def padded_text(text_LE: np.ndarray, tokens: int) -> np.ndarray:
    """A caption's features, padded with zeros to `tokens`. Wan's models attend to the padding as to the caption."""
    return np.pad(text_LE, ((0, tokens - len(text_LE)), (0, 0))) if len(text_LE) < tokens else text_LE


@dataclasses.dataclass(frozen=True)
class Segment:
    """The arrays of one clip, independent of its place in a row."""

    tokens_nP: np.ndarray  # float32
    cond_mask_n: np.ndarray  # bool: True for tokens that are given clean
    size_thw: tuple[int, int, int]  # the clip's grid of patches, n = t * h * w
    text_LE: np.ndarray
    fps: float
    first: int = 0  # the temporal position of the first latent frame; above 0 without the codec's first latent frame
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)  # the distance between neighbouring tokens in t, y, x
    given_nx: np.ndarray | None = None  # channels of given frames, for models that read them
    image_IE: np.ndarray | None = None  # image tokens of given frames, for models that attend to them
    actions_tx: np.ndarray | None = None  # actions of each latent frame (data/actions.py)

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        """The size of the grid that the positions span, for tokens with a spacing."""
        (t, h, w), (a, b, c) = self.size_thw, self.spacing
        return 1 + round((t - 1) * a), max(1, round(h * b)), max(1, round(w * c))


def patchify(latents_thwc: np.ndarray, patch: tuple[int, int, int]) -> np.ndarray:
    """(t, h, w, c) -> (t/pt, h/ph, w/pw, pt * ph * pw * c); the order within a patch is (t, y, x, channel)."""
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
    """The position (t, y, x) of each token of a grid, in row-major order: (t * h * w, 3). Cached: do not write to it.

    Without spacing the positions are int32. With spacing they are float32: the first frame stays at `first` * spacing,
    and the picture's edges are scaled, so half a token is added before and subtracted after.

    Args:
        size_thw: the grid of patches.
        first: the temporal position of the first latent frame.
        spacing: the distance between neighbouring tokens in t, y, x.
    """
    positions = np.stack(np.meshgrid(*map(np.arange, size_thw), indexing="ij"), axis=-1)
    positions = positions.reshape(-1, 3).astype(np.int32) + np.array([first, 0, 0], np.int32)
    if spacing == (1.0, 1.0, 1.0):
        return positions
    centre = np.array([0.0, 0.5, 0.5], np.float32)
    return (positions + centre) * np.array(spacing, np.float32) - centre


def pack_segments(
    rows: list[list[Segment]], config: PackConfig, max_segment_len: int = 0, action_width: int = 0
) -> PackedBatch:
    """A PackedBatch of NumPy arrays from the segments of each row.

    Args:
        rows: the segments of each row; at least one row has a segment.
        max_segment_len: no segment has more tokens; 0: unknown.
        action_width: `DiTConfig.action_width` of the model that reads the batch.

    Raises:
        ValueError: a row has too many segments, frames or tokens, or a segment is longer than `max_segment_len`.
    """
    B, S, L, G = len(rows), config.tokens, config.text_tokens, config.slots
    example = next(segment for row in rows for segment in row)
    spaced = any(segment.spacing != (1.0, 1.0, 1.0) for row in rows for segment in row)
    text, token_width = example.text_LE, example.tokens_nP.shape[1]
    tokens_BSP = np.zeros((B, S, token_width), np.float32)
    segment_BS = np.zeros((B, S), np.int32)
    position_BS3 = np.zeros((B, S, 3), np.float32 if spaced else np.int32)
    cond_mask_BS = np.zeros((B, S), bool)
    text_BLE = np.full((B, L, text.shape[1]), PAD, text.dtype)
    text_segment_BL = np.zeros((B, L), np.int32)
    fps_BG = np.zeros((B, G), np.float32)
    size_BG3 = np.zeros((B, G, 3), np.int32)
    for b, segments in enumerate(rows):
        if len(segments) > G:
            raise ValueError(f"{len(segments)} clips in a row of {G} slots: raise pack.slots")
        frames = sum(s.size_thw[0] for s in segments)
        if frames > config.frames > 0:
            raise ValueError(f"row {b} has {frames} latent frames, above pack.frames={config.frames}: raise it")
        at, text_at = 0, 0
        for g, s in enumerate(segments):
            n, m = len(s.tokens_nP), len(s.text_LE)
            if n > max_segment_len > 0:
                raise ValueError(f"a segment has {n} tokens, above max_segment_len={max_segment_len}: raise it")
            if at + n > S or text_at + m > L:
                raise ValueError(f"row {b} is full: {at + n} of {S} video and {text_at + m} of {L} caption tokens")
            tokens_BSP[b, at : at + n] = s.tokens_nP
            segment_BS[b, at : at + n] = g + 1
            position_BS3[b, at : at + n] = grid_positions(s.size_thw, s.first, s.spacing)
            cond_mask_BS[b, at : at + n] = s.cond_mask_n
            text_BLE[b, text_at : text_at + m] = s.text_LE
            text_segment_BL[b, text_at : text_at + m] = g + 1
            fps_BG[b, g], size_BG3[b, g] = s.fps, s.grid_thw
            at, text_at = at + n, text_at + m
    arrays: tuple[Any, ...]  # NumPy arrays, which stand in for jax.Array until they are put on devices
    arrays = (tokens_BSP, segment_BS, position_BS3, cond_mask_BS, text_BLE, text_segment_BL, fps_BG, size_BG3)
    arrays += (*_image_tokens(rows, G), _given_channels(rows, S), _actions(rows, config.frames or S, action_width))
    return PackedBatch(*arrays, max_segment_len=max_segment_len, frames=config.frames)


def _actions(rows: list[list[Segment]], frames: int, width: int) -> Any:
    """The actions of all latent frames of each row (B, U, x), zeros where they are not known; None without a width."""
    if not width:
        return None
    actions_BUx = np.zeros((len(rows), frames, width), np.float32)
    for actions_Ux, row in zip(actions_BUx, rows):
        at = 0
        for s in row:
            if s.actions_tx is not None:
                if s.actions_tx.shape != (s.size_thw[0], width):
                    raise ValueError(
                        f"actions of shape {s.actions_tx.shape} for {s.size_thw[0]} latent frames and a model that "
                        f"reads {width} numbers of each (dit.action_width)"
                    )
                actions_Ux[at : at + len(s.actions_tx)] = s.actions_tx
            at += s.size_thw[0]
    return actions_BUx


def _given_channels(rows: list[list[Segment]], length: int) -> Any:
    """The segments' channels of given frames (B, S, x); None if they have none."""
    parts = [[s.given_nx for s in row if s.given_nx is not None] for row in rows]
    widths = [x_nx.shape[1] for row in parts for x_nx in row]
    if not widths:
        return None
    given_BSx = np.zeros((len(rows), length, widths[0]), np.float32)
    for given_Sx, row in zip(given_BSx, parts):
        if row:
            given_Sx[: sum(map(len, row))] = np.concatenate(row)
    return given_BSx


def _image_tokens(rows: list[list[Segment]], slots: int) -> tuple[Any, Any]:
    """The segments' image tokens (B, I, E) and their segment ids (B, I), with room for all slots; None without any."""
    parts = [[s.image_IE for s in row if s.image_IE is not None] for row in rows]
    shapes = [x_IE.shape for row in parts for x_IE in row]
    if not shapes:
        return None, None
    longest, E = max(shapes)
    image_BIE = np.zeros((len(rows), slots * longest, E), np.float32)
    segment_BI = np.zeros((len(rows), slots * longest), np.int32)
    for image_IE, segment_I, row in zip(image_BIE, segment_BI, parts):
        if row:
            ids = np.repeat(np.arange(1, len(row) + 1), [len(x_IE) for x_IE in row])
            image_IE[: len(ids)], segment_I[: len(ids)] = np.concatenate(row), ids
    return image_BIE, segment_BI


def training_segment(
    clip: LatentClip,
    patch: tuple[int, int, int],
    conditioning: ConditioningConfig,
    dropout: tuple[float, float],
    empty_text_LE: np.ndarray,
    caption_tokens: int,
    rng: np.random.Generator,
    shown: tuple[int, int],
    mask: str = "",
) -> Segment:
    """The segment of a training clip: a sample of the posterior, a random conditioning mask, and its caption.

    Args:
        dropout: the probabilities that the caption is replaced by the empty one, and that the actions are left out.
        shown: the first latent frame that is shown, and the one after the last. Temporal positions are 0, 1, ..., or
            1, 2, ... without the first latent frame.
        mask: the kind of conditioning mask; "" draws it.
    """
    noise = rng.standard_normal(clip.mean_thwc.shape, np.float32)
    grid = patchify(clip.mean_thwc + clip.std_thwc * noise, patch)
    grid = grid[shown[0] : shown[1]]
    t, h, w, P = grid.shape
    text = padded_text(empty_text_LE if rng.random() < dropout[0] else clip.text_LE, caption_tokens)
    cond_mask_n = conditioning.draw((t, h, w), rng, mask).reshape(-1)
    given_nx, image_IE = None, None
    if clip.frames:
        given_thwx = patchify(clip.frames.channels_thwc, patch)[shown[0] : shown[1]]
        given_nx, image_IE = given_thwx.reshape(t * h * w, -1), clip.frames.image_IE
    where: dict[str, Any] = {"first": min(shown[0], 1), "given_nx": given_nx, "image_IE": image_IE}
    if clip.actions_TA is not None and not (dropout[1] and rng.random() < dropout[1]):
        where["actions_tx"] = by_latent_frame(clip.actions_TA, len(clip.mean_thwc))[shown[0] : shown[1]]
    return Segment(grid.reshape(-1, P), cond_mask_n, (t, h, w), text, clip.fps, **where)

"""The size of packed rows where the config leaves it to the data: `PackConfig` entries that are 0."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np

from minisora_jax.data.packing import PackConfig, pack_rows

log = logging.getLogger("minisora")

LEAST_TOKENS = 256  # video tokens of a row: short clips share one
MOST_ROWS = 8  # of a microbatch
FEW = 10_000  # so many clips are packed to see how many rows they fill; more fill them for sure
UNIT = 64  # rows are whole units of tokens, so that meshes divide them


def sized_by(
    tokens: np.ndarray, text: np.ndarray, config: PackConfig, accumulate: int = 1, frames: np.ndarray | None = None
) -> PackConfig:
    """The config with the clips' values in place of each 0.

    A row holds the longest clip, and at least `LEAST_TOKENS`. Its caption tokens and slots leave room above the mean of
    the clips, so that video tokens fill it first. A microbatch has `MOST_ROWS` rows, or as many as the clips fill.

    Args:
        tokens: the video tokens of each clip.
        text: the caption tokens of each clip.
        accumulate: microbatches of a step.
        frames: the latent frames of each clip; None: `config.frames` stays.
    """
    if not len(tokens):
        return config
    if not all((config.tokens, config.text_tokens, config.slots, config.rows)):
        config = _sized(tokens, text, config, accumulate)
    if frames is None or config.frames:
        return config
    return dataclasses.replace(config, frames=most_frames(tokens, frames, config))


def _sized(tokens: np.ndarray, text: np.ndarray, config: PackConfig, accumulate: int) -> PackConfig:
    length = config.tokens or _whole(max(LEAST_TOKENS, int(tokens.max())), UNIT)
    clips = length / tokens.mean()  # of a row
    captions = _whole(max(int(text.max()), round(1.25 * clips * float(text.mean()))), UNIT)
    sized = dataclasses.replace(
        config,
        tokens=length,
        text_tokens=config.text_tokens or captions,
        slots=config.slots or _whole(round(2 * clips), 8),
        rows=config.rows or MOST_ROWS,
    )
    if not config.rows and len(tokens) < FEW and (tokens <= sized.tokens).all() and (text <= sized.text_tokens).all():
        filled = len(pack_rows(tokens, text, sized, 0, 0))
        sized = dataclasses.replace(sized, rows=max(1, min(MOST_ROWS, filled // accumulate)))
    log.info(
        "a step has %d rows of %d video tokens, %d caption tokens and at most %d clips (the longest clip has %d video "
        "tokens; --config.pack.* changes the rows)",
        sized.rows * accumulate, sized.tokens, sized.text_tokens, sized.slots, tokens.max(),
    )  # fmt: skip
    return sized


def most_frames(tokens: np.ndarray, frames: np.ndarray, config: PackConfig) -> int:
    """No row of such clips has more latent frames.

    Args:
        tokens: the video tokens of each clip.
        frames: the latent frames of each clip, in tokens.
        config: its tokens and slots.
    """
    return min(config.tokens // int((tokens // frames).min()), config.slots * int(frames.max()))


def _whole(n: int, unit: int) -> int:
    return -(-n // unit) * unit

"""Many clips on one picture, for people who would rather look than read."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from minisora_jax.io.atomic import replacing


def contact_sheet(
    path: str | os.PathLike,
    clips: Sequence[tuple[np.ndarray, str]],
    *,
    columns_of_frames: int = 8,
    frame_side: int = 112,
    gap: int = 4,
) -> None:
    """A PNG with a row per clip: its label, and under it up to `columns_of_frames` frames evenly spaced in time.

    `clips` is (uint8 (T, H, W, 3), label) pairs, of any sizes. Small frames are enlarged by a whole factor, pixels
    kept square and sharp, until the longer side nears `frame_side` pixels; large ones are shrunk to it.
    """
    if not clips:
        raise ValueError("contact_sheet needs at least one clip")
    font = ImageFont.load_default(size=13)
    rows = [_sheet_row(frames, columns_of_frames, frame_side) for frames, _ in clips]
    width = max(max(sum(f.width + gap for f in row) for row in rows) + gap, 4 * frame_side)
    labels = [_wrap(label, font, width - 2 * gap) for _, label in clips]
    line = 17
    height = gap + sum(line * len(words) + row[0].height + 2 * gap for words, row in zip(labels, rows))
    sheet = Image.new("RGB", (width, height), (250, 250, 250))
    draw, y = ImageDraw.Draw(sheet), gap
    for words, row in zip(labels, rows):
        for text in words:
            draw.text((gap, y), text, fill=(20, 20, 20), font=font)
            y += line
        x = gap
        for frame in row:
            sheet.paste(frame, (x, y))
            x += frame.width + gap
        y += row[0].height + 2 * gap
    with replacing(path) as temporary:
        sheet.save(temporary)


def _sheet_row(frames_THWC: np.ndarray, columns: int, side: int) -> list[Image.Image]:
    T, H, W = frames_THWC.shape[:3]
    shown = np.unique(np.linspace(0, T - 1, min(columns, T)).round().astype(int))
    images = [Image.fromarray(frames_THWC[t]) for t in shown]
    if max(H, W) <= side:
        factor = max(1, side // max(H, W))
        return [image.resize((W * factor, H * factor), Image.Resampling.NEAREST) for image in images]
    scale = side / max(H, W)
    return [i.resize((max(1, round(W * scale)), max(1, round(H * scale))), Image.Resampling.BOX) for i in images]


def _wrap(text: str, font, width: float) -> list[str]:
    """Lines of whole words that fit `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines

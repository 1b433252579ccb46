"""Contact sheets: many clips on one picture, with their captions."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from minisora_jax.io.atomic import replacing
from minisora_jax.media.fonts import FontStack

FRAME_SIDE = 112  # pixels of the longer side of a frame in a sheet


def sheet_size(H: int, W: int) -> tuple[int, int]:
    """The height and width at which a sheet needs a frame: those of the frame, or smaller."""
    scale = min(1.0, FRAME_SIDE / max(H, W))
    return max(1, round(H * scale)), max(1, round(W * scale))


def contact_sheet(
    path: str | os.PathLike,
    clips: Sequence[tuple[np.ndarray, str]],
    *,
    columns_of_frames: int = 8,
    frame_side: int = FRAME_SIDE,
    gap: int = 4,
) -> None:
    """Write a PNG with a row per clip: its label, and under it frames that are evenly spaced in time.

    Labels may be in any script; see media/fonts.py.

    Args:
        clips: (uint8 frames (T, H, W, 3), label) pairs, of any sizes.
        columns_of_frames: at most this many frames of each clip are shown.
        frame_side: the longer side of a frame in the sheet, in pixels. Larger frames are shrunk to it. Smaller ones are
            enlarged by a whole factor without smoothing.
        gap: pixels between frames.
    """
    if not clips:
        raise ValueError("contact_sheet needs at least one clip")
    fonts = FontStack(size=13)
    rows = [_sheet_row(frames, columns_of_frames, frame_side) for frames, _ in clips]
    width = max(max(sum(f.width + gap for f in row) for row in rows) + gap, 4 * frame_side)
    labels = [_wrap(label, fonts, width - 2 * gap) for _, label in clips]
    line_height = 17
    height = gap + sum(line_height * len(lines) + row[0].height + 2 * gap for lines, row in zip(labels, rows))
    sheet = Image.new("RGB", (width, height), (250, 250, 250))
    draw, y = ImageDraw.Draw(sheet), gap
    for lines, row in zip(labels, rows):
        for text in lines:
            fonts.draw(draw, (gap, y), text, fill=(20, 20, 20))
            y += line_height
        x = gap
        for frame in row:
            sheet.paste(frame, (x, y))
            x += frame.width + gap
        y += row[0].height + 2 * gap
    with replacing(path) as temporary:
        sheet.save(temporary)


def _sheet_row(frames_THWC: np.ndarray, columns: int, side: int) -> list[Image.Image]:
    T, H, W = frames_THWC.shape[:3]
    indices = np.unique(np.linspace(0, T - 1, min(columns, T)).round().astype(int))
    images = [Image.fromarray(frames_THWC[t]) for t in indices]
    if max(H, W) <= side:
        factor = max(1, side // max(H, W))
        return [image.resize((W * factor, H * factor), Image.Resampling.NEAREST) for image in images]
    scale = side / max(H, W)
    return [i.resize((max(1, round(W * scale)), max(1, round(H * scale))), Image.Resampling.BOX) for i in images]


def _wrap(text: str, fonts: FontStack, width: float) -> list[str]:
    """Lines that fit `width` pixels, broken between words, or inside a word that is wider than a line."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if fonts.length(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for char in word:
            if lines[-1] and fonts.length(lines[-1] + char) > width:
                lines.append("")
            lines[-1] += char
    return lines

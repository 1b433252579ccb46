"""Example pictures and clips for each form, such as the bundled model is trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from minisora_jax.media.video_writer import write_video
from minisora_jax.toy.grammar import FPS, Object, Scene
from minisora_jax.toy.shapes import render

SETS = {  # the name of a set in forms.py -> {input of the form: file}
    "picture": {"image": "circle-right.png"},
    "two pictures": {"image": "circle-left.png", "last": "circle-right.png"},
    "clip": {"video": "circle.mp4"},
    "clip and mask": {"video": "circle.mp4", "mask": "mask.png"},
    "two clips": {"video": "circle.mp4", "second": "circle-up.mp4"},
}


def draw(folder: Path) -> dict[str, dict[str, str]]:
    """`SETS` with full paths. Files that are missing in the folder are drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    left, right = (18.0, 24.0), (46.0, 24.0)
    files = {
        "circle-left.png": lambda: _clip(1, left, left),
        "circle-right.png": lambda: _clip(1, right, right),
        "circle.mp4": lambda: _clip(17, right, left),
        "circle-up.mp4": lambda: _clip(17, (32.0, 32.0), (32.0, 16.0)),
        "mask.png": lambda: np.pad(np.full((1, 48, 32, 3), 255, np.uint8), ((0, 0), (0, 0), (32, 0), (0, 0))),
    }
    for name, draw_frames in files.items():
        if not (folder / name).is_file():
            write_video(folder / name, draw_frames(), FPS)
    return {name: {field: str(folder / file) for field, file in inputs.items()} for name, inputs in SETS.items()}


def _clip(frames: int, start: tuple[float, float], end: tuple[float, float]) -> np.ndarray:
    """Frames of 48x64 pixels: a large red circle moves from one place to another on black."""
    x, y = (np.linspace(a, b, frames) for a, b in zip(start, end))
    circle = Object("red", "circle", "still", "large", x_T=x, y_T=y, radius_T=np.full(frames, 13.0))
    return render(Scene((frames, 48, 64), (circle,), "black"))

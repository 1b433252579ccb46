"""Looking at videos and runs in a notebook."""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minisora_jax.media.video import read_clip_frames
from minisora_jax.media.video_writer import write_video

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN_SIDE = 192  # smaller videos are enlarged to about this many pixels, since their pixels are to be seen


def read_video(path: str | Path, max_frames: int | None = None) -> tuple[np.ndarray, float]:
    """The frames of a video or an image; a file that was made here, at the size at which it was made.

    Args:
        path: mp4, webm, mov, mkv, avi, gif, or an image.
        max_frames: read at most this many; None reads all.

    Returns:
        uint8 frames (T, H, W, 3) and frames per second.

    Raises:
        VideoError: if the file cannot be decoded.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> import minisora_jax as ms
        >>> path = tempfile.mkdtemp() + "/black.mp4"
        >>> ms.write_video(path, np.zeros((5, 32, 32, 3), np.uint8), fps=8)
        >>> frames, fps = ms.read_video(path)
        >>> frames.shape, fps
        ((5, 32, 32, 3), 8.0)
    """
    return read_clip_frames(path, max_frames=max_frames, made=True)


class Videos:
    """Videos side by side; a notebook displays them as players that loop."""

    def __init__(self, videos: Sequence[np.ndarray], captions: Sequence[str], fps: float):
        self.videos, self.captions, self.fps = videos, captions, fps

    def _repr_html_(self) -> str:
        from html import escape

        cells = []
        with tempfile.TemporaryDirectory() as folder:
            for i, (frames, caption) in enumerate(zip(self.videos, self.captions)):
                path = Path(folder) / (f"{i}.png" if len(frames) == 1 else f"{i}.mp4")
                write_video(path, frames, self.fps, upscale=max(1, _SHOWN_SIDE // max(frames.shape[1:3])))
                data = base64.b64encode(path.read_bytes()).decode()
                if len(frames) == 1:
                    tag = f'<img src="data:image/png;base64,{data}">'
                else:
                    tag = f'<video controls loop autoplay muted src="data:video/mp4;base64,{data}"></video>'
                cells.append(f"<figure style='margin:4px'>{tag}<figcaption>{escape(caption)}</figcaption></figure>")
        return f"<div style='display:flex;flex-wrap:wrap'>{''.join(cells)}</div>"

    def __repr__(self) -> str:
        sizes = ", ".join("x".join(map(str, frames.shape[:3])) for frames in self.videos)
        return f"{len(self.videos)} videos ({sizes}) at {self.fps:g} fps"


def show(videos: np.ndarray | Sequence[np.ndarray], captions: str | Sequence[str] = "", fps: float = 8.0) -> Videos:
    """Videos for a notebook to display: the last expression of a cell is shown.

    Args:
        videos: uint8 frames (T, H, W, 3) of one video, or a sequence of such; T = 1 is an image.
        captions: one for each.
        fps: frames per second.

    Example:
        >>> import numpy as np
        >>> import minisora_jax as ms
        >>> ms.show(np.zeros((5, 32, 32, 3), np.uint8), "black")
        1 videos (5x32x32) at 8 fps
    """
    clips = [videos] if isinstance(videos, np.ndarray) and videos.ndim == 4 else list(videos)
    texts = [captions] * len(clips) if isinstance(captions, str) else list(captions)
    return Videos(clips, texts, fps)


class Plot:
    """A matplotlib `figure`, which a notebook displays as a picture without any setting of matplotlib."""

    def __init__(self, figure: Figure):
        self.figure = figure

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def plot_metrics(workdir: str | Path, names: Sequence[str] = ("loss",)) -> Plot:
    """A plot of a run's metrics over its steps; `.figure` is the matplotlib figure.

    Args:
        workdir: the work directory of `ms.train` or `ms.train_codec`.
        names: metrics of WORKDIR/metrics.jsonl, such as "loss", "grad_norm", "learning_rate".

    Raises:
        FileNotFoundError: if the run has logged nothing yet.
        ValueError: for a metric that the run did not log; the message lists those that it did.

    Example:
        >>> import pathlib, tempfile
        >>> import minisora_jax as ms
        >>> work = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (work / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}')
        >>> len(ms.plot_metrics(work).figure.axes)
        1
    """
    from matplotlib.figure import Figure

    from minisora_jax.training.metrics import read_rows

    rows = read_rows(Path(workdir) / "metrics.jsonl")
    logged = sorted({name for row in rows for name in row} - {"step"})
    if missing := sorted(set(names) - set(logged)):
        raise ValueError(f"{workdir} logged no {', '.join(missing)}; it logged {', '.join(logged)}")
    figure = Figure(figsize=(7, 2.5 * len(names)), layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(len(names))), names):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points))
        axes.set(xlabel="step", ylabel=name)
    return Plot(figure)

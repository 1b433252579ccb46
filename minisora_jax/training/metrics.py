"""The outputs of a run's numbers: a metrics.jsonl that survives restarts, TensorBoard, W&B, and a progress bar.

*Goodput* is the share of the time since the run's first start that went into steps that count. Compiling, waiting for
data, saving, sampling, time between runs, and repeated steps do not count (like Google's ML Goodput).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter
from tensorboardX.proto import summary_pb2

from minisora_jax.io.atomic import write_text
from minisora_jax.io.json_files import read_json_lines
from minisora_jax.io.progress import Progress
from minisora_jax.media.video_writer import write_video
from minisora_jax.parallel.processes import is_main
from minisora_jax.training.wandb_sink import WandbSink


class Metrics:
    """Writes the run's scalars and videos. Only the main process writes; on the others the methods do nothing."""

    def __init__(
        self, workdir: Path, start: int, steps: int, name: str, *, wandb: str = "", config: dict | None = None
    ) -> None:
        """Open the files of a run.

        Args:
            workdir: The work directory.
            start: The step that was restored. Rows after it are removed from metrics.jsonl.
            steps: Steps of the whole run.
            name: Label of the progress bar.
            wandb: A project of Weights & Biases that gets everything too; "": none.
            config: The run's whole configuration, for that project.
        """
        self.main, self.clock = is_main(), Clock()
        if not self.main:
            return
        self._path = workdir / "metrics.jsonl"
        self._samples = workdir / "samples"
        self._samples.mkdir(exist_ok=True)
        rows = read_rows(self._path)
        kept = [row for row in rows if row["step"] <= start]
        self._write(kept)
        self._productive = next((row["productive_s"] for row in reversed(kept) if "productive_s" in row), 0.0)
        self._began = min((row["began"] for row in rows if "began" in row), default=time.time())
        self._file = self._path.open("a", encoding="utf-8")
        self._wandb = WandbSink(wandb, workdir, config or {}) if wandb else None
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1 if start else None)
        self._shown: dict[str, str] = {}  # the newest numbers, beside the bar
        self._bar = Progress(total=steps, initial=start, desc=name, unit="step", dynamic_ncols=True, mininterval=1.0)

    def window(self, step: int, values: dict[str, float], counts: list[dict[str, float]]) -> None:
        """Write the scalars of a logging window, with its rates, its time by part, and the goodput.

        Args:
            step: The window's last step.
            values: Scalars of that step.
            counts: The counts of each step of the window.
        """
        if not self.main:
            return
        seconds, parts = self.clock.take()
        self._productive += parts.get("step", 0.0)
        elapsed = max(time.time() - self._began, 1e-9)
        part_seconds = {f"time_{part}": s for part, s in parts.items()}
        total = {"goodput": self._productive / elapsed, "productive_s": self._productive, "began": self._began}
        self.scalars(step, values | _rates(counts, seconds) | part_seconds | total)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write a row of metrics.jsonl and the same scalars to TensorBoard."""
        if not self.main:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.scalars(step, values)
        self._board.flush()  # a killed run resumes from a checkpoint, and would not write these again
        self._shown |= {k: f"{values[k]:.4g}" for k in ("loss", "held_out_loss", "tokens_per_s") if k in values}
        self._bar.set_postfix(self._shown, refresh=False)

    def video(self, step: int, name: str, frames_THWC: np.ndarray, fps: float) -> None:
        """Write a video as a GIF to WORKDIR/samples, and to TensorBoard's image tab, where it plays."""
        if not self.main:
            return
        path = self._samples / f"{name}_{step:07d}.gif"
        write_video(path, frames_THWC, fps, upscale=max(1, 128 // max(frames_THWC.shape[1:3])))
        if self._wandb:
            self._wandb.video(step, name, path)
        height, width = frames_THWC.shape[1:3]
        # The classes of a generated protobuf module are not visible to type checkers.
        Summary = getattr(summary_pb2, "Summary")  # noqa: B009
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes())
        if self._board.file_writer is not None:
            self._board.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def advance(self) -> None:
        """Move the progress bar by one step."""
        if self.main:
            self._bar.update()

    def close(self) -> None:
        """Close the files and the bar."""
        if self.main:
            self._bar.close()
            self._board.close()
            if self._wandb:
                self._wandb.close()
            self._file.close()

    def _write(self, rows: list[dict]) -> None:
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, each a step and numbers. What a kill cut off, or is damaged, is left out."""
    is_row = lambda row: isinstance(row.get("step"), int) and all(map(_is_number, row.values()))
    return [row for row in read_json_lines(path) if is_row(row)]


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


class Clock:
    """Measures the seconds that each part of a run takes. Parts do not nest."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._parts: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A context whose time counts for the part `name`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._parts[name] = self._parts.get(name, 0.0) + time.perf_counter() - begin

    def take(self) -> tuple[float, dict[str, float]]:
        """(seconds since the last call, seconds of each part since then). The clock restarts."""
        now = time.perf_counter()
        elapsed, parts = now - self._since, self._parts
        self._since, self._parts = now, {}
        return elapsed, parts


def _rates(window: list[dict[str, float]], seconds: float) -> dict[str, float]:
    """Rates per second of the counts in a logging window, and the share of tokens that were padding."""
    total = {k: sum(c.get(k, 0.0) for c in window) for k in set().union(*window)}
    rates = {f"{k}_per_s": v / seconds for k, v in total.items()} | {"steps_per_s": len(window) / seconds}
    if total.get("tokens"):
        rates["padding_share"] = 1.0 - total["useful_tokens"] / total["tokens"]
    return rates

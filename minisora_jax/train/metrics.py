"""Where a run's numbers go: TensorBoard, a metrics.jsonl that survives restarts, and a progress bar."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

from minisora_jax.data.video import write_video
from minisora_jax.parallel.processes import is_main


class Metrics:
    """Writes the run's scalars and videos; on a resume, forgets rows after the step that was restored."""

    def __init__(self, workdir: Path, *, start: int, steps: int, name: str):
        self.main = is_main()
        if not self.main:
            return
        self._path = workdir / "metrics.jsonl"
        self._samples = workdir / "samples"
        self._samples.mkdir(exist_ok=True)
        self._keep_rows_until(start)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start or None)
        self._bar = tqdm(total=steps, initial=start, desc=name, unit="step", dynamic_ncols=True, mininterval=1.0)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if not self.main:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._bar.set_postfix({k: f"{values[k]:.4g}" for k in ("loss", "tokens_per_s") if k in values}, refresh=False)

    def video(self, step: int, name: str, frames_THWC: np.ndarray, fps: float) -> None:
        """A GIF in WORKDIR/samples, and the same in TensorBoard's image tab, where it plays."""
        if not self.main:
            return
        path = self._samples / f"{name}_{step:07d}.gif"
        write_video(path, frames_THWC, fps, upscale=max(1, 128 // max(frames_THWC.shape[1:3])))
        height, width = frames_THWC.shape[1:3]
        picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes())
        self._board.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=picture)]), step)

    def advance(self) -> None:
        if self.main:
            self._bar.update()

    def close(self) -> None:
        if self.main:
            self._bar.close()
            self._board.close()
            self._file.close()

    def _keep_rows_until(self, step: int) -> None:
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the row that a kill cut short
                continue
            if row["step"] <= step:
                kept.append(line + "\n")
        self._path.write_text("".join(kept), encoding="utf-8")

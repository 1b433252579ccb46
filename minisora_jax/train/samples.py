"""Sample videos while a diffusion transformer trains: a contact sheet and TensorBoard videos at each call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from minisora_jax.data.video import contact_sheet
from minisora_jax.generate import Generator, Request
from minisora_jax.models.codec import Codec
from minisora_jax.train.diffusion_task import DiffusionTask
from minisora_jax.train.metrics import Metrics


def sample_videos(task: DiffusionTask, codec: Codec, prompts: Sequence[dict], workdir: Path) -> Callable:
    """A `sample` for `train`. `prompts` are {"prompt", "size_THW"} as in the config."""
    requests = [Request(p["prompt"], tuple(p["size_THW"]), seed=i) for i, p in enumerate(prompts)]

    def sample(step: int, params, metrics: Metrics) -> None:
        generator = Generator(codec, task.dit, task.times, jax.device_get(params))
        videos = generator.generate(requests, progress=False)
        for i, (request, frames) in enumerate(zip(requests, videos)):
            metrics.video(step, f"sample/{i}", frames, request.fps)
        (workdir / "samples").mkdir(exist_ok=True)
        sheet = workdir / "samples" / f"step_{step:07d}.png"
        contact_sheet(sheet, [(frames, r.prompt) for r, frames in zip(requests, videos)])

    return sample

"""Sample videos while a model trains: captions of the data's own clips, held-out ones where there are any."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minisora_jax.data.latents import Latents, Mixture
from minisora_jax.diffusion.distillation import Distilled
from minisora_jax.generate import Request, VideoPipeline
from minisora_jax.io.filesystem import is_url
from minisora_jax.io.retry import DataError
from minisora_jax.media.contact_sheet import contact_sheet
from minisora_jax.models.codec import Codec
from minisora_jax.sources.clips import open_clips
from minisora_jax.training.diffusion_task import DiffusionTask
from minisora_jax.types import ClipSequence

KEPT = 8  # captions of held-out clips that a latent cache keeps


def held_out_examples(data: str) -> list[dict[str, Any]]:
    """Captions, sizes and rates of some clips that are held out of a data set; [] if it holds out none."""
    kind, _, rest = data.partition(":")
    if kind == "shapes":
        clips: ClipSequence = open_clips("shapes:heldout:1000") if not rest.startswith("heldout") else ()
    elif is_url(data) or not os.path.exists(os.path.join(data, "heldout", "manifest.json")):
        return []
    else:
        clips = open_clips(os.path.join(data, "heldout"))
    return [
        {"prompt": clip.caption, "size_THW": list(clip.size_THW), "fps": clip.fps}
        for clip in _distinct(clips, KEPT, lambda clip: clip.caption)
    ]


def sample_requests(
    prompts: int | Sequence[Mapping[str, Any]], task: DiffusionTask, codec: Codec, latents: Latents | Mixture
) -> list[Request]:
    """What is sampled while a model trains.

    Args:
        prompts: {"prompt", "size_THW"} each; or so many captions of the data, of held-out clips if the cache has them.
            A model that reads given frames gets those of clips of the data.

    Raises:
        ValueError: A model that reads given frames is given `prompts` without.
    """
    if isinstance(prompts, int):
        examples = [] if latents.given else latents.examples
        size_of = lambda z: codec.config.pixel_size(z.mean_thwc.shape[:3])
        examples = examples or [
            {"prompt": z.caption, "size_THW": size_of(z), "fps": z.fps, "frames": z.frames}
            for z in _distinct(latents, prompts, lambda z: z.caption)
        ]
        cell_h, cell_w = (codec.config.space_factor * n for n in task.dit.patch[1:])
        whole = [e for e in examples if e["size_THW"][1] % cell_h == 0 and e["size_THW"][2] % cell_w == 0]
        prompts = [whole[i] for i in _spread(len(whole), prompts)]
    elif latents.given:
        raise ValueError(f"prompts={prompts!r:.80} have no given frames: let prompts be a number, of clips of the data")
    return [
        Request(p["prompt"], tuple(p["size_THW"]), seed=i, fps=p.get("fps", 8.0), frames=p.get("frames"))
        for i, p in enumerate(prompts)
    ]


def sampler(
    requests: Sequence[Request], task: DiffusionTask, codec: Codec, captions, workdir: Path
) -> Callable[..., None]:
    """sample(step, params, metrics): each request as a TensorBoard video, and all of them on one contact sheet."""

    def sample(step: int, params, metrics) -> None:
        settings: Any = {"objective": task.objective, "captions": captions}
        settings["distilled"] = Distilled(task.distill.steps, task.distill.method)
        pipeline = VideoPipeline(codec, task.trained_dit, task.times, params, **settings)
        videos = pipeline.generate(requests, progress=False)
        for i, (request, frames) in enumerate(zip(requests, videos)):
            metrics.video(step, f"sample{i}", frames, request.fps)
        sheet = workdir / "samples" / f"step_{step:07d}.png"
        contact_sheet(sheet, [(frames, r.prompt) for r, frames in zip(requests, videos)])

    return sample


def _distinct(clips: Any, count: int, caption: Callable[[Any], str]) -> Iterator[Any]:
    """At most `count` clips from all over a sequence, of different captions; damaged clips are passed over."""
    seen: set[str] = set()
    for i in _spread(len(clips), 4 * count):
        try:
            clip = clips[int(i)]
        except DataError:
            continue
        if caption(clip) not in seen:
            seen.add(caption(clip))
            yield clip
        if len(seen) == count:
            return


def _spread(length: int, count: int) -> list[int]:
    """At most `count` whole numbers below `length`, evenly spaced."""
    return sorted({int(i) for i in np.linspace(0, length - 1, min(count, length)).round()})

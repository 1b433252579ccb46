"""Training from Python: a config, a work directory, and the exported model in the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minisora_jax.api.samples import sample_requests, sampler
from minisora_jax.bundled import CODEC
from minisora_jax.config import build, complete, load
from minisora_jax.data.latents import open_latents
from minisora_jax.io.hub import local_folder
from minisora_jax.models.captions import captions_of
from minisora_jax.models.codec import Codec
from minisora_jax.parallel.programs import keep_compiled_programs
from minisora_jax.sources.clips import hold_out, open_clips
from minisora_jax.training import codec_task
from minisora_jax.training.clip_plan import with_row_size
from minisora_jax.training.codec_task import CodecTask
from minisora_jax.training.diffusion_task import DiffusionTask, settings_of, train_diffusion
from minisora_jax.training.latents_check import check_actions


def train(
    config: str | Mapping[str, Any],
    workdir: str | Path,
    *,
    codec: str | Path | None = None,
    init: str | Path | None = None,
) -> Path:
    """Train the diffusion transformer on a latent cache.

    Progress, rate and time left are shown; metrics go to WORKDIR/metrics.jsonl and TensorBoard. A run that was
    interrupted goes on from its last checkpoint, bit for bit, when it is called again.

    Args:
        config: a config of `ms.configs`, such as "dit_tiny:data=data/latents", or what `ms.configs.load` returned.
        workdir: checkpoints, metrics and samples go there.
        codec: the directory of the latents' codec; None for the bundled one.
        init: the directory of a model to start from. Its shape and objective hold where the config is silent.

    Returns:
        The directory of the exported model, WORKDIR/export, for `VideoPipeline.load`.

    Raises:
        ValueError: for a setting that does not exist or does not fit the latents, and for a work directory that was
            begun with another config.
        FileNotFoundError: if there is no such config, cache or model.

    Example:
        >>> import tempfile
        >>> import minisora_jax as ms
        >>> work = tempfile.mkdtemp()
        >>> latents = ms.encode("shapes:train:80", f"{work}/latents", progress=False)
        >>> config = ms.configs.load("dit_tiny", data=latents, steps=2, prompts=False)
        >>> config.dit.width, config.dit.depth, config.dit.heads = 64, 1, 1
        >>> export = ms.train(config, f"{work}/model")
        >>> ms.VideoPipeline.load(export).known_size[0]
        17
    """
    keep_compiled_programs()
    entries, init = _entries(config), init and local_folder(init)
    settled = settings_of(init) if init else None
    whole = complete(entries, DiffusionTask, settled)
    prompts = whole.pop("prompts", 0)
    task = build(DiffusionTask, whole)
    loaded = Codec.load(codec or CODEC)
    latents = open_latents(task.data.path, codec_hash=loaded.latents)
    held_out = open_latents(task.data.held_out, codec_hash=loaded.latents) if task.data.held_out else None
    task = with_row_size(task, latents)
    whole["pack"] = dataclasses.asdict(task.pack)
    sample = None
    if prompts and (requests := sample_requests(prompts, task, loaded, latents)):
        sample = sampler(requests, task, loaded, captions_of(task.dit, latents.text, None, None), Path(workdir))
    check_actions(task.dit, latents.actions, loaded.config.time_factor)
    export = {"codec": loaded.latents, "text": latents.text}
    if task.dit.causal or task.times.causal:
        export["world"] = {"actions": latents.actions, "fps": latents[0].fps, "caption": latents[0].caption}
    run_config = whole | {"init": str(init or "")}
    return train_diffusion(task, Path(workdir), latents, run_config, export, sample, init, held_out, loaded)


def train_codec(config: str | Mapping[str, Any], workdir: str | Path) -> Codec:
    """Train the video codec on a data set and export it to WORKDIR/export.

    Args:
        config: a config of `ms.configs`, such as "vae_tiny:data=data/clips", or what `ms.configs.load` returned.
        workdir: checkpoints, metrics and reconstructions go there.

    Returns:
        The trained codec.

    Raises:
        ValueError: for a setting that does not exist, and for a work directory that was begun with another config.
        FileNotFoundError: if there is no such config or data set.

    Example:
        >>> import tempfile
        >>> import minisora_jax as ms
        >>> config = ms.configs.load("vae_tiny", data="shapes:train:40", held_out="shapes:heldout:4", steps=1)
        >>> config.vae.base, config.crop_THW, config.run.sample_every = 4, (5, 32, 32), 0
        >>> ms.train_codec(config, tempfile.mkdtemp()).config.time_factor
        4
    """
    keep_compiled_programs()
    whole = complete(_entries(config), CodecTask)
    task = build(CodecTask, whole)
    clips = open_clips(task.data.path)
    clips, held_out = (clips, open_clips(task.data.held_out)) if task.data.held_out else hold_out(clips)
    return codec_task.train_codec(task, Path(workdir), clips, held_out, whole)


def _entries(config: str | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(config, str):
        return load(config).to_dict()
    to_dict = getattr(config, "to_dict", None)  # a ConfigDict has one
    return to_dict() if to_dict else dict(config)

"""Parses the flags of a plan: a model, the tokens of a clip, a mesh."""

from __future__ import annotations

import dataclasses
import math
import re

import jax

from minisora_jax.config import build, read_config
from minisora_jax.models.dit import abstract_params
from minisora_jax.parallel.mesh import MeshConfig
from minisora_jax.training.diffusion_task import DiffusionTask
from minisora_jax.weights.presets import CODECS, TRANSFORMERS


def task_of(preset: str | None, config_flags: list[str], remat: str | None, attention: str) -> DiffusionTask:
    """The training task to plan.

    Args:
        preset: A key of TRANSFORMERS, or None.
        config_flags: "--config=FILE" and its overrides, in place of a preset.
        remat: Remat policy; None: "full" for a preset, the config's own otherwise.
        attention: The attention kernel.

    Raises:
        ValueError: Both or none of preset and config are given, or the preset is unknown.
    """
    if bool(preset) == any(f.startswith("--config=") for f in config_flags):
        raise ValueError("name the model by --preset=NAME or by --config=FILE.py, one of the two")
    if preset:
        if preset not in TRANSFORMERS:
            raise ValueError(f"--preset={preset} must be one of {', '.join(TRANSFORMERS)}")
        task = DiffusionTask(dit=TRANSFORMERS[preset].config)
        remat = remat or "full"
    else:
        task = configured_task(config_flags)
    dit = dataclasses.replace(task.dit, remat=remat or task.dit.remat, attention=attention, dtype="bfloat16")
    return dataclasses.replace(task, dit=dit)


def configured_task(config_flags: list[str]) -> DiffusionTask:
    """The training task that "--config=NAME" and its overrides say, without the prompts of its samples."""
    config = read_config(config_flags, DiffusionTask, "dit_tiny:data=data/latents")
    return build(DiffusionTask, {k: v for k, v in config.items() if k != "prompts"})


def parameter_count(task: DiffusionTask) -> int:
    """The number of the transformer's parameters."""
    dit = dataclasses.replace(task.dit, attention="reference")
    return sum(x.size for x in jax.tree.leaves(abstract_params(dit)))


def token_count(text: str) -> int:
    """The number in "4096", "8k" (k = 1024) or "16.8M" (M = 1,000,000).

    Raises:
        ValueError: The text has another form.
    """
    if not (match := re.fullmatch(r"([\d.]+)([kM]?)", text)):
        raise ValueError(f"{text!r} must be a number of tokens, such as 4096, 8k or 16.8M")
    return round(float(match[1]) * {"": 1, "k": 1024, "M": 1e6}[match[2]])


def clip_tokens(clip: str, fps: float, codec: str, patch: tuple[int, int, int]) -> tuple[int, int, str]:
    """The tokens of a clip, and its latent frames.

    Args:
        clip: "60s@1080p", "5s@832x480" (width x height), or tokens such as "16.8M", "8k" or "4096".
        fps: Frames per second.
        codec: A key of CODECS.
        patch: Latents of a token.

    Returns:
        (tokens, latent frames or 0 if they are not known, the clip in words).

    Raises:
        ValueError: The clip has another form, or the codec is unknown.
    """
    if re.fullmatch(r"[\d.]+[kM]?", clip):
        return token_count(clip), 0, "that length"
    if codec not in CODECS:
        raise ValueError(f"--codec={codec} must be one of {', '.join(CODECS)}")
    vae = CODECS[codec].config
    T, H, W = clip_size(clip, fps, vae.time_factor, (vae.space_factor * patch[1], vae.space_factor * patch[2]))
    t, h, w = vae.latent_size((T, H, W))
    rows, columns = h // patch[1], w // patch[2]
    return t * rows * columns, t, f"{T} frames of {W}x{H}, {t} x {rows} x {columns} tokens"


def clip_size(clip: str, fps: float, time_factor: int, cell: tuple[int, int]) -> tuple[int, int, int]:
    """The frames, height and width of "60s@1080p" or "5s@832x480" (width x height), up to whole cells.

    Args:
        clip: The clip.
        fps: Frames per second.
        time_factor: Frames of each latent frame after the first.
        cell: Height and width that the sides are multiples of.

    Raises:
        ValueError: The clip has another form.
    """
    match = re.fullmatch(r"([\d.]+)s@(?:(\d+)p|(\d+)x(\d+))", clip)
    if not match:
        raise ValueError(f"--clip={clip} must look like 60s@1080p, 5s@832x480 (width x height) or 16.8M (tokens)")
    height = int(match[2] or match[4])
    width = int(match[3]) if match[3] else 2 * round(height * 16 / 9 / 2)
    H, W = (math.ceil(n / c) * c for n, c in zip((height, width), cell))
    return 1 + round(float(match[1]) * fps / time_factor) * time_factor, H, W


def mesh_of(text: str, chips: int) -> MeshConfig:
    """The mesh of a text such as "ring=4,ulysses=2" on `chips` chips, with the size of every axis."""
    return MeshConfig(*MeshConfig.parse(text).sizes(chips))


def configured_mesh(text: str, own: MeshConfig, chips: int) -> MeshConfig:
    """The mesh of a text, or the config's own if there is none, with the size of every axis."""
    return mesh_of(text, chips) if text else MeshConfig(*own.sizes(chips))

"""Calibration of the step cache (generate/step_cache.py): measured schedules, in a file of the model's folder.

    MODEL/step_cache.json   {"calibrations": [{"model": hash, "sampler": ..., "guidance": ..., "changes": ...,
                             "schedules": [{"share": 0.5, "reuse": "0010...", "error": 0.02, "psnr": 48.3}]}]}

There is one calibration for each weights, sampler and guidance. It holds for these alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minisora_jax.diffusion.guidance import GuidanceConfig
from minisora_jax.diffusion.sampler import SAMPLERS, SamplerConfig
from minisora_jax.evaluation.frames import psnr
from minisora_jax.generate.native import require_native
from minisora_jax.generate.pipeline import VideoPipeline
from minisora_jax.generate.request import Request
from minisora_jax.generate.step_cache import solve
from minisora_jax.io.atomic import write_text
from minisora_jax.io.json_files import read_json
from minisora_jax.io.retry import DataError

NAME = "step_cache.json"


def calibrate(
    pipeline: VideoPipeline,
    requests: Sequence[Request],
    sampler: SamplerConfig,
    guidance: GuidanceConfig,
    shares: Sequence[float],
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure how the blocks' residual changes over full samplings, and what schedules that follow from it cost.

    Args:
        pipeline: The model.
        requests: Videos at sizes of the model's training.
        sampler: The sampler, without `reuse`.
        guidance: The guidance.
        shares: For each a schedule is made that reuses this share of the model calls.

    Returns:
        A calibration of the file. "changes" has (with caption, without) for each model call, and of each schedule
        "error" is |z - z_full| / |z_full| over the latents of all videos, and "psnr" that of their frames in dB.

    Raises:
        ValueError: A share is out of range, the sampler has no fixed steps, or the model cannot make a request.
    """
    for request in requests:
        require_native(pipeline, request)
    everything = dataclasses.replace(sampler, reuse="0" * sampler.steps * _calls(sampler))
    for share in shares:
        solve(np.zeros(len(everything.reuse)), share)  # raises before anything is sampled
    changes: list[list[np.ndarray]] = [[] for _ in range(sampler.steps)]
    sample = lambda sampler, **options: pipeline.sample(
        requests, sampler=sampler, guidance=guidance, progress=progress, **options
    )
    full = sample(everything, measure=lambda k, change_CG: changes[k].append(change_CG))
    change_CG = np.concatenate([np.mean(of_step, axis=0) for of_step in changes])
    change_CG[0] = 0.0  # there was no call before
    true = pipeline.decode(full)
    schedules = []
    for share in shares:
        reuse = solve(change_CG.max(axis=1), share)
        latents = sample(dataclasses.replace(sampler, reuse=reuse))
        square = lambda pairs: sum(float(np.sum(np.square(a - b))) for a, b in pairs)
        error = np.sqrt(square(zip(latents, full)) / square((z, 0.0) for z in full))
        frames = pipeline.decode(latents)
        quality = psnr(*(np.concatenate([x.reshape(-1, 3) for x in videos]) for videos in (frames, true)))
        schedules.append({"share": share, "reuse": reuse, "error": _digits(error), "psnr": round(quality, 2)})
    return {
        **_settings(pipeline.hash, sampler, guidance),
        "videos": len(requests),
        "changes": [[_digits(x) for x in change_G] for change_G in change_CG],
        "schedules": schedules,
    }


def save(folder: str | Path, calibration: dict[str, Any]) -> Path:
    """Write a calibration into the model's file, in place of an older one for the same settings."""
    path = Path(folder) / NAME
    same = _flat(calibration)
    others = [c for c in _read(path) if _flat(c) != same] if path.exists() else []
    lines = ",\n".join(json.dumps(c) for c in [*others, calibration])
    write_text(path, f'{{"calibrations": [\n{lines}\n]}}\n')
    return path


def step_cache(
    folder: str | Path, model_hash: str, sampler: SamplerConfig, guidance: GuidanceConfig, share: float
) -> SamplerConfig:
    """The sampler with the schedule that was calibrated for a share of reused model calls.

    Args:
        folder: The model's.
        model_hash: `VideoPipeline.hash`.
        sampler: The sampler, without `reuse`.
        guidance: The guidance.
        share: One of those that were calibrated.

    Raises:
        ValueError: There is no such calibration. The message says how to make it.
    """
    path = Path(folder) / NAME
    fix = f"run `minisora calibrate` with the flags of this run and --shares {share:g}"
    if not path.exists():
        raise ValueError(f"{path} does not exist, so no step cache is calibrated: {fix}")
    ours = _flat(_settings(model_hash, sampler, guidance))
    every = _read(path)
    differences = [{k: (ours.get(k), c.get(k)) for k in ours if ours[k] != c.get(k)} for c in map(_flat, every)]
    if {} not in differences:
        nearest: dict[str, tuple] = min(differences, key=len, default={})
        words = ", ".join(f"{k}={there!r} (here {here!r})" for k, (here, there) in nearest.items())
        raise ValueError(f"{path} was calibrated for other settings, {words or 'none'}: {fix}")
    schedules = every[differences.index({})]["schedules"]
    for schedule in schedules:
        if schedule["share"] == share:
            return dataclasses.replace(sampler, reuse=schedule["reuse"])
    measured = ", ".join(f"{s['share']:g} (PSNR {s['psnr']:g} dB)" for s in schedules)
    raise ValueError(f"{path} has step caches for {measured}, and not for {share:g}: take one of them, or {fix}")


def _calls(sampler: SamplerConfig) -> int:
    if sampler.name not in SAMPLERS:
        raise ValueError(f"{sampler.name} chooses its own steps, so none can be left out: use --sampler unipc or heun")
    return SAMPLERS[sampler.name].calls


def _settings(model_hash: str, sampler: SamplerConfig, guidance: GuidanceConfig) -> dict[str, Any]:
    """What a calibration is for."""
    named = {"sampler": dataclasses.asdict(sampler), "guidance": dataclasses.asdict(guidance)}
    del named["sampler"]["reuse"]
    return {"model": model_hash, **json.loads(json.dumps(named))}


def _flat(calibration: dict[str, Any]) -> dict[str, Any]:
    """The settings of a calibration by dotted names."""
    groups = {f"{g}.{k}": v for g in ("sampler", "guidance") for k, v in calibration[g].items()}
    return {"model": calibration["model"], **groups}


def _read(path: Path) -> list[dict[str, Any]]:
    """The calibrations of a file, whose fields are there and have their types."""
    try:
        every = read_json(path)["calibrations"]
        for calibration in every:
            _flat(calibration)
            for schedule in calibration["schedules"]:
                _ = float(schedule["share"]), float(schedule["psnr"]), "" + schedule["reuse"]
        return every
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {error!r:.100}. Delete it and run `minisora calibrate` again") from error


def _digits(x: float) -> float:
    return float(f"{x:.4g}")

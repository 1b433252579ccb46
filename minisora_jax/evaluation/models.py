"""Measure a codec and a model. The results are scores, and rows for a contact sheet."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from minisora_jax.evaluation.frechet import distance, gaussian, open_extractor
from minisora_jax.generate import Request, VideoPipeline
from minisora_jax.io.progress import Progress
from minisora_jax.io.user_function import load_function
from minisora_jax.models.codec import Codec
from minisora_jax.models.perceptual import LPIPS
from minisora_jax.toy.checker import check_all
from minisora_jax.toy.grammar import FPS
from minisora_jax.toy.shapes import Shapes
from minisora_jax.training.codec_task import reconstruct
from minisora_jax.types import ClipSequence

Rows = list[tuple[np.ndarray, str]]  # (frames_THWC, label), for a contact sheet


def evaluate_codec(
    codec: Codec, clips: ClipSequence, lpips: str | None = None, extractor: str | None = None
) -> tuple[dict, Rows]:
    """(scores, rows of originals and reconstructions) of a codec. Clips are decoded from the posterior mean.

    Args:
        lpips: What `minisora import lpips` wrote, or FILE.py:FUNCTION, a distance of two clips uint8 (T, H, W, 3) that
            loads its own weights; None for none.
        extractor: Of a Frechet distance between the clips and their reconstructions, see `open_extractor`. With the
            I3D of the FVD paper it is the reconstruction FVD. None for none.

    Returns:
        scores: the means of "psnr" in dB, "ssim" and others; "psnr_worst" is the smallest PSNR of a clip.
    """
    each, rows, seen = [], [], ([], [])
    perceptual = _distance(lpips) if lpips else None
    eye = open_extractor(extractor) if extractor else None
    for i in Progress(range(len(clips)), desc="codec", unit="clip"):
        clip = clips[i]
        scores, [(_, frames)] = reconstruct(codec, [clip])
        if perceptual:
            scores["lpips"] = float(perceptual(clip.frames_THWC, frames))
        if eye:
            for features, video in zip(seen, (clip.frames_THWC, frames)):
                features.append(eye.features(video))
        each.append(scores)
        if len(rows) < 32:
            rows += [
                (clip.frames_THWC, clip.name),
                (frames, f"PSNR {scores['psnr']:.1f} dB, SSIM {scores['ssim']:.3f}"),
            ]
    mean = {k: round(float(np.mean([s[k] for s in each])), 4) for k in each[0]}
    facts = {"clips": len(clips), "codec": codec.hash} | ({"lpips_by": lpips} if lpips else {})
    if eye:
        facts |= {"frechet": round(distance(*map(gaussian, seen)), 5), "extractor": eye.name}
    return mean | {"psnr_worst": round(min(s["psnr"] for s in each), 4)} | facts, rows


def _distance(lpips: str) -> Callable[[np.ndarray, np.ndarray], float]:
    return LPIPS.load(lpips).distance if os.path.isdir(lpips) else load_function(lpips)


def evaluate_model(pipeline: VideoPipeline, split: str, count: int, **options: Any) -> tuple[dict, Rows]:
    """(scores, rows) of videos generated from `count` captions of the procedural clips.

    A score is the share of videos that show an attribute of their caption, by toy/checker.py. A video has the size of
    the caption's clip. "by_motion" has the motion score of each kind of motion.

    Args:
        split: "train" or "heldout".
        options: further arguments of `pipeline.generate`.
    """
    clips = Shapes(split, count)
    truth = [clips[i] for i in range(count)]
    requests = [Request(c.caption, c.size_THW, seed=i, fps=FPS) for i, c in enumerate(truth)]
    videos = pipeline.generate(requests, **options)
    hits, by_motion, errors = check_all(videos, [c.caption for c in truth])
    rows = [(v, c.caption + (f"   WRONG: {e}" if e else "")) for v, c, e in zip(videos, truth, errors)]
    share = lambda v: round(float(np.mean(v)), 4)
    return {
        **{k: share(v) for k, v in hits.items()},
        "videos": count,
        "counted": {k: len(v) for k, v in hits.items()},
        "by_motion": {k: share(v) for k, v in by_motion.items()},
        "model": pipeline.hash,
        **{k: _plain(v) for k, v in options.items()},
    }, rows


def _plain(value: Any) -> Any:
    """The fields of a dataclass; any other value unchanged."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value

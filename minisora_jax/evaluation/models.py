"""Measurements of a codec and of a model, each with the pictures to look at beside the numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
from tqdm import tqdm

from minisora_jax.curation.filters import load_function
from minisora_jax.generate import Request, VideoPipeline
from minisora_jax.models.codec import Codec
from minisora_jax.toy.checker import check_all
from minisora_jax.toy.shapes import FPS, Shapes
from minisora_jax.train.codec_task import reconstruct
from minisora_jax.types import ClipSequence

Rows = list[tuple[np.ndarray, str]]  # (frames_THWC, label), for a contact sheet


def evaluate_codec(codec: Codec, clips: ClipSequence, lpips: str | None = None) -> tuple[dict, Rows]:
    """{"psnr", "ssim", ...} of reconstructions of the posterior mean, and rows of originals and reconstructions.

    lpips: FILE.py:FUNCTION, a distance of two clips uint8 (T, H, W, 3), whose weights are its own affair.
    """
    each, rows = [], []
    perceived = load_function(lpips) if lpips else None
    for i in tqdm(range(len(clips)), desc="codec", unit="clip"):
        clip = clips[i]
        scores, [(_, frames)] = reconstruct(codec, [clip])
        if perceived:
            scores["lpips"] = float(perceived(clip.frames_THWC, frames))
        each.append(scores)
        if len(rows) < 32:
            rows += [
                (clip.frames_THWC, clip.name),
                (frames, f"PSNR {scores['psnr']:.1f} dB, SSIM {scores['ssim']:.3f}"),
            ]
    mean = {k: round(float(np.mean([s[k] for s in each])), 4) for k in each[0]}
    facts = {"clips": len(clips), "codec": codec.hash} | ({"lpips_by": lpips} if lpips else {})
    return mean | {"psnr_worst": round(min(s["psnr"] for s in each), 4)} | facts, rows


def evaluate_model(pipeline: VideoPipeline, split: str, count: int, **options) -> tuple[dict, Rows]:
    """Share of videos that show each attribute of their caption, by the checker, over `count` captions of a split.

    Sizes are those of the true clips, whose captions are used. "by_motion" breaks the motion score down.
    """
    clips = Shapes(split, count)
    truth = [clips[i] for i in range(count)]
    requests = [Request(c.caption, c.size_THW, seed=i, fps=FPS) for i, c in enumerate(truth)]
    videos = pipeline.generate(requests, **options)
    hits, by_motion, wrong = check_all(videos, [c.caption for c in truth])
    rows = [(v, c.caption + (f"   WRONG: {w}" if w else "")) for v, c, w in zip(videos, truth, wrong)]
    share = lambda v: round(float(np.mean(v)), 4)
    return {
        **{k: share(v) for k, v in hits.items()},
        "videos": count,
        "counted": {k: len(v) for k, v in hits.items()},
        "by_motion": {k: share(v) for k, v in by_motion.items()},
        "model": pipeline.hash,
        **{k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for k, v in options.items()},
    }, rows

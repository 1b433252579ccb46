"""Videos beyond the sizes of training: scaled rotary positions, windows and upscaling (docs/long-context.md).

    uv run python docs/position_extrapolation.py 32 33x48x48 none linear yarn windows    # captions, size, ways

A way is a method of models/rope_scaling.py, "windows" for length, or "upscaling". Each gets the same held-out captions
and seeds. The checker's shares are printed, and a contact sheet is written.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

from minisora_jax.evaluation.heldout import clips, requests
from minisora_jax.generate import VideoPipeline, tasks
from minisora_jax.media.contact_sheet import contact_sheet
from minisora_jax.toy.checker import check_all

STEPS, SHOWN = 10, 8


def made(pipeline: VideoPipeline, way: str, wanted: list, size: tuple[int, int, int]) -> list[np.ndarray]:
    """Videos of these requests, made in one of the ways."""
    if way == "windows":
        work = [tasks.long_video(pipeline, request, size[0]) for request in wanted]
    else:
        work = wanted
        if way == "none":  # in one piece, as if there were nothing to it
            pipeline = pipeline.extrapolated("none", size)
        elif way != "upscaling":
            pipeline = pipeline.extrapolated(way, size)
    return pipeline.generate(work, steps=STEPS, progress=False)


def main(count: int, size: tuple[int, int, int], ways: list[str]) -> None:
    pipeline, truth, rows = VideoPipeline.load(), clips(count, size), []
    captions = [clip.caption for clip in truth]
    for way in ways:
        start = time.process_time()
        videos = [clip.frames_THWC for clip in truth] if way == "truth" else made(pipeline, way, requests(truth), size)
        hits, _, errors = check_all(videos, captions)
        scores = {attribute: round(float(np.mean(verdict)), 3) for attribute, verdict in hits.items()}
        print(size, way, json.dumps(scores), f"{(time.process_time() - start) / count:.1f} CPU s a video", flush=True)
        rows += [(v, f"{way}: {c}" + (f"   WRONG: {e}" if e else "")) for v, c, e in zip(videos, captions, errors)][
            :SHOWN
        ]
    contact_sheet(Path(f"extrapolation-{'x'.join(map(str, size))}.png"), rows)


if __name__ == "__main__":
    T, H, W = map(int, sys.argv[2].split("x"))
    main(int(sys.argv[1]), (T, H, W), sys.argv[3:])

"""Make clips from a few prompts with the bundled model: the whole path from words to mp4, on a laptop CPU.

examples:
  minisora demo
  minisora demo --seed 3 --out my-demo

Writes one mp4 (or png) for each prompt and one contact sheet, and prints where. The captions are held out: their
colours, shapes and motions were each seen in training, but never together.
"""

from __future__ import annotations

import time
from pathlib import Path

CLIPS = 8
SIZE_THW = (17, 48, 48)


def add_arguments(parser):
    parser.add_argument("--out", default="minisora-demo", help="directory for the files (default minisora-demo)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other captions and clips (default 0)")


def run(args, _):
    since = time.perf_counter()
    from minisora_jax.bundled import CODEC, MODEL
    from minisora_jax.generate import Request, VideoPipeline
    from minisora_jax.media.contact_sheet import contact_sheet
    from minisora_jax.media.video_writer import write_video
    from minisora_jax.toy.checker import check
    from minisora_jax.toy.grammar import FPS, caption
    from minisora_jax.toy.scenes import sample_scene

    pipeline = VideoPipeline.load(MODEL, CODEC)
    captions = [caption(sample_scene(10_000 + args.seed * CLIPS + i, "heldout", SIZE_THW)) for i in range(CLIPS)]
    requests = [Request(c, SIZE_THW, seed=args.seed + i, fps=FPS) for i, c in enumerate(captions)]
    videos = pipeline.generate(requests)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, (request, frames) in enumerate(zip(requests, videos)):
        path = out / f"{i}.mp4"
        write_video(path, frames, request.fps, upscale=4)
        shown = check(frames, request.prompt)
        verdict = ", ".join(f"{k} {'yes' if good else 'NO'}" for k, good in shown.items())
        print(f"{path}  {request.prompt}  [{verdict}]")
        rows.append((frames, request.prompt))
    contact_sheet(out / "contact-sheet.png", rows)
    print(f"\n{out / 'contact-sheet.png'}: all clips at a glance ({time.perf_counter() - since:.0f} s in all)")
    print(
        "A model makes mistakes; NO marks what the checker did not find. In a checkout, commands start with `uv run`."
    )
    print('next: minisora generate "a large red circle moves left slowly on a black background"; minisora --help')

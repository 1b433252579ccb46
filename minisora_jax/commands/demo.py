"""Make clips from a few prompts with the bundled model: the whole path from words to mp4, on a laptop CPU.

examples:
  minisora demo
  minisora demo --seed 3 --out my-demo

Writes one mp4 (or png) for each prompt and one contact sheet, and prints where. The captions are held out: their
colours, shapes and motions were each seen in training, but never together. A model makes mistakes: a checker looks at
each clip, and what it does not find right is made again with another seed, at most twice. The printed lines say so.
"""

from __future__ import annotations

import time
from pathlib import Path

CLIPS = 8
SIZE_THW = (17, 48, 48)
TRIES = 3


def add_arguments(parser):
    parser.add_argument("--out", default="minisora-demo", help="directory for the files (default minisora-demo)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other captions and clips (default 0)")


def run(args, _):
    since = time.perf_counter()
    from minisora_jax.commands import options
    from minisora_jax.commands.generate import model_record
    from minisora_jax.diffusion.guidance import GuidanceConfig
    from minisora_jax.diffusion.sampler import SamplerConfig
    from minisora_jax.jobs.batch import run_jobs
    from minisora_jax.jobs.job import Job
    from minisora_jax.media.contact_sheet import contact_sheet
    from minisora_jax.media.video import read_clip_frames
    from minisora_jax.toy.checker import check

    pipeline = options.load_pipeline()
    out, sampling = Path(args.out), {"sampler": SamplerConfig("heun", 20), "guidance": GuidanceConfig(3.0)}
    out.mkdir(parents=True, exist_ok=True)
    model = model_record(args, pipeline)
    prompts = held_out_prompts(CLIPS, args.seed)
    paths = [out / f"{i}.mp4" for i in range(CLIPS)]
    verdicts: list[dict[str, bool]] = [{"made": False}] * CLIPS
    seeds, rows = list(range(args.seed, args.seed + CLIPS)), {}
    for _ in range(TRIES):
        again = [i for i in range(CLIPS) if not all(verdicts[i].values())]
        jobs = [Job(prompts[i], size=SIZE_THW[1:], frames=SIZE_THW[0], seed=seeds[i]) for i in again]
        if jobs:
            run_jobs(pipeline, jobs, [paths[i] for i in again], model=model, sampling=sampling, upscale=4)
        for i in again:
            frames, _ = read_clip_frames(paths[i], made=True)
            verdicts[i], rows[i] = check(frames, prompts[i]), (frames, prompts[i])
            if not all(verdicts[i].values()):
                seeds[i] += CLIPS
    for i, path in enumerate(paths):
        tries = min((seeds[i] - args.seed - i) // CLIPS + 1, TRIES)
        verdict = ", ".join(f"{k} {'yes' if good else 'NO'}" for k, good in verdicts[i].items())
        print(f"{path}  {prompts[i]}  [{verdict}{f'; try {tries}' if tries > 1 else ''}]")
    contact_sheet(out / "contact-sheet.png", [rows[i] for i in range(CLIPS)])
    print(f"\n{out / 'contact-sheet.png'}: all clips at a glance ({time.perf_counter() - since:.0f} s in all)")
    print("A model makes mistakes. What the checker did not find was made again, at most twice; NO marks what is left.")
    print("In a checkout, commands start with `uv run`.")
    print('next: minisora generate "a large red circle moves left slowly on a black background"; minisora --help')


def held_out_prompts(count: int, seed: int) -> list[str]:
    """Captions of held-out scenes, each with another motion."""
    from minisora_jax.toy.grammar import caption
    from minisora_jax.toy.scenes import sample_scene

    prompts: dict[str, str] = {}
    number = 10_000 + 100 * seed
    while len(prompts) < count:
        scene = sample_scene(number, "heldout", SIZE_THW)
        prompts.setdefault(scene.objects[0].motion, caption(scene))
        number += 1
    return list(prompts.values())

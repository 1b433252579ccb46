"""Measure a codec, a model, or every task of a model: numbers, and pictures to look at.

examples:
  minisora eval codec --data shapes:heldout:256
  minisora eval codec --codec=runs/codec/export --data data/clips/heldout --lpips models/lpips
  minisora eval codec --data data/clips/heldout --extractor i3d:i3d_torchscript.pt       # reconstructed against true
  minisora eval model --count 256 --out eval                  # does each video show what its caption says?
  minisora eval tasks --count 128 --out eval                  # every task, with pictures: eval/report.html
  minisora eval tasks --only loop transition --count 32
  minisora eval world --model=runs/home/export --codec=runs/home-codec/export --data data/home/heldout --count 32 \
      --probe-data data/home                                  # frames after true actions, beside the environment's
  minisora eval frechet --count 256 --extractor i3d:i3d_torchscript.pt       # generated against true clips
  minisora eval frechet --data data/clips --against data/other --extractor random

The model is asked for held-out captions, whose (colour, shape, motion) never occurred in training; an independent
checker reads colour, shape, motion and permanence off the pixels. A Frechet distance is named by its extractor and that
file's hash: it is FVD only with the I3D of the FVD paper, which is not part of this package.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

from minisora_jax.commands import options


def add_arguments(parser):
    parser.add_argument("what", type=_current, choices=("codec", "model", "tasks", "frechet", "world"))
    parser.add_argument(
        "--data", default=None, help="clips for `codec`, `frechet` (default shapes:heldout:256), `world`"
    )
    parser.add_argument("--against", default=None, help="clips for `frechet` in place of generated ones")
    parser.add_argument(
        "--extractor", default=None, help="of `frechet`, `codec`: random, i3d:FILE, inception:FILE, FILE.py:F"
    )
    parser.add_argument(
        "--lpips", default=None, help="of `codec`: what `minisora import lpips` wrote, or FILE.py:F of two clips"
    )
    parser.add_argument(
        "--only", nargs="*", type=_current, default=None, metavar="TASK", help="of `tasks`: which (default: all)"
    )
    parser.add_argument("--count", type=int, default=206, help="videos made, of each task (default 206)")
    parser.add_argument("--context", type=int, default=16, help="of `world`: true frames before a rollout (default 16)")
    parser.add_argument("--probe-data", default=None, help="of `world`: clips to learn to read actions from")
    parser.add_argument("--split", default="heldout", choices=("train", "heldout"), help="of the captions for `model`")
    options.add_model(parser)
    options.add_sampling(parser)
    options.add_step_cache(parser)
    parser.add_argument("--out", default="eval", help="directory for the numbers and pictures (default eval)")


def _current(word: str) -> str:
    """A name before 0.2, which is taken for one release, as it is now."""
    renamed = {"verbs": "tasks", "animate": "image-to-video", "join": "interpolate", "restyle": "video-to-video"}
    renamed |= {"connect": "transition", "connect-strangers": "transition-strangers"}
    return renamed.get(word, word)


def run(args, _):
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    scores = {"codec": _codec, "model": _model, "tasks": _tasks, "frechet": _frechet, "world": _world}[args.what](
        args, out
    )
    (out / f"{args.what}.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(scores, indent=2))
    print(out / ("report.html" if args.what == "tasks" else f"{args.what}.json"))


def _codec(args, out: Path) -> dict:
    from minisora_jax.bundled import CODEC
    from minisora_jax.evaluation.models import evaluate_codec
    from minisora_jax.media.contact_sheet import contact_sheet
    from minisora_jax.models.codec import Codec
    from minisora_jax.sources.clips import open_clips

    clips = open_clips(args.data or "shapes:heldout:256")
    scores, rows = evaluate_codec(Codec.load(args.codec or CODEC), clips, args.lpips, args.extractor)
    contact_sheet(out / "codec.png", rows[:32])
    return scores


def _model(args, out: Path) -> dict:
    from minisora_jax.evaluation.models import evaluate_model
    from minisora_jax.media.contact_sheet import contact_sheet

    pipeline, sampling = options.pipeline_and_sampling(args)
    scores, rows = evaluate_model(pipeline, args.split, args.count, **sampling)
    contact_sheet(out / "model.png", rows[:32])
    return scores | {"guide_model": args.guide_model}


def _tasks(args, out: Path) -> dict:
    from minisora_jax.evaluation.report import write_report
    from minisora_jax.evaluation.tasks import TASKS
    from minisora_jax.jobs.output import machine

    names = args.only or list(TASKS)
    if unknown := set(names) - set(TASKS):
        raise ValueError(f"--only {', '.join(sorted(unknown))}: the tasks are {', '.join(TASKS)}")
    pipeline, sampling = options.pipeline_and_sampling(args)
    settings = {"model": pipeline.hash, "codec": pipeline.codec.hash, "videos of each": args.count, **machine()}
    settings |= {k: str(v) for k, v in sampling.items()}
    results = {}
    for name in names:
        since = time.perf_counter()
        scores, rows = TASKS[name](pipeline, args.count, sampling)
        results[name] = scores | {"seconds": round(time.perf_counter() - since, 1)}, rows
        short = {k: v for k, v in results[name][0].items() if not isinstance(v, dict)}
        print(f"{name}: {json.dumps(short)}", flush=True)
        # Written anew after each, so that what took an hour is not lost with the last one.
        write_report(out / "report.html", "What one model does", settings, results)
    return settings | {name: scores for name, (scores, _) in results.items()}


def _world(args, out: Path) -> dict:
    from minisora_jax.evaluation.action_probe import train_probe
    from minisora_jax.evaluation.worlds import evaluate_world
    from minisora_jax.generate.streaming import StreamConfig
    from minisora_jax.generate.world import World
    from minisora_jax.io.progress import Progress
    from minisora_jax.media.contact_sheet import contact_sheet
    from minisora_jax.sources.clips import open_clips

    if not args.data:
        raise ValueError("name clips of the environment that the world has not seen: --data=DIR")
    if args.model is None:
        raise ValueError("name a world's model: --model=DIR, and its codec: --codec=DIR")
    settings = StreamConfig(**({"steps": args.steps} if args.steps else {}))
    world, clips = World.load(args.model, args.codec, settings), open_clips(args.data)
    probe = None
    if args.probe_data:
        seen = open_clips(args.probe_data)
        probe = train_probe([seen[i] for i in range(min(len(seen), 400))])
    chosen = [clips[i] for i in range(min(len(clips), args.count))]
    with Progress(total=len(chosen), desc="world", unit="clip") as bar:
        advance = lambda done: bar.update(done - bar.n)
        scores, rows = evaluate_world(world, chosen, context=args.context, probe=probe, progress=advance)
    contact_sheet(out / "world.png", rows[:16], columns_of_frames=12)
    return scores | {"stream": dataclasses.asdict(world.settings), "model": str(args.model)}


def _frechet(args, out: Path) -> dict:
    from minisora_jax.evaluation.frechet import frechet, open_extractor
    from minisora_jax.generate import Request
    from minisora_jax.sources.clips import open_clips

    if not args.extractor:
        raise ValueError("name what sees: --extractor i3d:FILE.pt, inception:FILE.pt, FILE.py:FUNCTION, or random")
    extractor = open_extractor(args.extractor)
    true = open_clips(args.data or f"shapes:heldout:{args.count}")
    theirs = [true[i] for i in range(min(len(true), args.count))]
    if args.against:
        other = open_clips(args.against)
        ours = [other[i].frames_THWC for i in range(min(len(other), args.count))]
    else:
        requests = [Request(c.caption, c.size_THW, seed=i, fps=c.fps) for i, c in enumerate(theirs)]
        pipeline, sampling = options.pipeline_and_sampling(args)
        ours = pipeline.generate(requests, **sampling)
    distance = frechet(ours, [c.frames_THWC for c in theirs], extractor)
    return {"frechet": round(distance, 5), "extractor": extractor.name, "videos": [len(ours), len(theirs)]}

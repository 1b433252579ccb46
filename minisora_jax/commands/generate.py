"""Make videos and images from words, pictures and other videos.

examples:
  minisora generate "a large red circle moves left slowly on a black background"
  minisora generate "a photo of a small green cross on a navy background" --frames 1 --size 64x64
  minisora generate "a blue square grows on a grey background" "a red triangle moves up on a brown background" --seed 7
  minisora generate "..." --image cat.png                          # image to video
  minisora generate "..." --first a.png --last b.png               # interpolate between two pictures
  minisora generate "..." --video cat.mp4 --strength 0.6           # video to video (0: as it is, 1: all new)
  minisora generate "..." --video cat.mp4 --mask mask.png          # inpaint: make anew what is white in the mask
  minisora generate "..." --video cat.mp4 --size 64x96             # outpaint: a larger frame around it
  minisora generate "..." --video cat.mp4 --extend forward 2       # seconds; or backward, or both
  minisora generate "..." --transition cat.mp4 dog.mp4             # a transition from one to the other
  minisora generate "..." --loop                                   # a seamless loop; with --video, of that video
  minisora generate "a red circle grows on a navy background [4s] a red circle shrinks on a navy background" --seconds 9
  minisora generate --batch jobs.jsonl --out made                  # one a line: {"prompt": "...", "image": "cat.png"}
  minisora generate --reproduce made/00003-a-cat-0.mp4             # make it again, and compare bit for bit
  minisora generate "..." --negative "blurry" --guidance 5 --guidance-schedule cosine --sampler unipc --steps 12
  minisora generate "..." --seconds 8 --rope linear                # beyond training's length in one piece
  minisora generate "..." --step-cache 0.5                         # half of the model calls (see minisora calibrate)
  minisora generate "a cat on a skateboard" --model=models/wan --codec=models/wan-vae --text-encoder=models/umt5 \\
      --size 480x832 --frames 81 --fps 16 --sampler unipc --schedule wan --guidance 5
  minisora generate "the cat jumps" --image cat.png --model=models/i2v --image-encoder=models/clip-vision ...
  minisora generate "a cat on a skateboard" --expand http://localhost:8000/v1#my-llm --model=models/wan ...
  minisora generate "a cat on a skateboard" --model=models/wan ... --lora runs/a/export --lora b.safetensors:0.8
  minisora generate 207 --model=models/dit --codec=models/sd-vae --size 256x256 --frames 1

The bundled model knows coloured shapes in motion: --captions lists its words. A model trained here remembers its text
encoder; an imported model is told with --text-encoder. For a model of classes the prompt is the number or the name of a
class. Sizes are HEIGHTxWIDTH in pixels. Each file has a record beside it and within it, from which --reproduce makes it
again. On several processes (a pod, or launch/local_cpu.py) all take part in each video.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from minisora_jax.commands import options

ON_SEVERAL_PROCESSES = True

log = logging.getLogger("minisora")

FORMATS = ("mp4", "webm", "gif", "frames")


def add_arguments(parser):
    parser.add_argument("prompts", nargs="*", help="one video each; [4s] within one: what comes from then on")
    parser.add_argument("--negative", default="", help="a prompt for what the video shall not show")
    parser.add_argument("--size", default=None, help="HEIGHTxWIDTH in pixels, any (default: the input's, or 48x48)")
    parser.add_argument(
        "--frames", type=int, default=None, help="1 + 4k frames, 1 for an image, 4k for a loop (default 17)"
    )
    parser.add_argument(
        "--seconds", type=float, default=None, help="length of the video, or of the new part; at most 60"
    )
    parser.add_argument(
        "--fps",
        type=float,
        default=None,
        help="frames per second (default: the input's, or 8), at the input's speed",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; the next ones count up (default 0)")
    given = parser.add_argument_group("inputs")
    given.add_argument("--image", "--first", dest="image", default=None, help="the first frame")
    given.add_argument("--last", default=None, help="the last frame, with --image")
    given.add_argument("--video", default=None, help="the video to change, extend or loop")
    given.add_argument(
        "--strength", type=float, default=None, help="video to video: the share of noise to start from, 0 to 1"
    )
    given.add_argument("--mask", default=None, help="inpaint: a picture or a video, white where to make it anew")
    given.add_argument(
        "--extend",
        default=None,
        nargs="+",
        metavar="SIDE [SECONDS]",
        help="extend the video: forward, backward or both, by so many seconds (default 1)",
    )
    given.add_argument("--transition", default=None, nargs="+", metavar="VIDEO", help="two videos, or one and --video")
    options.renamed(given, "--connect", "--transition", nargs="+")
    given.add_argument("--loop", action="store_true", help="the end meets the beginning")
    options.add_model(parser)
    options.add_sampling(parser)
    options.add_step_cache(parser)
    files = parser.add_argument_group("files")
    files.add_argument("--out", default="minisora-out", help="directory for the files (default minisora-out)")
    files.add_argument(
        "--format", default="mp4", choices=FORMATS, help="of videos (default mp4; frames: a folder of png)"
    )
    files.add_argument(
        "--upscale", type=int, default=4, help="show small videos larger: repeat each pixel in files (default 4)"
    )
    files.add_argument(
        "--batch", default=None, metavar="FILE", help="jobs as JSON lines; a batch that was stopped goes on"
    )
    files.add_argument("--batch-size", type=int, default=8, help="jobs packed together (default 8)")
    options.renamed(files, "--together", "--batch-size", type=int)
    files.add_argument("--reproduce", default=None, metavar="FILE", help="a file made here, to be made again")
    options.renamed(files, "--remake", "--reproduce")
    parser.add_argument(
        "--expand",
        default=None,
        metavar="MODEL",
        help="write each prompt as a long caption first, with any --captioner of `minisora prepare`",
    )
    options.add_mesh(parser)
    parser.add_argument("--captions", action="store_true", help="list the words of the bundled model, and exit")


def run(args, _):
    if args.captions:
        return _list_captions()
    if not (args.prompts or args.batch or args.reproduce):
        raise ValueError('no prompt given; for example: minisora generate "a red circle grows on a black background"')
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size} must be at least 1")
    from minisora_jax.jobs.batch import read_jobs
    from minisora_jax.jobs.output import own_folder
    from minisora_jax.media.video_writer import MOST_UPSCALE

    if not 1 <= args.upscale <= MOST_UPSCALE:
        raise ValueError(f"--upscale {args.upscale} must be from 1 to {MOST_UPSCALE}")
    options.sampling_options(args)  # raises before anything is read
    if args.reproduce:
        return _reproduce(args)
    lines = read_jobs(Path(args.batch)) if args.batch else _jobs(args)
    with options.mesh_in_use(args.mesh, of_all=True), own_folder(args.out) as out:
        return _make(args, lines, out)


def _make(args, lines: list[Any], out: Path) -> int:
    """Make the jobs of these lines in the folder `out`; the exit code. The model is read onto the mesh in use."""
    from minisora_jax.jobs.batch import free_paths, release, run_batch, run_jobs
    from minisora_jax.parallel.processes import is_main

    pipeline, sampling = options.pipeline_and_sampling(args)
    jobs = [job for job in lines if not isinstance(job, ValueError)]
    _give_hints(pipeline, jobs)
    suffix = "" if args.format == "frames" else f".{args.format}"
    common = {"model": model_record(args, pipeline), "sampling": sampling, "upscale": args.upscale}
    if args.batch:
        counts = run_batch(pipeline, lines, Path(args.out), suffix, args.batch_size, **common)
        made, failed, before = (counts[what] for what in ("made", "failed", "before"))
        if is_main():
            print(f"{made} made, {failed} failed, {before} made before and skipped: {out / 'manifest.jsonl'}")
        return 1 if failed else 0
    paths, records = free_paths(out, jobs, suffix), []
    try:
        for first in range(0, len(jobs), args.batch_size):
            batch = slice(first, first + args.batch_size)
            records += run_jobs(pipeline, jobs[batch], paths[batch], **common)
    finally:
        release(paths)
    if is_main():
        print(*paths, sep="\n")
        print(options.write_sheet(out, paths, [job.prompt for job in jobs]))
    return 1 if any("one_colour" in record for record in records) else 0


def _give_hints(pipeline, jobs: list[Any]) -> None:
    """Say what the model does not know of these jobs: words, sizes, pictures."""
    from minisora_jax.jobs.hints import picture_hints, size_hint
    from minisora_jax.parallel.processes import is_main

    words = [text for job in jobs for text in (job.prompt, job.negative) if text]
    told = ((text, pipeline.unknown_words_hint(text)) for text in words)
    hints = [f"{text!r}: {hint} `minisora generate --captions` lists its words." for text, hint in told if hint]
    pictures = [path for job in jobs for path in (job.image, job.last, job.video, job.transition) if path]
    sizes = {job.size: None for job in jobs if not job.video}
    hints += [*picture_hints(pipeline, pictures), *filter(None, (size_hint(pipeline, size) for size in sizes))]
    for hint in hints if is_main() else []:  # all processes take part in looking at the pictures
        log.warning("%s", hint)


def _jobs(args) -> list[Any]:
    """One for each prompt on the command line."""
    from minisora_jax.jobs.job import Job

    prompts = _expanded(args.prompts, args.expand) if args.expand else args.prompts
    names = "negative frames seconds fps image last video strength mask extend transition loop".split()
    size = options.parse_size(args.size) if args.size else None
    values: dict[str, Any] = {name: getattr(args, name) for name in names} | {"size": size}
    if args.extend:
        values["extend"], *seconds = args.extend
        values["seconds"] = _number("--extend", seconds) if seconds else args.seconds
    if args.transition:
        *first, values["transition"] = args.transition
        if len(first) > 1 or bool(first) == bool(args.video):
            raise ValueError(f"--transition {' '.join(args.transition)}: give the two videos, or one and --video")
        values["video"] = first[0] if first else args.video
    return [Job(prompt=prompt, seed=args.seed + i, **values) for i, prompt in enumerate(prompts)]


def _number(flag: str, words: list[str]) -> float:
    try:
        [seconds] = words
        return float(seconds)
    except ValueError:
        raise ValueError(f"{flag} ... {' '.join(words)}: seconds are one number, such as 2 or 0.5") from None


def model_record(args, pipeline) -> dict:
    """The part of a record that names the model."""
    from minisora_jax.generate.extrapolation import spelled

    names = ("model", "codec", "guide_model", "text_encoder", "image_encoder", "mesh", "dtype", "lora")
    paths = {name: getattr(args, name, None) for name in names}
    paths |= {"rope": spelled(pipeline.config)} if getattr(args, "rope", None) else {}
    return paths | {"hash": pipeline.hash, "codec_hash": pipeline.codec.hash, "window": pipeline.window_frames}


def _reproduce(args) -> int:
    """Make a file again from its record, and compare."""
    from minisora_jax.jobs.batch import reproduce
    from minisora_jax.jobs.output import different_machine, own_folder, read_record
    from minisora_jax.parallel.processes import is_main

    record = read_record(args.reproduce)
    model = record["model"]
    names = ("model", "codec", "guide_model", "text_encoder", "image_encoder", "window", "dtype", "lora", "rope")
    if is_main() and (words := different_machine(record)):
        print(words)
    source = Path(args.reproduce)
    name = (source.with_suffix("") if source.suffix == ".json" else source).name
    with options.mesh_in_use(model["mesh"], of_all=True), own_folder(args.out) as out:
        pipeline = options.load_pipeline(**{name: model.get(name) for name in names})
        again = reproduce(pipeline, record, out / name, upscale=args.upscale)["pixels"]
    before = record.get("pixels")
    verdict = "no hash to compare with" if not before else "the same to the bit" if again == before else "NOT the same"
    if is_main():
        print(f"{out / name}: {verdict} ({again[:16]})")
    return 0 if before in (None, again) else 1


def _expanded(prompts: list[str], spec: str) -> list[str]:
    """The prompts as long captions, each printed."""
    from minisora_jax.curation.captioners import expand, open_captioner
    from minisora_jax.parallel.processes import several

    if several():  # each would ask, and get another answer
        raise ValueError("--expand is for one process: expand the prompts there, and give the long captions to all")
    captioner = open_captioner(spec)
    captioner.check()
    captions = [expand(prompt, captioner) for prompt in prompts]
    for prompt, caption in zip(prompts, captions):
        print(f"{prompt} -> {caption}")
    return captions


def _list_captions() -> None:
    from minisora_jax.toy.grammar import BACKGROUNDS, COLOURS, PHRASES, SHAPES, example_captions

    print("colours:     " + ", ".join(COLOURS))
    print("shapes:      " + ", ".join(SHAPES))
    print("motions:     " + ", ".join(PHRASES.values()))
    print("backgrounds: " + ", ".join(BACKGROUNDS) + ", checkered")
    print("\n" + "\n".join(example_captions()))

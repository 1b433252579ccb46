"""Make videos and images: from words, pictures and other videos.

examples:
  minisora generate "a large red circle moves left slowly on a black background"
  minisora generate "a photo of a small green cross on a navy background" --frames 1 --size 64x64
  minisora generate "a blue square grows on a grey background" "a red triangle moves up on a brown background" --seed 7
  minisora generate "..." --image cat.png                          # animate a picture
  minisora generate "..." --first a.png --last b.png               # from one picture to another
  minisora generate "..." --video cat.mp4 --strength 0.6           # restyle (0: as it is, 1: all anew)
  minisora generate "..." --video cat.mp4 --mask mask.png          # make anew what the mask has white
  minisora generate "..." --video cat.mp4 --size 64x96             # outpaint: a larger frame around it
  minisora generate "..." --video cat.mp4 --extend forward 2       # seconds; or backward, or both
  minisora generate "..." --connect cat.mp4 dog.mp4                # a transition from one to the other
  minisora generate "..." --loop                                   # a seamless loop; with --video, of that
  minisora generate "a red circle grows on a black background [4s] it moves up on a black background" --seconds 9
  minisora generate --batch jobs.jsonl --out made                  # a job a line: {"prompt": "...", "image": "cat.png"}
  minisora generate --remake made/00003-a-cat-0.mp4                # the same again, and say whether to the bit
  minisora generate "..." --negative "blurry" --guidance 5 --guidance-schedule cosine --sampler unipc --steps 12
  minisora generate "a cat on a skateboard" --model=models/wan --codec=models/wan-vae --text-encoder=models/umt5 \\
      --size 480x832 --frames 81 --fps 16 --sampler unipc --grid wan --guidance 5
  minisora generate "a cat on a skateboard" --expand http://localhost:8000/v1#my-llm --model=models/wan ...
  minisora generate 207 --model=models/dit --codec=models/sd-vae --size 256x256 --frames 1

The bundled model knows coloured shapes in motion; see --captions for what to say. A model trained here remembers its
text encoder, an imported one is told. To a model of classes a prompt is the number of one.
Sizes are HEIGHTxWIDTH in pixels. Beside each file, and within it, is the record that --remake makes it from.
"""

from __future__ import annotations

from pathlib import Path

FORMATS = ("mp4", "webm", "gif", "frames")


def add_arguments(parser):
    parser.add_argument("prompts", nargs="*", help="one video each; [4s] within one: what comes from then on")
    parser.add_argument("--negative", default="", help="what it should not be: guidance goes away from this prompt")
    parser.add_argument("--size", default=None, help="HEIGHTxWIDTH in pixels, any (default: the input's, or 48x48)")
    parser.add_argument(
        "--frames", type=int, default=None, help="1 + 4k frames; 1: an image; 4k of a loop (default 17)"
    )
    parser.add_argument("--seconds", type=float, default=None, help="how long, or how much longer; up to 60")
    parser.add_argument("--fps", type=float, default=None, help="frames per second (default: the input's, or 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; the next ones count up (default 0)")
    given = parser.add_argument_group("what is given")
    given.add_argument("--image", "--first", dest="image", default=None, help="the first frame")
    given.add_argument("--last", default=None, help="the last frame, with --image")
    given.add_argument("--video", default=None, help="what to restyle, inpaint, outpaint, extend, connect or loop")
    given.add_argument("--strength", type=float, default=None, help="restyle: the share of noise to start from, 0 to 1")
    given.add_argument("--mask", default=None, help="inpaint: a picture or a video, white where to make it anew")
    given.add_argument("--extend", default=None, nargs="+", metavar="SIDE [SECONDS]", help="forward, backward or both")
    given.add_argument(
        "--connect", default=None, nargs="+", metavar="VIDEO", help="the video to lead to, or both videos"
    )
    given.add_argument("--loop", action="store_true", help="the end meets the beginning")
    add_sampling(parser)
    parser.add_argument("--model", default=None, help="an exported model (default: the bundled one)")
    parser.add_argument("--codec", default=None, help="its codec (default: the bundled one)")
    parser.add_argument(
        "--window",
        type=int,
        default=None,
        metavar="FRAMES",
        help="frames that the model makes at once (default: as trained); longer videos are made of windows",
    )
    parser.add_argument("--out", default="minisora-out", help="directory for the files (default minisora-out)")
    parser.add_argument(
        "--format", default="mp4", choices=FORMATS, help="of videos (default mp4; frames: a folder of png)"
    )
    parser.add_argument("--upscale", type=int, default=4, help="enlarge pixels this many times in files (default 4)")
    parser.add_argument(
        "--batch", default=None, metavar="FILE", help="jobs as JSON lines; goes on where it was stopped"
    )
    parser.add_argument("--together", type=int, default=8, help="jobs packed together (default 8)")
    parser.add_argument("--remake", default=None, metavar="FILE", help="a file made here, to be made again")
    parser.add_argument(
        "--expand",
        default=None,
        metavar="MODEL",
        help="write each prompt as a long caption first, by what --captioner of `minisora prepare` takes",
    )
    add_mesh(parser)
    parser.add_argument("--captions", action="store_true", help="list what the bundled model understands, and exit")


def run(args, _):
    if args.captions:
        return _list_captions()
    if not (args.prompts or args.batch or args.remake):
        raise ValueError('no prompt given; for example: minisora generate "a red circle grows on a black background"')
    if args.together < 1:
        raise ValueError(f"--together {args.together} must be at least 1")
    from minisora_jax.generate.batch import free_paths, read_jobs, run_batch, run_jobs

    if args.remake:
        return _remake(args)
    jobs = read_jobs(Path(args.batch)) if args.batch else _jobs(args)
    generator, options = load(args), sampling(args)
    out, suffix = Path(args.out), "" if args.format == "frames" else f".{args.format}"
    common = {"model": model_of(args, generator), "sampling": options, "upscale": args.upscale}
    with mesh_in_use(args.mesh):
        if args.batch:
            counts = run_batch(generator, jobs, out, suffix, args.together, **common)
            print(", ".join(f"{n} {what}" for what, n in counts.items()) + f": {out / 'manifest.jsonl'}")
            return 1 if counts["failed"] else 0
        paths = free_paths(out, jobs, suffix)
        for first in range(0, len(jobs), args.together):
            some = slice(first, first + args.together)
            run_jobs(generator, jobs[some], paths[some], **common)
    print(*paths, sep="\n")
    print(_sheet(out, paths, jobs))


def _jobs(args) -> list:
    """One for each prompt on the command line."""
    from minisora_jax.generate.job import Job

    prompts = _expanded(args.prompts, args.expand) if args.expand else args.prompts
    names = "negative frames seconds fps image last video strength mask extend connect loop".split()
    size = parse_size(args.size) if args.size else None
    said = {name: getattr(args, name) for name in names} | {"size": size}
    if args.extend:
        said["extend"], *seconds = args.extend
        said["seconds"] = _number("--extend", seconds) if seconds else args.seconds
    if args.connect:
        *first, said["connect"] = args.connect
        if len(first) > 1 or (first and args.video):
            raise ValueError(f"--connect {' '.join(args.connect)}: give the two videos, or one and --video")
        said["video"] = first[0] if first else args.video
    return [Job(prompt=prompt, seed=args.seed + i, **said) for i, prompt in enumerate(prompts)]


def _number(flag: str, words: list[str]) -> float:
    try:
        [seconds] = words
        return float(seconds)
    except ValueError:
        raise ValueError(f"{flag} ... {' '.join(words)}: seconds are one number, such as 2 or 0.5") from None


def load(args):
    """The generator that --model, --codec, --guide-model, --text-encoder and --window ask for."""
    import dataclasses

    from minisora_jax.bundled import MODEL
    from minisora_jax.generate import Generator

    generator = Generator.load(args.model or MODEL, args.codec, args.guide_model, args.text_encoder)
    if args.window is None:
        return generator
    factor = generator.codec.config.time_factor
    if args.window < 2 * factor + 1:
        raise ValueError(f"--window {args.window} must be at least {2 * factor + 1} frames: three latent ones")
    return dataclasses.replace(generator, window=1 + (args.window - 1) // factor)


def model_of(args, generator) -> dict:
    """What a record says of the model."""
    paths = {name: getattr(args, name) for name in ("model", "codec", "guide_model", "text_encoder", "mesh")}
    return paths | {"hash": generator.hash, "codec_hash": generator.codec.hash, "window": generator.window_frames}


def _remake(args) -> int:
    """Make a file again from its record, and compare."""
    import argparse

    from minisora_jax.generate.batch import remake
    from minisora_jax.generate.output import different_machine, read_record

    record = read_record(args.remake)
    generator = load(argparse.Namespace(**record["model"]))
    if words := different_machine(record):
        print(words)
    source = Path(args.remake).with_suffix("") if args.remake.endswith(".json") else Path(args.remake)
    path = Path(args.out) / source.name
    with mesh_in_use(record["model"]["mesh"]):
        again = remake(generator, record, path, upscale=args.upscale)["pixels"]
    before = record.get("pixels")
    verdict = "no hash to compare with" if not before else "the same to the bit" if again == before else "NOT the same"
    print(f"{path}: {verdict} ({again[:16]})")
    return 0 if before in (None, again) else 1


def _sheet(out: Path, paths: list[Path], jobs: list) -> Path:
    """A contact sheet of the files, of a minute's video its first seconds."""
    from minisora_jax.io.contact_sheet import contact_sheet
    from minisora_jax.io.video import read_clip_frames

    rows = []
    for path, job in list(zip(paths, jobs))[:32]:
        if path.is_dir():
            import numpy as np

            frames = np.concatenate([read_clip_frames(p)[0] for p in sorted(path.glob("*.png"))[:256]])
        else:
            frames, _ = read_clip_frames(path, max_frames=256)
        rows.append((frames, job.prompt))
    contact_sheet(out / "contact-sheet.png", rows)
    return out / "contact-sheet.png"


# The names of diffusion/sampler.py and diffusion/time.py, without importing jax for --help; a test compares them.
SAMPLERS = ("euler", "heun", "ddim", "ddpm", "sde", "dpm++2m", "unipc", "dopri5")
SCHEDULES = ("constant", "linear", "cosine")
GRIDS = ("even", "wan", "karras", "leading", "linspace", "trailing")


def add_sampling(parser):
    """The options of sampling, which `generate` and `eval` share."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--sampler",
        default="heun",
        choices=SAMPLERS,
        help="heun (default) calls the model twice a step, dopri5 as often as it needs, the others once; ddpm and sde "
        "add noise at each step",
    )
    group.add_argument("--steps", type=int, default=20, help="sampler steps (default 20)")
    group.add_argument("--grid", default="even", choices=GRIDS, help="where the steps lie in time (default even)")
    group.add_argument(
        "--eta", type=float, default=None, help="share of noise renewed by ddim (default 0), ddpm, sde (1)"
    )
    group.add_argument("--tolerance", type=float, default=1e-3, help="error of a step of dopri5 (default 1e-3)")
    group.add_argument("--guidance", type=float, default=3.0, help="how strictly to follow the prompt; 1 is none")
    group.add_argument(
        "--guidance-interval",
        default="0-1",
        metavar="LOW-HIGH",
        help="times to guide at, of 0 (clean) to 1 (noise), such as 0.2-0.8 (default 0-1)",
    )
    group.add_argument(
        "--guidance-rescale",
        type=float,
        default=0.0,
        help="share by which to undo the contrast that guidance adds, 0 (default) to 1",
    )
    group.add_argument(
        "--guidance-schedule",
        default="constant",
        choices=SCHEDULES,
        help="how guidance goes over time, its mean being kept: linear and cosine are weak at first",
    )
    group.add_argument(
        "--text-encoder",
        default=None,
        help="a text encoder that `minisora import` wrote (default: the one that the model was trained with)",
    )
    group.add_argument(
        "--guide-model",
        default=None,
        help="an exported worse model of the same codec: guide away from it (autoguidance), not from the empty prompt",
    )


def sampling(args) -> dict:
    """The arguments of `Generator.generate` that they make."""
    from minisora_jax.diffusion.guidance import GuidanceConfig
    from minisora_jax.diffusion.sampler import SamplerConfig

    return {
        "sampler": SamplerConfig(args.sampler, args.steps, args.grid, args.eta, args.tolerance),
        "guidance": GuidanceConfig(
            args.guidance, parse_interval(args.guidance_interval), args.guidance_rescale, args.guidance_schedule
        ),
    }


def add_mesh(parser):
    """The option of devices, which `generate` and `encode` share."""
    parser.add_argument(
        "--mesh",
        default=None,
        metavar="AXIS=SIZE,...",
        help="devices, such as data=2,ring=4: clips are divided over data, their tokens (in the codec, their height) "
        "over ring (default: one device)",
    )


def mesh_in_use(text: str | None):
    """A context in which the mesh of that text is set, of this process's devices; no mesh for None."""
    import contextlib

    if text is None:
        return contextlib.nullcontext()

    import jax

    from minisora_jax.parallel.mesh import MeshConfig, make_mesh

    return jax.set_mesh(make_mesh(MeshConfig.parse(text), jax.local_devices()))


def parse_interval(text: str) -> tuple[float, float]:
    """(0.2, 0.8) from "0.2-0.8"."""
    try:
        low, high = (float(n) for n in text.split("-"))
    except ValueError:
        raise ValueError(f"--guidance-interval {text!r} must be LOW-HIGH in times, such as 0.2-0.8") from None
    return low, high


def parse_size(text: str) -> tuple[int, int]:
    """(H, W) from "48x64"."""
    try:
        height, width = (int(n) for n in text.lower().split("x"))
    except ValueError:
        raise ValueError(f"--size {text!r} must be HEIGHTxWIDTH in pixels, such as 48x64") from None
    return height, width


def _expanded(prompts: list[str], spec: str) -> list[str]:
    """The prompts as long captions, each shown."""
    from minisora_jax.curation.captioners import expand, open_captioner

    captioner = open_captioner(spec)
    long = [expand(prompt, captioner) for prompt in prompts]
    for prompt, words in zip(prompts, long):
        print(f"{prompt} -> {words}")
    return long


def _list_captions():
    from minisora_jax.toy.shapes import BACKGROUNDS, COLOURS, PHRASES, SHAPES

    print("colours:     " + ", ".join(COLOURS))
    print("shapes:      " + ", ".join(SHAPES))
    print("motions:     " + ", ".join(PHRASES.values()))
    print("backgrounds: " + ", ".join(BACKGROUNDS) + ", checkered")
    print("\na large red circle moves left slowly on a black background")
    print("the camera pans right past a small cyan cross on a checkered background")
    print("a red circle moves up and a blue square stays still on a grey background")
    print("a photo of a small green triangle on a navy background")

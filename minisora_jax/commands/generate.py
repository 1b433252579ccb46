"""Make videos and images from prompts.

examples:
  minisora generate "a large red circle moves left slowly on a black background"
  minisora generate "a photo of a small green cross on a navy background" --frames 1 --size 64x64
  minisora generate "a blue square grows on a grey background" "a red triangle moves up slowly on a brown background" \\
      --size 48x64 --frames 17 --seed 7 --out my_videos
  minisora generate "a red circle grows on a black background" --sampler unipc --steps 12 --guidance-interval 0.2-0.9
  minisora generate "a cat on a skateboard" --model=models/wan --codec=models/wan-vae --text-encoder=models/umt5 \\
      --size 480x832 --frames 81 --fps 16 --sampler unipc --grid wan --guidance 5
  minisora generate "a cat on a skateboard" --expand http://localhost:8000/v1#my-llm --model=models/wan ...
  minisora generate 207 --model=models/dit --codec=models/sd-vae --size 256x256 --frames 1

The bundled model knows coloured shapes in motion; see --captions for what to say. A model trained here remembers its
text encoder, an imported one is told. To a model of classes a prompt is the number of one.
Sizes are HEIGHTxWIDTH in pixels.
"""

from __future__ import annotations

from pathlib import Path


def add_arguments(parser):
    parser.add_argument("prompts", nargs="*", help="one video each")
    parser.add_argument("--size", default="48x48", help="HEIGHTxWIDTH in pixels (default 48x48)")
    parser.add_argument("--frames", type=int, default=17, help="1 + 4k frames; 1 for an image (default 17)")
    parser.add_argument("--fps", type=float, default=8.0, help="frames per second (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; the next ones count up (default 0)")
    add_sampling(parser)
    parser.add_argument("--model", default=None, help="an exported model (default: the bundled one)")
    parser.add_argument("--codec", default=None, help="its codec (default: the bundled one)")
    parser.add_argument("--out", default="minisora-out", help="directory for the files (default minisora-out)")
    parser.add_argument("--upscale", type=int, default=4, help="enlarge pixels this many times in files (default 4)")
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
    if not args.prompts:
        raise ValueError('no prompt given; for example: minisora generate "a red circle grows on a black background"')
    size_HW = parse_size(args.size)

    from minisora_jax.bundled import MODEL
    from minisora_jax.data.contact_sheet import contact_sheet
    from minisora_jax.data.video import write_video
    from minisora_jax.generate import Generator, Request

    if args.expand:
        args.prompts = _expanded(args.prompts, args.expand)
    options = sampling(args)
    generator = Generator.load(args.model or MODEL, args.codec, args.guide_model, args.text_encoder)
    requests = [
        Request(prompt, (args.frames, *size_HW), args.seed + i, args.fps) for i, prompt in enumerate(args.prompts)
    ]
    with mesh_in_use(args.mesh):
        videos = generator.generate(requests, **options)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for request, frames in zip(requests, videos):
        words = "-".join("".join(c if c.isalnum() else " " for c in request.prompt).split())[:60]
        path = out / f"{words}-{request.seed}.{'png' if args.frames == 1 else 'mp4'}"
        write_video(path, frames, request.fps, upscale=args.upscale)
        print(path)
    sheet = out / "contact-sheet.png"
    contact_sheet(sheet, [(frames, r.prompt) for r, frames in zip(requests, videos)])
    print(sheet)


# The names of diffusion/sampler.py and diffusion/time.py, without importing jax for --help; a test compares them.
SAMPLERS = ("euler", "heun", "ddim", "ddpm", "sde", "dpm++2m", "unipc", "dopri5")
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
        "guidance": GuidanceConfig(args.guidance, parse_interval(args.guidance_interval), args.guidance_rescale),
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
    from minisora_jax.data.curate.captioners import expand, open_captioner

    captioner = open_captioner(spec)
    long = [expand(prompt, captioner) for prompt in prompts]
    for prompt, words in zip(prompts, long):
        print(f"{prompt} -> {words}")
    return long


def _list_captions():
    from minisora_jax.data.shapes import BACKGROUNDS, COLOURS, PHRASES, SHAPES

    print("colours:     " + ", ".join(COLOURS))
    print("shapes:      " + ", ".join(SHAPES))
    print("motions:     " + ", ".join(PHRASES.values()))
    print("backgrounds: " + ", ".join(BACKGROUNDS) + ", checkered")
    print("\na large red circle moves left slowly on a black background")
    print("the camera pans right past a small cyan cross on a checkered background")
    print("a red circle moves up and a blue square stays still on a grey background")
    print("a photo of a small green triangle on a navy background")

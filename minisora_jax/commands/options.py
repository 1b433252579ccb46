"""Options that several commands share, and what they mean: sampling, models, the mesh.

The names of samplers and schedules stand here once more, so that `--help` needs no jax; a test compares them.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minisora_jax.diffusion.distillation import Distilled
    from minisora_jax.generate import VideoPipeline

SAMPLERS = ("euler", "heun", "ddim", "ddpm", "sde", "consistency", "mean-flow", "dpm++2m", "unipc", "dopri5")
GUIDANCE_SCHEDULES = ("constant", "linear", "cosine")
TIME_SCHEDULES = ("even", "wan", "karras", "leading", "linspace", "trailing")


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options that say which model to load, and from where: what `load_pipeline` takes."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=None,
        help="an exported model (default: the bundled one; fast: the bundled one, distilled to 4 steps)",
    )
    group.add_argument("--codec", default=None, help="its codec (default: the bundled one)")
    group.add_argument(
        "--text-encoder",
        default=None,
        help="a text encoder that `minisora import` wrote (default: the one that the model was trained with)",
    )
    group.add_argument(
        "--image-encoder",
        default=None,
        help="the image encoder of a Wan 2.1 model for images, that `minisora import clip-vision-h` wrote",
    )
    group.add_argument(
        "--guide-model",
        default=None,
        help="a weaker exported model of the same codec: guide away from it (autoguidance), not from the empty prompt",
    )
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="PATH[:WEIGHT]",
        help="an adapter of the model, that `minisora train --lora` exported or a published file; may be repeated "
        "(weight: default 1)",
    )
    group.add_argument(
        "--window",
        type=int,
        default=None,
        metavar="FRAMES",
        help="frames that the model makes at once (default: as trained); longer videos are made window by window",
    )
    group.add_argument(
        "--rope",
        default=None,
        metavar="METHOD[=T,Y,X]",
        help="make videos beyond training's sizes in one piece, with rotary positions scaled by linear, ntk, "
        "ntk-by-parts, yarn, riflex or abf; T,Y,X: how many times longer, taller and wider (default: as asked for)",
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "int8", "nf4"),
        default=None,
        help="of the transformer's weights and arithmetic; bfloat16 halves its memory. int8 and nf4 are of weights "
        "alone, and take a quarter and a seventh (default: arithmetic as the model says, on float32 weights)",
    )
    group.add_argument(
        "--offload",
        action="store_true",
        help="of a pair of experts (Wan 2.2 A14B), keep the one that is not at work in the host's memory",
    )


def load_pipeline(
    model: str | None = None,
    codec: str | None = None,
    guide_model: str | None = None,
    text_encoder: str | None = None,
    window: int | None = None,
    dtype: str | None = None,
    lora: Sequence[str] | None = None,
    image_encoder: str | None = None,
    offload: bool = False,
    rope: str | None = None,
    size_THW: tuple[int, int, int] | None = None,
) -> VideoPipeline:
    """The pipeline that the options of `add_model` name. A window needs at least 3 latent frames.

    `size_THW` is the size that is asked for, from which factors of `rope` follow.
    """
    import dataclasses

    from minisora_jax.generate import VideoPipeline
    from minisora_jax.generate.extrapolation import parse_rope

    method, factors = parse_rope(rope) if rope else ("", None)
    pipeline = VideoPipeline.load(model, codec, guide_model, text_encoder, dtype, lora or (), image_encoder, offload)
    if method:
        pipeline = pipeline.extrapolated(method, size_THW, factors=factors)
    if window is None:
        return pipeline
    factor = pipeline.codec.config.time_factor
    if window < 2 * factor + 1:
        raise ValueError(f"--window {window} must be at least {2 * factor + 1} frames: three latent ones")
    return dataclasses.replace(pipeline, window=1 + (window - 1) // factor)


def pipeline_of(args: argparse.Namespace) -> VideoPipeline:
    """The pipeline of a command that has the options of `add_model`."""
    names = ("model", "codec", "guide_model", "text_encoder", "image_encoder", "window", "dtype", "lora", "offload")
    return load_pipeline(**{name: getattr(args, name) for name in names}, rope=args.rope, size_THW=_asked_size(args))


def _asked_size(args: argparse.Namespace) -> tuple[int, int, int] | None:
    """Frames, height and width that the command line asks for; None where it does not say."""
    if getattr(args, "batch", None) or not hasattr(args, "frames"):
        return None
    frames = args.frames or round((args.seconds or 0) * (args.fps or 8.0)) or 1
    return frames, *(parse_size(args.size) if args.size else (1, 1))


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """The options of sampling: what `sampling_options` reads."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--sampler",
        default=None,
        choices=SAMPLERS,
        help="heun (default) calls the model twice a step, dopri5 as often as it needs, the others once; ddpm, sde and "
        "consistency add noise at each step",
    )
    group.add_argument(
        "--steps", type=int, default=None, help="sampler steps (default 20; a distilled model's own, without guidance)"
    )
    group.add_argument(
        "--schedule",
        default="even",
        choices=TIME_SCHEDULES,
        help="how the sampler spaces its steps in time (default even)",
    )
    renamed(group, "--grid", "--schedule")
    group.add_argument(
        "--eta", type=float, default=None, help="share of noise renewed by ddim (default 0), ddpm, sde, consistency (1)"
    )
    group.add_argument(
        "--shift",
        type=float,
        default=None,
        help="shift of the times towards noise, above 0 (default: the model's own: 5 for most Wans, 1 for others)",
    )
    group.add_argument("--tolerance", type=float, default=1e-3, help="error of a step of dopri5 (default 1e-3)")
    group.add_argument("--guidance", type=float, default=None, help="guidance scale (default 3; 1 is none)")
    group.add_argument(
        "--guidance-low-noise", type=float, help="scale of the second expert of a pair (Wan 2.2 A14B: 3, and 4 before)"
    )
    group.add_argument(
        "--guidance-interval",
        default="0-1",
        metavar="LOW-HIGH",
        help="times to guide at, from 0 (clean) to 1 (noise), such as 0.2-0.8 (default 0-1)",
    )
    group.add_argument(
        "--guidance-rescale",
        type=float,
        default=0.0,
        help="share of the contrast added by guidance that is removed again, 0 (default) to 1",
    )
    group.add_argument(
        "--guidance-schedule",
        default="constant",
        choices=GUIDANCE_SCHEDULES,
        help="how the guidance scale changes over time: linear and cosine start weak; its mean is --guidance",
    )
    group.add_argument(
        "--guidance-channels",
        type=int,
        default=None,
        metavar="N",
        help="guide the first N channels of the latents only; the authors of DiT and SiT guide 3 (default: all)",
    )


def add_step_cache(parser: argparse.ArgumentParser) -> None:
    """--step-cache, for `pipeline_and_sampling`."""
    parser.add_argument(
        "--step-cache",
        type=float,
        default=None,
        metavar="SHARE",
        help="let this share of the model calls reuse what the transformer's blocks added before, such as 0.5, as "
        "`minisora calibrate` measured (default: none)",
    )


def pipeline_and_sampling(args: argparse.Namespace) -> tuple[VideoPipeline, dict[str, Any]]:
    """The pipeline, and the arguments of its `sample`, of a command with these options."""
    from minisora_jax.bundled import folder

    sampling_options(args)  # raises before anything is read
    pipeline = pipeline_of(args)
    sampling = sampling_options(args, pipeline.distilled)
    if getattr(args, "step_cache", None) is not None:
        from minisora_jax.evaluation.calibration import step_cache

        settings = sampling["sampler"], sampling["guidance"]
        sampling["sampler"] = step_cache(folder(args.model), pipeline.hash, *settings, args.step_cache)
    return pipeline, sampling


def sampling_options(args: argparse.Namespace, distilled: Distilled | None = None) -> dict[str, Any]:
    """The arguments of `NativePipeline.sample` that the options of `add_sampling` name.

    Args:
        args: The options. Those that are not given are the defaults of the model.
        distilled: How the model was distilled; None: it was not.
    """
    from minisora_jax.diffusion.distillation import sampling_defaults
    from minisora_jax.diffusion.guidance import GuidanceConfig
    from minisora_jax.diffusion.sampler import SamplerConfig

    steps, guidance, sampler = sampling_defaults(distilled)
    steps = steps if args.steps is None else args.steps
    guidance = guidance if args.guidance is None else args.guidance
    interval = parse_interval(args.guidance_interval)
    return {
        "sampler": SamplerConfig(args.sampler or sampler, steps, args.schedule, args.eta, args.tolerance, args.shift),
        "guidance": GuidanceConfig(
            guidance,
            interval,
            args.guidance_rescale,
            args.guidance_schedule,
            args.guidance_channels,
            args.guidance_low_noise,
        ),
    }


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """--mesh, for `mesh_in_use`."""
    parser.add_argument(
        "--mesh",
        default=None,
        metavar="AXIS=SIZE,...",
        help="devices, such as data=2,ring=4: clips are divided over data, their tokens (in the codec, their height) "
        "over ring (default: one device)",
    )


def mesh_in_use(text: str | None, *, of_all: bool = False) -> contextlib.AbstractContextManager:
    """A context with the mesh of that text set, over this process's devices; without a mesh for None.

    of_all: over the devices of all processes, if there are several; None then divides rows over them.
    """
    from minisora_jax.parallel.processes import several

    of_all = of_all and several()
    if text is None and not of_all:
        return contextlib.nullcontext()

    import jax

    from minisora_jax.parallel.mesh import MeshConfig, make_mesh

    return jax.set_mesh(make_mesh(MeshConfig.parse(text or ""), None if of_all else jax.local_devices()))


def add_config(parser: argparse.ArgumentParser, verb: str, rest: str) -> None:
    """--list-config, and a usage line that shows how a config is named and changed."""
    parser.usage = f"minisora {verb} --config=NAME[:arg=value,...] [--config.key=value ...] {rest}"
    parser.add_argument("--list-config", action="store_true", help="print every key of the config, and exit")


def print_settings(cls: type) -> None:
    """Every setting of a config: key, type, default and meaning; and the shipped configs."""
    import textwrap

    from minisora_jax.config import names, settings

    rows = list(settings(cls))
    wide = max(len(row.key) for row in rows)
    for row in rows:
        print(f"--config.{row.key:<{wide}}  {row.type} = {row.default!r}")
        print(textwrap.fill(row.meaning, 110, initial_indent=" " * 6, subsequent_indent=" " * 6))
    print("\nshipped configs, for --config=NAME:")
    for name, about in names().items():
        print(f"  {name:<14}{about}")


def renamed(parser: Any, old: str, new: str, **options: Any) -> None:
    """`old` as a hidden spelling of the option `new`, for one release."""
    parser.add_argument(
        old, dest=new.strip("-").replace("-", "_"), default=argparse.SUPPRESS, help=argparse.SUPPRESS, **options
    )


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


def write_sheet(out: Path, paths: list[Path], prompts: list[str]) -> Path:
    """OUT/contact-sheet.png of at most 32 videos; of a long one its first 256 frames, at the sheet's size."""
    import numpy as np

    from minisora_jax.media.contact_sheet import contact_sheet, sheet_size
    from minisora_jax.media.video import read_clip_frames

    rows = []
    for path, prompt in list(zip(paths, prompts))[:32]:
        if path.is_dir():
            frames = np.concatenate([read_clip_frames(p, fit=sheet_size)[0] for p in sorted(path.glob("*.png"))[:256]])
        else:
            frames, _ = read_clip_frames(path, max_frames=256, fit=sheet_size)
        rows.append((frames, prompt))
    contact_sheet(out / "contact-sheet.png", rows)
    return out / "contact-sheet.png"

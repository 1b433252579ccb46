"""Train the diffusion transformer on a latent cache and export it to WORKDIR/export.

examples:
  minisora train --config=configs/dit_tiny.py:data=data/latents --workdir=runs/model
  minisora train --config=configs/dit_tiny.py:data=data/latents --config.run.mesh.fsdp=4 --workdir=runs/m2
  minisora train --config=configs/dit_finetune.py:data=data/latents --init=models/wan --codec=models/wan-vae \\
      --workdir=runs/wan

Interrupted, the same command goes on from the last checkpoint, bit for bit. TensorBoard: tensorboard --logdir=WORKDIR
"""

from __future__ import annotations

from pathlib import Path

TAKES_CONFIG = True
ON_SEVERAL_PROCESSES = True


def add_arguments(parser):
    parser.add_argument("--workdir", required=True, help="checkpoints, metrics and the exported model go here")
    parser.add_argument("--codec", default=None, help="the codec of the cache, for sample videos (default: bundled)")
    parser.add_argument(
        "--init",
        default=None,
        help="a model to start from, trained here or imported: its weights, and its shape and objective, where the "
        "config does not say otherwise",
    )
    parser.usage = (
        "minisora train --config=FILE.py[:arg=value,...] [--config.key=value ...] --workdir=DIR [--codec=DIR]"
    )
    parser.usage += " [--init=DIR]"


def run(args, config_flags):
    from minisora_jax.bundled import CODEC
    from minisora_jax.config import build, read_config
    from minisora_jax.data.latents import open_latents
    from minisora_jax.models.captions import captions_of
    from minisora_jax.models.codec import Codec
    from minisora_jax.parallel.processes import is_main
    from minisora_jax.train.diffusion_task import DiffusionTask, settings_of, train_diffusion

    settled = settings_of(args.init) if args.init else None
    config = read_config(config_flags, DiffusionTask, "configs/dit_tiny.py:data=data/latents", settled)
    prompts = config.pop("prompts", ())
    task = build(DiffusionTask, config)
    codec = Codec.load(args.codec or CODEC)
    latents = open_latents(task.data.path, codec_hash=codec.latents)
    export = {"codec": codec.latents, "text": latents.text}
    captions = captions_of(task.dit, latents.text, None, None) if prompts else None
    sample = sample_videos(task, codec, captions, prompts, Path(args.workdir)) if prompts else None
    run_config = config | {"init": args.init or ""}
    where = train_diffusion(task, Path(args.workdir), latents, run_config, export, sample, args.init)
    if is_main():
        print(f"model exported to {where}")


def sample_videos(task, codec, captions, prompts, workdir):
    """A `sample` for `train`: each prompt of the config as a TensorBoard video, and all on one contact sheet."""
    from minisora_jax.generate import Request, VideoPipeline
    from minisora_jax.io.contact_sheet import contact_sheet

    requests = [Request(p["prompt"], tuple(p["size_THW"]), seed=i) for i, p in enumerate(prompts)]

    def sample(step, params, metrics):
        pipeline = VideoPipeline(codec, task.dit, task.times, params, objective=task.objective, captions=captions)
        videos = pipeline.generate(requests, progress=False)
        for i, (request, frames) in enumerate(zip(requests, videos)):
            metrics.video(step, f"sample{i}", frames, request.fps)
        sheet = workdir / "samples" / f"step_{step:07d}.png"
        contact_sheet(sheet, [(frames, r.prompt) for r, frames in zip(requests, videos)])

    return sample

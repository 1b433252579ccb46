"""Train the diffusion transformer on a latent cache and export it to WORKDIR/export.

examples:
  minisora train --list-config                        # every key, its type, default and meaning
  minisora train --config=dit_tiny:data=data/latents --workdir=runs/model
  minisora train --config=dit_tiny:data=data/latents --config.run.mesh.fsdp=4 --workdir=runs/m2
  minisora train --config=dit_finetune:data=data/latents --init=models/wan --codec=models/wan-vae \\
      --workdir=runs/wan
  minisora train --config=dit_finetune:data=data/latents,lr=1e-4 --init=models/wan --lora rank=32,alpha=32 \\
      --codec=models/wan-vae --workdir=runs/adapter           # adapters over the frozen model

A config is a shipped one by name, or a file such as my/config.py. An interrupted run goes on from its last checkpoint,
bit for bit, with the same command. To watch it:
`uv run --with tensorboard tensorboard --logdir=WORKDIR`.
"""

from __future__ import annotations

from minisora_jax.commands.options import add_config

TAKES_CONFIG = True
ON_SEVERAL_PROCESSES = True


def add_arguments(parser):
    add_config(parser, "train", "--workdir=DIR [--codec=DIR] [--init=DIR]")
    parser.add_argument("--workdir", default=None, help="checkpoints, metrics and the exported model go here")
    parser.add_argument("--codec", default=None, help="the codec of the cache, for sample videos (default: bundled)")
    parser.add_argument(
        "--init",
        default=None,
        help="a model to start from, trained here or imported. The config overrides its shape and objective",
    )
    parser.add_argument(
        "--lora",
        default=None,
        metavar="rank=N,...",
        help="train adapters over --init, which stays as it is: short for --config.lora.rank=N and so on: alpha, "
        "targets (attention, mlp, spatial, temporal, all, or a pattern), debias (1: motion apart from appearance) and "
        "base (float32, bfloat16, int8 or nf4)",
    )


def run(args, config_flags):
    from minisora_jax.commands.options import print_settings
    from minisora_jax.config import read_config
    from minisora_jax.models.lora import lora_settings
    from minisora_jax.training.diffusion_task import DiffusionTask, settings_of

    if args.list_config:
        return print_settings(DiffusionTask)
    settled = settings_of(args.init) if args.init else None
    chosen = lora_settings(args.lora) if args.lora is not None else {}
    lora_flags = [f"--config.lora.{name}={value}" for name, value in chosen.items()]
    config = read_config([*config_flags, *lora_flags], DiffusionTask, "dit_tiny:data=data/latents", settled)
    if not args.workdir:
        raise ValueError("no --workdir given; for example --workdir=runs/model")
    from minisora_jax.api.training import train
    from minisora_jax.parallel.processes import is_main

    export = train(config, args.workdir, codec=args.codec, init=args.init)
    if is_main():
        print(f"model exported to {export}")

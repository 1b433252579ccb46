"""Train the video codec (a causal 3-D convolutional VAE) and export it to WORKDIR/export.

examples:
  minisora train-vae --list-config                    # every key, its type, default and meaning
  minisora train-vae --config=vae_tiny --workdir=runs/codec
  minisora train-vae --config=vae_tiny:data=data/clips --config.run.steps=500 --workdir=runs/mine

An interrupted run goes on from its last checkpoint with the same command. To watch it:
`uv run --with tensorboard tensorboard --logdir=WORKDIR`.
"""

from __future__ import annotations

from minisora_jax.commands.options import add_config

TAKES_CONFIG = True
ON_SEVERAL_PROCESSES = True


def add_arguments(parser):
    add_config(parser, "train-vae", "--workdir=DIR")
    parser.add_argument("--workdir", default=None, help="checkpoints, metrics and the exported codec go here")


def run(args, config_flags):
    from minisora_jax.commands.options import print_settings
    from minisora_jax.config import read_config
    from minisora_jax.training.codec_task import CodecTask

    if args.list_config:
        return print_settings(CodecTask)
    config = read_config(config_flags, CodecTask, "vae_tiny")
    if not args.workdir:
        raise ValueError("no --workdir given; for example --workdir=runs/codec")
    from minisora_jax.api.training import train_codec
    from minisora_jax.parallel.processes import is_main

    codec = train_codec(config, args.workdir)
    if is_main():
        print(f"codec {codec.hash} exported to {args.workdir}/export")

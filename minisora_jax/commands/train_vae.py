"""Train the video codec (a causal 3-D convolutional VAE) and export it to WORKDIR/export.

examples:
  minisora train-vae --config=configs/vae_tiny.py --workdir=runs/codec
  minisora train-vae --config=configs/vae_tiny.py:data=data/clips --config.run.steps=500 --workdir=runs/mine

Interrupted, the same command goes on from the last checkpoint. TensorBoard: tensorboard --logdir=WORKDIR
"""

from __future__ import annotations

from pathlib import Path

TAKES_CONFIG = True
ON_SEVERAL_PROCESSES = True


def add_arguments(parser):
    parser.add_argument("--workdir", required=True, help="checkpoints, metrics and the exported codec go here")
    parser.usage = "minisora train-vae --config=FILE.py[:arg=value,...] [--config.key=value ...] --workdir=DIR"


def run(args, config_flags):
    from minisora_jax.config import build, read_config
    from minisora_jax.parallel.processes import is_main
    from minisora_jax.sources.clips import hold_out, open_clips
    from minisora_jax.train.codec_task import CodecTask, train_codec

    config = read_config(config_flags, CodecTask, "configs/vae_tiny.py")
    task = build(CodecTask, config)
    clips = open_clips(task.data.path)
    clips, held_out = (clips, open_clips(task.data.held_out)) if task.data.held_out else hold_out(clips)
    codec = train_codec(task, Path(args.workdir), clips, held_out, config)
    if is_main():
        print(f"codec {codec.hash} exported to {args.workdir}/export")

"""A codec of single frames: 2.6 M parameters, 1x8x8 compression into 16 channels, for worlds that answer at once.

    minisora train-vae --config=vae_frames:data=data/home,held_out=data/home/heldout --workdir=runs/home-codec

Hardware: 2 CPU cores; 42 minutes on one of them. It reaches 34.6 dB on a maze of Doom (docs/worlds.md).
"""

from minisora_jax.config import load, parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, data="data/home", held_out="", steps=3600, start="", decoder_only=False, lr=4e-3)
    config = load("vae_tiny", **arg)
    config.vae.update(base=32, time_down=(False, False), images=True)
    config.crop_THW, config.batch = (1, 64, 80), 16
    config.run.log_every, config.run.save_every = 20, 200
    return config

"""A small codec for real films: 2.9 M parameters, 4x8x8 compression into 16 channels. The bundled codec's shape.

    minisora prepare my_films/ data/films --curate --no-captions --min-seconds 0.1 --max-frames 17 --max-side 640 \\
        --held-out 0.2
    minisora train-vae --config=vae_films:data=data/films,held_out=data/films/heldout --workdir=runs/films

Hardware: 2 CPU cores. Absolute and squared error alone, so PSNR counts: on held-out films 27.6 dB after 1500 steps, and
29.6 dB after 450 more from its export with lr=3e-3 (docs/benchmarks.md).
"""

from minisora_jax.config import load, parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, data="data/films", held_out="", steps=1500, start="", decoder_only=False, lr=5e-3)
    config = load("vae_tiny", **arg)
    config.crop_THW, config.batch, config.kl = (17, 48, 48), 4, 1e-5
    config.run.save_every, config.run.sample_every = 250, 750
    return config

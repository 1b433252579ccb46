"""A small codec for real films: 2.9 M parameters, 4x8x8 compression into 16 channels. The bundled codec's shape.

    minisora prepare my_films/ data/films --curate --no-captions --min-seconds 0.1 --max-frames 17 --max-side 640 \\
        --held-out 0.2
    minisora train-vae --config=vae_films:data=data/films,held_out=data/films/heldout --workdir=runs/films

Hardware: 2 CPU cores. Absolute and squared error alone, so PSNR counts: on held-out films 27.6 dB after 1500 steps, and
29.6 dB after 450 more from its export with lr=3e-3 (docs/benchmarks.md).
"""

from ml_collections import ConfigDict

from minisora_jax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, data="data/films", held_out="", steps=1500, start="", decoder_only=False, lr=5e-3)
    return ConfigDict(
        dict(
            data=dict(path=arg["data"], held_out=arg["held_out"]),
            vae=dict(
                base=20,
                multipliers=(1, 2, 4),
                residual_blocks=1,
                time_down=(True, True),
                latent_channels=16,
                patch=2,
                shortcuts=True,
            ),
            crop_THW=(17, 48, 48),
            batch=4,
            l2=4.0,
            kl=1e-5,
            export_dtype="float16",
            start=arg["start"],
            decoder_only=arg["decoder_only"],
            run=dict(
                steps=arg["steps"],
                log_every=50,
                save_every=250,
                sample_every=750,
                optim=dict(name="muon", learning_rate=arg["lr"], warmup=100, final=0.02, b1=0.95, b2=0.99, ema=0.998),
                mesh=dict(data=-1, fsdp=1),
            ),
        )
    )

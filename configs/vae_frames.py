"""A codec of single frames: 2.6 M parameters, 8x8 compression into 16 channels, for worlds that answer at once.

    minisora train-vae --config=vae_frames:data=data/home,held_out=data/home/heldout --workdir=runs/home-codec

Hardware: 2 CPU cores, about 45 minutes on one of them.
"""

from ml_collections import ConfigDict

from minisora_jax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, data="", held_out="", steps=3600, start="", decoder_only=False, lr=4e-3)
    if not arg["data"]:
        raise ValueError("name the clips: --config=vae_frames:data=DIR (`minisora prepare` writes them)")
    return ConfigDict(
        dict(
            data=dict(path=arg["data"], held_out=arg["held_out"]),
            vae=dict(
                base=32,
                multipliers=(1, 2, 4),
                residual_blocks=1,
                time_down=(False, False),
                latent_channels=16,
                patch=2,
                shortcuts=True,
                images=True,
            ),
            crop_THW=(1, 64, 80),
            batch=16,
            l2=4.0,
            kl=1e-4,
            export_dtype="float16",
            start=arg["start"],
            decoder_only=arg["decoder_only"],
            run=dict(
                steps=arg["steps"],
                log_every=20,
                save_every=200,
                optim=dict(name="muon", learning_rate=arg["lr"], warmup=100, final=0.02, b1=0.95, b2=0.99, ema=0.998),
                mesh=dict(data=-1, fsdp=1),
            ),
        )
    )

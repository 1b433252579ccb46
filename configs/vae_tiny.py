"""The bundled codec: 2.9 M parameters, 4x8x8 compression into 16 channels, on the procedural shapes.

    minisora train-vae --config=vae_tiny --workdir=runs/codec

Hardware: 2 CPU cores, about 20 minutes. On your own clips: --config=vae_tiny:data=data/clips,steps=3000
(a directory that `minisora prepare` wrote; clips at least 32x32).
"""

from ml_collections import ConfigDict

from minisora_jax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, data="shapes:train:100000", held_out="", steps=2300, start="", decoder_only=False, lr=5e-3)
    if arg["data"].startswith("shapes") and not arg["held_out"]:
        arg["held_out"] = "shapes:heldout:1000"
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
            crop_THW=(17, 32, 32),  # as long as the longest clip: trained on 9 frames, colours drift after the ninth
            batch=8,
            l2=4.0,
            kl=1e-4,
            export_dtype="float16",
            start=arg["start"],
            decoder_only=arg["decoder_only"],
            run=dict(
                steps=arg["steps"],
                log_every=50,
                save_every=400,
                sample_every=1000,
                optim=dict(name="muon", learning_rate=arg["lr"], warmup=100, final=0.02, b1=0.95, b2=0.99, ema=0.998),
                mesh=dict(data=-1, fsdp=1),
            ),
        )
    )

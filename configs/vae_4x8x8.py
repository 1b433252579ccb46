"""A codec for real video: 100.8 M parameters, 4x8x8 compression into 16 channels, in three stages.

    minisora import lpips my_lpips/ --out=models/lpips
    minisora prepare my_films/ data/films --curate --no-captions --crf 14 --held-out 0.01
    minisora train-vae --config=vae_4x8x8:data=data/films,lpips=models/lpips --workdir=runs/codec

Without `lpips` the second stage is left out. Mesh: data=-1, so every chip has its own crops and all parameters.
Hardware: 16 chips of v6e, or as many GPUs. Compiled, not run: 27.2 of 29.8 GiB a chip, a step of at least 0.033 s, by
`minisora plan --config=vae_4x8x8:lpips=models/lpips --topology v6e:4x4`. Each stage: docs/pods.md, "Configs for pods".
"""

from ml_collections import ConfigDict

from minisora_jax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, data="data/films", held_out="", lpips="", steps=300_000, batch=32, start="")
    held_out = arg["held_out"] or f"{arg['data']}/heldout"
    return ConfigDict(
        dict(
            data=dict(path=arg["data"], held_out=held_out),
            vae=dict(
                base=104,
                multipliers=(1, 2, 4),
                residual_blocks=2,
                time_down=(True, True),
                latent_channels=16,
                patch=2,
                shortcuts=True,
                dtype="bfloat16",
            ),
            crop_THW=(17, 256, 256),
            batch=arg["batch"],
            l2=0.0,
            kl=1e-5,
            lpips=dict(path=arg["lpips"], weight=1.0, start=100_000),
            gan=dict(weight=0.05, start=200_000, layers=4),
            start=arg["start"],
            run=dict(
                steps=arg["steps"],
                log_every=100,
                save_every=5000,
                sample_every=5000,
                optim=dict(learning_rate=1e-4, warmup=2000, final=0.1, ema=0.9999),
                mesh=dict(data=-1),
            ),
        )
    )

"""The bundled model: a text-to-video transformer over the procedural shapes, from a latent cache of the bundled codec.

    minisora encode shapes:train:20000 data/shapes-latents
    minisora train --config=dit_tiny:data=data/shapes-latents --workdir=runs/model
    minisora eval model --model=runs/model/export

Hardware: 2 CPU cores. What it reached is in minisora_jax/bundled/README.md. With classes=N the model reads classes,
of a cache that `encode --classes` made.
"""

from ml_collections import ConfigDict

from minisora_jax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, data="", classes=0, steps=5000, rows=0, prompts=True, lr=3e-3)
    if not arg["data"]:
        raise ValueError("name the latent cache: --config=dit_tiny:data=DIR (`minisora encode` writes one)")
    label = dict(caption="label", classes=arg["classes"] + 1, micro_conditioning=False) if arg["classes"] else {}
    return ConfigDict(
        dict(
            data=dict(path=arg["data"]),
            prompts=4 if arg["prompts"] else 0,  # captions of the data, held-out ones if it has any
            dit=dict(
                latent_channels=16,
                patch=(1, 2, 2),
                width=192,
                depth=6,
                heads=3,
                text_features=1,
                text_width=128,
                text_depth=1,
                dtype="float32",  # bfloat16 is no faster on CPUs, where memory traffic and not arithmetic decides
                **label,
            ),
            pack=dict(rows=arg["rows"]),  # the rest follows from the clips: 256 tokens for these
            times=dict(mean=0.0, std=1.0, base_tokens=32, per_frame=0.1),
            caption_dropout=0.1,
            export_dtype="float16",
            run=dict(
                steps=arg["steps"],
                log_every=50,
                save_every=500,
                sample_every=1000,
                optim=dict(name="muon", learning_rate=arg["lr"], warmup=200, final=0.02, b1=0.95, b2=0.99, ema=0.999),
                mesh=dict(data=-1, fsdp=1),
            ),
        )
    )

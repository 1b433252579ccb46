"""DiT-S, B, L or XL on images and clips of about 256 px with captions or classes: the sizes of arXiv:2212.09748.

    minisora encode data/clips data/latents --codec=models/codec
    minisora train --config=dit_256:size=B,data=data/latents --workdir=runs/dit-b
    minisora train --config=dit_256:size=XL,classes=1000,data=data/imagenet-latents --workdir=runs/dit-xl
    minisora plan --config=dit_256:size=XL,data=data/latents --topology v6e:4x4 --clip 1280

Data: images and clips of any shape near 256x256, up to 4 s: an image is 256 tokens and 17 frames are 1280. Captions are
read as bytes; with `encode --text-encoder=DIR` set --config.dit.text_features. With classes=N the model reads labels as
the paper's does, and the cache is made by `encode --classes`.
Hardware: 16 chips of v6e for every size, or more with rows=...; S and B also train on one GPU or one chip with
rows=16 and --config.run.mesh.fsdp=1. Memory, time and MFU of a step: docs/pods.md, "Configs for pods". Compiled for
v6e, and not run by us.
"""

from ml_collections import ConfigDict

from minisora_jax.config import parse_arg

SIZES = {
    "S": dict(width=384, depth=12, heads=6, text_width=256),
    "B": dict(width=768, depth=12, heads=12, text_width=384),
    "L": dict(width=1024, depth=24, heads=16, text_width=512),
    "XL": dict(width=1152, depth=28, heads=16, text_width=512),
}


def get_config(arg=None):
    arg = parse_arg(arg, data="", size="B", classes=0, steps=400_000, rows=128)
    if not arg["data"] or arg["size"] not in SIZES:
        raise ValueError(f"--config=dit_256:data=DIR,size=SIZE (`minisora encode` writes DIR): sizes {[*SIZES]}")
    size = SIZES[arg["size"]]
    label = dict(caption="label", classes=arg["classes"] + 1, micro_conditioning=False) if arg["classes"] else {}
    return ConfigDict(
        dict(
            data=dict(path=arg["data"]),
            dit=dict(remat="attention", **size, **label),
            pack=dict(tokens=4096, text_tokens=24 if label else 2048, slots=24, rows=arg["rows"]),
            times=dict(base_tokens=256, per_frame=0.1),
            mup_base_width=6 * size["width"] // size["heads"],  # of six heads, as S has: S's learning rate serves all
            run=dict(
                steps=arg["steps"],
                save_every=5000,
                sample_every=5000,
                optim=dict(learning_rate=5e-4, warmup=1000, b2=0.95, ema=0.9999),
                mesh=dict(data=1, fsdp=-1),
            ),
        )
    )

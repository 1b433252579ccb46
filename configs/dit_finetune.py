"""Fine-tune a published transformer on your own clips; its shape and objective are those of the model it starts from.

    minisora import wan2.1-vae Wan2.1-T2V-1.3B-Diffusers/vae --out=models/wan-vae
    minisora import umt5-xxl Wan2.1-T2V-1.3B-Diffusers/text_encoder --out=models/umt5
    minisora import wan2.1-t2v-1.3b Wan2.1-T2V-1.3B-Diffusers/transformer --out=models/wan
    minisora prepare my_clips/ data/clips
    minisora encode data/clips data/latents --codec=models/wan-vae --text-encoder=models/umt5
    minisora train --config=dit_finetune:data=data/latents --init=models/wan --codec=models/wan-vae \\
        --workdir=runs/wan
    minisora generate "what your captions say" --model=runs/wan/export --codec=models/wan-vae --size 480x832 --frames 81
    minisora export runs/wan/export exported/transformer

Hardware: weights, their average and Adam's two moments are 16 bytes a parameter, cut over all chips: 23 GB for Wan's
1.3 B, 229 GB for its 14 B; activations are a row of 32,768 tokens on each chip, computed again in the backward pass.
Expected: not yet run on the published weights by us. The same commands on small random ones are tests/test_finetune.py.
"""

from ml_collections import ConfigDict

from minisora_jax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, data="", steps=2000, rows=8, lr=1e-5)
    if not arg["data"]:
        raise ValueError("name the latent cache: --config=dit_finetune:data=DIR,...")
    return ConfigDict(
        dict(
            data=dict(path=arg["data"]),
            dit=dict(remat="full"),
            # A row holds 81 frames of 480x832 (21 x 30 x 52 tokens), or several smaller clips.
            pack=dict(tokens=32_768, text_tokens=8192, slots=16, rows=arg["rows"]),
            # Text to video only, as published. Shares here teach it image_to_video, extend and the like.
            conditioning=dict(
                first=0.0, last=0.0, ends=0.0, prefix=0.0, suffix=0.0, frames=0.0, box=0.0, outside=0.0, middle=0.0
            ),
            caption_dropout=0.1,
            export_dtype="bfloat16",
            run=dict(
                steps=arg["steps"],
                log_every=10,
                save_every=250,
                sample_every=0,
                optim=dict(learning_rate=arg["lr"], warmup=100, weight_decay=0.01, b1=0.9, b2=0.95, ema=0.999),
                mesh=dict(data=1, fsdp=-1),
            ),
        )
    )

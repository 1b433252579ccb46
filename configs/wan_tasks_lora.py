"""An adapter that teaches a text-to-video model to be given parts of a video: every task of `minisora generate`.

    minisora prepare my_clips/ data/clips
    minisora encode data/clips data/latents --codec=models/wan-vae --text-encoder=models/umt5
    minisora train --config=wan_tasks_lora:data=data/latents --init=models/wan --codec=models/wan-vae \\
        --workdir=runs/tasks
    minisora generate "..." --model=models/wan --codec=models/wan-vae --text-encoder=models/umt5 \\
        --lora runs/tasks/export --image first.png

Given tokens are clean and told time 0, and the others have the noise of their clip, or of their frame. A published
model has seen neither, so all its kernels are adapted, those of the time among them. Pusa (arXiv:2507.16116) taught
Wan 14B times by frame with an adapter of rank 512 and 4,000 clips. Rehearsed on small random weights in Wan's layout,
and not yet run on the published ones.
"""

from minisora_jax.config import load, parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, data="", steps=2000, rows=8, rank=128, lr=1e-4, base="bfloat16")
    if not arg["data"]:
        raise ValueError("name the latent cache: --config=wan_tasks_lora:data=DIR,...")
    config = load("dit_finetune", **{name: arg[name] for name in ("data", "steps", "rows", "lr")})
    config.lora = dict(rank=arg["rank"], targets="all", base=arg["base"])
    # The other tenth of the clips keeps text to video as it is.
    config.conditioning = dict(
        first=0.2, last=0.05, ends=0.1, prefix=0.15, suffix=0.1, between=0.1, frames=0.05, box=0.1, outside=0.05
    )
    config.times = dict(per_frame=0.1)
    config.run.optim = dict(learning_rate=arg["lr"], warmup=100, weight_decay=0.0, ema=0.999)
    return config

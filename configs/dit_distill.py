"""Distil a trained model to few steps without guidance: progressive distillation, run after run or at once.

    minisora train --config=dit_distill:data=data/latents,steps=4 --init=models/teacher --workdir=runs/4
    minisora generate "..." --model=runs/4/export        # by default as it was trained: euler, 4 steps, no guidance
    minisora eval model --model=runs/4/export

The teacher takes `substeps` steps of Heun for one of the student's. Or in halves, each run from the last one's student:
substeps=1,steps=16 from the teacher with its guidance, then steps=8,guidance=1 --init=runs/16/export, and so on.

Hardware: 2 CPU cores made the bundled `--model fast` of the bundled model; bundled/README.md has the numbers. For a
larger teacher `--lora rank=64` makes the student an adapter.
"""

from ml_collections import ConfigDict

from minisora_jax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(
        arg, data="", steps=4, substeps=2, guidance=3.0, sampler="heun", updates=1500, rows=0, lr=1e-3, tokens=0
    )
    if not arg["data"]:
        raise ValueError("name the latent cache: --config=dit_distill:data=DIR,...")
    distill = {name: arg[name] for name in ("steps", "substeps", "guidance", "sampler")}
    return ConfigDict(
        dict(
            data=dict(path=arg["data"]),
            prompts=0,
            distill=distill,
            pack=dict(rows=arg["rows"], tokens=arg["tokens"]),
            caption_dropout=0.0,  # the student is never asked without its caption
            run=dict(
                steps=arg["updates"],
                log_every=10,
                save_every=250,
                sample_every=0,
                optim=dict(name="muon", learning_rate=arg["lr"], warmup=40, final=0.05, b1=0.95, b2=0.99, ema=0.99),
                mesh=dict(data=-1, fsdp=1),
            ),
        )
    )

"""Distil a trained model to few steps without guidance.

    minisora train --config=dit_distill:data=data/latents,steps=4 --init=models/teacher --workdir=runs/4
    minisora generate "..." --model=runs/4/export        # by default as it was trained: euler, 4 steps, no guidance
    minisora eval model --model=runs/4/export

`method` is one of diffusion/distillation.py. substeps=0 and sampler= (empty) mean those that fit the method:

    progressive    one step of the student is 2 of Heun of the teacher. Or in halves, each run from the last one's
                   student: substeps=1,steps=16 from the teacher, then steps=8,guidance=1 --init=runs/16/export, ...
    consistency    neighbours of 12 teacher steps (DDIM) a student's step have one clean estimate; 1 to 4 steps
    meanflow       the mean velocity between any two times: any number of steps; the model gets one more input
    dmd            clips that the teacher finds likely, by a second model trained along; 1 to 4 steps. Three models in
                   memory: student, its fake model and the teacher. The student takes every 5th update

Hardware: 2 CPU cores made the bundled `--model fast` of the bundled model; bundled/README.md has the numbers. For a
larger teacher `--lora rank=64` makes the student an adapter.
"""

from ml_collections import ConfigDict

from minisora_jax.config import parse_arg

# method -> (substeps, sampler); meanflow and dmd have no use for them
FITTING = {"progressive": (2, "heun"), "consistency": (12, "ddim")}


def get_config(arg=None):
    arg = parse_arg(
        arg, data="", method="progressive", steps=4, substeps=0, guidance=3.0, sampler="", updates=1500, rows=0,
        lr=1e-3, tokens=0,
    )  # fmt: skip
    if not arg["data"]:
        raise ValueError("name the latent cache: --config=dit_distill:data=DIR,...")
    if arg["steps"] < 1:
        raise ValueError(f"--config=dit_distill:steps={arg['steps']} must be 1 or more: the steps of the student")
    distill = {name: arg[name] for name in ("method", "steps", "substeps", "guidance", "sampler")}
    substeps, sampler = FITTING.get(arg["method"], (2, "heun"))
    distill["substeps"] = arg["substeps"] or substeps
    distill["sampler"] = arg["sampler"] or sampler
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

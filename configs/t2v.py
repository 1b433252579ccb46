"""Text to video from scratch with 1, 3 or 14 billion parameters, in three stages: 256 px, 480p, 60 seconds.

    minisora encode data/clips-256 data/256px --codec=models/codec --text-encoder=models/umt5
    minisora train --config=t2v:size=1b,stage=256px,data=data/256px --workdir=runs/256px
    minisora train --config=t2v:size=1b,stage=480p,data=data/480p --init=runs/256px/export --workdir=runs/480p
    minisora train --config=t2v:size=1b,stage=60s,data=data/60s --init=runs/480p/export --workdir=runs/60s
    minisora plan --config=t2v:size=1b,stage=60s,data=data/60s --topology v5e:8x8 --clip 60s@832x480

Data: images and clips up to 256x256 and 4 s; up to 480x832 and 5 s; these and whole minutes. Any sizes may be mixed,
since rows are packed. Latents: 16 channels at 4x8x8, of configs/vae_4x8x8.py or Wan's codec. Captions: UMT5-XXL.
Memory, time and MFU of a step: docs/pods.md, "Configs for pods". Compiled for these pods, and not run by us.
"""

from ml_collections import ConfigDict

from minisora_jax.config import parse_arg

SIZES = {
    "1b": dict(width=1536, depth=28, heads=12),  # for v5e:8x8
    "3b": dict(width=2560, depth=28, heads=20),  # for v5p:4x4x4
    "14b": dict(width=5120, depth=40, heads=40, mlp_ratio=3.3),  # for v5p:8x8x8
}
STAGES = {  # rows, mesh and microbatches of 64 chips, then of the 512 chips of 14b: 2 and 4 million tokens a step
    "256px": dict(steps=300_000, lr=1e-3, tokens=8192, on_64=(256, (64, 1, 1), 1), on_512=(512, (512, 1, 1), 1)),
    "480p": dict(steps=100_000, lr=5e-4, tokens=32_768, on_64=(64, (64, 1, 1), 1), on_512=(128, (128, 4, 1), 1)),
    "60s": dict(steps=20_000, lr=2e-4, tokens=565_248, on_64=(1, (1, 16, 4), 4), on_512=(8, (8, 16, 4), 1)),
}


def get_config(arg=None):
    arg = parse_arg(arg, data="", size="1b", stage="256px", steps=0)
    if not arg["data"] or arg["size"] not in SIZES or arg["stage"] not in STAGES:
        raise ValueError(f"--config=t2v:data=DIR,size=SIZE,stage=STAGE: sizes {[*SIZES]}, stages {[*STAGES]}")
    stage = STAGES[arg["stage"]]
    rows, (fsdp, ring, ulysses), accumulate = stage["on_512" if arg["size"] == "14b" else "on_64"]
    return ConfigDict(
        dict(
            data=dict(path=arg["data"]),
            dit=dict(text_features=4096, text_width=1024, remat="full", **SIZES[arg["size"]]),
            pack=dict(tokens=stage["tokens"], text_tokens=8192, slots=64, rows=rows),
            times=dict(base_tokens=256, per_frame=0.1),
            mup_base_width=256,  # the learning rate is that of this width
            export_dtype="bfloat16",
            run=dict(
                steps=arg["steps"] or stage["steps"],
                save_every=1000,
                sample_every=0,
                optim=dict(learning_rate=stage["lr"], warmup=1000, b2=0.95, weight_decay=0.01, accumulate=accumulate),
                mesh=dict(data=1, fsdp=fsdp, ring=ring, ulysses=ulysses),
            ),
        )
    )

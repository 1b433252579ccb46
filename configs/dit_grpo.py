"""Tune a model by a reward of its videos: Flow-GRPO, which compares videos of one caption with each other.

    minisora train --config=dit_grpo:data=data/latents,reward=my.py:reward --init=models/mine --workdir=runs/tuned
    minisora eval model --model=runs/tuned/export

my.py has a function of (frames, caption) that returns a number, the larger the better; frames are uint8
(T, H, W, 3). The cache gives captions and sizes; its videos are not looked at. `group` videos of each caption are made
for one update, so a step takes as long as sampling `rows` x clips a row x `group` videos.

Watch "reward" in the log. A reward that rises while videos get worse is being cheated: look at samples, measure with
something else beside it, and set kl=0.01 or above, which holds the model to the one that it comes from.

Hardware: 2 CPU cores for the bundled models; docs/fine-tune.md has numbers.
"""

from ml_collections import ConfigDict

from minisora_jax.config import parse_arg

NO_MASKS = dict.fromkeys(
    ("first", "last", "ends", "prefix", "suffix", "frames", "box", "outside", "between", "middle"), 0.0
)


def get_config(arg=None):
    arg = parse_arg(
        arg, data="", reward="", updates=60, rows=0, tokens=0, lr=2e-4, group=16, steps=10, trained=3, eta=0.7,
        guidance=1.0, kl=0.0,
    )  # fmt: skip
    if not arg["data"] or not arg["reward"]:
        raise ValueError("name the cache and the reward: --config=dit_grpo:data=DIR,reward=FILE.py:FUNCTION,...")
    return ConfigDict(
        dict(
            data=dict(path=arg["data"]),
            prompts=0,
            grpo={n: arg[n] for n in ("reward", "group", "steps", "trained", "eta", "guidance", "kl")},
            pack=dict(rows=arg["rows"], tokens=arg["tokens"]),
            conditioning=NO_MASKS,
            caption_dropout=0.0,
            run=dict(
                steps=arg["updates"],
                log_every=1,
                save_every=10,
                sample_every=0,
                optim=dict(learning_rate=arg["lr"], warmup=3, final=0.2, b1=0.9, b2=0.95, ema=0.9),
                mesh=dict(data=-1, fsdp=1),
            ),
        )
    )

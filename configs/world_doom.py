"""The bundled world to walk in: Doom's maze "my way home" at 64x80, frame by frame, by its player's actions.

    minisora prepare 'gym:VizdoomMyWayHome-v1?frame_skip=4&size=64x80&episodes=320' data/home --held-out 0.05 --cell 16
    minisora train-vae --config=vae_frames:data=data/home,held_out=data/home/heldout --workdir=runs/home-codec
    minisora encode data/home data/home-latents --codec=runs/home-codec/export
    minisora train --config=world_doom:data=data/home-latents --workdir=runs/home
    minisora play --model=runs/home/export --codec=runs/home-codec/export --start=data/home/heldout

Hardware: 2 CPU cores. Every frame is coded by itself, since a player does not wait for four frames; it is 20 tokens.
actions is the number of columns of the data's actions.
"""

from ml_collections import ConfigDict

from minisora_jax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, data="", held_out="", actions=6, steps=6000, rows=0, lr=3e-3)
    if not arg["data"]:
        raise ValueError("name the latent cache: --config=world_doom:data=DIR (`minisora encode` writes one)")
    return ConfigDict(
        dict(
            data=dict(path=arg["data"], held_out=arg["held_out"]),
            prompts=0,
            dit=dict(
                latent_channels=16,
                patch=(1, 2, 2),
                width=192,
                depth=7,
                heads=3,
                text_width=64,
                text_depth=1,
                positions="space",  # and rotary ones in time: a window rolls on for ever
                micro_conditioning=False,
                causal=True,
                action_width=arg["actions"] + 1,
                dtype="float32",
            ),
            pack=dict(rows=arg["rows"]),
            times=dict(mean=0.0, std=1.0, base_tokens=0),
            conditioning=dict(
                **dict.fromkeys("first last ends prefix suffix frames box outside between middle".split(), 0.0)
            ),
            caption_dropout=0.1,
            action_dropout=0.1,
            export_dtype="float16",
            run=dict(
                steps=arg["steps"],
                log_every=50,
                save_every=500,
                optim=dict(name="muon", learning_rate=arg["lr"], warmup=200, final=0.02, b1=0.95, b2=0.99, ema=0.999),
                mesh=dict(data=-1, fsdp=1),
            ),
        )
    )

"""The bundled world to walk in: Doom's maze "my way home" at 64x80, frame by frame, by its player's actions.

    minisora prepare 'gym:VizdoomMyWayHome-v1?frame_skip=4&size=64x80&episodes=320' data/home --held-out 0.05 --cell 16
    minisora train-vae --config=vae_frames:data=data/home,held_out=data/home/heldout --workdir=runs/home-codec
    minisora encode data/home data/home-latents --codec=runs/home-codec/export
    minisora train --config=world_doom:data=data/home-latents --codec=runs/home-codec/export --workdir=runs/home
    minisora play --model=runs/home/export --codec=runs/home-codec/export --start=data/home/heldout

Hardware: 2 CPU cores. Every frame is coded by itself, since a player does not wait for four frames; it is 20 tokens.
actions is the number of columns of the data's actions.
"""

from minisora_jax.config import load, parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, data="", held_out="", actions=6, steps=6000, rows=0, lr=3e-3)
    if not arg["data"]:
        raise ValueError("name the latent cache: --config=world_doom:data=DIR (`minisora encode` writes one)")
    actions, held_out = arg.pop("actions"), arg.pop("held_out")
    config = load("dit_tiny", prompts=False, **arg)
    config.data.held_out = held_out
    config.dit.update(depth=7, text_width=64, causal=True, action_width=actions + 1)
    config.dit.update(positions="space", micro_conditioning=False)  # so that a window rolls on for ever
    config.times.base_tokens = 0
    config.conditioning = dict.fromkeys("first last ends prefix suffix frames box outside between middle".split(), 0.0)
    config.action_dropout = 0.1
    return config

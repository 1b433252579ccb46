"""A small world of random weights: real models in their folders, which nobody trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np

from minisora_jax.io.model_dir import export_model
from minisora_jax.models.codec import Codec
from minisora_jax.models.dit import DiTConfig, abstract_params
from minisora_jax.models.vae import VAEConfig
from minisora_jax.models.vae import abstract_params as codec_params

ACTIONS = ("nothing", "move right", "move left", "move forward", "turn right", "turn left")
SIZE = (32, 48)


def random_tree(tree, scale: float):
    """Numbers for a tree of shapes."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: scale * rng.standard_normal(x.shape).astype(np.float32), tree)


def write_world(folder: Path, actions: tuple[str, ...] = ACTIONS, time_down: tuple[bool, ...] = (False,)) -> list[str]:
    """Write FOLDER/model and FOLDER/codec; the arguments of `minisora play` that name them."""
    vae = VAEConfig(base=4, multipliers=(1, 2), residual_blocks=1, time_down=time_down, latent_channels=4, patch=2)
    zeros, ones = np.zeros(4, np.float32), np.ones(4, np.float32)
    codec = Codec(vae, random_tree(codec_params(vae), 0.3), zeros, ones)
    codec_hash = codec.export(folder / "codec", {})
    dit = DiTConfig(
        latent_channels=4,
        width=32,
        depth=1,
        heads=2,
        text_width=64,
        text_depth=0,
        dtype="float32",
        positions="none",
        micro_conditioning=False,
        causal=True,
        action_width=len(actions) * vae.time_factor + 1,
    )
    config = {
        "kind": "dit",
        "dit": dataclasses.asdict(dit),
        "codec": codec_hash,
        "text": {"encoder": "bytes"},
        "latent_size": [9, SIZE[0] // vae.space_factor, SIZE[1] // vae.space_factor],
        "world": {"actions": actions, "fps": 20.0, "caption": "a small world"},
    }
    export_model(folder / "model", random_tree(abstract_params(dit), 0.3), config)
    return [f"--model={folder / 'model'}", f"--codec={folder / 'codec'}"]

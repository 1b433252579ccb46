"""Motion modules: attention over time, added to an image model that stays as it is (AnimateDiff, arXiv:2307.04725).

    after each block   x + W_out h,   h = W_in norm(x),   then h + attention(norm(h)) twice, h + MLP(norm(h))

A token attends to the tokens at its place in all latent frames of its clip. Its frame number is a rotation of queries
and keys, where AnimateDiff adds sinusoids. W_out starts at zero, so a new module changes nothing: the model is its
image model, frame by frame. The image model is told that each frame is a clip of one (`as_images`).
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from minisora_jax.models.dit_config import DiTConfig
from minisora_jax.models.layers import MLP, Attention, Einsum, LayerNorm
from minisora_jax.types import PackedBatch

PATTERN = "^blocks/motion/"  # of the paths of all parameters of motion modules


class MotionModule(nn.Module):
    """x (B, S, D) -> x plus what attention over the frames at each place adds."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x_BSD: jax.Array, temporal_BS: jax.Array, angles_BSk: jax.Array) -> jax.Array:
        """Apply the module.

        Args:
            x_BSD: Tokens.
            temporal_BS: "temporal" ids of `attention_segments`.
            angles_BSk: Rotation by the frame number.
        """
        cfg, D = self.config, self.config.width
        h_BSD = Einsum("bsd,de->bse", (D, D), name="proj_in")(LayerNorm(name="norm")(x_BSD))
        for name in ("first", "second"):
            sharpness = cfg.scaling.sharpness("temporal")
            attention = Attention(
                cfg.heads, cfg.qk_norm, impl=cfg.attention, sharpness=sharpness, name=f"{name}_attention"
            )
            h_BSD = h_BSD + attention(LayerNorm(name=f"{name}_norm")(h_BSD), temporal_BS, angles_BSk)
        h_BSD = h_BSD + MLP(cfg.mlp_ratio, name="mlp")(LayerNorm(name="mlp_norm")(h_BSD))
        return x_BSD + Einsum("bsd,de->bse", (D, D), scale=0.0, name="proj_out")(h_BSD)


def as_images(batch: PackedBatch) -> PackedBatch:
    """The batch as an image model is told of it: every latent frame is the first, of a clip of one."""
    first = lambda x, value: jnp.where(jnp.arange(3) == 0, jnp.minimum(x, value), x)
    return dataclasses.replace(batch, position_BS3=first(batch.position_BS3, 0), size_BG3=first(batch.size_BG3, 1))

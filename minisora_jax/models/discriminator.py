"""A patch discriminator of videos: a score for each part of a clip, high where it looks like a true one.

    x -> conv, stride 2 -> [conv, stride 2 in space and, once, in time -> group norm] ... -> conv -> scores

It is PatchGAN (Isola et al. 2016, arXiv:1611.07004) with 3-D convolutions, as codecs of video are trained with
(Zheng et al. 2024, arXiv:2412.20404; Yang et al. 2024, arXiv:2408.06072). Batch norm is group norm here. So no clip
changes another's score, and any mesh gives the same ones.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from minisora_jax.models.vae_layers import Conv
from minisora_jax.parallel.halo import over_clips

WIDEST = 8  # times the first layer's channels


class Discriminator(nn.Module):
    """Frames (B, T, H, W, 3) in [-1, 1] -> scores (B, t, h, w), float32.

    Attributes:
        base: Channels of the first layer; each later one has twice as many, up to 8 times.
        layers: Layers that halve the frames. A score sees about 2**(layers + 2) pixels along a side.
    """

    base: int
    layers: int

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array) -> jax.Array:
        x = x_BTHWC
        for i in range(self.layers + 1):
            width = self.base * min(2**i, WIDEST)
            stride = (2 if i < 2 else 1, 2) if i < self.layers else (1, 1)
            x = Conv(width, stride=stride, padding=(1, 1), name=f"conv{i}")(_in_time(x))
            if i:
                x = nn.GroupNorm(math.gcd(32, width), name=f"norm{i}")(x)
            x = nn.leaky_relu(x, 0.2)
        return Conv(1, name="scores")(_in_time(x))[..., 0]


def _in_time(x_BTHWC: jax.Array) -> jax.Array:
    """x with a zero frame before and after it."""
    return jnp.pad(x_BTHWC, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))


def scores(discriminator: Discriminator, params: dict, x_BTHWC: jax.Array) -> jax.Array:
    """The scores (B, n) of the parts of each clip. On a mesh each device takes its clips, and their frames whole."""

    def of_clips(params, x_BTHWC):
        result = discriminator.apply(params, x_BTHWC)
        return jnp.asarray(result).reshape(len(x_BTHWC), -1)

    return over_clips(of_clips, params, x_BTHWC)

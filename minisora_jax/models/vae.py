"""The video codec: a causal 3-D convolutional VAE. 1 + 4k frames <-> 1 + k latent frames; an image is one frame.

    x_BTHWC -> [patchify] -> conv -> down stages -> middle (residual, attention, residual) -> head -> mean, logvar
    z_Bthwc -> conv -> middle -> up stages -> head -> [unpatchify] -> x_BTHWC

Every temporal convolution looks only backwards. So the first frame is coded as an image, and a clip can be coded chunk
by chunk: a `History` gives each convolution the last frames that it saw, and the result equals coding the whole clip at
once. The bottleneck is a diagonal Gaussian (Kingma & Welling 2013, arXiv:1312.6114). vae_layers.py has the layers.

The architecture is a superset of three published ones, with their layers, norms, order of folded pixels and treatment
of the first frame:

    Wan 2.1            Wan Team 2025, arXiv:2503.20314, section 4.1   the defaults
    Wan 2.2                                                           patch=2, shortcuts=True, halve_up=False
    Stable Diffusion   Rombach et al. 2022, arXiv:2112.10752          images=True: each frame is coded by itself
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from minisora_jax.models.vae_layers import (
    CausalConv,
    Conv,
    Downsample,
    FrameAttention,
    History,
    Residual,
    States,
    Upsample,
    average_down,
    duplicate_up,
    make_norm,
    patchify,
    unpatchify,
)


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Shape of the codec. The defaults are Wan 2.1's: 4x8x8 compression into 16 channels.

    Raises:
        ValueError: `time_down` does not fit the stages, or the channels of a stage are odd.
    """

    base: int = 96  # channels of the first stage
    multipliers: tuple[int, ...] = (1, 2, 4, 4)  # channels of each stage, in units of base
    residual_blocks: int = 2  # per encoder stage; the decoder has one more
    time_down: tuple[bool, ...] = (False, True, True)  # whether the step after stage i also halves time
    latent_channels: int = 16  # of the latents (c)
    patch: int = 1  # pixels along each side that are folded into channels before the encoder
    attention: bool = True  # single-head attention within a frame, in the middle
    shortcuts: bool = False  # parameter-free paths around each resampling stage, as in Wan 2.2 and DC-AE
    halve_up: bool = True  # upsampling halves the channels (Wan 2.1) or keeps them (Wan 2.2)
    decoder_base: int | None = None  # base of the decoder; None: as the encoder
    images: bool = False  # code each frame by itself, with 2-D convolutions and group norms (Stable Diffusion)
    dtype: str = "float32"  # of the computation; parameters are float32

    def __post_init__(self) -> None:
        if len(self.time_down) != len(self.multipliers) - 1:
            raise ValueError(
                f"time_down={self.time_down} has {len(self.time_down)} entries and must have "
                f"{len(self.multipliers) - 1}: one for each step between the {len(self.multipliers)} stages"
            )
        if self.images and any(self.time_down):
            raise ValueError(
                f"time_down={self.time_down} with images=True: an image codec does not compress time, so set all "
                f"entries to False"
            )
        if any(self.base * m % 2 for m in self.multipliers):
            raise ValueError(
                f"base={self.base} times each of multipliers={self.multipliers} must be even: upsampling halves it"
            )

    @property
    def time_factor(self) -> int:
        """Frames of pixels for each latent frame after the first."""
        return 2 ** sum(self.time_down)

    @property
    def space_factor(self) -> int:
        """Pixels along a side of one latent."""
        return self.patch * 2 ** (len(self.multipliers) - 1)

    def latent_size(self, size_THW: tuple[int, int, int]) -> tuple[int, int, int]:
        """The latent size (t, h, w) of a clip of (T, H, W) pixels.

        Raises:
            ValueError: T is not 1 + time_factor * k, or H or W is not a multiple of space_factor.
        """
        T, H, W = size_THW
        if (T - 1) % self.time_factor or T < 1:
            k = max(T - 1, 0) // self.time_factor
            low, high = 1 + k * self.time_factor, 1 + (k + 1) * self.time_factor
            raise ValueError(f"frames={T} must be 1 + {self.time_factor}*k; use {low} or {high}")
        for name, n in (("height", H), ("width", W)):
            if n % self.space_factor or n < 1:
                raise ValueError(f"{name}={n} must be a multiple of {self.space_factor}")
        return 1 + (T - 1) // self.time_factor, H // self.space_factor, W // self.space_factor

    @property
    def decoder_reach(self) -> int:
        """The most latent frames before its own that a decoded frame depends on."""
        if self.images:
            return 0
        residuals, up = 2 * 2 * (self.residual_blocks + 1), [*reversed(self.time_down), False]
        reach, rate = 2.0 + 2 * 2 * 2, 1  # conv_in and the middle; each convolution reaches two frames back
        for doubles in up:
            reach += residuals / rate
            if doubles:
                reach, rate = reach + 2 / rate, 2 * rate
        return math.ceil(reach + 2 / rate)  # conv_out

    def pixel_size(self, size_thw: tuple[int, int, int]) -> tuple[int, int, int]:
        """The size (T, H, W) in pixels of latents of size (t, h, w)."""
        t, h, w = size_thw
        return 1 + (t - 1) * self.time_factor, h * self.space_factor, w * self.space_factor


class Middle(nn.Module):
    """Residual block, attention within each frame, residual block."""

    config: VAEConfig

    @nn.compact
    def __call__(self, x: jax.Array, history: History) -> jax.Array:
        images = self.config.images
        x = Residual(x.shape[-1], images, name="residual1")(x, history)
        if self.config.attention:
            x = FrameAttention(images, name="attention")(x)
        return Residual(x.shape[-1], images, name="residual2")(x, history)


class Encoder(nn.Module):
    """Pixels (B, T, H, W, 3) in [-1, 1] -> moments (B, t, h, w, 2 c): mean and log variance."""

    config: VAEConfig

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array, history: History) -> jax.Array:
        cfg = self.config
        x = patchify(x_BTHWC, cfg.patch)
        x = CausalConv(cfg.base * cfg.multipliers[0], cfg.images, name="conv_in")(x, history)
        for i, multiplier in enumerate(cfg.multipliers):
            stage_in = x
            for j in range(cfg.residual_blocks):
                x = Residual(cfg.base * multiplier, cfg.images, name=f"stage{i}_residual{j}")(x, history)
            down = i < len(cfg.time_down)
            if down:
                x = Downsample(cfg.time_down[i], name=f"stage{i}_down")(x, history)
            if cfg.shortcuts and (down or x.shape[-1] == stage_in.shape[-1]):
                x = x + average_down(stage_in, 1 + (down and cfg.time_down[i]), 1 + down, x.shape[-1])
        x = Middle(cfg, name="middle")(x, history)
        x = nn.silu(make_norm(cfg.images, "norm_out")(x))
        x = CausalConv(2 * cfg.latent_channels, cfg.images, name="conv_out")(x, history)
        # The posterior starts narrow. At unit width its noise hides the signal for the first thousand steps.
        narrow = lambda key, shape: -6.0 * (jnp.arange(shape[0]) >= cfg.latent_channels).astype(jnp.float32)
        return Conv(2 * cfg.latent_channels, (1, 1, 1), bias_init=narrow, name="moments")(x)


class Decoder(nn.Module):
    """Latents (B, t, h, w, c) -> pixels (B, T, H, W, 3) in [-1, 1]."""

    config: VAEConfig

    @nn.compact
    def __call__(self, z_Bthwc: jax.Array, history: History) -> jax.Array:
        cfg = self.config
        widths = [(cfg.decoder_base or cfg.base) * m for m in reversed(cfg.multipliers)]
        x = Conv(cfg.latent_channels, (1, 1, 1), name="latents")(z_Bthwc)
        x = CausalConv(widths[0], cfg.images, name="conv_in")(x, history)
        x = Middle(cfg, name="middle")(x, history)
        for i, width in enumerate(widths):
            stage_in = x
            for j in range(cfg.residual_blocks + 1):
                x = Residual(width, cfg.images, name=f"stage{i}_residual{j}")(x, history)
            if i < len(cfg.time_down):
                time = cfg.time_down[-1 - i]
                x = Upsample(time, width // 2 if cfg.halve_up else width, name=f"stage{i}_up")(x, history)
                if cfg.shortcuts:
                    x = x + duplicate_up(stage_in, 1 + time, 2, x.shape[-1], history.first)
        x = nn.silu(make_norm(cfg.images, "norm_out")(x))
        x = CausalConv(3 * cfg.patch**2, cfg.images, name="conv_out")(x, history)
        return unpatchify(x, cfg.patch)


class VAE(nn.Module):
    """Pixels in [-1, 1] <-> Gaussian posterior over latents."""

    config: VAEConfig

    def setup(self) -> None:
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def encode(self, x_BTHWC: jax.Array, past: States | None = None) -> tuple[jax.Array, jax.Array, States]:
        """The posterior of one chunk of a clip.

        Args:
            x_BTHWC: Pixels in [-1, 1]: 1 + 4k frames of a first chunk, 4k of a later one.
            past: States of the chunk before; None at the start of a clip.

        Returns:
            mean_Bthwc: float32.
            logvar_Bthwc: Logarithm of the variance, float32.
            states: For the next chunk.
        """
        history = History(past)
        moments = self.encoder(x_BTHWC.astype(self.config.dtype), history).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0), tuple(history.states)

    def decode(self, z_Bthwc: jax.Array, past: States | None = None) -> tuple[jax.Array, States]:
        """The pixels of one chunk of a clip.

        Args:
            z_Bthwc: Latents.
            past: States of the chunk before; None at the start of a clip.

        Returns:
            x_BTHWC: float32 pixels in about [-1, 1]: 1 + 4 (t - 1) frames of a first chunk, 4 t of a later one.
            states: For the next chunk.
        """
        history = History(past)
        x = self.decoder(z_Bthwc.astype(self.config.dtype), history)
        return x.astype(jnp.float32), tuple(history.states)

    def __call__(self, x_BTHWC: jax.Array) -> jax.Array:
        """The reconstruction from the posterior's mean. Initialise with this method: it uses every parameter."""
        return self.decode(self.encode(x_BTHWC)[0])[0]


@functools.cache
def abstract_params(config: VAEConfig) -> Any:
    """The parameter tree {"params": ...} as `jax.ShapeDtypeStruct`s, float32."""
    frames = jax.ShapeDtypeStruct((1, 1, config.space_factor, config.space_factor, 3), jnp.float32)
    return jax.eval_shape(VAE(config).init, jax.random.key(0), frames)

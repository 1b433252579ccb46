"""The video codec: a causal 3-D convolutional VAE, frames 1 + 4k <-> latents 1 + k, images are one frame.

    x_BTHWC -> [patchify] -> conv -> down stages -> middle (residual, attention, residual) -> head -> mean, logvar
    z_Bthwc -> conv -> middle -> up stages -> head -> [unpatchify] -> x_BTHWC

Every temporal convolution looks only backwards, so the first frame is coded as an image and a clip can be
coded chunk by chunk: a `History` hands each convolution the last frames it saw, and the result is the same as
coding the whole clip at once. The architecture is a superset of the VAEs of Wan 2.1 (Wan Team 2025,
arXiv:2503.20314, section 4.1; the defaults) and Wan 2.2 (`patch=2, shortcuts=True, halve_up=False`): layers, norms,
the order of folded pixels and the treatment of the first frame in time resampling are theirs. The bottleneck is a
diagonal Gaussian (Kingma & Welling 2013, arXiv:1312.6114).

A 3-D convolution runs as one 2-D convolution over frames with the time taps stacked as input channels: XLA's
CPU backward of the 3-D form is several times slower, and on accelerators the two forms are the same matmul.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from minisora_jax.parallel.mesh import unfold


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Shape of the codec. The defaults are Wan 2.1's: 4x8x8 compression into 16 channels."""

    base: int = 96  # channels of the first stage
    multipliers: tuple[int, ...] = (1, 2, 4, 4)  # channels of each stage, in units of base
    residual_blocks: int = 2  # per encoder stage; the decoder has one more
    time_down: tuple[bool, ...] = (False, True, True)  # does the step after stage i halve time too
    latent_channels: int = 16
    patch: int = 1  # pixels folded into channels before the encoder, each way
    attention: bool = True  # single-head attention within a frame, in the middle
    shortcuts: bool = False  # parameter-free paths around each resampling stage, as in Wan 2.2 and DC-AE
    halve_up: bool = True  # upsampling halves the channels (Wan 2.1) or keeps them (Wan 2.2)
    decoder_base: int | None = None  # base of the decoder; None: as the encoder
    dtype: str = "float32"  # of the computation; parameters are float32

    def __post_init__(self):
        if len(self.time_down) != len(self.multipliers) - 1:
            raise ValueError(
                f"time_down={self.time_down} needs one entry per step between the {len(self.multipliers)} stages, "
                f"so {len(self.multipliers) - 1} entries"
            )
        if any(self.base * m % 2 for m in self.multipliers):
            raise ValueError(
                f"base={self.base} times multipliers={self.multipliers} must be even: upsampling halves it"
            )

    @property
    def time_factor(self) -> int:
        return 2 ** sum(self.time_down)

    @property
    def space_factor(self) -> int:
        return self.patch * 2 ** (len(self.multipliers) - 1)

    def latent_size(self, size_THW: tuple[int, int, int]) -> tuple[int, int, int]:
        """(t, h, w) of a clip of (T, H, W) pixels; ValueError where the grid does not divide it."""
        T, H, W = size_THW
        if (T - 1) % self.time_factor or T < 1:
            k = max(T - 1, 0) // self.time_factor
            low, high = 1 + k * self.time_factor, 1 + (k + 1) * self.time_factor
            raise ValueError(f"frames={T} must be 1 + {self.time_factor}*k; use {low} or {high}")
        for name, n in (("height", H), ("width", W)):
            if n % self.space_factor or n < 1:
                raise ValueError(f"{name}={n} must be a multiple of {self.space_factor}")
        return 1 + (T - 1) // self.time_factor, H // self.space_factor, W // self.space_factor

    def pixel_size(self, size_thw: tuple[int, int, int]) -> tuple[int, int, int]:
        t, h, w = size_thw
        return 1 + (t - 1) * self.time_factor, h * self.space_factor, w * self.space_factor


class History:
    """What the causal convolutions remember of earlier chunks, threaded through one call in layer order.

    `past=None` means this chunk starts the clip (zeros before it); otherwise `past` is the `states` of the
    previous chunk's call. It lives only while a function is traced: arrays in, arrays out.
    """

    def __init__(self, past=None):
        self.first = past is None
        self._past = iter(past or ())
        self.states = []

    def extend(self, x_BTHWC: jax.Array, frames: int) -> jax.Array:
        """x with the `frames` frames before it in front; zeros at the start of a clip."""
        if self.first:
            x = jnp.pad(x_BTHWC, ((0, 0), (frames, 0), (0, 0), (0, 0), (0, 0)))
        else:
            x = jnp.concatenate([next(self._past), x_BTHWC], axis=1)
        self.states.append(x[:, x.shape[1] - frames :])
        return x


class Conv(nn.Module):
    """Convolution over frames (kernel_t, k, k), no padding in time: callers put history in front."""

    features: int
    kernel: tuple[int, int, int] = (3, 3, 3)
    stride: tuple[int, int] = (1, 1)  # time, space
    padding: tuple[int, int] | None = None  # in space, before and after; None keeps the size
    zero_init: bool = False
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x_BTHWC):
        kt, kh, _ = self.kernel
        c = x_BTHWC.shape[-1]
        init = nn.initializers.zeros if self.zero_init else nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        kernel = self.param("kernel", init, (*self.kernel, c, self.features))
        bias = self.param("bias", self.bias_init, (self.features,))
        B, T, H, W, _ = x_BTHWC.shape
        frames = (T - kt) // self.stride[0] + 1
        taps = [x_BTHWC[:, j : j + (frames - 1) * self.stride[0] + 1 : self.stride[0]] for j in range(kt)]
        x = jnp.concatenate(taps, axis=-1).reshape(B * frames, H, W, kt * c)
        kernel = rearrange(kernel, "t h w i o -> h w (t i) o").astype(x.dtype)
        pad = self.padding or ((kh - 1) // 2, (kh - 1) // 2)
        y = jax.lax.conv_general_dilated(
            x, kernel, (self.stride[1],) * 2, (pad, pad), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return unfold(y, x_BTHWC) + bias.astype(x.dtype)


class CausalConv(nn.Module):
    """3 x 3 x 3 convolution that sees only the present and the two frames before it."""

    features: int
    kernel: tuple[int, int, int] = (3, 3, 3)
    zero_init: bool = False

    @nn.compact
    def __call__(self, x_BTHWC, history: History):
        if self.kernel[0] > 1:
            x_BTHWC = history.extend(x_BTHWC, self.kernel[0] - 1)
        return Conv(self.features, self.kernel, zero_init=self.zero_init, name="conv")(x_BTHWC)


class ChannelNorm(nn.Module):
    """x / rms(x over channels) * scale, in float32 (Wan's `RMS_norm`: L2 normalisation times sqrt(channels))."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        norm = jnp.sqrt(jnp.sum(x32 * x32, axis=-1, keepdims=True) + 1e-12)
        return (x32 / norm * (x.shape[-1] ** 0.5) * scale).astype(x.dtype)


class Residual(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x, history: History):
        h = CausalConv(self.features, name="conv1")(nn.silu(ChannelNorm(name="norm1")(x)), history)
        h = CausalConv(self.features, name="conv2", zero_init=True)(nn.silu(ChannelNorm(name="norm2")(h)), history)
        if x.shape[-1] != self.features:
            x = Conv(self.features, (1, 1, 1), name="shortcut")(x)
        return x + h


class FrameAttention(nn.Module):
    """Single-head self-attention among the positions of one frame."""

    @nn.compact
    def __call__(self, x_BTHWC):
        B, T, H, W, C = x_BTHWC.shape
        qkv = Conv(3 * C, (1, 1, 1), name="qkv")(ChannelNorm(name="norm")(x_BTHWC))
        qkv = rearrange(rearrange(qkv, "b t h w c -> b t (h w) c"), "b t s c -> (b t) s 1 c")
        out = jax.nn.dot_product_attention(*jnp.split(qkv, 3, axis=-1))
        out = rearrange(unfold(out, x_BTHWC), "b t (h w) 1 c -> b t h w c", h=H)
        return x_BTHWC + Conv(C, (1, 1, 1), name="out", zero_init=True)(out)


class Middle(nn.Module):
    features: int
    attention: bool

    @nn.compact
    def __call__(self, x, history: History):
        x = Residual(self.features, name="residual1")(x, history)
        if self.attention:
            x = FrameAttention(name="attention")(x)
        return Residual(self.features, name="residual2")(x, history)


class Downsample(nn.Module):
    """Half the height and width, and half the frames after the first where `time`."""

    time: bool

    @nn.compact
    def __call__(self, x, history: History):
        c = x.shape[-1]
        x = Conv(c, (1, 3, 3), stride=(1, 2), padding=(0, 1), name="space")(x)
        if not self.time:
            return x
        conv = Conv(c, (3, 1, 1), stride=(2, 1), name="time")
        if not history.first:
            return conv(history.extend(x, 1))
        history.states.append(x[:, -1:])
        # The first frame is kept as it is; frame i >= 1 of the result sees frames 2i-2, 2i-1, 2i.
        rest = conv(x if x.shape[1] > 1 else jnp.pad(x, ((0, 0), (0, 2), (0, 0), (0, 0), (0, 0))))
        return jnp.concatenate([x[:, :1], rest], axis=1) if x.shape[1] > 1 else x


class Upsample(nn.Module):
    """Twice the height and width; twice the frames after the first where `time`."""

    time: bool
    features: int

    @nn.compact
    def __call__(self, x, history: History):
        c = x.shape[-1]
        if self.time:
            conv = Conv(2 * c, (3, 1, 1), name="time")
            first, rest = (x[:, :1], x[:, 1:]) if history.first else (x[:, :0], x)
            doubled = conv(history.extend(rest, 2)) if rest.shape[1] else self._remember_nothing(conv, rest, history)
            doubled = rearrange(doubled, "b t h w (two c) -> b (t two) h w c", two=2)
            x = jnp.concatenate([first, doubled], axis=1)
        x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
        return Conv(self.features, (1, 3, 3), name="space")(x)

    def _remember_nothing(self, conv, rest, history):
        """A clip of one frame: the convolution runs on zeros only so that its parameters exist."""
        padded = history.extend(rest, 2)
        return conv(jnp.pad(padded, ((0, 0), (0, 1), (0, 0), (0, 0), (0, 0))))[:, :0]


def into_channels(x_BTHWC: jax.Array, axis: int, n: int) -> jax.Array:
    """Groups of n neighbours along one of the axes 1..3 (time, height, width) become n channels for each one.

    One axis a call: on an explicit mesh a reshape may split or merge only one at a time.
    """
    if n == 1:
        return x_BTHWC
    moved = jnp.moveaxis(x_BTHWC, axis, -2)
    return jnp.moveaxis(rearrange(moved, "... (s n) c -> ... s (c n)", n=n), -2, axis)


def out_of_channels(x_BTHWC: jax.Array, axis: int, n: int) -> jax.Array:
    """The inverse of `into_channels`."""
    if n == 1:
        return x_BTHWC
    moved = jnp.moveaxis(x_BTHWC, axis, -2)
    return jnp.moveaxis(rearrange(moved, "... s (c n) -> ... (s n) c", n=n), -2, axis)


def patchify(x_BTHWC: jax.Array, p: int) -> jax.Array:
    """p x p pixels into channels, ordered (channel, column, row) as in Wan 2.2."""
    return into_channels(into_channels(x_BTHWC, 3, p), 2, p)


def unpatchify(x_BTHWC: jax.Array, p: int) -> jax.Array:
    return out_of_channels(out_of_channels(x_BTHWC, 2, p), 3, p)


def average_down(x_BTHWC: jax.Array, time: int, space: int, features: int) -> jax.Array:
    """The stage's input at its output's size: (time, space, space) neighbours into channels, averaged in groups.

    DC-AE's residual autoencoding (Chen et al. 2024, arXiv:2410.10733), Wan 2.2's `AvgDown3D`. One zero frame before
    the clip makes the first frame a group of its own; a later chunk, of even length, has none.
    """
    pad = -x_BTHWC.shape[1] % time
    x = jnp.pad(x_BTHWC, ((0, 0), (pad, 0), (0, 0), (0, 0), (0, 0)))
    for axis, n in ((1, time), (2, space), (3, space)):
        x = into_channels(x, axis, n)
    return jnp.mean(rearrange(x, "b t h w (c g) -> b t h w c g", c=features), axis=-1)


def duplicate_up(x_BTHWC: jax.Array, time: int, space: int, features: int, first: bool) -> jax.Array:
    """The inverse in shape of `average_down` (Wan 2.2's `DupUp3D`): repeated channels out into the neighbours."""
    x = jnp.repeat(x_BTHWC, features * space**2 * time // x_BTHWC.shape[-1], axis=-1)
    for axis, n in ((3, space), (2, space), (1, time)):
        x = out_of_channels(x, axis, n)
    return x[:, time - 1 :] if first else x


class Encoder(nn.Module):
    config: VAEConfig

    @nn.compact
    def __call__(self, x_BTHWC, history: History):
        cfg = self.config
        x = patchify(x_BTHWC, cfg.patch)
        x = CausalConv(cfg.base * cfg.multipliers[0], name="conv_in")(x, history)
        for i, multiplier in enumerate(cfg.multipliers):
            stage_in = x
            for j in range(cfg.residual_blocks):
                x = Residual(cfg.base * multiplier, name=f"stage{i}_residual{j}")(x, history)
            down = i < len(cfg.time_down)
            if down:
                x = Downsample(cfg.time_down[i], name=f"stage{i}_down")(x, history)
            if cfg.shortcuts and (down or x.shape[-1] == stage_in.shape[-1]):
                x = x + average_down(stage_in, 1 + (down and cfg.time_down[i]), 1 + down, x.shape[-1])
        x = Middle(x.shape[-1], cfg.attention, name="middle")(x, history)
        x = nn.silu(ChannelNorm(name="norm_out")(x))
        x = CausalConv(2 * cfg.latent_channels, name="conv_out")(x, history)
        # A narrow posterior to begin with: at unit width its noise would hide the first thousand steps' signal.
        narrow = lambda key, shape: -6.0 * (jnp.arange(shape[0]) >= cfg.latent_channels).astype(jnp.float32)
        return Conv(2 * cfg.latent_channels, (1, 1, 1), bias_init=narrow, name="moments")(x)


class Decoder(nn.Module):
    config: VAEConfig

    @nn.compact
    def __call__(self, z_Bthwc, history: History):
        cfg = self.config
        widths = [(cfg.decoder_base or cfg.base) * m for m in reversed(cfg.multipliers)]
        x = Conv(cfg.latent_channels, (1, 1, 1), name="latents")(z_Bthwc)
        x = CausalConv(widths[0], name="conv_in")(x, history)
        x = Middle(widths[0], cfg.attention, name="middle")(x, history)
        for i, width in enumerate(widths):
            stage_in = x
            for j in range(cfg.residual_blocks + 1):
                x = Residual(width, name=f"stage{i}_residual{j}")(x, history)
            if i < len(cfg.time_down):
                time = cfg.time_down[-1 - i]
                x = Upsample(time, width // 2 if cfg.halve_up else width, name=f"stage{i}_up")(x, history)
                if cfg.shortcuts:
                    x = x + duplicate_up(stage_in, 1 + time, 2, x.shape[-1], history.first)
        x = nn.silu(ChannelNorm(name="norm_out")(x))
        x = CausalConv(3 * cfg.patch**2, name="conv_out")(x, history)
        return unpatchify(x, cfg.patch)


class VAE(nn.Module):
    """Pixels in [-1, 1] <-> Gaussian posterior over latents. All methods take and return batches (B, T, H, W, C)."""

    config: VAEConfig

    def setup(self):
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def encode(self, x_BTHWC, past=None):
        """(mean_Bthwc, logvar_Bthwc, states). `past`: the states of the chunk before, None at a clip's start.

        A first chunk has 1 + 4k frames, a later one 4k.
        """
        history = History(past)
        moments = self.encoder(x_BTHWC.astype(self.config.dtype), history).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0), tuple(history.states)

    def decode(self, z_Bthwc, past=None):
        """(x_BTHWC, states): 1 + 4(t - 1) frames from a first chunk of t latent frames, 4t from a later one."""
        history = History(past)
        x = self.decoder(z_Bthwc.astype(self.config.dtype), history)
        return x.astype(jnp.float32), tuple(history.states)

    def __call__(self, x_BTHWC):
        """Reconstruction from the posterior mean; its `init` makes every parameter."""
        return self.decode(self.encode(x_BTHWC)[0])[0]

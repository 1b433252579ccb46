"""The layers of the video codec (vae.py): causal convolutions, norms, residual blocks, resampling, shortcuts.

A 3-D convolution runs as one 2-D convolution over frames with the time taps stacked as input channels: XLA's
CPU backward of the 3-D form is several times slower, and on accelerators the two forms are the same matmul.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from minisora_jax.parallel.halo import attend_in_frame, frame_mean, halo
from minisora_jax.parallel.mesh import unfold


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


CONV_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def convolve(x_FHWC: jax.Array, kernel, pads, stride: int = 1) -> jax.Array:
    """2-D convolution of frames; kernel (k, k, in, out), pads ((above, below), (left, right))."""
    return jax.lax.conv_general_dilated(
        x_FHWC, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


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
        init = nn.initializers.zeros if self.zero_init else CONV_INIT
        kernel = self.param("kernel", init, (*self.kernel, c, self.features))
        bias = self.param("bias", self.bias_init, (self.features,))
        pad = self.padding or ((kh - 1) // 2, (kh - 1) // 2)
        x_BTHWC, rows = halo(x_BTHWC, pad)  # before the taps are stacked, so that each frame is sent once
        B, T, H, W, _ = x_BTHWC.shape
        frames = (T - kt) // self.stride[0] + 1
        taps = [x_BTHWC[:, j : j + (frames - 1) * self.stride[0] + 1 : self.stride[0]] for j in range(kt)]
        x = jnp.concatenate(taps, axis=-1).reshape(B * frames, H, W, kt * c)
        kernel = rearrange(kernel, "t h w i o -> h w (t i) o").astype(x.dtype)
        y = convolve(x, kernel, (rows, pad), self.stride[1])
        return unfold(y, x_BTHWC) + bias.astype(x.dtype)


class DoublingConv(nn.Module):
    """Each pixel twice along height and width, then a 3 x 3 convolution, in 4/9 of the arithmetic.

    Of an output pixel's nine taps several fall on one input pixel: along each axis the even ones see pixels i - 1 and i
    with weights (k0, k1 + k2), the odd ones i and i + 1 with (k0 + k1, k2). So four 2 x 2 convolutions give the
    four quarters of the pixels (Shi et al. 2016, arXiv:1609.07009).
    """

    features: int

    @nn.compact
    def __call__(self, x_BTHWC):
        B, T, H, W, c = x_BTHWC.shape
        kernel = self.param("kernel", CONV_INIT, (1, 3, 3, c, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        rows = []
        for kernel_row, pad_row in self._halves(kernel[0], 0):
            x, pad_row = halo(x_BTHWC, pad_row)
            x = x.reshape(B * T, -1, W, c)
            quarters = [
                convolve(x, quarter.astype(x.dtype), (pad_row, pad_column))
                for quarter, pad_column in self._halves(kernel_row, 1)
            ]
            rows.append(jnp.stack(quarters, axis=3).reshape(B * T, H, 2 * W, -1))
        y = jnp.stack(rows, axis=2).reshape(B * T, 2 * H, 2 * W, -1)
        return unfold(y, x_BTHWC) + bias.astype(x.dtype)

    def _halves(self, kernel, axis: int):
        """(kernel, padding) of the even and of the odd pixels along `axis`."""
        k0, k1, k2 = jnp.split(kernel, 3, axis)
        return (jnp.concatenate([k0, k1 + k2], axis), (1, 0)), (jnp.concatenate([k0 + k1, k2], axis), (0, 1))


class CausalConv(nn.Module):
    """3 x 3 x 3 convolution that sees only the present and the two frames before it; of images 1 x 3 x 3."""

    features: int
    images: bool
    zero_init: bool = False

    @nn.compact
    def __call__(self, x_BTHWC, history: History):
        if not self.images:
            x_BTHWC = history.extend(x_BTHWC, 2)
        kernel = (1, 3, 3) if self.images else (3, 3, 3)
        return Conv(self.features, kernel, zero_init=self.zero_init, name="conv")(x_BTHWC)


class ChannelNorm(nn.Module):
    """x / rms(x over channels) * scale, in float32 (Wan's `RMS_norm`: L2 normalisation times sqrt(channels))."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        norm = jnp.sqrt(jnp.sum(x32 * x32, axis=-1, keepdims=True) + 1e-12)
        return (x32 / norm * (x.shape[-1] ** 0.5) * scale).astype(x.dtype)


class GroupNorm(nn.Module):
    """Each frame's channels in 32 groups, of zero mean and unit variance (Wu & He 2018, arXiv:1803.08494)."""

    @nn.compact
    def __call__(self, x_BTHWC):
        c = x_BTHWC.shape[-1]
        if c % 32:
            raise ValueError(f"{c} channels do not divide into the 32 groups of an image codec's norms")
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        x = x_BTHWC.astype(jnp.float32)
        x = x - self._group_means(x)
        x = x * (scale * jax.lax.rsqrt(self._group_means(x * x) + 1e-6))
        return (x + bias).astype(x_BTHWC.dtype)

    def _group_means(self, x_BTHWC):
        """(B, T, 1, 1, C). Of each channel first: a CPU sums over height and width alone several times as fast."""
        mean = rearrange(frame_mean(x_BTHWC), "b t (g c) -> b t g c", g=32)
        mean = jnp.broadcast_to(jnp.mean(mean, axis=-1, keepdims=True), mean.shape)
        return rearrange(mean, "b t g c -> b t 1 1 (g c)")


def make_norm(images: bool, name: str) -> nn.Module:
    return GroupNorm(name=name) if images else ChannelNorm(name=name)


class Residual(nn.Module):
    features: int
    images: bool

    @nn.compact
    def __call__(self, x, history: History):
        h = nn.silu(make_norm(self.images, "norm1")(x))
        h = CausalConv(self.features, self.images, name="conv1")(h, history)
        h = nn.silu(make_norm(self.images, "norm2")(h))
        h = CausalConv(self.features, self.images, name="conv2", zero_init=True)(h, history)
        if x.shape[-1] != self.features:
            x = Conv(self.features, (1, 1, 1), name="shortcut")(x)
        return x + h


class FrameAttention(nn.Module):
    """Single-head self-attention among the positions of one frame."""

    images: bool

    @nn.compact
    def __call__(self, x_BTHWC):
        H, C = x_BTHWC.shape[2], x_BTHWC.shape[-1]
        qkv = Conv(3 * C, (1, 1, 1), name="qkv")(make_norm(self.images, "norm")(x_BTHWC))
        out = attend_in_frame(*jnp.split(qkv, 3, axis=-1))
        out = rearrange(unfold(out, x_BTHWC), "b t (h w) 1 c -> b t h w c", h=H)
        return x_BTHWC + Conv(C, (1, 1, 1), name="out", zero_init=True)(out)


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
        return DoublingConv(self.features, name="space")(x)

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

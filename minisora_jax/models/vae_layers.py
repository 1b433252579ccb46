"""The layers of the video codec (vae.py): causal convolutions, norms, residual blocks, resampling, shortcuts.

A 3-D convolution runs as one 2-D convolution over frames, with the time taps stacked as input channels. On CPUs XLA's
backward pass of the 3-D form is several times slower. On accelerators both forms are the same matrix product.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from minisora_jax.parallel.halo import attend_in_frame, frame_mean, halo
from minisora_jax.parallel.mesh import unfold

States = tuple[jax.Array, ...]  # the last frames that each causal convolution saw, in layer order


class History:
    """The frames of earlier chunks for the causal convolutions of one call, in layer order.

    It exists only while a function is traced.

    Attributes:
        first: Whether this chunk starts the clip.
        states: The states for the next chunk, which the layers append.
    """

    def __init__(self, past: States | None = None) -> None:
        """`past` is `states` of the chunk before; None: this chunk starts the clip, with zeros before it."""
        self.first = past is None
        self._past = iter(past or ())
        self.states: list[jax.Array] = []

    def extend(self, x_BTHWC: jax.Array, frames: int) -> jax.Array:
        """x with the `frames` frames before it prepended; zeros at the start of a clip."""
        if self.first:
            x = jnp.pad(x_BTHWC, ((0, 0), (frames, 0), (0, 0), (0, 0), (0, 0)))
        else:
            x = jnp.concatenate([next(self._past), x_BTHWC], axis=1)
        self.states.append(x[:, x.shape[1] - frames :])
        return x


CONV_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


Pads = tuple[tuple[int, int], tuple[int, int]]  # zeros (above, below), (left, right)


def convolve(x_RHWC: jax.Array, kernel: jax.Array, pads: Pads, stride: int = 1) -> jax.Array:
    """2-D convolution of frames (R, H, W, C) with a kernel (height, width, in, out)."""
    return jax.lax.conv_general_dilated(
        x_RHWC, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


class Conv(nn.Module):
    """3-D convolution without padding in time: callers prepend the history.

    Attributes:
        features: Output channels.
        kernel: Size along (time, height, width).
        stride: Along (time, space).
        padding: Zeros before and after each axis of space; None: as many as keep the size.
        zero_init: Whether the kernel is initialised to zero.
        bias_init: Initialiser of the bias.
    """

    features: int
    kernel: tuple[int, int, int] = (3, 3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | None = None
    zero_init: bool = False
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array) -> jax.Array:
        kt, kh, _ = self.kernel
        c = x_BTHWC.shape[-1]
        init = nn.initializers.zeros if self.zero_init else CONV_INIT
        kernel = self.param("kernel", init, (*self.kernel, c, self.features))
        bias = self.param("bias", self.bias_init, (self.features,))
        pad = self.padding or ((kh - 1) // 2, (kh - 1) // 2)
        x_BTHWC, pad_rows = halo(x_BTHWC, pad)  # before the taps are stacked, so each frame is sent once
        B, T, H, W, _ = x_BTHWC.shape
        frames = (T - kt) // self.stride[0] + 1
        taps = [x_BTHWC[:, j : j + (frames - 1) * self.stride[0] + 1 : self.stride[0]] for j in range(kt)]
        x = jnp.concatenate(taps, axis=-1).reshape(B * frames, H, W, kt * c)
        kernel = rearrange(kernel, "t h w i o -> h w (t i) o").astype(x.dtype)
        y = convolve(x, kernel, (pad_rows, pad), self.stride[1])
        return unfold(y, x_BTHWC) + bias.astype(x.dtype)


class DoublingConv(nn.Module):
    """Nearest-neighbour upsampling by 2 in height and width, then a 3 x 3 convolution, with 4/9 of the arithmetic.

    Several of an output pixel's nine taps fall on one input pixel. Along each axis the even output pixels see inputs
    i - 1 and i with weights (k0, k1 + k2), and the odd ones see i and i + 1 with (k0 + k1, k2). So four 2 x 2
    convolutions give the four quarters of the output (Shi et al. 2016, arXiv:1609.07009).
    """

    features: int

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array) -> jax.Array:
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
        return unfold(y, x_BTHWC) + bias.astype(x_BTHWC.dtype)

    def _halves(self, kernel: jax.Array, axis: int) -> tuple[tuple[jax.Array, tuple[int, int]], ...]:
        """(kernel, padding) of the even pixels and of the odd pixels along `axis`."""
        k0, k1, k2 = jnp.split(kernel, 3, axis)
        return (jnp.concatenate([k0, k1 + k2], axis), (1, 0)), (jnp.concatenate([k0 + k1, k2], axis), (0, 1))


class CausalConv(nn.Module):
    """3 x 3 x 3 convolution over the present frame and the two before it; 1 x 3 x 3 with `images`."""

    features: int
    images: bool
    zero_init: bool = False

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array, history: History) -> jax.Array:
        if not self.images:
            x_BTHWC = history.extend(x_BTHWC, 2)
        kernel = (1, 3, 3) if self.images else (3, 3, 3)
        return Conv(self.features, kernel, zero_init=self.zero_init, name="conv")(x_BTHWC)


class ChannelNorm(nn.Module):
    """x / rms(x over channels) * scale, in float32 (Wan's `RMS_norm`: L2 normalisation times sqrt(channels))."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        norm = jnp.sqrt(jnp.sum(x32 * x32, axis=-1, keepdims=True) + 1e-12)
        return (x32 / norm * (x.shape[-1] ** 0.5) * scale).astype(x.dtype)


class GroupNorm(nn.Module):
    """Group norm of each frame, in float32: 32 groups of channels (Wu & He 2018, arXiv:1803.08494).

    Raises:
        ValueError: The channels do not divide into 32 groups.
    """

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array) -> jax.Array:
        c = x_BTHWC.shape[-1]
        if c % 32:
            raise ValueError(
                f"{c} channels do not divide into the 32 groups of an image codec's norms: make vae.base times each "
                f"multiplier a multiple of 32"
            )
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        x = x_BTHWC.astype(jnp.float32)
        x = x - self._group_means(x)
        x = x * (scale * jax.lax.rsqrt(self._group_means(x * x) + 1e-6))
        return (x + bias).astype(x_BTHWC.dtype)

    def _group_means(self, x_BTHWC: jax.Array) -> jax.Array:
        """The mean of each channel's group, (B, T, 1, 1, C)."""
        # Channel means come first: CPUs sum over height and width alone several times as fast.
        mean = rearrange(frame_mean(x_BTHWC), "b t (g c) -> b t g c", g=32)
        mean = jnp.broadcast_to(jnp.mean(mean, axis=-1, keepdims=True), mean.shape)
        return rearrange(mean, "b t g c -> b t 1 1 (g c)")


def make_norm(images: bool, name: str) -> GroupNorm | ChannelNorm:
    """The norm of an image codec or of a video codec, as a submodule named `name`."""
    return GroupNorm(name=name) if images else ChannelNorm(name=name)


class Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1 x 1 convolution of x where the channels change."""

    features: int
    images: bool

    @nn.compact
    def __call__(self, x: jax.Array, history: History) -> jax.Array:
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
    def __call__(self, x_BTHWC: jax.Array) -> jax.Array:
        H, C = x_BTHWC.shape[2], x_BTHWC.shape[-1]
        qkv = Conv(3 * C, (1, 1, 1), name="qkv")(make_norm(self.images, "norm")(x_BTHWC))
        out = attend_in_frame(*jnp.split(qkv, 3, axis=-1))
        out = rearrange(unfold(out, x_BTHWC), "b t (h w) 1 c -> b t h w c", h=H)
        return x_BTHWC + Conv(C, (1, 1, 1), name="out", zero_init=True)(out)


class Downsample(nn.Module):
    """Halves height and width. With `time` it also halves the frames after the first."""

    time: bool

    @nn.compact
    def __call__(self, x: jax.Array, history: History) -> jax.Array:
        c = x.shape[-1]
        x = Conv(c, (1, 3, 3), stride=(1, 2), padding=(0, 1), name="space")(x)
        if not self.time:
            return x
        conv = Conv(c, (3, 1, 1), stride=(2, 1), name="time")
        if not history.first:
            return conv(history.extend(x, 1))
        history.states.append(x[:, -1:])
        # The first frame is copied. Frame i >= 1 of the result sees frames 2i - 2, 2i - 1 and 2i.
        rest = conv(x if x.shape[1] > 1 else jnp.pad(x, ((0, 0), (0, 2), (0, 0), (0, 0), (0, 0))))
        return jnp.concatenate([x[:, :1], rest], axis=1) if x.shape[1] > 1 else x


class Upsample(nn.Module):
    """Doubles height and width. With `time` it also doubles the frames after the first."""

    time: bool
    features: int

    @nn.compact
    def __call__(self, x: jax.Array, history: History) -> jax.Array:
        c = x.shape[-1]
        if self.time:
            conv = Conv(2 * c, (3, 1, 1), name="time")
            first, rest = (x[:, :1], x[:, 1:]) if history.first else (x[:, :0], x)
            doubled = conv(history.extend(rest, 2)) if rest.shape[1] else self._no_frames(conv, rest, history)
            doubled = rearrange(doubled, "b t h w (two c) -> b (t two) h w c", two=2)
            x = jnp.concatenate([first, doubled], axis=1)
        return DoublingConv(self.features, name="space")(x)

    def _no_frames(self, conv: Conv, rest: jax.Array, history: History) -> jax.Array:
        """No output frames, for a clip of one frame. The convolution runs on zeros so that its parameters exist."""
        padded = history.extend(rest, 2)
        return conv(jnp.pad(padded, ((0, 0), (0, 1), (0, 0), (0, 0), (0, 0))))[:, :0]


def into_channels(x_BTHWC: jax.Array, axis: int, n: int) -> jax.Array:
    """n neighbours along axis 1, 2 or 3 (time, height, width) folded into n times the channels.

    It folds one axis, because on an explicit mesh a reshape may split or merge only one.
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
    """p x p pixels folded into channels, ordered (channel, column, row) as in Wan 2.2."""
    return into_channels(into_channels(x_BTHWC, 3, p), 2, p)


def unpatchify(x_BTHWC: jax.Array, p: int) -> jax.Array:
    """The inverse of `patchify`."""
    return out_of_channels(out_of_channels(x_BTHWC, 2, p), 3, p)


def average_down(x_BTHWC: jax.Array, time: int, space: int, features: int) -> jax.Array:
    """A stage's input at the size of its output: neighbours folded into channels, which are averaged in groups.

    This is DC-AE's residual autoencoding (Chen et al. 2024, arXiv:2410.10733), Wan 2.2's `AvgDown3D`. A zero frame
    before the clip makes the first frame a group of its own. A later chunk has an even length and no zero frame.

    Args:
        x_BTHWC: The stage's input.
        time: Factor between the frames of input and output.
        space: Factor between the sides.
        features: Channels of the output.
    """
    pad = -x_BTHWC.shape[1] % time
    x = jnp.pad(x_BTHWC, ((0, 0), (pad, 0), (0, 0), (0, 0), (0, 0)))
    for axis, n in ((1, time), (2, space), (3, space)):
        x = into_channels(x, axis, n)
    return jnp.mean(rearrange(x, "b t h w (c g) -> b t h w c g", c=features), axis=-1)


def duplicate_up(x_BTHWC: jax.Array, time: int, space: int, features: int, first: bool) -> jax.Array:
    """A stage's input at the size of its output: repeated channels unfolded into neighbours (Wan 2.2's `DupUp3D`).

    Arguments are those of `average_down`; `first` says whether this chunk starts the clip.
    """
    x = jnp.repeat(x_BTHWC, features * space**2 * time // x_BTHWC.shape[-1], axis=-1)
    for axis, n in ((3, space), (2, space), (1, time)):
        x = out_of_channels(x, axis, n)
    return x[:, time - 1 :] if first else x

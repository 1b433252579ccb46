"""Frames whose height is divided over the sequence axes of the mesh, and the rows that devices exchange.

    device 0   rows 0 .. 4       a 3 x 3 convolution here needs row 5 of the device below
    device 1   rows 5 .. 9       and here row 4 from above and row 10 from below
    device 2   rows 10 .. 14     below the frame's last row are zeros, as in `SAME` padding

`shard_height` runs a function of whole frames on each device's rows. Inside it, layers that look across rows call
`halo` (convolutions), `frame_mean` (norms) or `attend_in_frame` (attention). Outside of it the three do what they do on
one device, so a model is written once. The result equals that of the whole frame. It is not a blend of tiles.

A height that does not divide is padded at the bottom, and the result stays exact: rows below the frame are zeros to
each convolution, are no part of a mean, and are keys that no query sees. A *unit* is the smallest height that a device
can have: one latent row.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from minisora_jax.parallel.attention import attend
from minisora_jax.parallel.mesh import BATCH, FRAMES, REPLICATED, ROWS, SEQUENCE, like, put_whole, shard
from minisora_jax.parallel.processes import whole


@dataclasses.dataclass(frozen=True)
class HeightShards:
    """How `shard_height` divides frames of `units` latent rows over `devices` devices."""

    devices: int
    units: int

    @property
    def padded(self) -> int:
        """Units after padding to a multiple of `devices`."""
        return self.devices * -(-self.units // self.devices)

    def inside(self, x_BTHWC: jax.Array) -> jax.Array | None:
        """Whether each row of a device is inside the frame, (H, 1, 1); None if nothing is padded."""
        if self.padded == self.units:
            return None
        height = x_BTHWC.shape[2]
        end = height * self.devices * self.units // self.padded  # of the frame, at the resolution of this layer
        row = jax.lax.axis_index(SEQUENCE) * height + jnp.arange(height)
        return (row < end)[:, None, None]

    def blank(self, x_BTHWC: jax.Array) -> jax.Array:
        """x with zeros in the rows below the frame."""
        inside = self.inside(x_BTHWC)
        return x_BTHWC if inside is None else jnp.where(inside, x_BTHWC, 0)


# Set while `shard_height` traces its function.
_shards: contextvars.ContextVar[HeightShards | None] = contextvars.ContextVar("shards", default=None)


def height_shards(units: int) -> HeightShards | None:
    """How the mesh in use divides frames of `units` latent rows; None without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else HeightShards(math.prod(mesh.shape[axis] for axis in SEQUENCE), units)


def shard_height(f: Callable, units: int, params: Any, *frames: Any) -> Any:
    """f(params, *frames), computed by each device for its rows. Gradients equal f's. Without a mesh, f itself runs.

    Args:
        f: A function of parameters and frames, whose results are trees of arrays like the frames.
        units: Height of the frames in latent rows, before padding.
        params: Parameters. They are gathered to every device.
        *frames: Trees of arrays (B, T, H, ...), H a multiple of the padded height in units. B is divided over the axes
            of rows.
    """
    shards = height_shards(units)
    if shards is None:
        return f(params, *frames)

    def on_device(params, *frames):
        with _sharding_height(shards if shards.devices > 1 else None):
            return f(params, *frames)

    params = jax.tree.map(lambda x: shard(x, REPLICATED), params)
    frames = jax.tree.map(lambda x: shard(x, FRAMES), frames)
    specs = (REPLICATED, *(FRAMES for _ in frames))
    # check_vma is off because the outputs of Pallas kernels carry no varying axes.
    return jax.shard_map(on_device, in_specs=specs, out_specs=FRAMES, check_vma=False)(params, *frames)


def over_clips(f: Callable, params: Any, *frames: jax.Array) -> jax.Array:
    """f(params, *frames) of whole frames, computed by each device for its clips. Gradients equal f's.

    Devices along the sequence axes compute the same clips. Without a mesh, f itself runs.

    Args:
        f: A function of parameters and frames (B, T, H, ...), whose result is (B, ...). No clip depends on another.
        params: Parameters. They are gathered to every device.
        *frames: B is divided over the axes of rows. A divided height is gathered.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return f(params, *frames)
    params = jax.tree.map(lambda x: shard(x, REPLICATED), params)
    specs = (REPLICATED, *(BATCH for _ in frames))
    # check_vma is off because the outputs of Pallas kernels carry no varying axes.
    return jax.shard_map(f, in_specs=specs, out_specs=BATCH, check_vma=False)(
        params, *(shard(x, P(*BATCH, *(None,) * (x.ndim - 1))) for x in frames)
    )


def require_whole_units(mesh: jax.sharding.Mesh, units: int, what: str) -> None:
    """Check that a height divides over the mesh. Only frames that come from the host are padded.

    Args:
        mesh: The mesh.
        units: Height in latent rows.
        what: Name of the frames, for the error message.

    Raises:
        ValueError: The height does not divide.
    """
    parts = math.prod(mesh.shape[axis] for axis in SEQUENCE)
    if units % parts:
        axes = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in SEQUENCE)
        low = units // parts * parts
        raise ValueError(
            f"{what} of {units} latent rows cannot be divided over {axes}: give it "
            f"{f'{low} or ' if low else ''}{low + parts} latent rows, or use a mesh with fewer devices on these axes"
        )


@contextlib.contextmanager
def _sharding_height(shards: HeightShards | None) -> Iterator[None]:
    token = _shards.set(shards)
    try:
        yield
    finally:
        _shards.reset(token)


# ---- What layers call


def halo(x_BTHWC: jax.Array, rows: tuple[int, int]) -> tuple[jax.Array, tuple[int, int]]:
    """x with rows of the neighbouring devices above and below.

    Args:
        x_BTHWC: This device's rows.
        rows: Rows that a convolution needs (above, below) its own, at most a device's height.

    Returns:
        x: x with the neighbours' rows. At the frame's border they are zeros.
        padding: Zero rows (above, below) that the caller must still add.
    """
    shards, (above, below) = _shards.get(), rows
    if shards is None or rows == (0, 0):
        return x_BTHWC, rows
    x = shards.blank(x_BTHWC)
    height, last = x.shape[2], shards.devices - 1
    parts = [x]
    # A device that receives nothing gets zeros: it is at the border of the frame.
    if above:
        down = [(i, i + 1) for i in range(last)]
        parts.insert(0, jax.lax.ppermute(x[:, :, height - above :], SEQUENCE, down))
    if below:
        parts.append(jax.lax.ppermute(x[:, :, :below], SEQUENCE, [(i + 1, i) for i in range(last)]))
    return jnp.concatenate(parts, axis=2), (0, 0)


def frame_mean(x_BTHWC: jax.Array) -> jax.Array:
    """The mean over the positions of each frame, (B, T, C)."""
    shards = _shards.get()
    if shards is None:
        return jnp.mean(x_BTHWC, axis=(2, 3))
    height, width = x_BTHWC.shape[2:4]
    count = height * shards.devices * shards.units // shards.padded * width
    return jax.lax.psum(jnp.sum(shards.blank(x_BTHWC), axis=(2, 3)), SEQUENCE) / count


def attend_in_frame(q_BTHWC: jax.Array, k_BTHWC: jax.Array, v_BTHWC: jax.Array) -> jax.Array:
    """Single-head attention among the positions of each frame, (B * T, H * W, 1, C).

    Keys and values are gathered from all devices. The attention kernel computes the weights in tiles.
    """
    shards = _shards.get()
    # One reshape merges two axes only: an explicit mesh allows no more at a time.
    fold = lambda x: rearrange(rearrange(x, "b t h w c -> b t (h w) c"), "b t s c -> (b t) s 1 c")
    inside = None if shards is None else shards.inside(q_BTHWC)
    q_RS1C, k_RS1C, v_RS1C = fold(q_BTHWC), fold(k_BTHWC), fold(v_BTHWC)
    ids_RS = like(jnp.ones(q_RS1C.shape[:2], jnp.int32), q_RS1C)
    if inside is not None:
        ids_RS = jnp.broadcast_to(inside[:, :, 0], q_BTHWC.shape[2:4]).reshape(-1) * ids_RS
    if shards is None:
        return attend(q_RS1C, k_RS1C, v_RS1C, ids_RS, ids_RS)
    gather = lambda x: jax.lax.all_gather(x, SEQUENCE, axis=1, tiled=True)
    return attend(q_RS1C, gather(k_RS1C), gather(v_RS1C), ids_RS, gather(ids_RS))


# ---- Between the host and the mesh


def put_frames(x_BTHWC: np.ndarray, units: int) -> Any:
    """Whole frames of the host, padded and sharded for `shard_height`. Without a mesh, x itself.

    The bottom is padded with zeros and the batch with copies of the last clip, to multiples of the mesh's axes.

    Args:
        x_BTHWC: The same on every process.
        units: Height in latent rows.
    """
    mesh, shards = jax.sharding.get_mesh(), height_shards(units)
    if shards is None:
        return x_BTHWC
    B, _, H = x_BTHWC.shape[:3]
    extra_clips = -B % math.prod(mesh.shape[axis] for axis in ROWS)
    x = np.concatenate([x_BTHWC, x_BTHWC[-1:].repeat(extra_clips, axis=0)])
    x = np.pad(x, ((0, 0), (0, 0), (0, H * shards.padded // units - H), (0, 0), (0, 0)))
    return put_whole(x, NamedSharding(mesh, FRAMES))


def fetch_frames(x_BTHWC: jax.Array, clips: int, units: int) -> np.ndarray:
    """The whole frames on the host of every process, without the padding of `put_frames`.

    Args:
        x_BTHWC: Frames on the mesh.
        clips: B before padding.
        units: Height in latent rows before padding.
    """
    x, shards = whole(x_BTHWC), height_shards(units)
    return x if shards is None else x[:clips, :, : x.shape[2] * units // shards.padded]


def put_params(params: Any) -> Any:
    """Parameters of the host, replicated on every device of the mesh in use; without a mesh, on the default device."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.device_put(params)
    replicated = NamedSharding(mesh, REPLICATED)
    return jax.tree.map(lambda x: put_whole(x, replicated), params)

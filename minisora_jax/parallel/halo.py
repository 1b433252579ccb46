"""Pictures cut along their height over the sequence axes of the mesh, and what each device must see of the others.

    device 0   rows 0 .. 4       a 3 x 3 convolution there asks its neighbour below for row 5
    device 1   rows 5 .. 9       ... and here for row 4 from above and row 10 from below
    device 2   rows 10 .. 14     below the picture's last row lie zeros, as `SAME` padding has them

`by_rows` runs a function of whole pictures on each device's rows. In it, layers that look across rows say so here:
`halo` for convolutions, `frame_mean` for norms, `attend_in_frame` for attention. Outside of it the three are what they
are on one device, so a model is written once. The result is that of the whole picture, not of tiles blended together.

A height that does not divide is padded at the bottom, and stays exact: rows below the picture are zeros to each
convolution, no part of a mean, and keys that no query sees. A *unit* is the height that cannot be cut, a latent row.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from minisora_jax.parallel.attention import attend
from minisora_jax.parallel.mesh import PICTURES, REPLICATED, ROWS, SEQUENCE, like, shard


@dataclasses.dataclass(frozen=True)
class HeightShards:
    """How the pictures of a `by_rows` lie: `units` of height over so many devices."""

    devices: int
    units: int

    @property
    def padded(self) -> int:
        return self.devices * -(-self.units // self.devices)

    def real(self, x_BTHWC) -> jax.Array | None:
        """(H, 1, 1): which of a device's rows are of the picture; None if all are, on all devices."""
        if self.padded == self.units:
            return None
        height = x_BTHWC.shape[2]
        end = height * self.devices * self.units // self.padded  # of the picture, at the resolution of this layer
        row = jax.lax.axis_index(SEQUENCE) * height + jnp.arange(height)
        return (row < end)[:, None, None]

    def blank(self, x_BTHWC) -> jax.Array:
        """x with zeros below the picture."""
        real = self.real(x_BTHWC)
        return x_BTHWC if real is None else jnp.where(real, x_BTHWC, 0)


_cut: contextvars.ContextVar[HeightShards | None] = contextvars.ContextVar(
    "cut", default=None
)  # set while by_rows traces


def cut_of(units: int) -> HeightShards | None:
    """How pictures of that height are cut on the mesh in use; None without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else HeightShards(math.prod(mesh.shape[axis] for axis in SEQUENCE), units)


def shard_height(f: Callable, units: int, params, *pictures):
    """f(params, *pictures), each device with its rows; f itself without a mesh. Gradients are those of f.

    `pictures`, and what f returns, are trees of arrays (B, T, H, ...) with H a multiple of the padded height, in
    units. Clips (B) are divided over the axes of rows of a batch. The parameters are gathered whole.
    """
    cut = cut_of(units)
    if cut is None:
        return f(params, *pictures)

    def on_device(params, *pictures):
        with _cutting(cut if cut.devices > 1 else None):
            return f(params, *pictures)

    params = jax.tree.map(lambda x: shard(x, REPLICATED), params)
    pictures = jax.tree.map(lambda x: shard(x, PICTURES), pictures)
    specs = (REPLICATED, *(PICTURES for _ in pictures))
    # check_vma is off as in `attend`, whose kernels' outputs carry no varying axes.
    return jax.shard_map(on_device, in_specs=specs, out_specs=PICTURES, check_vma=False)(params, *pictures)


def require_whole_units(mesh: jax.sharding.Mesh, units: int, what: str) -> None:
    """ValueError unless the height of `what`, already on the mesh, divides: only the host's pictures are padded."""
    parts = math.prod(mesh.shape[axis] for axis in SEQUENCE)
    if units % parts:
        named = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in SEQUENCE)
        low = units // parts * parts
        raise ValueError(
            f"{what} of {units} latent rows cannot be divided over {named}: give it "
            f"{f'{low} or ' if low else ''}{low + parts} latent rows, or the mesh fewer of them"
        )


@contextlib.contextmanager
def _cutting(cut: HeightShards | None):
    token = _cut.set(cut)
    try:
        yield
    finally:
        _cut.reset(token)


# ---- What layers ask for


def halo(x_BTHWC: jax.Array, rows: tuple[int, int]) -> tuple[jax.Array, tuple[int, int]]:
    """(x with the neighbours' rows, the zero rows that are still to be put (above, below)).

    `rows` are those that a convolution wants beyond its own, above and below, at most a device's height.
    """
    cut, (above, below) = _cut.get(), rows
    if cut is None or rows == (0, 0):
        return x_BTHWC, rows
    x = cut.blank(x_BTHWC)
    height, last = x.shape[2], cut.devices - 1
    parts = [x]
    # A device that nobody sends to gets zeros: the border of the picture.
    if above:
        down = [(i, i + 1) for i in range(last)]
        parts.insert(0, jax.lax.ppermute(x[:, :, height - above :], SEQUENCE, down))
    if below:
        parts.append(jax.lax.ppermute(x[:, :, :below], SEQUENCE, [(i + 1, i) for i in range(last)]))
    return jnp.concatenate(parts, axis=2), (0, 0)


def frame_mean(x_BTHWC: jax.Array) -> jax.Array:
    """(B, T, C): the mean over the positions of each frame."""
    cut = _cut.get()
    if cut is None:
        return jnp.mean(x_BTHWC, axis=(2, 3))
    height, width = x_BTHWC.shape[2:4]
    count = height * cut.devices * cut.units // cut.padded * width
    return jax.lax.psum(jnp.sum(cut.blank(x_BTHWC), axis=(2, 3)), SEQUENCE) / count


def attend_in_frame(q_BTHWC: jax.Array, k_BTHWC: jax.Array, v_BTHWC: jax.Array) -> jax.Array:
    """Single-head attention among the positions of each frame. Keys and values are gathered, and weights tiled."""
    cut = _cut.get()
    # Two axes at a time, as an explicit mesh wants it.
    fold = lambda x: rearrange(rearrange(x, "b t h w c -> b t (h w) c"), "b t s c -> (b t) s 1 c")
    real = None if cut is None else cut.real(q_BTHWC)
    q_FS1C, k_FS1C, v_FS1C = fold(q_BTHWC), fold(k_BTHWC), fold(v_BTHWC)
    ids_FS = like(jnp.ones(q_FS1C.shape[:2], jnp.int32), q_FS1C)
    if real is not None:
        ids_FS = jnp.broadcast_to(real[:, :, 0], q_BTHWC.shape[2:4]).reshape(-1) * ids_FS
    if cut is None:
        return attend(q_FS1C, k_FS1C, v_FS1C, ids_FS, ids_FS)
    whole = lambda x: jax.lax.all_gather(x, SEQUENCE, axis=1, tiled=True)
    return attend(q_FS1C, whole(k_FS1C), whole(v_FS1C), ids_FS, whole(ids_FS))


# ---- Between the host and the mesh


def place_pictures(x_BTHWC: np.ndarray, units: int):
    """Whole pictures of the host, the same on every process, as `by_rows` wants them; x itself without a mesh.

    Zeros are added at the bottom, and copies of the last clip, to multiples of what the mesh divides them by.
    """
    mesh, cut = jax.sharding.get_mesh(), cut_of(units)
    if cut is None:
        return x_BTHWC
    B, _, H = x_BTHWC.shape[:3]
    clips = -B % math.prod(mesh.shape[axis] for axis in ROWS)
    x = np.concatenate([x_BTHWC, x_BTHWC[-1:].repeat(clips, axis=0)])
    x = np.pad(x, ((0, 0), (0, 0), (0, H * cut.padded // units - H), (0, 0), (0, 0)))
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, PICTURES), lambda index: x[index])


def fetch_pictures(x_BTHWC: jax.Array, clips: int, units: int) -> np.ndarray:
    """On the host, without what `place_pictures` had added; on every process the whole."""
    x = np.asarray(x_BTHWC if x_BTHWC.is_fully_addressable else multihost_utils.process_allgather(x_BTHWC, tiled=True))
    cut = cut_of(units)
    return x if cut is None else x[:clips, :, : x.shape[2] * units // cut.padded]


def place_parameters(params):
    """Parameters of the host, whole on every device of the mesh in use, or on the one device."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.device_put(params)
    whole = NamedSharding(mesh, REPLICATED)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, whole, lambda index: x[index]), params)

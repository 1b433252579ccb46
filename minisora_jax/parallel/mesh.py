"""The device mesh, and the table of named PartitionSpecs.

One explicit mesh (`AxisType.Explicit`): every array's type says how it is laid out, so a wrong layout is a
trace-time error and not a slow program. Axes, 1 by default, so that one CPU core and a pod run the same code:

    data     replicas of the model, each with its own packed rows; over DCN on several slices
    fsdp     rows, too; parameters, EMA and optimiser state are cut up over fsdp, ring and ulysses together
    ring     a row's tokens: keys and values go round (parallel/ring.py)
    ulysses  a row's tokens, exchanged for heads in attention
    tensor   heads, and the columns of an MLP
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "ring", "ulysses", "tensor")
ROWS = ("data", "fsdp")  # the axes that divide a batch's rows
SEQUENCE = ("ring", "ulysses")  # those that divide a row's tokens, ulysses innermost
SHARDS = ("fsdp", "ring", "ulysses")  # those that parameters are cut up over

# ---- The table of layouts
BATCH = P(ROWS)  # (B, ...): rows divided; captions, and pixels of the codec
TOKENS = P(ROWS, SEQUENCE)  # (B, S, ...): rows and their tokens divided
PICTURES = P(ROWS, None, SEQUENCE)  # (B, T, H, ...): clips, and the rows of their frames (parallel/halo.py)
REPLICATED = P()


def batch_specs(batch, *, accumulated: bool = False):
    """The PartitionSpec of each array of a batch: fields named ..._BS* are TOKENS, the rest are BATCH.

    `accumulated`: arrays are (A, B, ...), steps of accumulation in front, whole on every device.
    """

    def spec(path, x):
        name = getattr(path[-1], "name", "") if path else ""
        by = TOKENS if name.rpartition("_")[2].startswith("BS") else BATCH
        return P(None, *by) if accumulated else by

    return jax.tree_util.tree_map_with_path(spec, batch)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Size of each mesh axis; at most one may be -1, which takes the devices that are left."""

    data: int = -1
    fsdp: int = 1
    ring: int = 1
    ulysses: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        if sum(n == -1 for n in sizes.values()) > 1 or any(n == 0 or n < -1 for n in sizes.values()):
            raise ValueError(f"mesh={sizes}: axis sizes are positive, and at most one may be -1 (the devices left)")

    @classmethod
    def parse(cls, text: str) -> MeshConfig:
        """From "ring=4,ulysses=2"; what is left of the devices goes to data."""
        sizes = {}
        for entry in filter(None, text.split(",")):
            axis, _, size = entry.partition("=")
            if axis not in AXES or not size.removeprefix("-").isdigit():
                raise ValueError(f"mesh {text!r}: {entry!r} must be AXIS=SIZE with an axis of {', '.join(AXES)}")
            sizes[axis] = int(size)
        return cls(**sizes)

    def sizes(self, devices: int) -> tuple[int, ...]:
        """Axis sizes on `devices` devices; ValueError where they do not multiply to it."""
        sizes = list(dataclasses.astuple(self))
        fixed = math.prod(n for n in sizes if n != -1)
        if devices % fixed or (-1 not in sizes and fixed != devices):
            named = ", ".join(f"{a}={n}" for a, n in zip(AXES, sizes))
            raise ValueError(f"mesh {named} needs a multiple of {fixed} devices; {devices} are here")
        return tuple(devices // fixed if n == -1 else n for n in sizes)


def make_mesh(config: MeshConfig = MeshConfig(), devices=None) -> jax.sharding.Mesh:
    """The explicit mesh over `devices` (all of them by default). Use it as `with jax.set_mesh(mesh):`.

    On several TPU slices the data axis is laid over the slow network between them, all others within a slice.
    """
    devices = list(devices if devices is not None else jax.devices())
    sizes = config.sizes(len(devices))
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if sizes[0] % slices:
        raise ValueError(f"mesh.data={sizes[0]} must be a multiple of the {slices} slices: only data spans slices")
    within, between = (sizes[0] // slices, *sizes[1:]), (slices, *(1 for _ in sizes[1:]))
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def require_divisible(mesh: jax.sharding.Mesh, *, rows: int, tokens: int = 0, heads: int = 0) -> None:
    """ValueError unless a batch of `rows` rows of `tokens` tokens, and a model of `heads` heads, fit the mesh."""
    for name, count, axes in (
        ("pack.rows (a codec's batch)", rows, ROWS),
        ("pack.tokens", tokens, SEQUENCE),
        ("dit.heads", heads, ("ulysses", "tensor")),
    ):
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if count % parts:
            named = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in axes)
            raise ValueError(f"{name}={count} cannot be divided over {named}: make it a multiple of {parts}")


def shard(x: jax.Array, spec: P) -> jax.Array:
    """x laid out as `spec` on the mesh in use; x itself where no mesh is set."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.sharding.reshard(x, spec)


def like(x: jax.Array, other: jax.Array) -> jax.Array:
    """x with its leading axes laid out as those of `other`: for constants and random draws, born replicated."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    spec = jax.typeof(other).sharding.spec
    return jax.sharding.reshard(x, P(*(spec[i] if i < len(spec) else None for i in range(x.ndim))))


def draw(sample, key: jax.Array, other: jax.Array) -> jax.Array:
    """sample(key, shape) of the shape of `other`, laid out as it; the same numbers on any mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return sample(key, other.shape)
    return sample(key, other.shape, out_sharding=jax.typeof(other).sharding)


def lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    """table[ids], laid out as `ids`; (V, D), (...) -> (..., D). The table must be whole on every device."""
    if jax.sharding.get_abstract_mesh().empty:
        return table[ids]
    return table.at[ids].get(out_sharding=P(*jax.typeof(ids).sharding.spec, None))


def take_in_row(x_BSP: jax.Array, index_BS: jax.Array) -> jax.Array:
    """x[b, index[b, s]], laid out as x. Rows that lie on several devices are gathered for it: for narrow x."""
    local = lambda x, index: jnp.take_along_axis(x, index[..., None], axis=1)
    if jax.sharding.get_abstract_mesh().empty:
        return local(x_BSP, index_BS)
    specs = jax.typeof(x_BSP).sharding.spec, jax.typeof(index_BS).sharding.spec
    whole = lambda x: x if specs[0][1] is None else jax.lax.all_gather(x, specs[0][1], axis=1, tiled=True)
    on_device = lambda x, index: local(whole(x), index)
    return jax.shard_map(on_device, in_specs=specs, out_specs=specs[0], check_vma=False)(x_BSP, index_BS)


def unfold(x: jax.Array, other: jax.Array) -> jax.Array:
    """(B * T, ...) -> (B, T, ...), B laid out as in `other` (B, ...): undoes a fold of frames into rows."""
    shape = (other.shape[0], -1, *x.shape[1:])
    spec = None if jax.sharding.get_abstract_mesh().empty else P(jax.typeof(other).sharding.spec[0])
    return jnp.reshape(x, shape, out_sharding=spec)


def parameter_spec(shape: tuple[int, ...], axis: int, tensor: int | None = None) -> P:
    """Cut `shape` along `axis` over SHARDS, or over fsdp alone, and along `tensor` over that axis of the mesh.

    An axis that is not divided without remainder stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    spec: list = [None] * len(shape)
    if mesh.empty:
        return P(*spec)
    for axes in (SHARDS, SHARDS[:1]):
        if shape[axis] % math.prod(mesh.shape[a] for a in axes) == 0:
            spec[axis] = axes
            break
    if tensor is not None and shape[tensor] % mesh.shape["tensor"] == 0:
        spec[tensor] = "tensor"
    return P(*spec)


def with_shardings(abstract, mesh: jax.sharding.Mesh):
    """A tree of abstract arrays with the layout that each was given, on the mesh's own devices."""

    def put_batch(x):  # eval_shape leaves out the sharding of what is replicated
        spec = x.sharding.spec if x.sharding is not None else REPLICATED
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(put_batch, abstract)


def host_rows(rows: int, mesh: jax.sharding.Mesh | None = None) -> list[int]:
    """The rows of a batch that this process must load: those its devices hold any token of. All without a mesh.

    Along the sequence axes a row may lie on several processes, all of which load it. `mesh` is the one in use.
    """
    mesh = jax.sharding.get_mesh() if mesh is None else mesh
    if mesh.empty:
        return list(range(rows))
    held = NamedSharding(mesh, BATCH).addressable_devices_indices_map((rows,)).values()
    return sorted({row for (cut,) in held for row in range(rows)[cut]})


def to_global(batch, mesh: jax.sharding.Mesh, specs=None):
    """A pytree of NumPy arrays, whose rows are this process's `host_rows`, as global arrays on the mesh.

    `specs`, one for all or a tree of them, is by default that of an accumulated batch, (A, B, ...).
    """
    specs = batch_specs(batch, accumulated=True) if specs is None else specs
    if isinstance(specs, P):
        specs = jax.tree.map(lambda _, spec=specs: spec, batch)
    cuts = math.prod(mesh.shape[axis] for axis in ROWS)
    cuts_here = len(host_rows(cuts, mesh))

    def put(x, spec):
        axis = spec.index(ROWS)
        rows = x.shape[axis] // cuts_here * cuts
        at = {row: i for i, row in enumerate(host_rows(rows, mesh))}

        def piece(index):
            first, last, _ = index[axis].indices(rows)
            return x[(*index[:axis], slice(at[first], at[first] + last - first), *index[axis + 1 :])]

        shape = (*x.shape[:axis], rows, *x.shape[axis + 1 :])
        return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), piece)

    return jax.tree.map(put, batch, specs)


def put_batch(batch, specs=None):
    """A batch (B, ...) of NumPy arrays on the mesh in use, by `layout`; on the default device where none is set."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.tree.map(jnp.asarray, batch)
    return to_global(batch, mesh, batch_specs(batch) if specs is None else specs)


def params_on_mesh(params, abstract):
    """Parameters on the mesh in use, laid out as `abstract()` has them; themselves where none is set."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return params
    return jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), params, with_shardings(abstract(), mesh))


def cuts() -> tuple[int, int]:
    """Into how many parts the mesh in use divides (rows, a row's tokens)."""
    mesh = jax.sharding.get_mesh()
    return tuple(1 if mesh.empty else math.prod(mesh.shape[axis] for axis in axes) for axes in (ROWS, SEQUENCE))

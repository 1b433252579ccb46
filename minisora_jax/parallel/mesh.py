"""The device mesh, and the table of named PartitionSpecs.

There is one explicit mesh (`AxisType.Explicit`): the type of every array includes its sharding, so a wrong sharding is
a trace-time error and not a slow program. Axes are 1 by default, so one CPU core and a pod run the same code:

    data     replicas of the model, each with its own packed rows; over DCN between slices
    fsdp     more rows; parameters, EMA and optimiser state are sharded over fsdp, ring and ulysses together
    ring     tokens of a row: keys and values travel round the ring (parallel/ring.py)
    ulysses  tokens of a row, exchanged for heads in attention
    tensor   heads, and the columns of an MLP
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "ring", "ulysses", "tensor")
ROWS = ("data", "fsdp")  # the axes that divide a batch's rows
SEQUENCE = ("ring", "ulysses")  # the axes that divide a row's tokens, ulysses innermost
SHARDS = ("fsdp", "ring", "ulysses")  # the axes that parameters are sharded over

# ---- The table of shardings
BATCH = P(ROWS)  # (B, ...): rows divided; captions and tables over slots
TOKENS = P(ROWS, SEQUENCE)  # (B, S, ...): rows and their tokens divided
FRAMES = P(ROWS, None, SEQUENCE)  # (B, T, H, ...): clips and the height of their frames divided (parallel/halo.py)
REPLICATED = P()


def batch_specs(batch: Any, *, accumulated: bool = False) -> Any:
    """The PartitionSpec of each array of a batch. Fields named ..._BS* are TOKENS, the others are BATCH.

    Args:
        batch: A tree of arrays (B, ...).
        accumulated: Arrays are (A, B, ...), with A microbatches whole on every device.
    """

    def spec(path, x):
        name = getattr(path[-1], "name", "") if path else ""
        by = TOKENS if name.rpartition("_")[2].startswith("BS") else BATCH
        return P(None, *by) if accumulated else by

    return jax.tree_util.tree_map_with_path(spec, batch)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Size of each mesh axis. At most one may be -1: it takes the remaining devices.

    Raises:
        ValueError: A size is 0 or below -1, or several sizes are -1.
    """

    data: int = -1  # replicas; on several slices the slow network between them
    fsdp: int = 1  # replicas that share the states: each device holds a part
    ring: int = 1  # a row's tokens, by ring attention
    ulysses: int = 1  # a row's tokens, exchanged for heads in attention
    tensor: int = 1  # heads and mlp

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        if sum(n == -1 for n in sizes.values()) > 1 or any(n == 0 or n < -1 for n in sizes.values()):
            raise ValueError(
                f"mesh={sizes}: axis sizes must be positive, and at most one may be -1 (the remaining devices)"
            )

    @classmethod
    def parse(cls, text: str) -> MeshConfig:
        """The mesh of a text such as "ring=4,ulysses=2". The data axis takes the remaining devices.

        Raises:
            ValueError: The text has an unknown axis, or a size that is no number.
        """
        sizes = {}
        for entry in filter(None, text.split(",")):
            axis, _, size = entry.partition("=")
            if axis not in AXES or not size.removeprefix("-").isdigit():
                raise ValueError(f"mesh {text!r}: {entry!r} must be AXIS=SIZE with an axis of {', '.join(AXES)}")
            sizes[axis] = int(size)
        return cls(**sizes)

    def sizes(self, devices: int) -> tuple[int, ...]:
        """The size of each axis on `devices` devices.

        Raises:
            ValueError: The sizes do not multiply to the number of devices.
        """
        sizes = list(dataclasses.astuple(self))
        fixed = math.prod(n for n in sizes if n != -1)
        if devices % fixed or (-1 not in sizes and fixed != devices):
            axes = ", ".join(f"{a}={n}" for a, n in zip(AXES, sizes))
            count = f"a multiple of {fixed}" if -1 in sizes else str(fixed)
            raise ValueError(f"mesh {axes} needs {count} devices; {devices} are here")
        return tuple(devices // fixed if n == -1 else n for n in sizes)


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The explicit mesh over `devices`. Use it as `with jax.set_mesh(mesh):`.

    On several TPU slices the data axis spans the slow network between slices. All other axes stay within a slice.

    Args:
        config: Size of each axis.
        devices: None: all devices.

    Raises:
        ValueError: The sizes do not fit the devices or their slices.
    """
    devices = list(devices if devices is not None else jax.devices())
    sizes = config.sizes(len(devices))
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if sizes[0] % slices:
        raise ValueError(
            f"mesh.data={sizes[0]} must be a multiple of the {slices} slices: only the data axis spans slices"
        )
    within, between = (sizes[0] // slices, *sizes[1:]), (slices, *(1 for _ in sizes[1:]))
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def require_divisible(mesh: jax.sharding.Mesh, *, rows: int, tokens: int = 0, heads: int = 0) -> None:
    """Check that a batch and a model divide over the mesh.

    Args:
        mesh: The mesh.
        rows: B.
        tokens: S; 0: not checked.
        heads: Attention heads of the model; 0: not checked.

    Raises:
        ValueError: One of the numbers does not divide.
    """
    for name, count, axes in (
        ("pack.rows (a codec's batch)", rows, ROWS),
        ("pack.tokens", tokens, SEQUENCE),
        ("dit.heads", heads, ("ulysses", "tensor")),
    ):
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if count % parts:
            sizes = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in axes)
            raise ValueError(f"{name}={count} cannot be divided over {sizes}: make it a multiple of {parts}")


def shard(x: jax.Array, spec: P) -> jax.Array:
    """x with the sharding `spec` on the mesh in use; x itself without a mesh."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.sharding.reshard(x, spec)


def like(x: jax.Array, other: jax.Array) -> jax.Array:
    """x with its leading axes sharded like those of `other`. For constants and random draws, which are replicated."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    spec = jax.typeof(other).sharding.spec
    return jax.sharding.reshard(x, P(*(spec[i] if i < len(spec) else None for i in range(x.ndim))))


def draw(sample: Callable[..., jax.Array], key: jax.Array, other: jax.Array) -> jax.Array:
    """sample(key, shape) with the shape and sharding of `other`. The numbers are the same on any mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return sample(key, other.shape)
    return sample(key, other.shape, out_sharding=jax.typeof(other).sharding)


def lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    """table[ids], sharded like `ids`: (V, D), (...) -> (..., D). The table must be whole on every device."""
    if jax.sharding.get_abstract_mesh().empty:
        return table[ids]
    return table.at[ids].get(out_sharding=P(*jax.typeof(ids).sharding.spec, None))


def take_in_row(x_BSP: jax.Array, index_BS: jax.Array) -> jax.Array:
    """x[b, index[b, s]], sharded like x. Rows on several devices are gathered, so use it for narrow x only."""
    local = lambda x, index: jnp.take_along_axis(x, index[..., None], axis=1)
    if jax.sharding.get_abstract_mesh().empty:
        return local(x_BSP, index_BS)
    specs = jax.typeof(x_BSP).sharding.spec, jax.typeof(index_BS).sharding.spec
    gather = lambda x: x if specs[0][1] is None else jax.lax.all_gather(x, specs[0][1], axis=1, tiled=True)
    on_device = lambda x, index: local(gather(x), index)
    return jax.shard_map(on_device, in_specs=specs, out_specs=specs[0], check_vma=False)(x_BSP, index_BS)


def unfold(x: jax.Array, other: jax.Array) -> jax.Array:
    """(B * T, ...) -> (B, T, ...), with B sharded as in `other` (B, ...). It undoes a fold of frames into rows."""
    shape = (other.shape[0], -1, *x.shape[1:])
    spec = None if jax.sharding.get_abstract_mesh().empty else P(jax.typeof(other).sharding.spec[0])
    return jnp.reshape(x, shape, out_sharding=spec)


def parameter_spec(shape: tuple[int, ...], axis: int, tensor: int | None = None) -> P:
    """The sharding of a parameter on the mesh in use.

    Args:
        shape: Shape of the parameter.
        axis: Axis that is divided over SHARDS, or over fsdp alone if SHARDS leaves a remainder.
        tensor: Axis that is divided over the tensor axis of the mesh, or None.

    Returns:
        The spec. An axis that does not divide stays whole.
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


def with_shardings(abstract: Any, mesh: jax.sharding.Mesh) -> Any:
    """A tree of abstract arrays with the same specs, as shardings on the devices of `mesh`."""

    def with_sharding(x):
        spec = x.sharding.spec if x.sharding is not None else REPLICATED  # eval_shape drops replicated shardings
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(with_sharding, abstract)


def host_rows(rows: int, mesh: jax.sharding.Mesh | None = None) -> list[int]:
    """The rows of a batch that this process must load, because its devices hold some of their tokens.

    Several processes load the same row if its tokens are divided over them. Without a mesh a process loads all rows.

    Args:
        rows: B on all processes together.
        mesh: None: the mesh in use.
    """
    mesh = jax.sharding.get_mesh() if mesh is None else mesh
    if mesh.empty:
        return list(range(rows))
    indices = NamedSharding(mesh, BATCH).addressable_devices_indices_map((rows,)).values()
    return sorted({row for index in indices if index is not None for row in range(rows)[index[0]]})


def to_global(batch: Any, mesh: jax.sharding.Mesh, specs: Any = None) -> Any:
    """NumPy arrays of this process as global arrays on the mesh.

    Args:
        batch: A tree of arrays, whose rows are the `host_rows` of this process.
        mesh: The mesh.
        specs: One PartitionSpec, or a tree of them. None: the specs of an accumulated batch (A, B, ...).
    """
    specs = batch_specs(batch, accumulated=True) if specs is None else specs
    if isinstance(specs, P):
        specs = jax.tree.map(lambda _, spec=specs: spec, batch)
    shards = math.prod(mesh.shape[axis] for axis in ROWS)
    own_shards = len(host_rows(shards, mesh))

    def put(x, spec):
        axis = spec.index(ROWS)
        rows = x.shape[axis] // own_shards * shards
        at = {row: i for i, row in enumerate(host_rows(rows, mesh))}

        def piece(index):
            first, last, _ = index[axis].indices(rows)
            return x[(*index[:axis], slice(at[first], at[first] + last - first), *index[axis + 1 :])]

        shape = (*x.shape[:axis], rows, *x.shape[axis + 1 :])
        return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), piece)

    return jax.tree.map(put, batch, specs)


def put_batch(batch: Any, specs: Any = None) -> Any:
    """A batch (B, ...) of NumPy arrays on the mesh in use; on the default device without a mesh.

    Args:
        batch: A tree of arrays, with all rows, the same on every process.
        specs: A PartitionSpec, or a tree of them; None: `batch_specs(batch)`.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.tree.map(jnp.asarray, batch)
    specs = jax.tree.map(lambda _: specs, batch) if isinstance(specs, P) else specs or batch_specs(batch)
    return jax.tree.map(lambda x, spec: put_whole(x, NamedSharding(mesh, spec)), batch, specs)


def put_whole(x: Any, sharding: NamedSharding) -> jax.Array:
    """An array that every process has, on devices of all processes."""
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def params_on_mesh(params: Any, abstract: Callable[[], Any]) -> Any:
    """Parameters on the mesh in use, with the shardings of `abstract()`. Without a mesh, or there already: as given.

    Parameters that `abstract()` does not have, such as adapters, are whole on every device.
    """
    mesh, first = jax.sharding.get_mesh(), jax.tree.leaves(params)[0]
    if mesh.empty or getattr(getattr(first, "sharding", None), "mesh", None) == mesh:
        return params
    places = dict(jax.tree_util.tree_flatten_with_path(with_shardings(abstract(), mesh))[0])
    replicated = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, REPLICATED))
    return jax.tree_util.tree_map_with_path(lambda at, x: put_whole(x, places.get(at, replicated).sharding), params)


def in_host_memory(params: Any) -> Any:
    """Parameters moved to the memory of their devices' hosts, with the same shardings."""
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind("pinned_host")), params)


def on_device(params: Any) -> Any:
    """Copies on the devices of those parameters that are `in_host_memory`, and the others as they are."""

    def fetched(x: Any) -> Any:
        waits = getattr(getattr(x, "sharding", None), "memory_kind", None) == "pinned_host"
        return jax.device_put(x, x.sharding.with_memory_kind("device")) if waits else x

    return jax.tree.map(fetched, params)


def cuts() -> tuple[int, int]:
    """The number of parts that the mesh in use divides (rows, tokens of a row) into."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return 1, 1
    return math.prod(mesh.shape[axis] for axis in ROWS), math.prod(mesh.shape[axis] for axis in SEQUENCE)

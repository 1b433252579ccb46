"""The device mesh, and the table of named PartitionSpecs.

One explicit mesh (`AxisType.Explicit`): every array's type says how it is laid out, so a wrong layout is a
trace-time error and not a slow program. Axes, 1 by default, so that one CPU core and a pod run the same code:

    data     replicas of the model, each with its own packed rows (over DCN on several slices)
    fsdp     parameters, EMA and optimiser state cut up; rows are divided over it too
    ring, ulysses, tensor   sequence and head axes of long-context runs
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "ring", "ulysses", "tensor")

ROWS = ("data", "fsdp")  # the axes that divide a batch's rows
BATCH = P(ROWS)  # (B, ...): rows divided
MICROBATCHES = P(None, ROWS)  # (A, B, ...): accumulation steps whole, rows divided
REPLICATED = P()
WEIGHT_IN_OUT = P("fsdp", None)  # (in, out): parameters are cut along their input axis
STACKED_WEIGHT = P(None, "fsdp", None)  # (layer, in, out)


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
        for axis in ("ring", "ulysses", "tensor"):
            if sizes[axis] != 1:
                raise ValueError(f"mesh.{axis}={sizes[axis]}: only the axes data and fsdp are supported yet; use 1")

    def sizes(self, devices: int) -> tuple[int, ...]:
        """Axis sizes on `devices` devices; ValueError where they do not multiply to it."""
        sizes = list(dataclasses.astuple(self))
        fixed = math.prod(n for n in sizes if n != -1)
        if devices % fixed or (-1 not in sizes and fixed != devices):
            named = ", ".join(f"{a}={n}" for a, n in zip(AXES, sizes))
            raise ValueError(f"mesh {named} needs a multiple of {fixed} devices; {devices} are here")
        return tuple(devices // fixed if n == -1 else n for n in sizes)


def make_mesh(config: MeshConfig = MeshConfig(), devices=None) -> jax.sharding.Mesh:
    """The explicit mesh over `devices` (all of them by default). Use it as `with jax.set_mesh(mesh):`."""
    devices = devices if devices is not None else jax.devices()
    sizes = config.sizes(len(devices))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=devices)


def require_divisible(rows: int, mesh: jax.sharding.Mesh) -> None:
    """ValueError unless `rows` of a batch can be divided evenly over the hosts and the mesh."""
    parts = math.lcm(math.prod(mesh.shape[axis] for axis in ROWS), jax.process_count())
    if rows % parts:
        named = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in ROWS)
        raise ValueError(
            f"{rows} rows a batch cannot be divided over mesh {named} and {jax.process_count()} hosts: make "
            f"pack.rows (a codec's batch) a multiple of {parts}"
        )


def shard(x: jax.Array, spec: P) -> jax.Array:
    """x laid out as `spec` on the mesh in use; x itself where no mesh is set."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.sharding.reshard(x, spec)


def like(x: jax.Array, other: jax.Array) -> jax.Array:
    """x with its leading axes laid out as those of `other`: for constants and random draws, born replicated."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    spec = jax.typeof(other).sharding.spec
    return jax.sharding.reshard(x, P(*(spec[i] if i < len(spec) else None for i in range(x.ndim))))


def lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    """table[ids], laid out as `ids`; (V, D), (...) -> (..., D). The table must be whole on every device."""
    if jax.sharding.get_abstract_mesh().empty:
        return table[ids]
    return table.at[ids].get(out_sharding=P(*jax.typeof(ids).sharding.spec, None))


def unfold(x: jax.Array, other: jax.Array) -> jax.Array:
    """(B * T, ...) -> (B, T, ...), B laid out as in `other` (B, ...): undoes a fold of frames into rows."""
    shape = (other.shape[0], -1, *x.shape[1:])
    spec = None if jax.sharding.get_abstract_mesh().empty else P(jax.typeof(other).sharding.spec[0])
    return jnp.reshape(x, shape, out_sharding=spec)


def fsdp_spec(shape: tuple[int, ...], axis: int) -> P:
    """Cut `shape` along `axis` over fsdp where it divides, else replicate."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or shape[axis] % mesh.shape["fsdp"]:
        return P(*(None for _ in shape))
    return P(*("fsdp" if i == axis % len(shape) else None for i in range(len(shape))))


def laid_out(abstract, mesh: jax.sharding.Mesh):
    """A tree of `jax.ShapeDtypeStruct`s with the layouts their initialisers gave them, on the mesh's own devices.

    It is what to restore onto the mesh: `jax.eval_shape` under `jax.set_mesh` knows the specs, and not the devices.
    """

    def on(x):
        spec = x.sharding.spec if x.sharding is not None else REPLICATED
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(on, abstract)


def place(batch, mesh: jax.sharding.Mesh, spec: P = MICROBATCHES):
    """A pytree of this host's rows (NumPy) as global arrays laid out as `spec`."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)

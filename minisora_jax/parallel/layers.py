"""Work on whole matrices of sharded parameters: each device has the whole matrices of its share of the layers.

    (layers, in, out), in or out divided  ->  whole matrices, layers divided  ->  (layers, in, out), divided as before

Two all-to-alls move the matrices, and no device ever holds more than its share of them, or one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from minisora_jax.parallel.mesh import SHARDS, like, shard


def map_layers(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """function(x[i]) for each i, stacked and sharded like x.

    Args:
        function: Keeps the shape.
        x: A parameter with its layers along the first axis, which is not divided.
    """
    every = lambda x: jax.lax.map(function, x)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return every(x)
    layers, parts = x.shape[0], math.prod(mesh.shape[axis] for axis in SHARDS)
    # Zeros fill the layers up to a multiple of the devices.
    padded = jnp.pad(x, [(0, -layers % parts), *[(0, 0)] * (x.ndim - 1)])
    spec = P(SHARDS, *(None,) * (x.ndim - 1))
    mapped = jax.shard_map(every, in_specs=spec, out_specs=spec, check_vma=False)(shard(padded, spec))
    return like(mapped, padded)[:layers]

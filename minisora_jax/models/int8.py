"""Weights of 8 bits: a kernel is whole numbers, and each of its outputs has a scale.

    params/blocks/joint/mlp/in/kernel    int8, as of float32
    int8/blocks/joint/mlp/in/scale       float32 (layers, outputs)

`models.layers.Einsum` multiplies its products by the scale, if there is one. Other parameters keep their type.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import PartitionSpec as P

from minisora_jax.io.model_dir import onto_devices
from minisora_jax.models.lora import Kernel, kernels
from minisora_jax.parallel.mesh import shard

# Nearly all weights. The few others, above all those that make adaLN's modulation, cost more of the precision.
IN_BLOCKS = r"^blocks/.*(attention|mlp)/"


def held_as_int8(params: Any, which: str = "all") -> Any:
    """{"params": ...} as `jax.ShapeDtypeStruct`s, with kernels of int8 and their scales in the collection "int8".

    Args:
        params: Arrays or `jax.ShapeDtypeStruct`s.
        which: The kernels, see `LoraConfig.targets`.
    """
    held: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    for path, kernel in kernels(params, which).items():
        held[f"params/{path}/kernel"] = typed(held[f"params/{path}/kernel"], jnp.int8)
        held[f"int8/{path}/scale"] = jax.ShapeDtypeStruct(kernel.layers + kernel.outputs, jnp.float32)
    return traverse_util.unflatten_dict(held, sep="/")


def read_as_int8(stored: Any, places: Any, directory: str | Path) -> Any:
    """The parameters of a stored model on devices. A kernel is quantised as soon as it is read, in its stored type.

    Args:
        stored: What `open_model` returned.
        places: `held_as_int8`; arrays without a sharding go to the first device.
        directory: The model's, for messages.
    """
    alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    read = lambda x, at, dtype: onto_devices(
        x, jax.ShapeDtypeStruct(x.shape, dtype, sharding=at.sharding or alone), directory
    )
    sources: dict[str, Any] = traverse_util.flatten_dict(stored, sep="/")
    flat: dict[str, Any] = traverse_util.flatten_dict({"params": places["params"]}, sep="/")
    by_path, result = kernels({"params": places["params"]}), {}
    for name, place in flat.items():
        path, source = name.removeprefix("params/").removesuffix("/kernel"), sources[name]
        if place.dtype == jnp.int8:
            w = read(source, place, source.dtype)
            result[name], result[f"int8/{path}/scale"] = quantized(w, by_path[path])
        else:
            result[name] = read(source, place, place.dtype)
    return traverse_util.unflatten_dict(result, sep="/")


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
def quantized(w: jax.Array, kernel: Kernel) -> tuple[jax.Array, jax.Array]:
    """(int8, the scale of each output): the weights are their product, up to 1 / 254 of an output's largest."""
    axes = tuple(range(len(kernel.layers), len(kernel.layers) + len(kernel.inputs)))
    scale = jnp.max(jnp.abs(w.astype(jnp.float32)), axis=axes, keepdims=True) / 127
    scale = jnp.where(scale == 0, 1.0, scale)
    return jnp.round(w / scale).astype(jnp.int8), shard(jnp.squeeze(scale, axes), P())


def typed(x: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    """The abstract array x with another type."""
    return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

"""Weights of 8 or 4 bits, for sampling and for the base of adapters. Arithmetic stays as it is.

    params/blocks/joint/mlp/in/kernel    int8: whole numbers; a scale for each output follows the product
                                         nf4:  4 bits and a scale for each 64 weights (models/nf4.py)
    int8/blocks/joint/mlp/in/scale       float32 (layers, outputs)
    nf4/blocks/joint/mlp/in/scale        float32, as the kernel, but with blocks along its last input axis

`models.layers.Einsum` reads the scales, if there are any. Other parameters keep their type.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from minisora_jax.io.model_dir import onto_devices
from minisora_jax.models import nf4
from minisora_jax.models.lora import Kernel, kernels
from minisora_jax.parallel.mesh import shard

# Nearly all weights. The few others, above all those that make adaLN's modulation, cost more of the precision.
IN_BLOCKS = r"^blocks/.*(attention|mlp)/"
FORMS = {"int8": jnp.int8, "nf4": jnp.uint4}


def held_as(form: str, params: Any, which: str = IN_BLOCKS) -> Any:
    """{"params": ...} as `jax.ShapeDtypeStruct`s, with kernels of a form and their scales in a collection of its name.

    Args:
        form: Of FORMS.
        params: Arrays or `jax.ShapeDtypeStruct`s.
        which: The kernels, see `LoraConfig.targets`.
    """
    held: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    for path, kernel in kernels(params, which).items():
        name = f"params/{path}/kernel"
        held[name] = typed(held[name], FORMS[form])
        held[f"{form}/{path}/scale"] = _scale(form, kernel, held[name].sharding)
    return traverse_util.unflatten_dict(held, sep="/")


def form_of(params: Any) -> str | None:
    """The form of some of the kernels; None where all are floats."""
    return next((form for form in FORMS if form in params), None)


def read_as(form: str, stored: Any, places: Any, directory: str | Path) -> Any:
    """The parameters of a stored model on devices. A kernel is quantised as soon as it is read, in its stored type.

    Args:
        form: Of FORMS.
        stored: What `open_model` returned.
        places: `held_as`; arrays without a sharding go to the first device.
        directory: The model's, for messages.
    """
    alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    read = lambda x, at, dtype: onto_devices(
        x, jax.ShapeDtypeStruct(x.shape, dtype, sharding=at.sharding or alone), directory
    )
    sources: dict[str, Any] = traverse_util.flatten_dict(stored, sep="/")
    flat: dict[str, Any] = traverse_util.flatten_dict({"params": places["params"]}, sep="/")
    by_path, result = kernels({"params": places["params"]}, "all"), {}
    for name, place in flat.items():
        path, source = name.removeprefix("params/").removesuffix("/kernel"), sources[name]
        if place.dtype == FORMS[form]:
            w = read(source, place, source.dtype)
            result[name], result[f"{form}/{path}/scale"] = quantized(form, w, by_path[path])
        else:
            result[name] = read(source, place, place.dtype)
    return traverse_util.unflatten_dict(result, sep="/")


@functools.partial(jax.jit, static_argnums=(0, 2), donate_argnums=1)
def quantized(form: str, w: jax.Array, kernel: Kernel) -> tuple[jax.Array, jax.Array]:
    """(the kernel in a form, its scales). int8 is up to 1 / 254 of an output's largest weight off."""
    if form == "nf4":
        return nf4.encode(w, _block_axis(kernel))
    axes = tuple(range(len(kernel.layers), len(kernel.layers) + len(kernel.inputs)))
    scale = jnp.max(jnp.abs(w.astype(jnp.float32)), axis=axes, keepdims=True) / 127
    scale = jnp.where(scale == 0, 1.0, scale)
    return jnp.round(w / scale).astype(jnp.int8), shard(jnp.squeeze(scale, axes), P())


def typed(x: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    """The abstract array x with another type."""
    return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)


def nbytes(x: Any) -> int:
    """Bytes of an array, or an abstract one, on devices, where two numbers of 4 bits share one."""
    return x.size * x.dtype.itemsize // (2 if x.dtype == jnp.uint4 else 1)


def _scale(form: str, kernel: Kernel, place: Any) -> jax.ShapeDtypeStruct:
    """The scales of a kernel with the sharding `place`."""
    if form == "int8":
        return jax.ShapeDtypeStruct(kernel.layers + kernel.outputs, jnp.float32)
    axis, shape = _block_axis(kernel), [*kernel.layers, *kernel.inputs, *kernel.outputs]
    shape[axis] //= nf4.block_of(shape[axis])
    if place is not None:
        place = NamedSharding(place.mesh, nf4.scale_spec(place.spec, axis, shape[axis]))
    return jax.ShapeDtypeStruct(tuple(shape), jnp.float32, sharding=place)


def _block_axis(kernel: Kernel) -> int:
    return len(kernel.layers) + len(kernel.inputs) - 1

"""Training of a part of a model: adapters over a frozen base (models/lora.py), or the parameters that a pattern names.

The frozen part is an input of the train step. It has no gradient, no moments and no average, and no checkpoint holds
it: it is read again from the model that the run starts from.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from minisora_jax.io.model_dir import check_shapes, onto_devices, open_model
from minisora_jax.io.safetensors import LazyArray
from minisora_jax.models.lora import LoraConfig, apart, scaled, together
from minisora_jax.models.quantized import FORMS, form_of, held_as, read_as, typed
from minisora_jax.parallel.mesh import with_shardings


@dataclasses.dataclass(frozen=True)
class Frozen:
    """The parameters that a run does not train. By default there are none.

    Attributes:
        abstract: Their `jax.ShapeDtypeStruct`s with shardings, under the mesh in use.
        load: From those, on devices, to their values.
        join: (trained parameters, frozen ones) -> all parameters of the model.
    """

    abstract: Callable[[], Any] = dict
    load: Callable[[Any], Any] = lambda abstract: abstract
    join: Callable[[Any, Any], Any] = lambda trained, frozen: trained

    def on(self, mesh: jax.sharding.Mesh) -> Any:
        """The frozen parameters on a mesh."""
        return self.load(with_shardings(self.abstract(), mesh))


NOTHING = Frozen()


def frozen_base(lora: LoraConfig, abstract: Callable[[], Any], init: str | Path | None) -> Frozen:
    """All parameters of a model, for the training of an adapter.

    Args:
        lora: Its `base` is the type of the kernels; with "nf4" of those in the blocks, and the others are bfloat16.
            Other parameters keep float32.
        abstract: The model's parameters as `jax.ShapeDtypeStruct`s, under the mesh in use.
        init: The model; None: it is only planned, and not loaded.
    """
    return Frozen(
        lambda: _held_as(lora.base, abstract()),
        functools.partial(load_frozen, init),
        lambda trained, frozen: frozen | {"lora": scaled(trained["lora"], lora.scale)},
    )


def frozen_rest(pattern: str, abstract: Callable[[], Any], init: str | Path | None) -> Frozen:
    """The parameters whose paths do not match a pattern. Arguments are those of `frozen_base`."""
    return Frozen(lambda: apart(abstract(), pattern)[1], functools.partial(load_frozen, init), together)


def adds_modules(pattern: str, abstract: Any, init: str | Path) -> bool:
    """Whether a model has none of the parameters that a pattern names: they are those of new modules.

    Raises:
        ValueError: The pattern names no parameter of the model to be.
    """
    stored, trained = (
        traverse_util.flatten_dict(x, sep="/") for x in (open_model(init)[0], apart(abstract, pattern)[0])
    )
    return not stored.keys() & trained.keys()


def read_part(init: str | Path, places: Any) -> Any:
    """Some parameters of an exported model on devices, with the types and shardings of `places`.

    Raises:
        ValueError: The model has not all of them in these shapes.
    """
    stored, _ = open_model(init)
    flat, wanted = (traverse_util.flatten_dict(tree, sep="/") for tree in (stored, places))
    part = traverse_util.unflatten_dict({n: x for n, x in flat.items() if n in wanted}, sep="/")
    check_shapes(part, places, init)
    return onto_devices(part, places, init)


def unchanged(init: str | Path) -> Any:
    """All parameters of an exported model as `LazyArray`s, to be written again."""
    read = lambda x: LazyArray(x.shape, x.dtype, lambda: [x[...]])
    return jax.tree.map(read, open_model(init)[0])


def _held_as(base: str, params: Any) -> Any:
    """The frozen parameters as `jax.ShapeDtypeStruct`s, see `frozen_base`."""
    if base == "int8":
        return held_as(base, params, "all")
    dtype = jnp.bfloat16 if base in FORMS else jnp.dtype(base)
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    held = {n: typed(x, dtype) if n.endswith("/kernel") else x for n, x in flat.items()}
    held = traverse_util.unflatten_dict(held, sep="/")
    return held_as(base, held) if base in FORMS else held


def load_frozen(init: str | Path | None, places: Any) -> Any:
    """The frozen parameters from an exported model. A kernel of 8 or 4 bits is quantised as soon as it is read."""
    if init is None:
        raise ValueError("there is no model to read the frozen parameters from")
    if (form := form_of(places)) is None:
        return read_part(init, places)
    stored, _ = open_model(init)
    check_shapes(stored, {"params": places["params"]}, init)
    return read_as(form, stored, places, init)

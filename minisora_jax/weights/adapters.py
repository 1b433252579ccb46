"""Adapters (LoRA) on disk: folders of ours, and published files. Read for a model, applied to it, merged into it.

A folder of ours has the kind "lora": A and B by our paths, the model's shape, and the hash of the model that it was
trained over. Where an adapter is read, its scale and its weight are in B.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from minisora_jax.data.conditioning import recorded_masks
from minisora_jax.diffusion.distillation import Distilled, recorded_distillation
from minisora_jax.io.hub import local_folder
from minisora_jax.io.model_dir import FILES, in_memory, is_finite, model_hash, open_model, require_kind, saved_settings
from minisora_jax.io.safetensors import LazyArray
from minisora_jax.models.dit import DiTConfig, abstract_params
from minisora_jax.models.lora import LoraConfig, delta, kernels, scaled, stacked
from minisora_jax.models.quantized import form_of
from minisora_jax.parallel.mesh import put_whole
from minisora_jax.weights.lora_names import read_published

log = logging.getLogger("minisora")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter in memory, as NumPy arrays."""

    lora: Any  # A and B by path, with scale and weight in B
    diff: Any  # whole changes by the paths of parameters, with the weight in them
    hash: str  # of the file or folder, and the weight
    base: str = ""  # hash of the model that it was trained over; "": not recorded
    distilled: Distilled = Distilled()  # how it was distilled
    masks: frozenset[str] = frozenset()  # the kinds of conditioning mask that it was trained with


def parse_adapter(text: str) -> tuple[str, float]:
    """(path, weight) of "DIR", "FILE" or "PATH:WEIGHT".

    Raises:
        ValueError: The text is empty, or the weight is not finite.
    """
    if not text:
        raise ValueError("--lora '' names no adapter")
    path, colon, number = text.rpartition(":")
    if not colon or not path or Path(text).exists():
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        return text, 1.0
    if not math.isfinite(weight):
        raise ValueError(f"--lora {text}: the weight must be a finite number")
    return path, weight


def read_adapter(text: str, dit: DiTConfig, model: str | Path) -> Adapter:
    """The adapter that "PATH" or "PATH:WEIGHT" names: a folder of ours, or a published file.

    Args:
        text: See `parse_adapter`.
        dit: The model that it is applied to.
        model: That model's name, for messages.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no adapter, an adapter of another model, or damaged. The message names what differs.
    """
    path, weight = parse_adapter(text)
    where = Path(local_folder(path))
    if not where.exists():
        raise FileNotFoundError(f"there is no adapter {where}")
    base, distilled, masks = "", Distilled(), None
    if where.is_dir() and all((where / name).exists() for name in FILES):
        tree, config = _own(where)
        digest, training = model_hash(where), config.get("training")
        base = str(training.get("base", "")) if isinstance(training, dict) else ""
        distilled, masks = recorded_distillation(config, where), recorded_masks(config, where)
    else:
        tree, digest = read_published(where, dit), _file_hash(where)
    _check(tree, dit, where, model)
    lora = jax.tree.map(np.asarray, scaled(tree.get("lora", {}), weight))
    diff = jax.tree.map(lambda x: x * np.float32(weight), tree.get("diff", {}))
    return Adapter(lora, diff, f"{digest}:{weight:g}", base, distilled, masks or frozenset())


def adapter_settings(directory: str | Path) -> tuple[Any, LoraConfig, DiTConfig, dict]:
    """(the stored tree, its LoRA's settings, the model's shape, the whole config) of an adapter's folder of ours."""
    stored, config = open_model(directory)
    require_kind(config, "lora", directory)
    lora = saved_settings(LoraConfig, config, "lora", directory)
    return stored, lora, saved_settings(DiTConfig, config, "dit", directory), config


def _own(directory: Path) -> tuple[Any, dict]:
    stored, lora, _, config = adapter_settings(directory)
    tree = in_memory(stored, directory, "float32")
    return tree | {"lora": scaled(tree.get("lora", {}), lora.scale)}, config


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def _flat(tree: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")


def _check(tree: Any, dit: DiTConfig, path: Path, model: str | Path) -> None:
    """Raise ValueError unless every A, B and whole change fits a parameter of the model."""
    abstract = abstract_params(dit)
    every, shapes = kernels(abstract), _flat(abstract["params"])
    flat = _flat(tree)
    other = f"{path} is an adapter of another model than {model}: "
    for name, leaf in flat.items():
        kind, _, rest = name.partition("/")
        if kind == "diff":
            if rest not in shapes or shapes[rest].shape != leaf.shape:
                wanted = shapes[rest].shape if rest in shapes else "no such parameter"
                raise ValueError(f"{other}it changes {rest} of shape {leaf.shape}, and the model has {wanted}")
            continue
        kernel_path, _, part = rest.rpartition("/")
        a = flat.get(f"lora/{kernel_path}/a")
        if kind != "lora" or part not in ("a", "b") or a is None or f"lora/{kernel_path}/b" not in flat:
            raise ValueError(f"{path} is no whole adapter: it has {name[:80]!r} alone")
        wanted = every[kernel_path].shapes(a.shape[-1])[part] if kernel_path in every and a.ndim else "no such kernel"
        if leaf.shape != wanted:
            raise ValueError(f"{other}{rest} has the shape {leaf.shape}, and the model wants {wanted}")
    if not flat:
        raise ValueError(f"{path} is an empty adapter")


def applied(params: Any, adapters: Sequence[Adapter]) -> Any:
    """A model's parameters with adapters beside them, on the devices of the parameters. Whole changes are added."""
    if not adapters:
        return params
    loras = [adapter.lora for adapter in adapters if adapter.lora]
    mesh = jax.sharding.get_mesh()
    place: Callable[[Any], Any] = jnp.asarray if mesh.empty else lambda x: put_whole(x, NamedSharding(mesh, P()))
    flat = _flat(params["params"])
    for adapter in adapters:
        for name, change in _flat(adapter.diff).items():
            if not jnp.issubdtype(flat[name].dtype, jnp.floating):
                form = form_of(params)
                raise ValueError(f"an adapter changes {name} as a whole, which {form} cannot hold: use another --dtype")
            flat[name] = _add(flat[name], jax.device_put(change, flat[name].sharding))
    result = params | {"params": traverse_util.unflatten_dict(flat, sep="/")}
    return result | ({"lora": jax.tree.map(lambda x: place(np.asarray(x)), stacked(loras))} if loras else {})


@jax.jit
def _add(x: jax.Array, change: jax.Array) -> jax.Array:
    return (x.astype(jnp.float32) + change).astype(x.dtype)


def merged(stored: Any, adapters: Sequence[Adapter]) -> Any:
    """A stored model's parameters with adapters folded in, as `LazyArray`s of the stored types.

    A stack of layers is read and changed layer by layer, in float32. Reading one raises ValueError if the sum is not
    finite in the stored type.
    """
    thin = _flat(jax.tree.map(np.asarray, stacked([a.lora for a in adapters if a.lora])))
    whole = [_flat(adapter.diff) for adapter in adapters]

    def lazy(name: str, leaf: Any) -> LazyArray:
        path = name.removesuffix("/kernel")
        a, b = (thin.get(f"{path}/{part}") if path != name else None for part in ("a", "b"))
        changes = [tree[name] for tree in whole if name in tree]
        layered = name.startswith("blocks/")

        def parts() -> Any:
            for i in range(leaf.shape[0]) if layered else [...]:
                x = np.asarray(leaf[i], np.float32)
                with np.errstate(over="ignore", invalid="ignore"):
                    x = x + delta(a[i], b[i], False).reshape(x.shape) if a is not None and b is not None else x
                    x = functools.reduce(np.add, (change[i] for change in changes), x).astype(leaf.dtype)
                if not is_finite(x):
                    raise ValueError(f"merged, {name} has NaN or infinite numbers in {leaf.dtype}: give lower weights")
                yield x

        plain = lambda: [leaf[...]]
        return LazyArray(leaf.shape, leaf.dtype, parts if a is not None or changes else plain)

    return {
        "params": traverse_util.unflatten_dict({n: lazy(n, x) for n, x in _flat(stored["params"]).items()}, sep="/")
    }

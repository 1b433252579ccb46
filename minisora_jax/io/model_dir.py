"""Exported models: a directory with `model.safetensors` (names joined by "/") and `config.json`.

The hash of both names the model in latent caches and in the metadata of what it generates.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from minisora_jax.config import with_current_names
from minisora_jax.io.atomic import write_text
from minisora_jax.io.safetensors import LazyArray, StoredTensor, order_of, read_tensors, write_tensors
from minisora_jax.parallel.processes import is_main, parts_of


def export_model(
    directory: str | Path, params: Any, config: dict, *, dtype: str | None = "float32", progress: str = ""
) -> str:
    """Write params and config to `directory`, each file atomically, and return the model's hash.

    Leaves are arrays, on the host or on devices, or `LazyArray`s; they are fetched and written one after another, so
    that memory holds one, of lazy ones one part. `dtype` None keeps the leaves'. `progress` names a bar.

    Of arrays that several processes hold, all must call it: the main process writes, the others give their parts, and
    get "" for a hash. Nobody waits for the file: `barrier` does.
    """
    directory = Path(directory)
    tensors = {k: _lazy(v, dtype) for k, v in traverse_util.flatten_dict(params, sep="/").items()}
    if not is_main():
        for name in order_of(tensors):
            list(tensors[name].parts())
        return ""
    write_tensors(directory / "model.safetensors", tensors, progress)
    write_text(directory / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    return model_hash(directory)


def _lazy(leaf: Any, dtype: str | None) -> LazyArray:
    if not isinstance(leaf, LazyArray):
        leaf = LazyArray(leaf.shape, leaf.dtype, functools.partial(parts_of, leaf))
    return leaf.astype(dtype or leaf.dtype)


def load_model(directory: str | Path, dtype: str | None = "float32") -> tuple[Any, dict]:
    """(NumPy params, config) of an exported model; FileNotFoundError names what is missing. `dtype` None: as stored."""
    stored, config = open_model(directory)
    return jax.tree.map(lambda x: np.array(x[...], dtype or x.dtype), stored), config


def open_model(directory: str | Path) -> tuple[Any, dict]:
    """`load_model` whose leaves stay on disk, as stored: `leaf[index]` reads them."""
    config = load_config(directory)
    stored: dict[str, StoredTensor] = read_tensors(Path(directory) / "model.safetensors")
    return traverse_util.unflatten_dict(stored, sep="/"), config


def load_params_onto(directory: str | Path, abstract: Any) -> Any:
    """The params of an exported model in `abstract`'s types and layouts: each device gets its part from the disk.

    Raises ValueError as `check_shapes` does, before anything is read.
    """
    stored, _ = open_model(directory)
    check_shapes(stored, abstract, directory)

    def place(x: StoredTensor, target: jax.ShapeDtypeStruct) -> jax.Array:
        part = lambda index: x[index].astype(target.dtype)
        return jax.make_array_from_callback(x.shape, target.sharding, part)

    return jax.tree.map(place, stored, abstract)


def check_shapes(stored: Any, abstract: Any, directory: str | Path) -> None:
    """ValueError for a parameter that is missing, left over or of another shape than is wanted here."""
    have, want = (traverse_util.flatten_dict(tree, sep="/") for tree in (stored, abstract))
    for name in sorted(have.keys() | want.keys()):
        theirs, ours = (str(tree[name].shape) if name in tree else "nothing" for tree in (have, want))
        if theirs != ours:
            raise ValueError(f"{directory} does not fit: for {name} it has {theirs}, the config wants {ours}")


def load_config(directory: str | Path) -> dict:
    directory = Path(directory)
    for name in ("model.safetensors", "config.json"):
        if not (directory / name).exists():
            raise FileNotFoundError(
                f"{directory} is not an exported model: {name} is missing. "
                f"`minisora train-vae` and `minisora train` write one to WORKDIR/export"
            )
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))


def config_fields(saved: dict) -> dict:
    """The fields of a frozen config from JSON, which has lists for tuples; under the names that they have today."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in with_current_names(saved).items()}


def model_hash(directory: str | Path) -> str:
    """First 16 hex digits of the SHA-256 over the model's weights and config."""
    digest = hashlib.sha256()
    for name in ("model.safetensors", "config.json"):
        with open(Path(directory) / name, "rb") as file:
            while chunk := file.read(2**24):
                digest.update(chunk)
    return digest.hexdigest()[:16]

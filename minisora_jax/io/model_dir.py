"""Exported models: a directory with `model.safetensors` (names joined by "/"), `config.json` and their checksums.

Latent caches and the records of generated files name a model by the hash of both files.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from minisora_jax.config import build, with_current_names
from minisora_jax.io import checksum
from minisora_jax.io.atomic import write_text
from minisora_jax.io.filesystem import open_regular
from minisora_jax.io.model_card import write_card
from minisora_jax.io.safetensors import LazyArray, StoredTensor, order_of, read_tensors, write_tensors
from minisora_jax.parallel.processes import is_main, parts_of

FILES = ("model.safetensors", "config.json")
KINDS = {
    "dit": "a diffusion transformer",
    "lora": "an adapter",
    "vae": "a codec",
    "t5": "a text encoder",
    "clip": "a text encoder",
    "clip_vision": "an image encoder",
    "lpips": "LPIPS",
}
LOW_NOISE = "low_noise"  # the folder of a second expert within that of the first (Wan 2.2 A14B)
MOST_LAYERS, MOST = 1000, 2**24  # limits of a saved number of layers, and of any other whole number


def export_model(
    directory: str | Path, params: Any, config: dict, *, dtype: str | None = "float32", progress: str = ""
) -> str:
    """Write params, config and a model card to `directory`, each file atomically, and return the model's hash.

    With several processes all must call it. The main process writes; the others send their parts and return "". No
    process waits for the file: call `barrier` for that.

    Args:
        params: a tree of arrays on the host or on devices, or of `LazyArray`s. Leaves are written one after another, so
            host memory holds one leaf at a time, or one part of a lazy leaf.
        dtype: the type on disk; None keeps each leaf's type.
        progress: the label of a progress bar; "" for no bar.
    """
    directory = Path(directory)
    tensors = {k: _lazy(v, dtype) for k, v in traverse_util.flatten_dict(params, sep="/").items()}
    if not is_main():
        for name in order_of(tensors):
            list(tensors[name].parts())
        return ""
    (directory / checksum.NAME).unlink(missing_ok=True)  # of an older export
    write_tensors(directory / "model.safetensors", tensors, progress)
    write_text(directory / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    others = {path.name for path in directory.rglob("*")} - {*FILES}
    checksum.write_checksums(directory, without=others)
    write_card(directory, config, sum(math.prod(x.shape) for x in tensors.values()))
    return model_hash(directory)


def _lazy(leaf: Any, dtype: str | None) -> LazyArray:
    if not isinstance(leaf, LazyArray):
        leaf = LazyArray(leaf.shape, leaf.dtype, functools.partial(parts_of, leaf))
    return leaf.astype(dtype or leaf.dtype)


def load_model(directory: str | Path, dtype: str | None = "float32") -> tuple[Any, dict]:
    """(NumPy params, config) of an exported model. `dtype` None keeps the stored types.

    Raises:
        FileNotFoundError: the message names the missing file.
        ValueError: a file is damaged, or weights are NaN or infinite.
    """
    stored, config = open_model(directory)
    return in_memory(stored, directory, dtype), config


def in_memory(stored: Any, directory: str | Path, dtype: str | None) -> Any:
    """NumPy params of what `open_model` returned; `dtype` None keeps their types. ValueError for NaN or infinity."""
    params = jax.tree.map(lambda x: np.array(x[...], dtype or x.dtype), stored)
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    if broken := [name for name, array in flat.items() if not is_finite(array)]:
        raise ValueError(
            f"{directory}: {len(broken)} of {len(flat)} parameters hold numbers that are NaN or infinite, {broken[0]} "
            f"first: the file is damaged, or the model's training diverged"
        )
    return params


def require_new_place(out: str | os.PathLike, model: str | os.PathLike) -> None:
    """Refuse to write what is made of a model over it.

    Raises:
        ValueError: `out` is the folder of the model, or a file in it.
    """
    place, given = Path(out).resolve(), Path(model).resolve()
    if given in (place, place.parent if place.suffix else place):
        raise ValueError(f"--out: {out} is in the model {model} itself, and would damage it: name a new folder")


def is_finite(array: np.ndarray) -> bool:
    """Whether no number is NaN or infinite, in one pass over memory for each sign and without a copy."""
    if not array.size or jnp.issubdtype(array.dtype, jnp.integer) or array.dtype == bool:
        return True
    # A type of 16 bits is compared as whole numbers: its largest patterns are infinity and NaN, of each sign.
    if array.dtype.itemsize == 2:
        infinity = int(np.array(np.inf, array.dtype).view(np.int16))
        return bool(array.view(np.int16).max() < infinity and array.view(np.uint16).max() < infinity + 2**15)
    if array.dtype.itemsize == 1:
        array = array.astype(np.float32)
    return bool(np.isfinite(array.min()) and np.isfinite(array.max()))


def in_words(params: Any, model_hash: str) -> str:
    """What a line can say of weights: their hash and their number."""
    return f"{model_hash or 'unsaved'}, {sum(x.size for x in jax.tree.leaves(params)) / 1e6:.1f} M parameters"


def open_model(directory: str | Path) -> tuple[Any, dict]:
    """(params, config) like `load_model`, but the leaves stay on disk with their stored types: `leaf[index]` reads.

    Raises:
        ValueError: a file is damaged: it differs from its checksum, or cannot be read.
    """
    config = load_config(directory)
    # Other kinds are the caller's. A hostile config may have a list there, which is no key of a dict.
    if config.get("kind") in tuple(KINDS) and (damage := checksum.damage(Path(directory))):
        raise ValueError(f"{damage}. If you changed it on purpose, delete {Path(directory) / checksum.NAME}")
    stored: dict[str, StoredTensor] = read_tensors(Path(directory) / "model.safetensors")
    for name in stored:
        above = name
        while above := above.rpartition("/")[0]:
            if above in stored:
                raise ValueError(f"{directory}/model.safetensors is no tree: it has {above[:80]!r} and {name[:80]!r}")
    return traverse_util.unflatten_dict(stored, sep="/"), config


def load_params_onto(directory: str | Path, abstract: Any) -> Any:
    """The params of an exported model on devices, with the types and shardings of `abstract`.

    Each device's part is read from the disk on its own.

    Raises:
        ValueError: see `check_shapes`; raised before any tensor is read.
    """
    stored, _ = open_model(directory)
    check_shapes(stored, abstract, directory)
    return onto_devices(stored, abstract, directory)


def onto_devices(stored: Any, abstract: Any, directory: str | Path) -> Any:
    """The params of what `open_model` returned, as `load_params_onto` does it."""

    def to_devices(x: StoredTensor, target: jax.ShapeDtypeStruct) -> jax.Array:
        def read_part(index):
            if not is_finite(part := x[index]):
                raise ValueError(f"{directory} holds weights that are NaN or infinite: it is damaged, or it diverged")
            return part.astype(target.dtype)

        return jax.make_array_from_callback(x.shape, target.sharding, read_part)

    return jax.tree.map(to_devices, stored, abstract)


def check_shapes(stored: Any, abstract: Any, directory: str | Path) -> None:
    """Raise ValueError if the stored parameters differ from `abstract` in names or shapes."""
    actual: dict[str, Any] = traverse_util.flatten_dict(stored, sep="/")
    expected: dict[str, Any] = traverse_util.flatten_dict(abstract, sep="/")
    for name in sorted(actual.keys() | expected.keys()):
        shape, wanted = (str(tree[name].shape) if name in tree else "nothing" for tree in (actual, expected))
        if shape != wanted:
            raise ValueError(f"{directory} does not fit: for {name} it has {shape}, the config wants {wanted}")


def load_config(directory: str | Path) -> dict:
    """The config of an exported model, as JSON gives it.

    Raises:
        FileNotFoundError: the directory holds no model.
        ValueError: config.json is not an object of JSON.
    """
    directory = Path(directory)
    for name in FILES:
        if not (directory / name).exists():
            raise FileNotFoundError(
                f"{directory} is not an exported model: {name} is missing. "
                f"`minisora train-vae` and `minisora train` write one to WORKDIR/export"
            )
    try:
        with open_regular(directory / "config.json") as file:
            config = json.loads(file.read().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{directory}/config.json is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{directory}/config.json is a {type(config).__name__}, and must be an object")
    return config


def require_kind(config: dict, kind: str, where: str | Path) -> None:
    """Raise ValueError unless the config is that of a model of this kind. `where` names the model in the message."""
    if config.get("kind") != kind:
        raise ValueError(f"{where} holds a {config.get('kind')!r} model, not {KINDS[kind]} ({kind!r})")


def saved_settings(cls: type, config: dict, key: str, directory: str | Path) -> Any:
    """The settings under `key` of an exported model's config, as an instance of the dataclass `cls`.

    Raises:
        ValueError: a setting is unknown, of a wrong type, or out of range.
    """
    try:
        values = config.get(key, {})
        if not isinstance(values, dict):
            raise ValueError(f"{key} is a {type(values).__name__}, and must be an object")
        values = with_current_names(values)
        if values.get("dtype", "float32") not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"{key}.dtype={values['dtype']!r} must be float32, bfloat16 or float16")
        for name, value in values.items():
            if isinstance(value, int) and abs(value) > (MOST_LAYERS if "depth" in name else MOST):
                raise ValueError(f"{key}.{name}={value} is more than any model has")
        return build(cls, values, key)
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{directory}/config.json: {error}") from error


def config_fields(saved: dict) -> dict:
    """The fields of a frozen config from JSON: lists become tuples, and old names become the current ones."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in with_current_names(saved).items()}


def model_hash(directory: str | Path) -> str:
    """First 16 hex digits of the SHA-256 over the model's weights and config."""
    digest = hashlib.sha256()
    for name in FILES:
        with open_regular(Path(directory) / name) as file:
            while chunk := file.read(2**24):
                digest.update(chunk)
    return digest.hexdigest()[:16]

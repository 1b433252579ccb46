"""Exported models: a directory with `model.safetensors` (names joined by "/") and `config.json`.

The hash of both names the model in latent caches and in the metadata of what it generates.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from safetensors import safe_open
from safetensors.numpy import load_file, save_file


def export_model(directory: str | Path, params: Any, config: dict, *, dtype: str | None = "float32") -> str:
    """Write params and config to `directory`, each file atomically, and return the model's hash.

    `dtype` None keeps the leaves'. NumPy leaves that are as wanted are written from where they are, without a copy.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    flat = traverse_util.flatten_dict(jax.device_get(params), sep="/")
    arrays = {k: np.ascontiguousarray(np.asarray(v, dtype)) for k, v in flat.items()}
    save_file(arrays, directory / "model.safetensors.partial")
    os.chmod(directory / "model.safetensors.partial", 0o644)  # safetensors leaves it to its owner alone
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (directory / "config.json.partial").write_text(text, encoding="utf-8")
    for name in ("model.safetensors", "config.json"):
        os.replace(directory / f"{name}.partial", directory / name)
    return model_hash(directory)


def load_model(directory: str | Path, dtype: str | None = "float32") -> tuple[Any, dict]:
    """(NumPy params, config) of an exported model; FileNotFoundError names what is missing. `dtype` None: as stored."""
    config = load_config(directory)
    flat = load_file(Path(directory) / "model.safetensors")
    params = {k: v.astype(dtype or v.dtype, copy=False) for k, v in flat.items()}
    return traverse_util.unflatten_dict(params, sep="/"), config


def open_model(directory: str | Path) -> tuple[Any, dict]:
    """`load_model` whose leaves are functions that read them from disk, as stored."""
    config = load_config(directory)
    file = safe_open(Path(directory) / "model.safetensors", framework="numpy")
    leaves = {name: functools.partial(file.get_tensor, name) for name in file.keys()}
    return traverse_util.unflatten_dict(leaves, sep="/"), config


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
    """The fields of a frozen config from JSON, which has lists for tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}


def model_hash(directory: str | Path) -> str:
    """First 16 hex digits of the SHA-256 over the model's weights and config."""
    digest = hashlib.sha256()
    for name in ("model.safetensors", "config.json"):
        with open(Path(directory) / name, "rb") as file:
            while chunk := file.read(2**24):
                digest.update(chunk)
    return digest.hexdigest()[:16]

"""Exported models: a directory with `model.safetensors` (names joined by "/") and `config.json`.

The hash of both names the model in latent caches and in the metadata of what it generates.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from safetensors.numpy import load_file, save_file


def export_model(directory: str | Path, params: Any, config: dict, *, dtype: str = "float32") -> str:
    """Write params and config to `directory`, each file atomically, and return the model's hash."""
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


def load_model(directory: str | Path) -> tuple[Any, dict]:
    """(params as float32 NumPy, config) of an exported model; FileNotFoundError names what is missing."""
    directory = Path(directory)
    for name in ("model.safetensors", "config.json"):
        if not (directory / name).exists():
            raise FileNotFoundError(
                f"{directory} is not an exported model: {name} is missing. "
                f"`minisora train-vae` and `minisora train` write one to WORKDIR/export"
            )
    flat = load_file(directory / "model.safetensors")
    params = traverse_util.unflatten_dict({k: v.astype(np.float32) for k, v in flat.items()}, sep="/")
    return params, json.loads((directory / "config.json").read_text(encoding="utf-8"))


def model_hash(directory: str | Path) -> str:
    """First 16 hex digits of the SHA-256 over the model's weights and config."""
    digest = hashlib.sha256()
    for name in ("model.safetensors", "config.json"):
        digest.update((Path(directory) / name).read_bytes())
    return digest.hexdigest()[:16]

"""Checkpoints of a run (Orbax, asynchronous, atomic) and exported models (safetensors + JSON).

A checkpoint is a step directory under WORKDIR/checkpoints, visible only once whole. It restores onto any
mesh. The data state is the step number, so nothing else is stored.
An exported model is a directory with `model.safetensors` (float16 or float32 arrays, names joined by "/") and
`config.json`; its hash names it in latent caches and in the metadata of what it generates.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from jax.sharding import NamedSharding
from safetensors.numpy import load_file, save_file

from minisora_jax.parallel.mesh import REPLICATED
from minisora_jax.types import TrainState


class Checkpoints:
    """Saves and restores a TrainState under `directory`, keeping the newest `keep`."""

    def __init__(self, directory: Path, *, keep: int = 3):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True, create=True)
        self._manager = ocp.CheckpointManager(Path(directory).absolute(), options=options)

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, abstract: TrainState, mesh: jax.sharding.Mesh, step: int | None = None) -> TrainState:
        """The newest state (or that of `step`), laid out on `mesh` as `abstract`'s types say."""

        def on_mesh(x):  # eval_shape leaves out the sharding of what is replicated
            spec = x.sharding.spec if x.sharding is not None else REPLICATED
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

        target = jax.tree.map(on_mesh, abstract)
        step = self.latest() if step is None else step
        return self._manager.restore(step, args=ocp.args.StandardRestore(target))

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def export_model(directory: str | Path, params: Any, config: dict, *, dtype: str = "float32") -> str:
    """Write params and config to `directory`, each file atomically, and return the model's hash."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    flat = traverse_util.flatten_dict(jax.device_get(params), sep="/")
    arrays = {k: np.ascontiguousarray(np.asarray(v, dtype)) for k, v in flat.items()}
    save_file(arrays, directory / "model.safetensors.partial")
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

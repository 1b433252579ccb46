"""Published checkpoint files, read one tensor at a time.

    model.safetensors | a directory | model.safetensors.index.json (sharded) | model.pth, .pt, .bin (torch's zip format)

Memory holds only the tensor that is being read, so a 14 B model needs no second copy. Torch files are read without
torch: they are a zip of raw storages and a pickle of views on them. Only tensors in plain containers are accepted.
"""

from __future__ import annotations

import copy
import json
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from minisora_jax.io.safetensors import read_tensors

_TORCH_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "BoolStorage": np.bool_,
}


class WeightsFileError(ValueError):
    """A checkpoint cannot be read, or its tensors are not those of its family."""


class Checkpoint:
    """The tensors of a checkpoint by name. Opening reads the headers only.

    Raises:
        FileNotFoundError: There is no such file.
        WeightsFileError: It is no checkpoint, or it is incomplete.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._entries = {name: (file, name) for file in _files(self.path) for name in file.names}

    def within(self, prefixes: tuple[str, ...]) -> Checkpoint:
        """The tensors under the first prefix that occurs, named without it. All tensors if none occurs."""
        for prefix in prefixes:
            if entries := {k.removeprefix(prefix): v for k, v in self._entries.items() if k.startswith(prefix)}:
                part = copy.copy(self)
                part._entries = entries
                return part
        return self

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def read(self, name: str) -> np.ndarray:
        """The tensor, read from disk."""
        file, stored = self._entries[name]
        return file.read(stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, from the header."""
        file, stored = self._entries[name]
        return file.shape(stored)

    def dtype(self, name: str) -> np.dtype:
        """The tensor's dtype, from the header."""
        file, stored = self._entries[name]
        return file.dtype(stored)


def _files(path: Path) -> list[_Safetensors | _TorchFile]:
    if path.is_dir():
        for pattern in ("*.index.json", "*.safetensors", "*.bin", "*.pth", "*.pt"):
            # A name that begins with a dot belongs to a file that was never finished.
            if paths := sorted(p for p in path.glob(pattern) if not p.name.startswith(".")):
                return [f for p in paths for f in _files(p)]
        raise WeightsFileError(f"{path} has no checkpoint: no *.safetensors, *.index.json, *.bin, *.pth or *.pt in it")
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if path.name.endswith(".index.json"):
        shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        if missing := [s for s in shards if not (path.parent / s).exists()]:
            raise WeightsFileError(
                f"{path} lists {len(missing)} shards that are missing in its directory, {missing[0]} first: download "
                f"them too"
            )
        return [f for s in shards for f in _files(path.parent / s)]
    return [_Safetensors(path) if path.suffix == ".safetensors" else _TorchFile(path)]


class _Safetensors:
    def __init__(self, path: Path):
        try:
            self._tensors = read_tensors(path)
        except ValueError as error:
            raise WeightsFileError(str(error)) from error
        self.names = list(self._tensors)

    def read(self, name: str) -> np.ndarray:
        return self._tensors[name][...]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._tensors[name].dtype


class _TorchFile:
    def __init__(self, path: Path):
        if not zipfile.is_zipfile(path):
            raise WeightsFileError(f"{path} is not a torch file in the zip format (torch >= 1.6), or it is cut short")
        self._zip = zipfile.ZipFile(path)
        member = next(n for n in self._zip.namelist() if n.endswith("data.pkl"))
        self._root = member.removesuffix("data.pkl")
        tree = _TensorUnpickler(self._zip.open(member)).load()
        while isinstance(tree, dict) and len(tree) and not any(isinstance(v, _View) for v in tree.values()):
            inner = [tree[k] for k in ("ema", "state_dict", "model", "module") if isinstance(tree.get(k), dict)]
            if not inner:
                raise WeightsFileError(f"{path} holds no tensors by name: its keys are {list(tree)[:8]}")
            tree = inner[0]
        self._views = {k: v for k, v in tree.items() if isinstance(v, _View)}
        self.names = list(self._views)

    def read(self, name: str) -> np.ndarray:
        view = self._views[name]
        flat = np.frombuffer(self._zip.read(f"{self._root}data/{view.storage[0]}"), view.storage[1])
        strides = [s * flat.itemsize for s in view.stride]
        return np.lib.stride_tricks.as_strided(flat[view.offset :], view.shape, strides, writeable=False)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._views[name].shape

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(self._views[name].storage[1])


class _View:
    """A tensor of a torch file: (key, dtype) of its storage, and its place in the storage."""

    def __init__(self, storage: tuple[str, Any], offset: int, shape: Any, stride: Any, *_: Any) -> None:
        self.storage, self.offset, self.shape, self.stride = storage, offset, tuple(shape), tuple(stride)


class _TensorUnpickler(pickle.Unpickler):
    """Accepts tensors in plain containers. Anything else could run code and is refused."""

    _ALLOWED = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _View,
        ("torch._utils", "_rebuild_parameter"): lambda view, *_: view,
    }

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _TORCH_DTYPES:
            return _TORCH_DTYPES[name]
        if (module, name) not in self._ALLOWED:
            raise WeightsFileError(f"the torch file asks for {module}.{name}: only tensors by name are read")
        return self._ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> tuple[str, Any]:
        _, dtype, key, _, _ = pid  # "storage", dtype, key, device, length
        return key, dtype

"""Published checkpoint files, read one tensor at a time.

    model.safetensors | a directory | model.safetensors.index.json (sharded) | model.pth, .pt, .bin, .ckpt (of torch)

Memory holds only the tensor that is being read, so a 14 B model needs no second copy. Nothing in a file is run, and
every place in it is checked against its length before anything is read. What a file is, its first bytes say, not its
name.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from minisora_jax.io import checksum
from minisora_jax.io.safetensors import read_header, read_tensors
from minisora_jax.weights.errors import WeightsFileError, shown
from minisora_jax.weights.torch_file import TorchFile
from minisora_jax.weights.torch_old import MAGIC, OldTorchFile

__all__ = ["Checkpoint", "WeightsFileError"]

# What wrappers of a training insert into names: torch.compile, FSDP and activation checkpointing.
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# Files that are no checkpoint, by their first bytes.
STRANGERS = {
    b"GGUF": "a GGUF file, quantised for llama.cpp and ComfyUI: take the original safetensors",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run `git lfs pull`, or download the file",
    b"<!DOCTYPE html": "a web page: the download needs a login, or the address is not the file's",
    b"<html": "a web page: the download needs a login, or the address is not the file's",
    b"\x89HDF": "an HDF5 file, of Keras or an old TensorFlow: take the PyTorch weights",
    b"\x93NUMPY": "a NumPy array: take the PyTorch weights",
}


class Checkpoint:
    """The tensors of a checkpoint by name. Opening reads the headers only.

    Names are without the insertions of torch.compile and FSDP.

    Raises:
        FileNotFoundError: There is no such file.
        WeightsFileError: It is no checkpoint, or it is incomplete or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.is_dir() and (damage := checksum.damage(self.path)):  # `minisora export` writes checksums
            raise WeightsFileError(damage)
        self.metadata: dict[str, str] = {}  # of safetensors
        self._entries: dict[str, tuple[_Safetensors | TorchFile, str]] = {}
        of_file: dict[str, Path] = {}
        for part, file in _files(self.path):
            self.metadata |= getattr(file, "metadata", {})
            for stored in file.names:
                name = stored
                for wrapper in WRAPPERS:
                    name = name.replace(wrapper, "")
                if name in self._entries:
                    raise WeightsFileError(
                        f"{shown(name)} is both in {of_file[name].name} and in {part.name}: give one of the files, not "
                        f"the directory"
                    )
                self._entries[name], of_file[name] = (file, stored), part

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

    @property
    def config(self) -> dict[str, Any]:
        """The config.json beside the weights, as diffusers and transformers write it; {} without a readable one."""
        path = (self.path if self.path.is_dir() else self.path.parent) / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (ValueError, OSError, RecursionError):
            return {}
        return config if isinstance(config, dict) else {}

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


def _files(path: Path) -> list[tuple[Path, _Safetensors | TorchFile]]:
    if path.is_dir():
        for pattern in ("*.index.json", "*.safetensors", "*.bin", "*.pth", "*.pt", "*.ckpt", "*.gguf"):
            # A name that begins with a dot belongs to a file that was never finished.
            if paths := sorted(p for p in path.glob(pattern) if not p.name.startswith(".")):
                return [f for p in paths for f in _files(p)]
        kinds = "*.safetensors, *.index.json, *.bin, *.pth or *.pt"
        parts = sorted(part for part in path.iterdir() if part.is_dir() and any(part.glob("*.safetensors")))
        fix = f": give one of its parts, such as {parts[-1]}" if parts else ""
        raise WeightsFileError(f"{path} has no checkpoint: no {kinds} in it{fix}")
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if not path.is_file():
        raise WeightsFileError(f"{path} is no regular file")
    if path.name.endswith(".index.json"):
        return [f for shard in _shards(path) for f in _files(shard)]
    return [(path, _opener(path)(path))]


def _opener(path: Path) -> Callable[[Path], _Safetensors | TorchFile]:
    """The class that reads a file, by its first bytes: a zip is torch's; the suffix counts for damaged files only."""
    with open(path, "rb") as file:
        first = file.read(32)
    if first.startswith(b"PK\x03\x04"):
        return TorchFile
    if first.startswith(MAGIC):
        return OldTorchFile
    if first[8:9] == b"{":
        return _Safetensors
    if what := next((what for magic, what in STRANGERS.items() if first.startswith(magic)), None):
        raise WeightsFileError(f"{path} is {what}")
    return _Safetensors if path.suffix == ".safetensors" else TorchFile


def _shards(index: Path) -> list[Path]:
    """The files that an index lists. They lie in its directory."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError("weight_map names no files")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise WeightsFileError(
            f"{index} is no index of a sharded checkpoint: {type(error).__name__} {error}"
        ) from error
    shards = sorted(set(weight_map.values()))
    for name in shards:
        if name != Path(name).name or name in ("", ".", "..") or "\\" in name or "\0" in name:
            raise WeightsFileError(f"{index} names the file {shown(name)}, which is not a plain name in its directory")
        if (path := index.parent / name).is_symlink() and not _in_hub_cache(path):
            raise WeightsFileError(f"{path} is a link to {path.resolve()}: copy the file itself there")
    if missing := [s for s in shards if not (index.parent / s).exists()]:
        raise WeightsFileError(
            f"{index} lists {len(missing)} shards that are missing in its directory, {shown(missing[0])} first: "
            f"download them too"
        )
    return [index.parent / name for name in shards]


def _in_hub_cache(link: Path) -> bool:
    """Whether a link is one of huggingface_hub's cache: models--.../snapshots/REVISION/... -> models--.../blobs/..."""
    parents = list(link.parent.absolute().parents)
    repository = next((above for below, above in zip(parents, parents[1:]) if below.name == "snapshots"), None)
    return repository is not None and link.resolve().parent == (repository / "blobs").resolve()


class _Safetensors:
    def __init__(self, path: Path):
        try:
            self._tensors = read_tensors(path)
            self.metadata = read_header(path).metadata
        except ValueError as error:
            raise WeightsFileError(str(error)) from error
        self.names = list(self._tensors)

    def read(self, name: str) -> np.ndarray:
        return self._tensors[name][...]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._tensors[name].dtype

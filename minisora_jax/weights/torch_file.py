"""The tensors of a torch file, read without torch: a zip of raw storages, and a pickle of views on them.

Each place is checked against the file's length before anything is read. torch does not compress its files, so a
compressed one is refused: a small one could inflate to any size.
"""

from __future__ import annotations

import math
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from minisora_jax.weights.errors import WeightsFileError, shown
from minisora_jax.weights.torch_pickle import Pickle, PickleError, View, read_pickle

DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint8": np.uint8,
    "bool": np.bool_,
}
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "UntypedStorage": "uint8",
    "BoolStorage": "bool",
}
# Where checkpoints keep their tensors, the best first: averaged weights, then plain ones.
_ENTRIES = ("ema", "ema_state_dict", "state_dict", "state_dict_ema", "model_state_dict", "model", "module", "net")
# What Python's zipfile raises for damaged files.
_DAMAGE = (
    zipfile.BadZipFile,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OSError,
    OverflowError,
    struct.error,
)
MOST_PICKLE = 64 * 2**20  # bytes; those of published checkpoints have a few MB


class TorchFile:
    """The tensors of a file that torch.save wrote, by name.

    Raises:
        WeightsFileError: it is no torch file, it is damaged, or a tensor leaves its storage.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._zip = zipfile.ZipFile(path)
            self._members = {info.filename: info for info in self._zip.infolist()}
            member = self._checked_members()
            self._root = member.removesuffix("data.pkl")
            pickle = read_pickle(self._zip.read(member))
        except PickleError as error:
            raise WeightsFileError(f"{path}: the pickle in it is damaged or no checkpoint's: {error}") from error
        except WeightsFileError:
            raise
        except _DAMAGE as error:
            raise WeightsFileError(
                f"{path} is not a torch file in the zip format (torch >= 1.6), or it is cut short or damaged: {error}"
            ) from error
        self._take(pickle)

    def _take(self, pickle: Pickle) -> None:
        """Keep the views of a pickle, each checked."""
        self.entry, self._views = _tensors(self._path, pickle.tree, pickle.foreign)
        self.names = list(self._views)
        for name, view in self._views.items():
            self._check(name, view)

    def read(self, name: str) -> np.ndarray:
        """The tensor, as a view of its whole storage."""
        view = self._views[name]
        try:
            data = self._stored(view.storage.key)
        except _DAMAGE as error:
            raise WeightsFileError(f"{self._path}: the storage of {shown(name)} is damaged: {error}") from error
        flat = np.frombuffer(data, self.dtype(name))
        strides = [s * flat.itemsize for s in view.stride]
        return np.lib.stride_tricks.as_strided(flat[view.offset :], view.shape, strides, writeable=False)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return self._views[name].shape

    def dtype(self, name: str) -> np.dtype:
        """The tensor's type."""
        kind = self._views[name].type
        return np.dtype(DTYPES[STORAGES.get(kind, kind)])

    def _stored(self, key: str) -> bytes:
        """The bytes of a storage."""
        return self._zip.read(f"{self._root}data/{key}")

    def _size(self, key: str) -> int | None:
        """The number of bytes of a storage; None if there is none of this key."""
        info = self._members.get(f"{self._root}data/{key}")
        return info.file_size if info else None

    def _checked_members(self) -> str:
        """The name of the pickle. All members are checked: stored as they are, and together no more than the file."""
        path, size = self._path, self._path.stat().st_size
        if any(name.endswith("/constants.pkl") for name in self._members):
            raise WeightsFileError(f"{path} is a TorchScript program, not weights: save the model's state_dict()")
        if squeezed := next((i for i in self._members.values() if i.compress_type != zipfile.ZIP_STORED), None):
            raise WeightsFileError(
                f"{path}: {shown(squeezed.filename)} in it is compressed, which torch never does "
                f"({squeezed.compress_size:,} bytes become {squeezed.file_size:,}): if you trust it, zip it again "
                f"without compression"
            )
        if len(self._members) != len(self._zip.infolist()):
            raise WeightsFileError(f"{path}: two members have one name")
        total = sum(info.file_size for info in self._members.values())
        if total > size:
            raise WeightsFileError(f"{path} has {size:,} bytes, and its members state {total:,}: they overlap")
        pickles = [name for name in self._members if name.endswith("data.pkl")]
        if not pickles:
            raise WeightsFileError(f"{path} is a zip file, but torch did not write it: there is no data.pkl in it")
        name = min(pickles, key=len)
        if self._members[name].file_size > MOST_PICKLE:
            raise WeightsFileError(
                f"{path}: its pickle has {self._members[name].file_size:,} bytes, no checkpoint's has"
            )
        order = name.removesuffix("data.pkl") + "byteorder"
        if order in self._members and self._members[order].file_size < 16 and self._zip.read(order) != b"little":
            raise WeightsFileError(f"{path} was written on a big-endian machine: save it again on a common one")
        return name

    def _check(self, name: str, view: View) -> None:
        """Raise WeightsFileError unless the tensor lies within its storage, and the storage in the file."""
        size = self._size(view.storage.key)
        if size is None:
            raise WeightsFileError(f"{self._path}: the storage {shown(view.storage.key)} of {shown(name)} is missing")
        stored = STORAGES.get(view.storage.type)
        kind = STORAGES.get(view.type, view.type)
        if stored is None or kind not in DTYPES:
            raise WeightsFileError(f"{self._path}: {shown(name)} has the type {shown(view.type)}, which is not read")
        if view.storage.length * np.dtype(DTYPES[stored]).itemsize != size:
            raise WeightsFileError(
                f"{self._path}: the storage of {shown(name)} has {size:,} bytes, not those of "
                f"{view.storage.length:,} numbers of {stored}"
            )
        room, count = size // np.dtype(DTYPES[kind]).itemsize, math.prod(view.shape)
        last = view.offset + sum((n - 1) * s for n, s in zip(view.shape, view.stride)) if count else view.offset - 1
        if last >= room or view.offset > room or count > room:
            raise WeightsFileError(
                f"{self._path}: {shown(name)} of shape {view.shape}, stride {view.stride} and offset {view.offset} "
                f"leaves its storage of {room:,} numbers"
            )


def _tensors(path: Path, tree: Any, foreign: list[str]) -> tuple[str, dict[str, View]]:
    """(where the tensors lie, the tensors by name)."""
    if found := _search(tree, set()):
        return found
    kind = "a single tensor" if isinstance(tree, View) else f"a {type(tree).__name__} of Python"
    what = f"its keys are {[shown(k) for k in list(tree)[:8]]}" if isinstance(tree, dict) else f"it is {kind}"
    names = ", ".join(map(shown, foreign[:4]))
    asks = f"; the torch file asks for {names}: only tensors by name are read" if foreign else ""
    raise WeightsFileError(f"{path} holds no tensors by name: {what}{asks}")


def _search(tree: Any, seen: set[int]) -> tuple[str, dict[str, View]] | None:
    """The tensors in the best entry of a tree, else its own; None for none. A tree that contains itself ends there."""
    if not isinstance(tree, dict) or id(tree) in seen or len(seen) > 100:
        return None
    seen.add(id(tree))
    for entry in _ENTRIES:
        if found := _search(tree.get(entry), seen):
            return f"{entry}.{found[0]}".removesuffix("."), found[1]
    views = {k: v for k, v in tree.items() if isinstance(v, View) and isinstance(k, str)}
    return ("", views) if views else None

"""Read and write safetensors files piece by piece, so a model may be larger than memory.

    8 bytes, little-endian: n | n bytes of JSON: {name: {"dtype", "shape", "data_offsets"}} | raw bytes, C order

Names, shapes and types are at the front. So a file is written in one pass, and any part of any tensor can be read on
its own. The output equals the safetensors library's, byte for byte.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from minisora_jax.io.atomic import replacing
from minisora_jax.io.filesystem import open_regular
from minisora_jax.io.progress import Progress

# The library writes tensors sorted by type, in the reverse of this order.
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array whose shape and type are known before any part of it is read or computed."""

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: Callable[[], Iterable[np.ndarray]]  # consecutive parts in C order; they are cast to dtype

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def astype(self, dtype: npt.DTypeLike) -> LazyArray:
        """The same array with another type."""
        return dataclasses.replace(self, dtype=np.dtype(dtype))

    def whole(self) -> np.ndarray:
        """The whole array in memory."""
        array, at = np.empty(math.prod(self.shape), self.dtype), 0
        for part in self.parts():
            array[at : at + part.size] = np.ravel(part)
            at += part.size
        return array.reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. `tensor[index]` maps the file and reads the indexed part; no memory stays in use."""

    path: Path
    offset: int  # of its first byte in the file
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: Any) -> np.ndarray:
        if isinstance(index, int):  # map one layer of a stack only
            inner = StoredTensor(self.path, self._start_of(index), self.shape[1:], self.dtype)
            return inner[...]
        if not math.prod(self.shape):
            return np.empty(self.shape, self.dtype)[index]
        return np.asarray(np.memmap(self.path, self.dtype, "r", self.offset, self.shape))[index]

    def _start_of(self, i: int) -> int:
        if not -self.shape[0] <= i < self.shape[0]:
            raise IndexError(f"index {i} is out of range for a first axis of {self.shape[0]}")
        return self.offset + i % self.shape[0] * math.prod(self.shape[1:]) * self.dtype.itemsize


MOST_HEADER = 32 * 2**20  # bytes; the names of a hundred thousand tensors have less
_LATER = ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64")  # types that are not read


@dataclasses.dataclass(frozen=True)
class Header:
    """The front of a safetensors file, checked against the file's length."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_tensors(path: str | Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name; ValueError for a damaged or truncated file."""
    return read_header(path).tensors


def read_header(path: str | Path) -> Header:
    """The tensors and the metadata of a safetensors file.

    The tensors must fill the file, one after another, without holes or overlaps, as the library requires too.

    Raises:
        ValueError: the file is damaged, truncated, or states what cannot be. Nothing of that size is allocated.
    """
    path = Path(path)
    size = os.path.getsize(path)
    try:
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError(f"it has {size} bytes and states a header of {length} bytes")
            if length > MOST_HEADER:
                raise ValueError(f"its header has {length} bytes, and at most {MOST_HEADER} are read")
            header = json.loads(file.read(length), object_pairs_hook=_without_doubles)
        if not isinstance(header, dict):
            raise ValueError(f"its header is {type(header).__name__}, not an object of tensors by name")
        metadata = header.pop("__metadata__", None) or {}
        tensors = {name: _tensor(path, 8 + length, name, entry) for name, entry in header.items()}
        end = 8 + length
        for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
            if tensor.offset != end:
                what = "overlaps the one before" if tensor.offset < end else "leaves a hole before it"
                raise ValueError(f"{name[:80]!r} {what}: it begins at byte {tensor.offset}, not {end}")
            end += tensor.nbytes
        if end != size:
            raise ValueError(f"it has {size} bytes, its header states {end}")
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    return Header(tensors, metadata if isinstance(metadata, dict) else {})


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(entries := dict(pairs)) < len(pairs):
        double, _ = collections.Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{double[:80]!r} is in the header twice")
    return entries


def _tensor(path: Path, data: int, name: str, entry: dict[str, Any]) -> StoredTensor:
    """The tensor that an entry of a header states; ValueError for one that cannot be."""
    kind, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    counts = lambda values: isinstance(values, list) and all(type(n) is int and 0 <= n < 2**60 for n in values)
    if kind not in DTYPES:
        later = "a type that is not read" if kind in _LATER else "no type"
        raise ValueError(f"{name[:80]!r} has the dtype {str(kind)[:20]!r}, {later}")
    if not counts(shape) or not counts(place) or len(place) != 2 or len(shape) > 32:
        raise ValueError(f"{name[:80]!r} has a shape or a place that is not made of counts")
    tensor = StoredTensor(path, data + place[0], tuple(shape), DTYPES[kind])
    if place[1] - place[0] != tensor.nbytes:
        raise ValueError(f"{name[:80]!r} of shape {tensor.shape} has {place[1] - place[0]} bytes")
    return tensor


def order_of(tensors: Mapping[str, LazyArray]) -> list[str]:
    """The names in the order in which `write_tensors` reads their parts."""
    types = list(_NAMES)
    return sorted(tensors, key=lambda name: (-types.index(np.dtype(tensors[name].dtype)), name))


def write_tensors(path: str | Path, tensors: Mapping[str, LazyArray], progress: str = "") -> None:
    """Write a safetensors file atomically, one part of one tensor after another.

    Args:
        progress: the label of a progress bar; "" for no bar.

    Raises:
        ValueError: the parts of a tensor do not add up to its size.
    """
    names, header, at = order_of(tensors), {}, 0
    for name in names:
        tensor = tensors[name]
        place = [at, at + tensor.nbytes]
        header[name] = {"dtype": _NAMES[np.dtype(tensor.dtype)], "shape": list(tensor.shape), "data_offsets": place}
        at += tensor.nbytes
    front = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    front += b" " * (-len(front) % 8)
    bar = Progress(desc=progress, total=at, unit="B", unit_scale=True, disable=not progress)
    with replacing(path) as temporary, bar, open(temporary, "wb") as file:
        file.write(len(front).to_bytes(8, "little") + front)
        for name in names:
            tensor, written = tensors[name], 0
            for part in tensor.parts():
                data = np.ascontiguousarray(part, tensor.dtype).reshape(-1).view(np.uint8)
                file.write(data)
                written += data.size
                bar.update(data.size)
                del part, data  # free the memory before the next part is read
            if written != tensor.nbytes:
                raise ValueError(f"{name} of shape {tensor.shape} is {tensor.nbytes} bytes, its parts are {written}")

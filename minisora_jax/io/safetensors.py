"""Read and write safetensors files piece by piece, so a model may be larger than memory.

    8 bytes, little-endian: n | n bytes of JSON: {name: {"dtype", "shape", "data_offsets"}} | raw bytes, C order

Names, shapes and types are at the front. So a file is written in one pass, and any part of any tensor can be read on
its own. The output equals the safetensors library's, byte for byte.
"""

from __future__ import annotations

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
from tqdm import tqdm

from minisora_jax.io.atomic import replacing

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


def read_tensors(path: str | Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name; ValueError for a damaged or truncated file."""
    path = Path(path)
    size = os.path.getsize(path)
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError(f"it has {size} bytes and states a header of {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors, end = {}, 0
        for name, entry in header.items():
            begin, stop = entry["data_offsets"]
            tensor = StoredTensor(path, 8 + length + begin, tuple(entry["shape"]), DTYPES[entry["dtype"]])
            if stop - begin != math.prod(tensor.shape) * tensor.dtype.itemsize:
                raise ValueError(f"{name} of shape {tensor.shape} has {stop - begin} bytes")
            tensors[name], end = tensor, max(end, stop)
        if 8 + length + end != size:
            raise ValueError(f"it has {size} bytes, its header states {8 + length + end}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    return tensors


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
    bar = tqdm(desc=progress, total=at, unit="B", unit_scale=True, disable=not progress)
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

"""The tensors of a file that torch before 1.6 saved, as torchvision's and LPIPS's weights are.

    pickles of a magic number, a version, the machine's facts, the tree, and the storages' keys in order
    then for each key the count of its numbers, 8 bytes, and the numbers

Nothing in it is run (torch_pickle.py), and every place is checked against the file's length before anything is read.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from minisora_jax.weights.errors import WeightsFileError, shown
from minisora_jax.weights.torch_file import DTYPES, MOST_PICKLE, STORAGES, TorchFile
from minisora_jax.weights.torch_pickle import PickleError, Storage, read_pickle

MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # a pickle of the number 0x1950a86a20f9469cfc6c
VERSION = 1001
COUNT = 8  # bytes


class OldTorchFile(TorchFile):
    """The tensors of a file that torch.save wrote before torch 1.6, by name.

    Raises:
        WeightsFileError: it is damaged, or a tensor leaves its storage.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._places = path, {}
        size = path.stat().st_size
        with open(path, "rb") as file:
            stream = io.BytesIO(file.read(MOST_PICKLE))
        try:
            stream.seek(len(MAGIC))
            version, facts, pickle, keys = (read_pickle(stream) for _ in range(4))
        except PickleError as error:
            raise WeightsFileError(f"{path}: a pickle in it is damaged, or no checkpoint's: {error}") from error
        if version.tree != VERSION or not isinstance(facts.tree, dict) or facts.tree.get("little_endian") is not True:
            raise WeightsFileError(f"{path} was written by an unknown torch, or on a big-endian machine: save it again")
        if not isinstance(keys.tree, list) or not all(isinstance(key, str) for key in keys.tree):
            raise WeightsFileError(f"{path} is damaged: it has no list of its storages")
        self._find(keys.tree, pickle.storages, stream.tell(), size)
        self._take(pickle)

    def _find(self, keys: list[str], storages: dict[str, Storage], at: int, size: int) -> None:
        """The place and the bytes of each storage, which lie one behind another from `at` to the end of the file."""
        with open(self._path, "rb") as file:
            for key in keys:
                kind = STORAGES.get(storages[key].type) if key in storages else None
                if kind is None or key in self._places:
                    raise WeightsFileError(f"{self._path} is damaged: no tensor has the storage {shown(key)}")
                file.seek(at)
                count = int.from_bytes(file.read(COUNT), "little")
                length = count * np.dtype(DTYPES[kind]).itemsize
                if at + COUNT + length > size:
                    raise WeightsFileError(
                        f"{self._path} is cut short or damaged: the storage {shown(key)} of {length:,} bytes begins at "
                        f"{at + COUNT:,}, and the file has {size:,}"
                    )
                self._places[key] = at + COUNT, length
                at += COUNT + length
        if at != size:
            raise WeightsFileError(f"{self._path} is damaged: {size - at:,} bytes follow its last storage")

    def _stored(self, key: str) -> bytes:
        at, length = self._places[key]
        with open(self._path, "rb") as file:
            file.seek(at)
            return file.read(length)

    def _size(self, key: str) -> int | None:
        return self._places[key][1] if key in self._places else None

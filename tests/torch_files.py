"""Files as torch.save writes them, step by step: also such as torch would never write."""

import pickle
import zipfile
from pathlib import Path

import numpy as np


def name_of(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def number(n: int) -> bytes:
    return pickle.dumps(n, 2)[2:-1]


def text(s: str) -> bytes:
    return b"X" + len(s.encode()).to_bytes(4, "little") + s.encode()


def tuple_of(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def dict_of(entries: dict[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(k) + v for k, v in entries.items()) + b"u"


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return name_of(module, name) + tuple_of(*arguments) + b"R"


def storage(key: str, length: int, kind: str = "FloatStorage") -> bytes:
    return tuple_of(text("storage"), name_of("torch", kind), text(key), text("cpu"), number(length)) + b"Q"


def tensor(key: str, length: int, shape, stride=None, offset: int = 0, kind: str = "FloatStorage") -> bytes:
    stride = stride if stride is not None else [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    counts = (tuple_of(*map(number, n)) for n in (shape, stride))
    hooks = call("collections", "OrderedDict")
    return call(
        "torch._utils", "_rebuild_tensor_v2", storage(key, length, kind), number(offset), *counts, b"\x89", hooks
    )


def write_torch(path: Path, tree: bytes, storages: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", b"\x80\x02" + tree + b".")
        for key, data in storages.items():
            file.writestr(f"archive/data/{key}", data)
    return path


def save_torch(path: Path, arrays: dict[str, np.ndarray], around=lambda tree: tree) -> Path:
    """float32 arrays by name; `around` makes the pickle of the whole tree from that of the dictionary."""
    tensors = {name: tensor(str(i), a.size, a.shape) for i, (name, a) in enumerate(arrays.items())}
    storages = {str(i): a.astype(np.float32).tobytes() for i, a in enumerate(arrays.values())}
    return write_torch(path, around(dict_of(tensors)), storages)

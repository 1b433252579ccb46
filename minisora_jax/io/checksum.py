"""Checksums of the files in a folder: written beside them, and compared when they are read.

    WORKDIR/checkpoints/500/checksums.json   {"files": {"default/manifest.ocdbt": [116, "8c736521"], ...}}
    runs/model/export/checksums.json         {"files": {"model.safetensors": [8620256, "1f0a77c2"]}}

Disks and networks flip bits without an error. CRC-32 finds them at several GB/s. It is no protection against a person
who changes a file and its checksum.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from minisora_jax.io.atomic import write_text
from minisora_jax.io.filesystem import json_or_none, open_regular

NAME = "checksums.json"
PIECE = 2**25  # bytes that a thread reads: a checkpoint has few large files and many small ones
BUFFER = 2**18  # bytes read at a time
THREADS = min(os.cpu_count() or 1, 16)  # zlib releases the interpreter's lock


def crc32(path: Path) -> str:
    """The CRC-32 of a file's bytes, 8 hex digits. Of a file above 32 MiB, the CRC-32 of those of its pieces."""
    return _crc32s([path])[0]


def _crc32s(paths: Sequence[Path]) -> list[str]:
    pieces = [(n, start) for n, path in enumerate(paths) for start in range(0, path.stat().st_size or 1, PIECE)]
    with ThreadPoolExecutor(THREADS) as threads:
        values = list(threads.map(lambda piece: _piece_crc32(paths[piece[0]], piece[1]), pieces))
    of_file: dict[int, list[int]] = {}
    for (n, _), value in zip(pieces, values):
        of_file.setdefault(n, []).append(value)
    return [f"{_joined(values):08x}" for _, values in sorted(of_file.items())]


def _piece_crc32(path: Path, start: int) -> int:
    value, left, buffer = 0, PIECE, memoryview(bytearray(BUFFER))
    with open_regular(path) as file:
        file.seek(start)
        while left and (count := file.readinto(buffer[: min(left, BUFFER)])):
            value, left = zlib.crc32(buffer[:count], value), left - count
    return value


def _joined(values: list[int]) -> int:
    return values[0] if len(values) == 1 else zlib.crc32(b"".join(value.to_bytes(4, "big") for value in values))


def write_checksums(folder: Path, *, without: Collection[str] = ()) -> None:
    """Write the sizes and checksums of all files under a folder to FOLDER/checksums.json.

    Args:
        folder: where the files are.
        without: the names of files that may change.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (NAME, *without))
    names = [path.relative_to(folder).as_posix() for path in files]
    entries = {name: [(folder / name).stat().st_size, value] for name, value in zip(names, _crc32s(files))}
    write_text(folder / NAME, json.dumps({"files": entries}, indent=1) + "\n")


def damage(folder: Path, *, part: int = 0, parts: int = 1) -> str:
    """What is wrong with the files that checksums.json lists, in a sentence; "" for nothing, and without such a file.

    Args:
        folder: where the files are.
        part, parts: check every `parts`-th file from number `part` on, so that processes share the work.
    """
    if not (folder / NAME).is_file():
        return ""
    listed = json_or_none((folder / NAME).read_text(encoding="utf-8", errors="replace"))
    files = listed.get("files") if isinstance(listed, dict) else None
    if not isinstance(files, dict) or not all(isinstance(e, list) and len(e) == 2 for e in files.values()):
        return f"{folder / NAME} is damaged: expected the sizes and checksums of files"
    names = sorted(files)[part::parts]
    if found := next(filter(None, (_misfit(folder, name, files[name][0]) for name in names)), ""):
        return found
    for name, actual in zip(names, _crc32s([folder / name for name in names])):
        if actual != (expected := files[name][1]):
            return f"{folder / name} is damaged: expected crc32 {expected}, found {actual}"
    return ""


def _misfit(folder: Path, name: str, size: int) -> str:
    """What the name and the size of a listed file show to be wrong, without reading it."""
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return f"{folder / NAME} names {name!r}, which is not within its folder"
    if not path.is_file():
        return f"{path} is missing"
    if (actual := path.stat().st_size) != size:
        return f"{path} is damaged: expected {size} bytes, found {actual}"
    return ""

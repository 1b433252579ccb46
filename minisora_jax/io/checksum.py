"""Checksums of the files in a folder: written beside them, and compared when they are read.

    WORKDIR/checkpoints/500/checksums.json   {"files": {"default/manifest.ocdbt": [116, "8c736521"], ...}}
    runs/model/export/checksums.json         {"files": {"model.safetensors": [8620256, "1f0a77c2"]}}

Disks and networks flip bits without an error. CRC-32 finds them at several GB/s. It is no protection against a person
who changes a file and its checksum.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from minisora_jax.io.atomic import write_text
from minisora_jax.io.filesystem import json_or_none, open_regular

NAME = "checksums.json"
CHUNK = 2**22  # bytes read at a time
THREADS = 4  # files at a time; zlib releases the interpreter's lock


def crc32(path: Path) -> str:
    """The CRC-32 of a file's bytes, 8 hex digits."""
    value, buffer = 0, memoryview(bytearray(CHUNK))
    with open_regular(path) as file:
        while count := file.readinto(buffer):
            value = zlib.crc32(buffer[:count], value)
    return f"{value:08x}"


def write_checksums(folder: Path, *, without: Collection[str] = ()) -> None:
    """Write the sizes and checksums of all files under a folder to FOLDER/checksums.json.

    Args:
        folder: where the files are.
        without: the names of files that may change.
    """
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in (NAME, *without)]
    names = [path.relative_to(folder).as_posix() for path in files]
    with ThreadPoolExecutor(THREADS) as threads:
        sums = dict(zip(names, threads.map(lambda name: crc32(folder / name), names)))
    entries = {name: [(folder / name).stat().st_size, sums[name]] for name in sorted(names)}
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
    with ThreadPoolExecutor(THREADS) as threads:
        return next(filter(None, threads.map(lambda name: _difference(folder, name, *files[name]), names)), "")


def _difference(folder: Path, name: str, size: int, expected: str) -> str:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return f"{folder / NAME} names {name!r}, which is not within its folder"
    if not path.is_file():
        return f"{path} is missing"
    if (actual := path.stat().st_size) != size:
        return f"{path} is damaged: expected {size} bytes, found {actual}"
    if (actual := crc32(path)) != expected:
        return f"{path} is damaged: expected crc32 {expected}, found {actual}"
    return ""

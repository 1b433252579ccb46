"""Find, list and read files on this machine or on object storage.

    clips/a.tar   clips/train-{000..999}.tar   clips/*.parquet   gs://bucket/clips/*.tar   s3://...   https://...

All access goes through fsspec. `gs://` needs gcsfs and `s3://` needs s3fs (`pip install 'minisora_jax[cloud]'`).
"""

from __future__ import annotations

import dataclasses
import glob
import itertools
import json
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import fsspec

BLOCK = 4 * 2**20  # bytes that are read ahead of a remote file
SHOWN = 3  # missing files that an error names
# Keys of a listing that change with the contents, the best first.
VERSIONS = ("ETag", "etag", "md5Hash", "crc32c", "mtime", "LastModified", "last_modified", "updated", "created")


@dataclasses.dataclass(frozen=True)
class File:
    """A file as its folder lists it. `version` changes with the contents: an etag, or the time of the last change."""

    url: str  # an absolute path, or scheme://...
    size: int  # bytes
    version: str

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes [start, stop) of the file; OSError where the storage fails."""
        fs, path = filesystem(self.url)
        return cast(bytes, fs.cat_file(path, start=start, end=self.size if stop is None else stop))

    def open(self) -> BinaryIO:
        """The file, opened for reading with random access."""
        fs, path = filesystem(self.url)
        return cast(BinaryIO, fs.open(path, "rb", block_size=BLOCK) if is_url(self.url) else fs.open(path, "rb"))


def is_url(spec: str | os.PathLike) -> bool:
    """Whether a name is scheme://..., not a path."""
    return re.match(r"[a-z][a-z0-9+.-]+://", os.fspath(spec)) is not None


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL or a path, and the path within it.

    Raises:
        ImportError: a package is missing; the message has the command that installs it.
        ValueError: no file system is known for the scheme.
    """
    if not is_url(url):
        return fsspec.filesystem("file"), os.path.abspath(url)  # a path may have "::" in it
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ImportError(f"{url} needs another package: pip install 'minisora_jax[cloud]' ({error})") from error
    except ValueError as error:
        raise ValueError(f"{url}: {error}; gs://, s3:// and https:// are known") from error


def read_url(url: str) -> bytes:
    """The bytes of a file; FileNotFoundError if it is missing."""
    fs, path = filesystem(url)
    return cast(bytes, fs.cat_file(path))


def find(spec: str | os.PathLike) -> list[File]:
    """The files that a name stands for, each once and in order.

    Args:
        spec: a path or URL; {000..009}, {a,b} and wildcards are expanded.

    Raises:
        FileNotFoundError: a file of a range is missing, or a wildcard matches no file. The message names them.
    """
    files: dict[str, File] = {}
    missing, folders = [], {}
    for name in expand_braces(os.fspath(spec)):
        fs, path = filesystem(name)
        if glob.has_magic(path) and not fs.exists(path):
            matches = cast(dict[str, dict[str, Any]], fs.glob(path, detail=True))
            infos = [info for info in matches.values() if info["type"] != "directory"]
        else:
            infos = [info] if (info := _info(fs, path, folders)) else []
        if not infos:
            missing.append(name)
        for info in sorted(infos, key=lambda info: info["name"]):
            file = _file(fs, info)
            files.setdefault(file.url, file)
    if missing:
        more = f", and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise FileNotFoundError(f"{spec}: there is no file {', '.join(missing[:SHOWN])}{more}")
    return list(files.values())


def listing(folder: str | os.PathLike) -> dict[str, File]:
    """All files under a folder except hidden ones, sorted: their names within it, with forward slashes -> `File`."""
    fs, root = filesystem(os.fspath(folder))
    root = root.rstrip("/")
    infos = cast(dict[str, dict[str, Any]], fs.find(root, detail=True)).values()
    names = {info["name"][len(root) + 1 :]: _file(fs, info) for info in infos}
    return {name: names[name] for name in sorted(names) if not is_hidden(name)}


def is_hidden(name: str) -> bool:
    """Whether a path belongs to the operating system, such as .DS_Store, ._cat.mp4 and files in __MACOSX."""
    return any((part.startswith(".") and part.strip(".")) or part == "__MACOSX" for part in name.split("/"))


def expand_braces(text: str) -> Iterator[str]:
    """'a-{08..10}{x,y}' -> a-08x, a-08y, a-09x, ...: ranges of numbers keep their leading zeros, as in a shell."""
    parts = re.split(r"\{(\d+\.\.\d+|[^{}]*,[^{}]*)\}", text)
    choices = [_choices(part) if i % 2 else [part] for i, part in enumerate(parts)]
    return map("".join, itertools.product(*choices))


def _choices(braced: str) -> list[str]:
    if "," in braced:
        return braced.split(",")
    first, last = braced.split("..")
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    return [f"{n:0{width}d}" for n in range(int(first), int(last) + 1)]


def _info(fs: fsspec.AbstractFileSystem, path: str, folders: dict[str, dict | None]) -> dict | None:
    """The listing's entry of a file; None if there is no such file.

    A range may have thousands of files, so a folder is listed once, for its second file. `folders` caches the listings.
    """
    parent = path.rpartition("/")[0]
    try:
        if parent not in folders or "http" in fs.protocol:  # the first file of a folder; web servers list no folders
            folders[parent] = None
            info = fs.info(path)
        else:
            entries = folders[parent]
            if entries is None:
                folders[parent] = entries = {info["name"]: info for info in fs.ls(parent, detail=True)}
            info = entries.get(path)
    except FileNotFoundError:
        return None
    return info if info and info["type"] != "directory" else None


def _file(fs: fsspec.AbstractFileSystem, info: dict) -> File:
    local = "file" in fs.protocol
    if info.get("islink"):
        info = fs.info(info["name"])  # the entry of the link's target
    version = next((str(info[key]) for key in VERSIONS if info.get(key)), "")
    if info["size"] is None:
        raise ValueError(f"{info['name']}: the server does not report a size, so parts cannot be read. Download it")
    return File(info["name"] if local else fs.unstrip_protocol(info["name"]), int(info["size"]), version)


def json_or_none(text: str) -> object:
    """The value of a JSON text; None for text that is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None

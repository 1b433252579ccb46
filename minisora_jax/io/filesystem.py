"""Files by their names, on this machine or on object storage: what sources and mirrors are read from.

    clips/a.tar   clips/train-{000..999}.tar   clips/*.parquet   gs://bucket/clips/*.tar   s3://...   https://...

Everything goes through fsspec, which knows `gs://` by gcsfs and `s3://` by s3fs (`pip install 'minisora_jax[cloud]'`).
"""

from __future__ import annotations

import dataclasses
import glob
import itertools
import json
import os
import re
from collections.abc import Iterator
from typing import BinaryIO

import fsspec

BLOCK = 4 * 2**20  # bytes that are read ahead of a remote file
SHOWN = 3  # missing files, in an error
VERSIONS = ("ETag", "etag", "md5Hash", "crc32c", "mtime", "LastModified", "last_modified", "updated", "created")


@dataclasses.dataclass(frozen=True)
class File:
    """A file as its folder lists it. `version` is another one where the contents are: an etag, or a time of change."""

    url: str  # an absolute path, or scheme://...
    size: int  # bytes
    version: str

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        """Its bytes [start, stop); OSError where the storage fails."""
        fs, path = filesystem(self.url)
        return fs.cat_file(path, start=start, end=self.size if stop is None else stop)

    def open(self) -> BinaryIO:
        """For reading at any place."""
        fs, path = filesystem(self.url)
        return fs.open(path, "rb", block_size=BLOCK) if is_url(self.url) else fs.open(path, "rb")


def is_url(spec: str | os.PathLike) -> bool:
    """scheme://..., and not a path."""
    return re.match(r"[a-z][a-z0-9+.-]+://", os.fspath(spec)) is not None


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """(file system, path within it); ImportError with the command that installs what it needs."""
    if not is_url(url):
        return fsspec.filesystem("file"), os.path.abspath(url)  # a path may have "::" in it
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ImportError(f"{url} needs a package more: pip install 'minisora_jax[cloud]' ({error})") from error
    except ValueError as error:
        raise ValueError(f"{url}: {error}; gs://, s3:// and https:// are known") from error


def find(spec: str | os.PathLike) -> list[File]:
    """The files of a name, with {000..009}, {a,b} and wildcards spelled out, each once and in order.

    FileNotFoundError names what is missing: each file of a range must be there, and one at least of a wildcard's.
    """
    found: dict[str, File] = {}
    missing, folders = [], {}
    for name in expand_braces(os.fspath(spec)):
        fs, path = filesystem(name)
        if glob.has_magic(path) and not fs.exists(path):
            infos = [info for info in fs.glob(path, detail=True).values() if info["type"] != "directory"]
        else:
            infos = [info] if (info := _info(fs, path, folders)) else []
        if not infos:
            missing.append(name)
        for info in sorted(infos, key=lambda info: info["name"]):
            file = _file(fs, info)
            found.setdefault(file.url, file)
    if missing:
        more = f", and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise FileNotFoundError(f"{spec}: there is no file {', '.join(missing[:SHOWN])}{more}")
    return list(found.values())


def listing(folder: str | os.PathLike) -> dict[str, File]:
    """All files under a folder by their names within it, with forward slashes, in order; hidden ones apart."""
    fs, root = filesystem(os.fspath(folder))
    root = root.rstrip("/")
    names = {info["name"][len(root) + 1 :]: _file(fs, info) for info in fs.find(root, detail=True).values()}
    return {name: names[name] for name in sorted(names) if not is_hidden(name)}


def is_hidden(name: str) -> bool:
    """Files of the system's, such as .DS_Store, ._cat.mp4 and what lies in __MACOSX."""
    return any((part.startswith(".") and part.strip(".")) or part == "__MACOSX" for part in name.split("/"))


def expand_braces(text: str) -> Iterator[str]:
    """'a-{08..10}{x,y}' -> a-08x, a-08y, a-09x, ...: ranges of numbers keep their zeros, as in a shell."""
    parts = re.split(r"\{(\d+\.\.\d+|[^{}]*,[^{}]*)\}", text)
    choices = [_choices(part) if i % 2 else [part] for i, part in enumerate(parts)]
    return map("".join, itertools.product(*choices))


def _choices(braced: str) -> list[str]:
    if "," in braced:
        return braced.split(",")
    first, last = braced.split("..")
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    return [f"{n:0{width}d}" for n in range(int(first), int(last) + 1)]


def _info(fs, path: str, folders: dict[str, dict]) -> dict | None:
    """What is known of a file; None if it is not there. Its folder is listed once: a range may have thousands."""
    parent = path.rpartition("/")[0]
    try:
        if parent not in folders or "http" in fs.protocol:  # the first of a folder; web servers list none
            folders[parent] = None
            info = fs.info(path)
        else:
            if folders[parent] is None:
                folders[parent] = {info["name"]: info for info in fs.ls(parent, detail=True)}
            info = folders[parent].get(path)
    except FileNotFoundError:
        return None
    return info if info and info["type"] != "directory" else None


def _file(fs, info: dict) -> File:
    local = "file" in fs.protocol
    if info.get("islink"):
        info = fs.info(info["name"])  # of what it leads to
    version = next((str(info[key]) for key in VERSIONS if info.get(key)), "")
    if info["size"] is None:
        raise ValueError(f"{info['name']}: the server does not say how large it is, so no part of it can be asked for")
    return File(info["name"] if local else fs.unstrip_protocol(info["name"]), int(info["size"]), version)


def json_or_none(text: str) -> object:
    """What a JSON text says; None for what is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None

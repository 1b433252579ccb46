"""Find, list and read files on this machine or on object storage.

    clips/a.tar   clips/train-{000..999}.tar   clips/*.parquet   gs://bucket/clips/*.tar   s3://...   https://...

All access goes through fsspec. gs:// needs gcsfs and s3:// needs s3fs (`uv sync --extra cloud`). Data sets of the
Hugging Face Hub, hf://datasets/OWNER/NAME/..., need huggingface_hub (`uv sync --extra hf`).
"""

from __future__ import annotations

import codecs
import dataclasses
import glob
import io
import itertools
import json
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

import fsspec

from minisora_jax.config import how_to_install

BLOCK = 4 * 2**20  # bytes that are read ahead of a remote file
DIRECTIONS = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # marks of text direction
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
        end = self.size if stop is None else stop
        if not is_url(self.url):
            with open_regular(self.url) as file:
                file.seek(start)
                return file.read(max(0, end - start))
        fs, path = filesystem(self.url)
        return cast(bytes, fs.cat_file(path, start=start, end=end))

    def open(self) -> BinaryIO:
        """The file, opened for reading with random access."""
        if not is_url(self.url):
            return open_regular(self.url)
        fs, path = filesystem(self.url)
        return cast(BinaryIO, fs.open(path, "rb", block_size=BLOCK))


class NotAFile(OSError):
    """A path is no plain file. `kind` says what it is, such as "a named pipe"."""

    def __init__(self, path: str, kind: str):
        super().__init__(f"{path} is {kind}, not a plain file")
        self.kind = kind


def open_regular(path: str | os.PathLike) -> io.BufferedReader:
    """A plain file, opened for reading. A pipe, device or socket, whose reading may never end, is refused.

    Raises:
        NotAFile: the path is none.
        OSError: the file cannot be opened.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
    try:
        file = open(path, "rb", opener=lambda name, _: os.open(name, flags | getattr(os, "O_BINARY", 0)))
    except IsADirectoryError as error:
        raise NotAFile(os.fspath(path), "a folder") from error
    mode = os.fstat(file.fileno()).st_mode
    if not stat.S_ISREG(mode):
        file.close()
        raise NotAFile(os.fspath(path), next((name for test, name in _KINDS if test(mode)), "no file"))
    return file


_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


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
        extra = "hf" if url.startswith("hf:") else "cloud"
        raise ImportError(f"{url} needs another package: {how_to_install(extra)} ({error})") from error
    except ValueError as error:
        raise ValueError(f"{url}: {error}; gs://, s3://, hf:// and https:// are known") from error


def read_url(url: str) -> bytes:
    """The bytes of a file; FileNotFoundError if it is missing, NotAFile for a pipe or device."""
    if not is_url(url):
        with open_regular(url) as file:
            return file.read()
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
    if is_url(folder):
        infos = cast(dict[str, dict[str, Any]], fs.find(root, detail=True)).values()
    else:
        infos = [fs.info(f"{root}/{name}") for name in walk(root)]
    names = {info["name"][len(root) + 1 :]: _file(fs, info) for info in infos}
    return {name: names[name] for name in sorted(names) if not is_hidden(name)}


def walk(
    folder: str | os.PathLike,
    is_file: Callable[[str], bool] = lambda name: False,
    failed: Callable[[str, str], None] = lambda name, detail: None,
) -> Iterator[str]:
    """The names of the visible files under a local folder, with forward slashes, in no special order.

    Linked folders are followed, but for those whose files the walk meets anyway.

    Args:
        is_file: whether a folder of this name counts as a file.
        failed: called with the name of a folder that is not listed, and the reason.
    """
    root = os.path.realpath(folder)
    followed: list[str] = []
    name_of = lambda path: os.path.relpath(path, folder).replace(os.sep, "/")
    within = lambda path, top: path == top or path.startswith(top.rstrip(os.sep) + os.sep)

    def follow(path: str) -> bool:
        target = os.path.realpath(path)
        if within(root, target):
            failed(name_of(path), "it links to a folder above itself")
            return False
        if any(within(target, top) for top in (root, *followed)):
            return False
        followed.append(target)
        return True

    pending = [os.fspath(folder)]
    while pending:
        top = pending.pop()
        try:
            entries = sorted(os.scandir(top), key=lambda entry: entry.name)
        except OSError as error:
            failed(name_of(top), str(error.strerror))
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if os.path.isdir(entry.path) and not is_file(entry.name):  # False for a link to itself, without an error
                if not entry.is_symlink() or follow(entry.path):
                    pending.append(entry.path)
            else:
                yield name_of(entry.path)


def is_hidden(name: str) -> bool:
    """Whether a path belongs to the operating system, such as .DS_Store, ._cat.mp4 and files in __MACOSX."""
    return any((part.startswith(".") and part.strip(".")) or part == "__MACOSX" for part in name.split("/"))


def printable(text: str, keep: str = "") -> str:
    """The text for a terminal: control characters, marks of direction and undecodable bytes become escapes."""
    hidden = lambda c: (unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in DIRECTIONS) and c not in keep
    return "".join(c.encode("unicode_escape", "surrogatepass").decode() if hidden(c) else c for c in text)


def expand_braces(text: str) -> Iterator[str]:
    """'a-{08..10}{x,y}' -> a-08x, a-08y, a-09x, ...: ranges of numbers keep their leading zeros, as in a shell."""
    parts = re.split(r"\{(\d+\.\.\d+|[^{},]*,[^{}]*)\}", text)
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


def text_of(content: bytes) -> str:
    """The text of a file that a person wrote: UTF-8, or UTF-16 if its byte order mark says so, as on Windows.

    Bytes that are not UTF-8 become lone surrogates, which the reader of the text refuses.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", "replace")
    return content.decode("utf-8-sig", "surrogateescape")

"""Sharded, checked, resumable storage of arrays of any shape: what prepared clips and cached latents share.

    DIR/clips-00000-of-00002.array_record   records in order, in files of about `shard_bytes`
        clips-00001-of-00002.array_record
        sizes.npy                           one row of integers a record: plans need no record to be read
        manifest.json                       written last: a folder without it is not finished
        progress.jsonl, parts/              only while writing: what is written, and the parts finished so far

A record is `MSR1`, the crc32 of what follows, the length of a JSON header, the header (names, dtypes and shapes of
the arrays, and the caller's facts), and the arrays' bytes. Every failure to read is a DataError that names the file,
what was expected and what was found; nothing is ever filled in.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import struct
import threading
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tqdm import tqdm

from minisora_jax.data.atomic import replacing, write_text
from minisora_jax.data.ends import Ends
from minisora_jax.data.files import is_url
from minisora_jax.data.storage import DataError, patiently, require_readable

FORMAT = 1
MAGIC = b"MSR1"
PARTS = "parts"
RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"


# ---- One record


def pack_record(arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> bytes:
    """Arrays and JSON facts as bytes; `unpack_record` gives both back exactly."""
    arrays = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
    layout = [[name, a.dtype.str, list(a.shape)] for name, a in arrays.items()]
    header = json.dumps({"arrays": layout, "facts": facts}, ensure_ascii=False, sort_keys=True).encode("utf-8")
    body = b"".join([struct.pack("<I", len(header)), header, *(a.tobytes() for a in arrays.values())])
    return MAGIC + struct.pack("<I", zlib.crc32(body)) + body


def unpack_record(record: bytes, where: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, facts) of a record. `where` is how an error calls it."""
    if record[:4] != MAGIC or len(record) < 12:
        raise DataError(f"{where} is corrupt: expected {MAGIC!r} at its start, found {record[:4]!r}")
    expected, length = struct.unpack_from("<II", record, 4)
    if expected != (found := zlib.crc32(memoryview(record)[8:])):
        raise DataError(f"{where} is corrupt: expected crc32 {expected:08x}, found {found:08x}")
    header, at, arrays = json.loads(record[12 : 12 + length].decode("utf-8")), 12 + length, {}
    for name, dtype, shape in header["arrays"]:
        arrays[name] = array = np.frombuffer(record, dtype, math.prod(shape), at).reshape(shape)
        at += array.nbytes
    return arrays, header["facts"]


# ---- Writing


def write_parts(
    out_dir: str | os.PathLike,
    opening: dict[str, Any],
    parts: Sequence[int],
    write_part: Callable[[int, ShardWriter], Any],
) -> None:
    """Write these parts of a data set, but for those that are done: of several processes, each its own.

    opening: of `opening_of`.   write_part(n, writer): adds the records of part n, and gives facts for `finish_parts`.
    Both are functions of the settings alone, so whoever writes which part, after whatever interruption, the same bytes
    come out. A part's JSON is written last: a part that has one is done.
    """
    folder = Path(out_dir) / PARTS
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        note = folder / f"{part:06d}.json"
        if note.exists():
            continue
        for litter in folder.glob(f".{part:06d}-*.tmp*"):
            litter.unlink()
        with ShardWriter(folder / f"{part:06d}", opening) as writer:
            facts = write_part(part, writer)
        write_text(note, json.dumps({"shards": writer.shards, "facts": facts}))


def finish_parts(
    out_dir: str | os.PathLike,
    opening: dict[str, Any],
    parts: int,
    *,
    tables: dict[str, np.ndarray] | None = None,
    closing: Callable[[list[Any]], dict[str, Any]] = lambda facts: {},
) -> dict[str, Any]:
    """The manifest of a data set all of whose parts are done, which puts them together.

    tables: arrays kept beside the records, as NAME.npy.   closing(the parts' facts): more entries of the manifest.
    """
    folder = Path(out_dir) / PARTS
    notes = [_read_json(folder / f"{part:06d}.json") for part in range(parts)]
    shards = [{**shard, "file": f"{PARTS}/{shard['file']}"} for note in notes for shard in note["shards"]]
    if not shards:
        shutil.rmtree(folder)
        (Path(out_dir) / "progress.jsonl").unlink(missing_ok=True)
        raise DataError(f"{out_dir}: there was no record to write")
    manifest = finish(Path(out_dir), opening, shards, tables or {}, closing([note["facts"] for note in notes]))
    shutil.rmtree(folder)
    return manifest


def opening_of(kind: str, settings: dict[str, Any], shard_bytes: int, options: str) -> dict[str, Any]:
    """The head of a manifest: what a run must have in common with the one that it goes on from."""
    settings = json.loads(json.dumps(settings))  # as it will be read back: tuples are lists
    return {"kind": kind, "format": FORMAT, "settings": settings, "shard_bytes": shard_bytes, "options": options}


def finished(out_dir: Path, opening: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest, if the data set is finished; DataError if it is another one."""
    out_dir.mkdir(parents=True, exist_ok=True)
    if not (out_dir / "manifest.json").exists():
        return None
    manifest = _read_json(out_dir / "manifest.json")
    _check_same(out_dir, opening, manifest)
    (out_dir / "progress.jsonl").unlink(missing_ok=True)
    shutil.rmtree(out_dir / PARTS, ignore_errors=True)
    return manifest


def begin(out_dir: Path, opening: dict[str, Any]) -> None:
    """Note in progress.jsonl what is being written; DataError if an unfinished run wrote something else."""
    progress = out_dir / "progress.jsonl"
    if progress.exists() and (lines := progress.read_text(encoding="utf-8").split("\n")[:-1]):
        _check_same(out_dir, opening, json.loads(lines[0]))
        return
    write_text(progress, json.dumps(opening) + "\n")


class ShardWriter:
    """Records into STEM-0.array_record, STEM-1.array_record, ...: a file is whole or absent, and ends with the record
    that reaches `shard_bytes`. `shards` lists those finished, all of them once the context is left."""

    def __init__(self, stem: Path, opening: dict[str, Any]):
        self.stem = stem
        self.shard_bytes, self.options = opening["shard_bytes"], opening["options"]
        self.shards: list[dict[str, Any]] = []
        self._file = contextlib.ExitStack()
        self._sizes: list[list[int]] = []

    def add(self, record: bytes, size: tuple[int, ...]) -> None:
        """Write a record; `size` is its row of sizes.npy."""
        if not self._sizes:
            self._path = self.stem.with_name(f"{self.stem.name}-{len(self.shards)}.array_record")
            temporary = self._file.enter_context(replacing(self._path))
            self._writer, self._written = ArrayRecordWriter(str(temporary), self.options), 0
            self._file.callback(self._writer.close)
        self._writer.write(record)
        self._sizes.append(list(map(int, size)))
        self._written += len(record)
        if self._written >= self.shard_bytes:
            self._close()

    def _close(self) -> None:
        self._file.close()
        entry = {"file": self._path.name, "bytes": self._path.stat().st_size, "sha256": sha256(self._path)}
        self.shards.append({**entry, "sizes": self._sizes})
        self._sizes = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            self._file.__exit__(kind, error, trace)
        elif self._sizes:
            self._close()


def finish(out_dir: Path, opening: dict, shards: list, tables: dict, closing: dict) -> dict[str, Any]:
    """Final names, tables, and the manifest last. Safe to run again from any point.

    shards: {"file", "bytes", "sha256", "sizes"} each, the file by its path within `out_dir`; `tables`, `closing` as of
    `write_shards`."""
    for litter in out_dir.glob(".*.tmp*"):  # of a process that was killed
        litter.unlink()
    rows, entries = [], []
    for i, shard in enumerate(shards):
        name = f"{opening['kind']}-{i:05d}-of-{len(shards):05d}.array_record"
        if (out_dir / shard["file"]).exists():
            os.replace(out_dir / shard["file"], out_dir / name)
        elif not (out_dir / name).exists():
            raise DataError(f"{out_dir / shard['file']} is missing. Delete {out_dir} and write it again")
        rows += shard["sizes"]
        entries.append(
            {"file": name, "records": len(shard["sizes"]), "bytes": shard["bytes"], "sha256": shard["sha256"]}
        )
    tables = {**tables, "sizes": np.array(rows, np.int32)}
    manifest = {**opening, "records": len(rows), "shards": entries, "tables": {}, **closing}
    for name, array in sorted(tables.items()):
        path = out_dir / f"{name}.npy"
        with replacing(path) as temporary:
            np.save(temporary, array)
        manifest["tables"][name] = {"file": path.name, "sha256": sha256(path)}
    write_text(out_dir / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    (out_dir / "progress.jsonl").unlink(missing_ok=True)
    return manifest


def _check_same(out_dir: Path, wanted: dict, found: dict) -> None:
    flat = lambda d: {**{k: d.get(k) for k in ("kind", "format", "shard_bytes", "options")}, **d.get("settings", {})}
    a, b = flat(wanted), flat(found)
    for key in [*a, *b]:
        if a.get(key) != b.get(key):
            raise DataError(
                f"{out_dir} already holds a data set with {key}={b.get(key)!r}; this one has {key}={a.get(key)!r}. "
                "Write to another folder, or delete that one"
            )


# ---- Reading


class Shards:
    """Random access to a finished data set; threads may share it, and it pickles (files open on demand).

    directory: a path, or the URL of object storage, which data/mirror.py then fetches shard by shard.
    expect: settings that must match the manifest's; None means any.
    """

    def __init__(self, directory: str | os.PathLike, kind: str, expect: dict[str, Any]):
        self.directory, self.kind, self.mirror = Path(directory), kind, None
        if is_url(directory):
            from minisora_jax.data.mirror import Mirror

            self.mirror = Mirror(os.fspath(directory))
            self.directory = self.mirror.directory
        self.manifest = self._load_manifest()
        for key, wanted in expect.items():
            self._check(key, wanted, self.manifest["settings"].get(key))
        self._paths = [str(self.directory / shard["file"]) for shard in self.manifest["shards"]]
        for shard, path in zip(self.manifest["shards"], map(Path, self._paths)):
            if self.mirror and not path.exists():
                continue
            if not path.is_file():
                raise DataError(
                    f"{path} is missing: {path.parent}/manifest.json lists {shard['records']} records in it"
                )
            if path.stat().st_size != shard["bytes"]:
                raise DataError(f"{path} is damaged: expected {shard['bytes']} bytes, found {path.stat().st_size}")
        self.sizes = self.table("sizes")
        self._ends = Ends(shard["records"] for shard in self.manifest["shards"])
        if not len(self.sizes) == self.manifest["records"] == len(self._ends):
            raise DataError(
                f"{self.directory}: expected {self.manifest['records']} records, found {len(self.sizes)} sizes and "
                f"{len(self._ends)} records in shards"
            )
        self._open: dict[int, ArrayRecordReader] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.manifest["records"]

    def read(self, i: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """(arrays, facts) of record i, its checksum verified. The arrays are read-only."""
        shard, at = self._ends.place(i)
        where = f"record {at} of {self._paths[shard]}"

        def attempt():
            try:
                return (self._open.get(shard) or self._reader(shard)).read([at])
            except DataError:
                raise
            except Exception as error:  # the library raises bare RuntimeErrors of its own, whatever went wrong
                with self._lock:
                    self._open.pop(shard, None)
                require_readable(self._paths[shard])
                raise DataError(f"{where} is corrupt: {error}") from error

        found = patiently(attempt, where)
        if len(found) != 1:
            raise DataError(f"{where} is corrupt: expected 1 record, found {len(found)}")
        return unpack_record(found[0], where)

    def table(self, name: str) -> np.ndarray:
        """An array kept beside the records, its checksum verified."""
        entry = self.manifest["tables"].get(name)
        path = self.directory / (entry["file"] if entry else f"{name}.npy")
        if entry is None or not path.is_file():
            raise DataError(f"{path} is missing; write the data set again")
        self._check_sha256(path, entry["sha256"])
        return np.load(path, allow_pickle=False, mmap_mode="r" if name == "sizes" else None)

    def verify(self, progress: bool = False) -> None:
        """Read every byte of every shard against its sha256. DataError at the first that differs."""
        for shard in tqdm(self.manifest["shards"], desc="verifying", unit="shard", disable=not progress):
            if self.mirror:
                self.mirror.fetch(shard["file"], shard["sha256"])
            self._check_sha256(self.directory / shard["file"], shard["sha256"])

    def _load_manifest(self) -> dict[str, Any]:
        path = self.directory / "manifest.json"
        if not path.exists() and (self.directory / "progress.jsonl").exists():
            raise DataError(f"{path} is missing: writing {self.directory} did not finish. Run the same command again")
        if not path.exists():
            raise DataError(f"{path} is missing: expected a finished data set of {self.kind}, found no manifest")
        manifest = _read_json(path)
        for key, wanted in {"kind": self.kind, "format": FORMAT}.items():
            self._check(key, wanted, manifest.get(key))
        return manifest

    def _check(self, key: str, wanted: Any, found: Any) -> None:
        if wanted is not None and wanted != found:
            raise DataError(
                f"{self.directory}/manifest.json: {key} should be {wanted!r} and is {found!r}. Write {self.directory} "
                "again for what is in use now, or use what it was written for"
            )

    def _check_sha256(self, path: Path, wanted: str) -> None:
        if (found := sha256(path)) != wanted:
            raise DataError(f"{path} is damaged: expected sha256 {wanted}, found {found}")

    def _reader(self, shard: int) -> ArrayRecordReader:
        if self.mirror:
            self.mirror.fetch(self.manifest["shards"][shard]["file"], self.manifest["shards"][shard]["sha256"])
        with self._lock:
            if shard not in self._open:
                path, expected = self._paths[shard], self.manifest["shards"][shard]["records"]
                os.stat(path)  # OSError; the library opens what is not there as empty
                reader = ArrayRecordReader(path, RANDOM_ACCESS)
                if (found := reader.num_records()) != expected:
                    raise DataError(f"{path} is damaged: expected {expected} records, found {found}")
                self._open[shard] = reader
            return self._open[shard]

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("_open", "_lock")}

    def __setstate__(self, state):
        self.__dict__.update(state, _open={}, _lock=threading.Lock())


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is damaged: expected JSON, found {error}") from error

"""Sharded, checked, resumable storage of arrays of any shape, used by prepared clips and cached latents.

    DIR/clips-00000-of-00002.array_record   records in order, in files of about `shard_bytes`
        clips-00001-of-00002.array_record
        sizes.npy                           one row of integers a record, so packing plans read no records
        manifest.json                       written last: a folder without it is not finished
        progress.jsonl, parts/              only while writing: the settings, and the finished parts

A record is `MSR1`, the crc32 of the rest, the length of a JSON header, the header (names, dtypes and shapes of the
arrays, and the caller's metadata under "facts"), and the arrays' bytes. Every failure to read is a DataError that names
the file, the expected value and the actual one. Missing data is never filled in.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from minisora_jax.io.concat_index import ConcatIndex
from minisora_jax.io.filesystem import is_url, open_regular
from minisora_jax.io.json_files import read_json
from minisora_jax.io.manifest import FORMAT, manifest_problem
from minisora_jax.io.progress import Progress
from minisora_jax.io.retry import DataError, require_readable, with_retries

MAGIC = b"MSR1"
RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"


# ---- One record


def pack_record(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> bytes:
    """Arrays and JSON metadata as bytes. `unpack_record` restores both exactly."""
    arrays = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
    layout = [[name, a.dtype.str, list(a.shape)] for name, a in arrays.items()]
    header = json.dumps({"arrays": layout, "facts": metadata}, ensure_ascii=False, sort_keys=True).encode("utf-8")
    body = [struct.pack("<I", len(header)), header, *(a.reshape(-1).view(np.uint8).data for a in arrays.values())]
    crc = 0
    for piece in body:
        crc = zlib.crc32(piece, crc)
    return b"".join([MAGIC, struct.pack("<I", crc), *body])  # the one copy: a clip may have most of a GiB


def unpack_record(record: bytes, where: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, metadata) of a record; DataError for a damaged one, which the message calls `where`."""
    if record[:4] != MAGIC or len(record) < 12:
        raise DataError(f"{where} is corrupt: expected {MAGIC!r} at its start, found {record[:4]!r}")
    expected, length = struct.unpack_from("<II", record, 4)
    if expected != (actual := zlib.crc32(memoryview(record)[8:])):
        raise DataError(f"{where} is corrupt: expected crc32 {expected:08x}, found {actual:08x}")
    at, arrays = 12 + length, {}
    try:  # a stranger's record may have a right checksum and a wrong header
        header = json.loads(record[12:at].decode("utf-8"))
        for name, dtype, shape in header["arrays"]:
            if np.dtype(dtype).hasobject or min(shape, default=0) < 0:
                raise ValueError(f"array {name!r} is {dtype} {shape}")
            arrays[name] = array = np.frombuffer(record, dtype, math.prod(shape), at).reshape(shape)
            at += array.nbytes
        metadata = header["facts"]
        if not isinstance(metadata, dict):
            raise ValueError(f"metadata {metadata!r} is no object")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{where} is corrupt: {type(error).__name__}: {error}") from error
    return arrays, metadata


# ---- Reading


class Shards:
    """Random access to a finished data set. Threads may share it. It pickles: files open on demand.

    Args:
        directory: a path, or a URL of object storage; io/object_store.py then fetches shard by shard.
        kind: the kind of data set that the manifest must state, such as "clips" or "latents".
        expect: settings that must equal the manifest's; None matches any value.

    Raises:
        DataError: the data set is missing, unfinished, damaged, or has other settings.
    """

    def __init__(self, directory: str | os.PathLike, kind: str, expect: dict[str, Any]):
        self.directory, self.kind, self.mirror = Path(directory), kind, None
        if is_url(directory):
            from minisora_jax.io.object_store import Mirror

            self.mirror = Mirror(os.fspath(directory))
            self.directory = self.mirror.directory
        self.manifest = self._load_manifest()
        for key, expected in expect.items():
            self._check(key, expected, self.manifest["settings"].get(key))
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
        if self.sizes.ndim != 2 or self.sizes.shape[1] != 4 or self.sizes.dtype.kind != "i" or (self.sizes < 0).any():
            raise DataError(f"{self.directory}: sizes.npy is damaged: it has no four sizes of each record")
        self._index = ConcatIndex(shard["records"] for shard in self.manifest["shards"])
        if not len(self.sizes) == self.manifest["records"] == len(self._index):
            raise DataError(
                f"{self.directory}: expected {self.manifest['records']} records, found {len(self.sizes)} sizes and "
                f"{len(self._index)} records in shards"
            )
        self._open: dict[int, ArrayRecordReader] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.manifest["records"]

    def read(self, i: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """(read-only arrays, metadata) of record i, its checksum verified."""
        shard, at = self._index.locate(i)
        where = f"record {at} of {self._paths[shard]}"

        def attempt():
            try:
                return (self._open.get(shard) or self._reader(shard)).read([at])
            except DataError:
                raise
            except Exception as error:  # the library raises a bare RuntimeError for every failure
                with self._lock:
                    self._open.pop(shard, None)
                require_readable(self._paths[shard])
                raise DataError(f"{where} is corrupt: {error}") from error

        records = with_retries(attempt, where)
        if len(records) != 1:
            raise DataError(f"{where} is corrupt: expected 1 record, found {len(records)}")
        return unpack_record(records[0], where)

    def require_size(self, i: int, size: tuple[int, ...]) -> None:
        """Raise DataError unless the size of record i begins as its row of sizes.npy does."""
        if tuple(self.sizes[i].tolist())[: len(size)] != size:
            shard, at = self._index.locate(i)
            raise DataError(
                f"record {at} of {self._paths[shard]} is corrupt, or another record: its size is {size}, and sizes.npy "
                f"has {tuple(self.sizes[i].tolist())}"
            )

    def fields(self, i: int, metadata: dict[str, Any], kinds: dict[str, type | tuple[type, ...]]) -> list[Any]:
        """The values of these fields of record i's metadata; DataError unless each is of its kind."""
        for name, kind in kinds.items():
            if not isinstance(metadata.get(name), kind) or isinstance(metadata[name], bool):
                raise DataError(
                    f"record {i} of {self.directory} is corrupt: its {name!r} is {metadata.get(name)!r:.80}"
                )
        return [metadata[name] for name in kinds]

    def table(self, name: str) -> np.ndarray:
        """The array NAME.npy beside the records, its checksum verified."""
        entry = self.manifest["tables"].get(name)
        path = self.directory / (entry["file"] if entry else f"{name}.npy")
        if entry is None or not path.is_file():
            raise DataError(f"{path} is missing; write the data set again")
        self._check_sha256(path, entry["sha256"])
        try:
            return np.load(path, allow_pickle=False, mmap_mode="r" if name == "sizes" else None)
        except (ValueError, EOFError, SyntaxError) as error:
            raise DataError(f"{path} is damaged: {error}") from error

    def verify(self, progress: bool = False) -> None:
        """Check the sha256 of every shard, which reads every byte; DataError at the first difference."""
        for shard in Progress(self.manifest["shards"], desc="verifying", unit="shard", disable=not progress):
            if self.mirror:
                self.mirror.fetch(shard["file"], shard["sha256"])
            self._check_sha256(self.directory / shard["file"], shard["sha256"])

    def _load_manifest(self) -> dict[str, Any]:
        path = self.directory / "manifest.json"
        if not path.exists() and (self.directory / "progress.jsonl").exists():
            raise DataError(f"{path} is missing: writing {self.directory} did not finish. Run the same command again")
        if not path.exists():
            raise DataError(f"{path} is missing: expected a finished data set of {self.kind}, found no manifest")
        manifest = read_json(path)
        if problem := manifest_problem(manifest):
            raise DataError(f"{path} is damaged: {problem}. Write {self.directory} again")
        for key, expected in {"kind": self.kind, "format": FORMAT}.items():
            self._check(key, expected, manifest.get(key))
        return manifest

    def _check(self, key: str, expected: Any, actual: Any) -> None:
        if expected is not None and expected != actual:
            raise DataError(
                f"{self.directory}/manifest.json: {key} should be {expected!r} and is {actual!r}. Write "
                f"{self.directory} again with {key}={expected!r}, or use {actual!r}"
            )

    def _check_sha256(self, path: Path, expected: str) -> None:
        if (actual := sha256(path)) != expected:
            raise DataError(f"{path} is damaged: expected sha256 {expected}, found {actual}")

    def _reader(self, shard: int) -> ArrayRecordReader:
        if self.mirror:
            self.mirror.fetch(self.manifest["shards"][shard]["file"], self.manifest["shards"][shard]["sha256"])
        with self._lock:
            if shard not in self._open:
                path, expected = self._paths[shard], self.manifest["shards"][shard]["records"]
                os.stat(path)  # OSError for a missing file, which the library opens as an empty one
                reader = ArrayRecordReader(path, RANDOM_ACCESS)
                if (actual := reader.num_records()) != expected:
                    raise DataError(f"{path} is damaged: expected {expected} records, found {actual}")
                self._require_first(reader, shard)
                self._open[shard] = reader
            return self._open[shard]

    def _require_first(self, reader: ArrayRecordReader, shard: int) -> None:
        """Raise DataError if a shard begins with a whole record that is not its own. A damaged one is its own fault."""
        expected = self.manifest["shards"][shard].get("first")
        try:
            [record] = reader.read([0])
            unpack_record(record, "")
        except Exception:  # the library raises a bare RuntimeError; reading the record reports what it is
            return
        if expected and expected != (actual := record_crc32(record)):
            raise DataError(
                f"{self._paths[shard]} is another shard: its first record has crc32 {actual}, and manifest.json has "
                f"{expected}"
            )

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("_open", "_lock")}

    def __setstate__(self, state):
        self.__dict__.update(state, _open={}, _lock=threading.Lock())


def record_crc32(record: bytes) -> str:
    """The checksum that a record states, 8 hex digits."""
    return f"{struct.unpack_from('<I', record, 4)[0]:08x}"


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

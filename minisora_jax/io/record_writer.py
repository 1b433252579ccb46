"""Write a data set of records (io/records.py) in parts. Writing is resumable and independent of who writes a part."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from minisora_jax.io.atomic import remove_leftovers, replacing, write_text
from minisora_jax.io.json_files import read_json
from minisora_jax.io.manifest import FORMAT, manifest_problem, seal
from minisora_jax.io.records import record_crc32, sha256
from minisora_jax.io.retry import DataError

PARTS = "parts"


def write_parts(
    out_dir: str | os.PathLike,
    opening: dict[str, Any],
    parts: Sequence[int],
    write_part: Callable[[int, ShardWriter], Any],
) -> None:
    """Write those of `parts` that are not done yet. Each of several processes calls it with its own parts.

    `opening` and `write_part` must depend on the settings only. Then the bytes are the same after any interruption and
    for any division of the parts among processes. A part's JSON file is written last, so a part that has one is done.

    Args:
        opening: the head of the manifest, see `opening_of`.
        write_part: write_part(n, writer) adds the records of part n and returns its metadata for `finish_parts`.
    """
    folder = Path(out_dir) / PARTS
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        note = folder / f"{part:06d}.json"
        if note.exists():
            continue
        for leftover in folder.glob(f".{part:06d}-*.tmp*"):
            leftover.unlink()
        with ShardWriter(folder / f"{part:06d}", opening) as writer:
            metadata = write_part(part, writer)
        write_text(note, json.dumps({"shards": writer.shards, "facts": metadata}))


def finish_parts(
    out_dir: str | os.PathLike,
    opening: dict[str, Any],
    parts: int,
    *,
    tables: dict[str, np.ndarray] | None = None,
    closing: Callable[[list[Any]], dict[str, Any]] = lambda metadata: {},
) -> dict[str, Any]:
    """Join the finished parts into one data set, and return its manifest.

    Args:
        parts: the number of parts, all of which must be done.
        tables: arrays to store beside the records, as NAME.npy.
        closing: closing(metadata of every part) returns further entries of the manifest.

    Raises:
        DataError: no part has a record.
    """
    folder = Path(out_dir) / PARTS
    notes = [read_json(folder / f"{part:06d}.json") for part in range(parts)]
    shards = [{**shard, "file": f"{PARTS}/{shard['file']}"} for note in notes for shard in note["shards"]]
    if not shards:
        shutil.rmtree(folder)
        (Path(out_dir) / "progress.jsonl").unlink(missing_ok=True)
        raise DataError(f"{out_dir}: there is no record to write")
    manifest = finish(Path(out_dir), opening, shards, tables or {}, closing([note["facts"] for note in notes]))
    shutil.rmtree(folder)
    return manifest


def opening_of(kind: str, settings: dict[str, Any], shard_bytes: int, options: str) -> dict[str, Any]:
    """The head of a manifest: a resumed run must have the same one."""
    settings = json.loads(json.dumps(settings))  # as JSON gives it back: tuples become lists
    return {"kind": kind, "format": FORMAT, "settings": settings, "shard_bytes": shard_bytes, "options": options}


def finished(out_dir: Path, opening: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a finished data set, None for an unfinished one; DataError if its head differs from `opening`."""
    out_dir.mkdir(parents=True, exist_ok=True)
    if not (out_dir / "manifest.json").exists():
        return None
    manifest = read_json(out_dir / "manifest.json")
    if problem := manifest_problem(manifest):
        raise DataError(f"{out_dir}/manifest.json is damaged: {problem}. Delete {out_dir} and run the command again")
    _check_same(out_dir, opening, manifest)
    (out_dir / "progress.jsonl").unlink(missing_ok=True)
    shutil.rmtree(out_dir / PARTS, ignore_errors=True)
    return manifest


def begin(out_dir: Path, opening: dict[str, Any]) -> None:
    """Write `opening` to progress.jsonl; DataError if an unfinished run left a different one."""
    progress = out_dir / "progress.jsonl"
    if progress.exists() and (lines := progress.read_text(encoding="utf-8").split("\n")[:-1]):
        try:
            stored = json.loads(lines[0])
            if not isinstance(stored, dict) or not isinstance(stored.get("settings"), dict):
                raise ValueError("its first line has no settings")
        except (ValueError, RecursionError) as error:
            raise DataError(f"{progress} is damaged: {error}. Delete {out_dir} and run the command again") from error
        _check_same(out_dir, opening, stored)
        return
    write_text(progress, json.dumps(opening) + "\n")


class ShardWriter:
    """A context that writes records to STEM-0.array_record, STEM-1.array_record, ..., each file atomically.

    A file ends with the record that reaches `shard_bytes`. `shards` lists the finished files; after the context it
    lists all of them.
    """

    def __init__(self, stem: Path, opening: dict[str, Any]):
        self.stem = stem
        self.shard_bytes, self.options = opening["shard_bytes"], opening["options"]
        self.shards: list[dict[str, Any]] = []
        self._file = contextlib.ExitStack()
        self._sizes: list[list[int]] = []

    def add(self, record: bytes, size: tuple[int, ...]) -> None:
        """Write a record. `size` is its row of sizes.npy."""
        if not self._sizes:
            self._path = self.stem.with_name(f"{self.stem.name}-{len(self.shards)}.array_record")
            temporary = self._file.enter_context(replacing(self._path))
            self._writer, self._written = ArrayRecordWriter(str(temporary), self.options), 0
            self._first = record_crc32(record)
            self._file.callback(self._writer.close)
        self._writer.write(record)
        self._sizes.append(list(map(int, size)))
        self._written += len(record)
        if self._written >= self.shard_bytes:
            self._close()

    def _close(self) -> None:
        self._file.close()
        entry = {"file": self._path.name, "bytes": self._path.stat().st_size, "sha256": sha256(self._path)}
        entry["first"] = self._first
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
    """Rename the shards, write the tables and, last, the manifest. It can run again after any interruption.

    Args:
        shards: {"file", "bytes", "sha256", "sizes"} each; "file" is a path within `out_dir`.
        tables: see `finish_parts`.
        closing: further entries of the manifest.

    Returns:
        The manifest.
    """
    remove_leftovers(out_dir)
    rows, entries = [], []
    for i, shard in enumerate(shards):
        name = f"{opening['kind']}-{i:05d}-of-{len(shards):05d}.array_record"
        if (out_dir / shard["file"]).exists():
            os.replace(out_dir / shard["file"], out_dir / name)
        elif not (out_dir / name).exists():
            raise DataError(f"{out_dir / shard['file']} is missing. Delete {out_dir} and run the command again")
        rows += shard["sizes"]
        entries.append(
            {"file": name, "records": len(shard["sizes"]), **{key: shard[key] for key in ("bytes", "sha256", "first")}}
        )
    tables = {**tables, "sizes": np.array(rows, np.int32)}
    manifest = {**opening, "records": len(rows), "shards": entries, "tables": {}, **closing}
    for name, array in sorted(tables.items()):
        path = out_dir / f"{name}.npy"
        with replacing(path) as temporary:
            np.save(temporary, array)
        manifest["tables"][name] = {"file": path.name, "sha256": sha256(path)}
    manifest["crc32"] = seal(manifest)
    write_text(out_dir / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    (out_dir / "progress.jsonl").unlink(missing_ok=True)
    return manifest


def _check_same(out_dir: Path, opening: dict, stored: dict) -> None:
    flat = lambda d: {**{k: d.get(k) for k in ("kind", "format", "shard_bytes", "options")}, **d["settings"]}
    ours, theirs = flat(opening), flat(stored)
    for key in [*ours, *theirs]:
        if ours.get(key) != theirs.get(key):
            raise DataError(
                f"{out_dir} already holds a data set with {key}={theirs.get(key)!r:.200}; this one has "
                f"{key}={ours.get(key)!r:.200}. Write to another folder, or delete {out_dir}"
            )

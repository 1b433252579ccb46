"""The form of a data set's manifest. A manifest may come from a stranger, so nothing in it is taken on trust."""

from __future__ import annotations

import json
import re
import zlib
from typing import Any

FORMAT = 2  # of a data set and its manifest; since 2 a manifest has a checksum of its own


def seal(manifest: dict[str, Any]) -> str:
    """The CRC-32 of what a manifest says, without its own entry "crc32": 8 hex digits. It finds damage, not forgery."""
    text = json.dumps({key: value for key, value in manifest.items() if key != "crc32"}, sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x}"


def manifest_problem(manifest: Any) -> str:
    """What is wrong with the form of a manifest, in words; "" for a good one.

    Every file that it names must lie in its own folder, so the name has no slash: a manifest may come from a stranger.
    """
    if not isinstance(manifest, dict):
        return f"expected JSON of an object, found {type(manifest).__name__}"
    shards, tables = manifest.get("shards"), manifest.get("tables")
    if not isinstance(shards, list) or not isinstance(tables, dict) or not isinstance(manifest.get("settings"), dict):
        return 'expected a list of "shards", and objects "tables" and "settings"'
    if not _is_count(manifest.get("records")):
        return f'"records" is {manifest.get("records")!r}, not a number of records'
    for entry in [*shards, *tables.values()]:
        if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
            return f"expected a file with its sha256, found {entry!r}"
        if not is_plain_name(entry.get("file")):
            return f"it names {entry.get('file')!r}, which is not a file in its folder"
    for shard in shards:
        if not (_is_count(shard.get("records")) and _is_count(shard.get("bytes"))):
            return f"{shard['file']} has no numbers of records and bytes"
    if manifest.get("format") == FORMAT and manifest.get("crc32") != (actual := seal(manifest)):
        return f"expected crc32 {manifest.get('crc32')}, found {actual}"
    return ""


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**60


def is_plain_name(name: Any) -> bool:
    """Whether a value is the name of a file within a folder: text without a slash, and no hidden or odd name."""
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}", name) is not None

"""Parquet files of clips, as Hugging Face's `datasets` writes them: a row a clip, the file's bytes in a column.

    data/train-00000-of-00009.parquet       video: struct<bytes, path> (or image, or plain binary)    caption: string

Which columns these are is told by `datasets`' own note in the file, or by their types and names; where that leaves a
choice, "?media=COLUMN&caption=COLUMN" after the files makes it. Only names and captions are read at first. A row group
is then read as a stream: rows in order take the memory of a page, which is at most a row group (100 MB by `datasets`).
"""

from __future__ import annotations

import json
import threading

from minisora_jax.io.filesystem import File
from minisora_jax.io.video import VideoError
from minisora_jax.sources.base import CAPTION_KEYS, BadClip, Media, SkipReport, clean_caption
from minisora_jax.sources.sharded import Entry, Sharded

BUFFER = 2**20  # bytes read ahead of a column


class Parquets(Sharded):
    """entry: (name, caption, row group, row in it).   media, caption: columns; "" finds out."""

    kind = "parquet"

    def __init__(
        self, files: list[File], *, media: str = "", caption: str = "", need_caption: bool = True, strict=False
    ):
        _pyarrow()
        self.media, self.caption = media, caption
        super().__init__(files, need_caption=need_caption, strict=strict)

    def index(self, file: File, report: SkipReport) -> list[Entry]:
        import pyarrow as pa

        entries, taken = [], set()
        with file.open() as opened:
            try:
                table = _pyarrow().ParquetFile(opened)
                media, caption, path = self.columns(file, table.schema_arrow)
            except (pa.ArrowException, OSError) as error:
                report.add("", "unreadable file", f"{file.url}: {error}")
                return []
            wanted, first = [c for c in (caption, path and f"{media}.path") if c], 0
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                try:
                    found = table.read_row_group(group, columns=wanted) if wanted else None
                    captions = found[caption].to_pylist() if caption else [None] * rows
                    paths = [p and p["path"] for p in found[media].to_pylist()] if path else [None] * rows
                except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                    report.add("", "corrupt row group", f"rows {first} to {first + rows - 1} of {file.url}: {error}")
                    captions = paths = []
                for row, (text, called) in enumerate(zip(captions, paths)):
                    name = _name(called, first + row, taken)
                    try:
                        if text is None and self.need_caption:
                            raise BadClip(name, "no caption", f"row {first + row} of {file.url}, column {caption!r}")
                        entries.append((name, clean_caption(name, text or "", self.need_caption), group, row))
                    except BadClip as bad:
                        report.add(bad.name, bad.reason, bad.detail)
                first += rows
        return entries

    def columns(self, file: File, schema) -> tuple[str, str, bool]:
        """(the column of files, of captions ("" for none needed), and whether the former has paths)."""
        media = self.media or _only("media", file, _media_columns(schema), schema.names)
        _known("media", media, file, schema.names)
        caption = self.caption or _caption_column(file, schema, self.need_caption)
        if caption:
            _known("caption", caption, file, schema.names)
        return media, caption, "path" in _fields(schema.field(media).type)

    def read(self, file: File, entry: Entry) -> Media:
        import pyarrow as pa

        name, caption, group, row = entry
        with self._reading:
            try:
                data = self._stream(file, group, row)
            except (pa.ArrowException, OSError) as error:
                self._at = None
                return Media(
                    name, caption, VideoError("corrupt row group", f"row group {group} of {file.url}: {error}")
                )
        if not isinstance(data, bytes):
            return Media(
                name, caption, VideoError("no bytes", f"row {row} of row group {group} of {file.url} has none")
            )
        return Media(name, caption, data)

    def _stream(self, file: File, group: int, row: int) -> bytes | None:
        """A row's bytes: the next of the open row group if it comes later, else from the group's start."""
        if self._at is None or self._at[:2] != (file.url, group) or self._at[2] > row:
            table = _pyarrow().ParquetFile(file.open(), buffer_size=BUFFER, pre_buffer=False)
            media, _, _ = self.columns(file, table.schema_arrow)
            leaf = f"{media}.bytes" if _fields(table.schema_arrow.field(media).type) else media
            self._rows = table.iter_batches(1, row_groups=[group], columns=[leaf], use_threads=False)
            self._at = (file.url, group, 0)
        for at in range(self._at[2], row + 1):
            batch = next(self._rows)
            self._at = (file.url, group, at + 1)
        value = batch.column(0)[0].as_py()
        return value.get("bytes") if isinstance(value, dict) else value

    def _forget(self) -> None:
        super()._forget()
        self._reading, self._at, self._rows = threading.Lock(), None, None


def splits(names: list[str]) -> list[str]:
    """The splits of a Hugging Face directory: 'train' of data/train-00000-of-00009.parquet or of train/0.parquet."""
    known = ("train", "test", "validation", "val", "valid", "dev", "eval")
    words = [name.replace("/", "-").replace("_", "-").replace(".", "-").split("-") for name in names]
    return sorted({word for split in words for word in split if word in known})


def _name(called: str | None, row: int, taken: set[str]) -> str:
    """The row's path, with its number if that is missing, odd or taken: datasets keep base names only."""
    name = called.replace("\\", "/").rpartition("/")[2] if called else ""
    if not name:
        name = f"{row:08d}"
    elif name in taken:
        name = f"{name}#{row}"
    taken.add(name)
    return name


def _media_columns(schema) -> list[str]:
    import pyarrow.types as types

    note = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = note.get("info", {}).get("features", {})
    said = [name for name in schema.names if features.get(name, {}).get("_type") in ("Video", "Image")]
    structs = [field.name for field in schema if "bytes" in _fields(field.type)]
    binary = [f.name for f in schema if types.is_binary(f.type) or types.is_large_binary(f.type)]
    return said or structs or binary


def _caption_column(file: File, schema, needed: bool) -> str:
    import pyarrow.types as types

    texts = [field.name for field in schema if types.is_string(field.type) or types.is_large_string(field.type)]
    if named := [name for name in CAPTION_KEYS if name in texts]:
        return named[0]
    return _only("caption", file, texts, schema.names) if needed else ""


def _only(what: str, file: File, found: list[str], names: list[str]) -> str:
    if len(found) == 1:
        return found[0]
    raise ValueError(
        f"{file.url} has {len(found) or 'no'} columns that may be its {what}{': ' if found else ''}{', '.join(found)}; "
        f"say which it is by '?{what}=COLUMN' after the files. Its columns are {', '.join(names)}"
    )


def _known(what: str, column: str, file: File, names: list[str]) -> None:
    if column not in names:
        raise ValueError(f"{file.url} has no column {column!r} for '?{what}='; its columns are {', '.join(names)}")


def _fields(kind) -> list[str]:
    import pyarrow.types as types

    return [kind.field(i).name for i in range(kind.num_fields)] if types.is_struct(kind) else []


def _pyarrow():
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError(f"parquet files need pyarrow: pip install 'minisora_jax[hf]' ({error})") from error
    return parquet

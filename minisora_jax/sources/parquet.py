"""Parquet files of clips, as Hugging Face's `datasets` writes them: one clip a row, the file's bytes in a column.

    data/train-00000-of-00009.parquet       video: struct<bytes, path> (or image, or plain binary)    caption: string

The metadata of `datasets` in the file names these columns; otherwise their types and names do. If several columns fit,
"?media=COLUMN&caption=COLUMN" after the files chooses. Opening reads names and captions only. A row group is then
streamed: reading rows in order takes the memory of a page, which is at most a row group (100 MB with `datasets`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from minisora_jax.config import how_to_install
from minisora_jax.io.filesystem import File, is_url, json_or_none
from minisora_jax.media.video import VideoError
from minisora_jax.sources.base import Media
from minisora_jax.sources.captions import CAPTION_KEYS, clean_caption
from minisora_jax.sources.sharded import Entry, Sharded
from minisora_jax.sources.skips import BadClip, SkipReport

if TYPE_CHECKING:
    import pyarrow as pa

BUFFER = 2**20  # bytes read ahead of a column


class Parquets(Sharded):
    """The clips of parquet files. An entry is (name, caption, row group, row in it).

    Args:
        media: the column of files; "" finds it by metadata, type or name.
        caption: the column of captions, texts or classes; "" finds it. The name of a class is the caption.
    """

    kind = "parquet"

    def __init__(
        self, files: list[File], *, media: str = "", caption: str = "", need_caption: bool = True, strict: bool = False
    ):
        _pyarrow()
        self.media, self.caption = media, caption
        super().__init__(files, need_caption=need_caption, strict=strict)

    def index(self, file: File, report: SkipReport) -> list[Entry]:
        """The entries of a file; see `Sharded.index`."""
        import pyarrow as pa

        entries, taken = [], set()
        with file.open() as opened:
            try:
                table = _pyarrow().ParquetFile(opened)
                media, caption, path = self.columns(file, table.schema_arrow)
                classes = _classes(table.schema_arrow, caption)
            except (pa.ArrowException, OSError) as error:
                report.add("", "unreadable file", f"{file.url}: {error}")
                return []
            columns, first = [c for c in (caption, path and f"{media}.path") if c], 0
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                captions = paths = [None] * rows
                try:
                    if columns:
                        texts = table.read_row_group(group, columns=columns)
                        captions = (
                            [_named(value, classes) for value in _values(texts[caption])] if caption else captions
                        )
                        paths = _values(texts[media]) if path else paths
                except Exception as error:  # pyarrow raises many kinds at damaged bytes
                    report.add("", "corrupt row group", f"rows {first} to {first + rows - 1} of {file.url}: {error}")
                    captions = paths = []
                for row, (text, stored_path) in enumerate(zip(captions, paths)):
                    stored_path = stored_path.get("path") if isinstance(stored_path, dict) else None
                    name = _name(stored_path, first + row, taken)
                    try:
                        if isinstance(text, Exception):
                            raise BadClip(name, "caption not UTF-8", f"row {first + row} of {file.url}: {text}")
                        if text is None and self.need_caption:
                            raise BadClip(name, "no caption", f"row {first + row} of {file.url}, column {caption!r}")
                        entries.append((name, clean_caption(name, text or "", self.need_caption), group, row))
                    except BadClip as bad:
                        report.add(bad.name, bad.reason, bad.detail)
                first += rows
        return entries

    def columns(self, file: File, schema: pa.Schema) -> tuple[str, str, bool]:
        """(the column of files, the column of captions or "" for none, whether the column of files has paths).

        Raises:
            ValueError: no column or several columns fit, or a given name is no column.
        """
        media = self.media or _only("media", file, _media_columns(schema), schema.names)
        _known("media", media, file, schema.names)
        caption = self.caption or _caption_column(file, schema, self.need_caption)
        if caption:
            _known("caption", caption, file, schema.names)
        return media, caption, "path" in _fields(schema.field(media).type)

    def read(self, file: File, entry: Entry) -> Media:
        """The clip of an entry; see `Sharded.read`."""
        name, caption, group, row = entry
        with self._reading:
            try:
                data = self._stream(file, group, row)
            except Exception as error:  # pyarrow raises many kinds at damaged bytes
                self._at = None
                if isinstance(error, OSError) and is_url(file.url):
                    raise  # the storage fails, not the file
                return Media(
                    name, caption, VideoError("corrupt row group", f"row group {group} of {file.url}: {error}")
                )
        if not isinstance(data, bytes):
            return Media(
                name, caption, VideoError("no bytes", f"row {row} of row group {group} of {file.url} has none")
            )
        return Media(name, caption, data)

    def _stream(self, file: File, group: int, row: int) -> bytes | None:
        """The bytes of a row. Reads on in the open row group if the row is ahead, else from the group's start."""
        at, rows = self._at, self._rows
        if at is None or rows is None or at[:2] != (file.url, group) or at[2] > row:
            table = _pyarrow().ParquetFile(file.open(), buffer_size=BUFFER, pre_buffer=False)
            media, _, _ = self.columns(file, table.schema_arrow)
            leaf = f"{media}.bytes" if _fields(table.schema_arrow.field(media).type) else media
            self._rows = rows = table.iter_batches(1, row_groups=[group], columns=[leaf], use_threads=False)
            self._at = at = (file.url, group, 0)
        value = None
        for n in range(at[2], row + 1):
            value = next(rows).column(0)[0]
            self._at = (file.url, group, n + 1)
        value = value.as_py() if value is not None else None
        return value.get("bytes") if isinstance(value, dict) else value

    def _forget(self) -> None:
        super()._forget()
        self._reading = threading.Lock()
        self._at: tuple[str, int, int] | None = None  # (file, row group, next row) of the open stream
        self._rows: Iterator[pa.RecordBatch] | None = None


def _values(column: pa.ChunkedArray) -> list[Any]:
    """The values of a column; one that is damaged, such as a text that is no UTF-8, is the error that it raises."""

    def value(scalar: pa.Scalar) -> Any:
        try:
            return scalar.as_py()
        except Exception as error:
            return error

    return [value(scalar) for scalar in column]


def splits(names: list[str]) -> list[str]:
    """The splits in the file names of a Hugging Face directory, such as 'train' of data/train-00000-of-00009.parquet
    or of train/0.parquet."""
    known = ("train", "test", "validation", "val", "valid", "dev", "eval")
    words = [name.replace("/", "-").replace("_", "-").replace(".", "-").split("-") for name in names]
    return sorted({word for split in words for word in split if word in known})


def _name(path: str | None, row: int, taken: set[str]) -> str:
    """The base name of a row's path, or its number. A taken name gets the number as a suffix."""
    name = path.replace("\\", "/").rpartition("/")[2] if path else ""
    if not name:
        name = f"{row:08d}"
    elif name in taken:
        name = f"{name}#{row}"
    taken.add(name)
    return name


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """What the metadata of `datasets` says of each column; {} where there is none."""
    value: object = json_or_none((schema.metadata or {}).get(b"huggingface", b"{}").decode("utf-8", "replace"))
    for key in ("info", "features"):  # notes that are damaged say nothing
        value = value.get(key) if isinstance(value, dict) else None
    features = value if isinstance(value, dict) else {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


def _classes(schema: pa.Schema, column: str) -> list[str]:
    """The names of a column's classes; [] for a column of texts or of plain numbers."""
    names = _features(schema).get(column, {}).get("names")
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def _named(value: Any, classes: list[str]) -> Any:
    """The caption that a value stands for: the name of a class, or of a number itself."""
    if not isinstance(value, int):
        return value
    return classes[value] if 0 <= value < len(classes) else None if classes else str(value)


def _media_columns(schema: pa.Schema) -> list[str]:
    import pyarrow.types as types

    kinds = {name: feature.get("_type") for name, feature in _features(schema).items()}
    declared = [name for name in schema.names if kinds.get(name) in ("Video", "Image")]
    structs = [field.name for field in schema if "bytes" in _fields(field.type)]
    binary = [f.name for f in schema if types.is_binary(f.type) or types.is_large_binary(f.type)]
    return declared or structs or binary


def _caption_column(file: File, schema: pa.Schema, needed: bool) -> str:
    import pyarrow.types as types

    texts = [field.name for field in schema if types.is_string(field.type) or types.is_large_string(field.type)]
    if named := [name for name in CAPTION_KEYS if name in texts]:
        return named[0]
    labels = [name for name in schema.names if _features(schema).get(name, {}).get("_type") == "ClassLabel"]
    texts = texts or labels
    return _only("caption", file, texts, schema.names) if needed else ""


def _only(what: str, file: File, columns: list[str], names: list[str]) -> str:
    """The one column that fits; ValueError for none or several."""
    if len(columns) == 1:
        return columns[0]
    fitting = f"{len(columns)} columns that may be its {what}: {', '.join(columns)}"
    raise ValueError(
        f"{file.url} has {fitting if columns else f'no columns that may be its {what}'}; "
        f"name it by '?{what}=COLUMN' after the files. Its columns are {', '.join(names)}"
    )


def _known(what: str, column: str, file: File, names: list[str]) -> None:
    if column not in names:
        raise ValueError(f"{file.url} has no column {column!r} for '?{what}='; its columns are {', '.join(names)}")


def _fields(kind: pa.DataType) -> list[str]:
    """The fields of a struct type; [] for other types."""
    import pyarrow as pa

    return [kind.field(i).name for i in range(kind.num_fields)] if isinstance(kind, pa.StructType) else []


def _pyarrow():
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError(f"parquet files need pyarrow: {how_to_install('hf')} ({error})") from error
    return parquet

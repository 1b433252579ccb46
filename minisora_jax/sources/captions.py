"""Find the clips among the files of a folder or a tar, and their captions in files beside them or in tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path

from minisora_jax.io.filesystem import json_or_none, text_of
from minisora_jax.media.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from minisora_jax.sources.actions import TABLE as ACTIONS
from minisora_jax.sources.skips import BadClip, SkipReport

TABLES = ("captions.jsonl", "captions.csv")  # caption tables at the top of a folder
FOLDER = "folder"  # "?caption=folder": a clip's caption is the name of the folder that it lies in, its class
METADATA = ("metadata.jsonl", "metadata.csv")  # caption tables in any folder, about the files in it
CAPTION_KEYS = ("caption", "text", "prompt", "description")  # keys of a table or a .json; the first present one counts
MAX_CAPTION, MAX_TABLE = 2**24, 2**31  # bytes; a larger file is not read as a caption, or as a table of captions


def scan_names(
    files: list[str],
    read: Callable[[str], bytes],
    need_caption: bool,
    report: SkipReport,
    *,
    caption: str = "",
    samples: bool = False,
) -> list[tuple[str, str]]:
    """(name, caption) of the files that are clips by their suffix and have a caption. Other files go to the report.

    Args:
        files: all names, with forward slashes.
        read: reads the bytes of a file; called for captions and tables only.
        need_caption: skip clips without a caption.
        caption: FOLDER, or "" for the files beside the clips and for tables.
        samples: files with the same name up to the first dot are one sample (webdataset), so a.mp4 and a.front.mp4
            may share a.txt.
    """
    entries, known = [], set(files)
    captions = {} if caption else _read_tables(files, read, report)
    used = {beside for name in files for beside in _beside(name, samples)} & known
    for name in files:
        suffix = Path(name).suffix.lower()
        if name in used or is_table(name) or name == ACTIONS:
            continue
        if suffix not in VIDEO_SUFFIXES + IMAGE_SUFFIXES:
            report.add(name, "caption without a clip" if suffix == ".txt" else "unknown suffix")
            continue
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            report.add(ascii(name)[1:-1], "name not UTF-8")
            continue
        try:
            beside = [other for other in _beside(name, samples) if other in known]
            text = _of_folder(name) if caption else _caption(name, beside, read, captions, need_caption)
            entries.append((name, text))
        except BadClip as bad:
            report.add(bad.name, bad.reason, bad.detail)
        except OSError as error:
            report.add(name, "unreadable caption", str(error))
    for name in sorted(set(captions) - known):
        report.add(name, "caption without a clip", "its row in the caption table names no file")
    return entries


def _beside(name: str, samples: bool) -> list[str]:
    """The files that may hold a clip's caption, the likeliest first; [] for a file that is no clip."""
    path = Path(name)
    if path.suffix.lower() not in VIDEO_SUFFIXES + IMAGE_SUFFIXES:
        return []
    stems = [path.with_suffix("")]
    if samples and (sample := path.name.split(".")[0]):
        stems.append(path.with_name(sample))
    return [f"{stem.as_posix()}{suffix}" for suffix in (".txt", ".json") for stem in stems]


def caption_option(where: str, caption: str) -> str:
    """The option of a folder or tar; ValueError unless it is "" or FOLDER."""
    if caption not in ("", FOLDER):
        raise ValueError(
            f"{where}: '?caption={caption}' must be '?caption={FOLDER}', which makes captions of the names of folders"
        )
    return caption


def _of_folder(name: str) -> str:
    """The folder that a clip lies in, below the top: its class, as in ImageNet and UCF-101."""
    folder, below, _ = name.partition("/")
    if not below:
        raise BadClip(name, "no class", "it lies in no folder, and the names of folders are the captions")
    return clean_caption(name, folder, True)


def _caption(name: str, beside: list[str], read: Callable, captions: dict[str, str], needed: bool) -> str:
    """A clip's caption with normalised spaces, from a .txt beside it, a table, or a .json beside it, in this order."""
    texts = [other for other in beside if other.endswith(".txt")]
    text = None
    if texts:
        text = text_of(read(texts[0]))
    elif name in captions:
        text = captions[name]
    elif beside:
        text = caption_of(json_or_none(text_of(read(beside[0]))))
    if text is None and needed:
        own = Path(name).with_suffix(".txt").name
        keys = f", and {beside[0]} has none of {', '.join(CAPTION_KEYS)}" if beside else ""
        keys += f"; '?caption={FOLDER}' after the source takes the name of its folder" if "/" in name else ""
        raise BadClip(name, "no caption", f"neither {own} nor a row of {' or '.join(TABLES + METADATA)}{keys}")
    return clean_caption(name, text or "", needed)


def clean_caption(name: str, text: str, needed: bool) -> str:
    """The caption with runs of white space as single spaces.

    Raises:
        BadClip: it contains surrogates, which stand for bytes that are not UTF-8, or it is empty and `needed`.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadClip(name, "caption not UTF-8", f"at character {error.start}") from error
    text = " ".join(text.split())
    if needed and not text:
        raise BadClip(name, "empty caption")
    return text


def caption_of(row: object) -> str | None:
    """The caption in a table's row or a .json file; None if there is none."""
    metadata = row if isinstance(row, dict) else {}
    return next((metadata[key] for key in CAPTION_KEYS if isinstance(metadata.get(key), str)), None)


def _read_tables(files: list[str], read: Callable[[str], bytes], report: SkipReport) -> dict[str, str]:
    """File name -> caption, from the tables of a folder. Rows without either are reported with their number."""
    captions = {}
    for table in filter(is_table, files):
        try:
            text = text_of(read(table))
        except OSError as error:
            report.add(table, "unreadable caption", str(error))
            continue
        rows = _jsonl_rows(text) if table.endswith("jsonl") else _csv_rows(text)
        for number, row in enumerate(rows, 1):
            file = (row.get("file") or row.get("file_name")) if isinstance(row, dict) else None
            caption = caption_of(row)
            if isinstance(file, str) and caption is not None:
                captions.setdefault((Path(table).parent / file).as_posix(), caption)
            else:
                detail = f"it needs 'file' (or 'file_name') and one of {', '.join(CAPTION_KEYS)}, both text"
                report.add(f"{table}:{number}", "bad caption row", detail)
    return captions


def is_table(name: str) -> bool:
    """Whether a file is a table of captions."""
    return name in TABLES or name.rpartition("/")[2] in METADATA


def _jsonl_rows(text: str) -> Iterator[object]:
    for line in filter(str.strip, text.split("\n")):
        yield json_or_none(line)


def _csv_rows(text: str) -> Iterator[object]:
    try:
        yield from csv.DictReader(io.StringIO(text, newline=""))
    except csv.Error:  # a field of more than 128 KiB; the start of the next row is unknown
        yield None

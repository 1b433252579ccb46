"""Which source a spelling means; docs/sources.md has them all, with examples."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from urllib.parse import parse_qsl

from minisora_jax.io.filesystem import File, filesystem, find, is_hidden, is_url, json_or_none, listing
from minisora_jax.io.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from minisora_jax.sources.base import Folder, ProceduralShapes, Source

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # those that are refused are, by name


def open_source(spec: str | os.PathLike, *, need_caption: bool = True, strict: bool = False) -> Source:
    """The source of that spelling: "shapes:SPLIT:COUNT", the path of a folder, or what docs/sources.md lists.

    need_caption: False keeps clips without a caption, as "" (a codec needs none).   strict: BadClip instead of a skip.
    ValueError or FileNotFoundError says what is wrong with the spelling, ImportError what to install.
    """
    spec = os.fspath(spec)
    if spec.split(":")[0] == "shapes":
        return ProceduralShapes(spec)
    options = {"need_caption": need_caption, "strict": strict}
    if " + " in spec and not os.path.exists(spec):
        from minisora_jax.sources.concat import Together

        parts = [part.strip() for part in spec.split(" + ")]
        return Together(parts, [open_source(part, **options) for part in parts], strict=strict)
    where, asked = split_options(spec)
    if where.startswith("tfds:"):
        from minisora_jax.sources.tfds import open_tfds

        return open_tfds(where, **asked, **options)
    if where.endswith(TAR_SUFFIXES) and not is_folder(where):
        from minisora_jax.sources.webdataset import Tars

        return Tars(find(where), **asked, **options)
    if where.endswith(".parquet") and not is_folder(where):
        return _parquets(find(where), asked, options)
    return _folder(where, asked, options)


def split_options(spec: str) -> tuple[str, dict[str, str]]:
    """('clips.parquet', {'caption': 'title'}) of 'clips.parquet?caption=title'. A wildcard ? has no = after it."""
    match = re.fullmatch(r"(.*?)\?(\w+=[^?]*)", spec, re.DOTALL)
    if not match or os.path.exists(spec):
        return spec, {}
    known = ("media", "caption", "fps", "data_dir")
    asked = dict(parse_qsl(match[2], keep_blank_values=True))
    if unknown := sorted(set(asked) - set(known)):
        raise ValueError(f"{spec}: {', '.join(unknown)} is no option of a source; those are {', '.join(known)}")
    return match[1], asked


def is_folder(where: str) -> bool:
    if not is_url(where):
        return os.path.isdir(where)
    fs, path = filesystem(where)
    return fs.isdir(path)


def _folder(where: str, asked: dict, options: dict) -> Source:
    """A folder of clips, of parquet files, or of what `prepare` wrote."""
    if not is_folder(where):
        raise FileNotFoundError(
            f"{where} is not a folder of clips, nor one of the other sources: *.tar, *.parquet, tfds:NAME:SPLIT, shapes"
        )
    if is_prepared(where):
        _refuse(where, asked)
        from minisora_jax.sources.prepared import Prepared

        return Prepared(where, **options)
    if files := _only_parquets(where):
        return _parquets(files, asked, options)
    _refuse(where, asked)
    if is_url(where):
        from minisora_jax.sources.remote import RemoteFolder

        return RemoteFolder(where, **options)
    return Folder(where, **options)


def is_prepared(where: str) -> bool:
    """A directory that `prepare` (or `encode`) wrote: others may have a manifest.json too."""
    fs, path = filesystem(where)
    manifest = f"{path.rstrip('/')}/manifest.json"
    metadata = json_or_none(fs.cat_file(manifest).decode("utf-8", "replace")) if fs.exists(manifest) else None
    return isinstance(metadata, dict) and {"kind", "settings", "shards"} <= set(metadata)


def _only_parquets(where: str) -> list[File]:
    """The parquet files of a folder that has no clips in it, and one split: a folder of clips may hold one of facts."""
    parquets = []
    for name in listing(where) if is_url(where) else _names(where):
        if name.lower().endswith(VIDEO_SUFFIXES + IMAGE_SUFFIXES):
            return []
        parquets += [name] if name.endswith(".parquet") else []
    if not parquets:
        return []
    from minisora_jax.sources.parquet import splits

    if len(found := splits(parquets)) > 1:
        raise ValueError(
            f"{where} has the splits {', '.join(found)}: name the files of one, as in {where}/**/train*.parquet"
        )
    files = listing(where)
    return [files[name] for name in sorted(parquets)]


def _names(folder: str) -> Iterator[str]:
    for top, _, files in os.walk(folder):
        for file in files:
            if not is_hidden(name := os.path.relpath(os.path.join(top, file), folder)):
                yield name


def _parquets(files: list[File], asked: dict, options: dict) -> Source:
    from minisora_jax.sources.parquet import Parquets

    return Parquets(files, **asked, **options)


def _refuse(where: str, asked: dict) -> None:
    if asked:
        raise ValueError(f"{where} is a folder, which has no option {', '.join(asked)}")

"""Open a source by its name. docs/sources.md lists all kinds, with examples."""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import parse_qsl

from minisora_jax.io.filesystem import (
    File,
    NotAFile,
    filesystem,
    find,
    is_hidden,
    is_url,
    json_or_none,
    listing,
    read_url,
    walk,
)
from minisora_jax.media.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from minisora_jax.sources.base import Folder, ProceduralShapes, Source

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # compressed ones get an error


def open_source(spec: str | os.PathLike, *, need_caption: bool = True, strict: bool = False) -> Source:
    """The source of a name.

    Args:
        spec: "shapes:SPLIT:COUNT", the path of a folder, or another kind of docs/sources.md.
        need_caption: False keeps clips without a caption, as "", since a codec needs none.
        strict: raise BadClip instead of skipping a clip.

    Raises:
        ValueError, FileNotFoundError: the name is wrong.
        ImportError: a package is missing; the message has the command that installs it.
    """
    spec = os.fspath(spec)
    if " + " in spec and not os.path.exists(spec):
        from minisora_jax.sources.concat import ConcatSource

        parts = [part.strip() for part in spec.split(" + ")]
        sources = [open_source(part, need_caption=need_caption, strict=strict) for part in parts]
        return ConcatSource(parts, sources, strict=strict)
    if spec.split(":")[0] == "shapes":
        return ProceduralShapes(spec)
    if spec.startswith("gym:"):
        from minisora_jax.sources.gym import open_gym

        return open_gym(spec)
    where, options = split_options(spec)
    rules: dict[str, Any] = {"need_caption": need_caption, "strict": strict}
    if where.startswith("tfds:"):
        from minisora_jax.sources.tfds import open_tfds

        return open_tfds(where, **options, **rules)
    if where.endswith(TAR_SUFFIXES) and not is_folder(where):
        from minisora_jax.sources.webdataset import Tars

        return Tars(find(where), **options, **rules)
    if where.endswith(".parquet") and not is_folder(where):
        return _parquets(find(where), options, rules)
    return _folder(where, options, rules)


def split_options(spec: str) -> tuple[str, dict[str, Any]]:
    """'clips.parquet?caption=title' -> ('clips.parquet', {'caption': 'title'}). A wildcard ? has no = after it.

    Raises:
        ValueError: an unknown option.
    """
    match = re.fullmatch(r"(.*?)\?(\w+=[^?]*)", spec, re.DOTALL)
    if not match or os.path.exists(spec):
        return spec, {}
    known = ("media", "caption", "fps", "data_dir")
    options = dict(parse_qsl(match[2], keep_blank_values=True))
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"{spec}: {', '.join(unknown)} is no option of a source; those are {', '.join(known)}")
    return match[1], options


def is_folder(where: str) -> bool:
    """Whether a path or URL is a folder."""
    if not is_url(where):
        return os.path.isdir(where)
    fs, path = filesystem(where)
    return fs.isdir(path)


def _folder(where: str, options: dict, rules: dict[str, Any]) -> Source:
    """A folder of clips or of parquet files, or a prepared data set."""
    if not is_folder(where):
        raise FileNotFoundError(
            f"{where} is not a folder of clips, nor one of the other sources: *.tar, *.parquet, tfds:NAME:SPLIT, shapes"
        )
    if is_prepared(where):
        _refuse_options(where, options)
        from minisora_jax.sources.prepared import Prepared

        return Prepared(where, **rules)
    if files := _only_parquets(where):
        return _parquets(files, options, rules)
    caption = options.pop("caption", "")
    _refuse_options(where, options)
    if is_url(where):
        from minisora_jax.sources.remote import RemoteFolder

        return RemoteFolder(where, caption, **rules)
    return Folder(where, caption, **rules)


def is_prepared(where: str) -> bool:
    """Whether `prepare` or `encode` wrote the directory. Other directories may have a manifest.json too."""
    fs, path = filesystem(where)
    manifest = f"{path.rstrip('/')}/manifest.json"
    if not fs.exists(manifest):
        return False
    try:
        metadata = json_or_none(read_url(f"{where.rstrip('/')}/manifest.json").decode("utf-8", "replace"))
    except NotAFile:
        return False
    return isinstance(metadata, dict) and {"kind", "settings", "shards"} <= set(metadata)


def _only_parquets(where: str) -> list[File]:
    """The parquet files of a folder without clips; [] if it has clips, since its parquet files may be metadata.

    Raises:
        ValueError: the files have several splits.
    """
    parquets = []
    for name in listing(where) if is_url(where) else filter(lambda name: not is_hidden(name), walk(where)):
        if name.lower().endswith(VIDEO_SUFFIXES + IMAGE_SUFFIXES):
            return []
        parquets += [name] if name.endswith(".parquet") else []
    if not parquets:
        return []
    from minisora_jax.sources.parquet import splits

    if len(names := splits(parquets)) > 1:
        raise ValueError(
            f"{where} has the splits {', '.join(names)}: name the files of one, as in {where}/**/train*.parquet"
        )
    files = listing(where)
    return [files[name] for name in sorted(parquets)]


def _parquets(files: list[File], options: dict, rules: dict[str, Any]) -> Source:
    from minisora_jax.sources.parquet import Parquets

    return Parquets(files, **options, **rules)


def _refuse_options(where: str, options: dict) -> None:
    if options:
        raise ValueError(f"{where} is a folder, which has no option {', '.join(options)}: leave it out")

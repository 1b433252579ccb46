"""A folder of clips on object storage, such as "gs://bucket/clips", with the same captions as a local folder."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from minisora_jax.io.filesystem import File, filesystem, listing
from minisora_jax.sources.base import Media, reopened
from minisora_jax.sources.captions import caption_option, is_table, scan_names
from minisora_jax.sources.skips import SkipReport

CAPTIONS = (".txt", ".json")


class RemoteFolder:
    """The videos and images of a remote folder, sorted by name. It costs one listing, and one read of each caption.

    A pickled RemoteFolder is its URL. Each process that unpickles it lists the folder again and checks that the
    contents are the same. With very many clips, tars or one caption table open faster than a caption file a clip.
    """

    actions = ()

    def __init__(self, url: str, caption: str = "", *, need_caption: bool = True, strict: bool = False):
        self.url, self.need_caption, self.report = url, need_caption, SkipReport(strict)
        self.caption = caption_option(url, caption)
        files = listing(url)
        wanted = lambda name: not caption and (name.endswith(CAPTIONS) or is_table(name))
        texts = _read_all({name: f for name, f in files.items() if wanted(name)})
        entries = scan_names(list(files), texts.__getitem__, need_caption, self.report, caption=caption)
        self.entries: list[tuple[str, str, File]] = [(name, caption, files[name]) for name, caption in entries]
        digest = hashlib.sha256()
        for name, caption, file in self.entries:
            digest.update(json.dumps([name, caption, file.size, file.version]).encode("utf-8"))
        self.identity = f"folder:{digest.hexdigest()}"

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, i: int) -> Media:
        name, caption, file = self.entries[i]
        return Media(name, caption, file.read())

    def __reduce__(self):
        return reopened, (RemoteFolder, (self.url, self.caption), self.need_caption, self.identity)


def _read_all(files: dict[str, File]) -> dict[str, bytes]:
    """The bytes of small files, read in parallel where the storage supports it."""
    if not files:
        return {}
    fs, _ = filesystem(next(iter(files.values())).url)
    paths = {str(fs._strip_protocol(file.url)): name for name, file in files.items()}
    contents: Any = fs.cat(list(paths), on_error="raise")  # a dict, or the bare bytes of a single file
    if not isinstance(contents, dict):
        contents = {next(iter(paths)): contents}
    return {name: contents[path] for path, name in paths.items()}

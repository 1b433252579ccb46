"""Sources of several large files (tar, parquet), each with an index of its own.

Opening a source indexes every file once. Only a count and a digest of each file stay in memory and are pickled. Reading
a clip indexes its file again and keeps the last few indices; the digest shows whether a file has changed meanwhile. So
memory is bounded by the index of a file, and a worker indexes only the files of its own clips.
"""

from __future__ import annotations

import abc
import hashlib
import json
import os
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

from minisora_jax.io.concat_index import ConcatIndex
from minisora_jax.io.filesystem import File
from minisora_jax.sources.base import Media
from minisora_jax.sources.skips import SkipReport

KEPT = 3  # indices that a process keeps
THREADS = 8  # files that are indexed at a time; most of the time is waiting for storage

Entry = tuple  # (name, caption, ...); a subclass adds the place of the clip in its file


class Sharded(abc.ABC):
    """The clips of `files` in order. A subclass implements `index` of a file and `read` of an entry.

    Names are unique: with several files, a clip's name begins with its file's, as in train-000/cat.mp4.
    """

    kind: str
    actions = ()

    def __init__(self, files: list[File], *, need_caption: bool = True, strict: bool = False):
        self.files, self.need_caption = files, need_caption
        self.prefixes = prefixes([file.url for file in files])
        self.report = SkipReport(strict)
        with ThreadPoolExecutor(THREADS) as pool:
            scans = list(pool.map(self._scanned, range(len(files))))
        errors = [error for *_, error in scans if error is not None]
        if errors and len(errors) == len(files):
            raise errors[0]  # an option is wrong, or no file is readable
        for rows, *_ in scans:
            for row in rows:
                self.report.add(row["name"], row["reason"], row["detail"])
        self.digests = [digest for _, digest, _, _ in scans]
        self.concat_index = ConcatIndex(count for _, _, count, _ in scans)
        metadata = json.dumps([*zip(self.prefixes, self.digests)])
        self.identity = f"{self.kind}:{hashlib.sha256(metadata.encode('utf-8')).hexdigest()}"
        self._forget()

    @abc.abstractmethod
    def index(self, file: File, report: SkipReport) -> list[Entry]:
        """The entries of a file, with names that are unique within it. Skipped clips are added to the report.

        Raises:
            ImportError: a package is missing.
            ValueError: an option or the format is wrong for the whole source.
        """

    @abc.abstractmethod
    def read(self, file: File, entry: Entry) -> Media:
        """A clip. The data of a damaged clip is a VideoError. Raises OSError where the storage fails."""

    def __len__(self) -> int:
        return len(self.concat_index)

    def __getitem__(self, i: int) -> Media:
        shard, at = self.concat_index.locate(i)
        return self.read(self.files[shard], self._entries(shard)[at])

    def _scanned(self, shard: int) -> tuple[list[dict[str, str]], str, int, ValueError | None]:
        """(skipped rows, digest, number of clips, the error of a file that has none)."""
        entries, report, error = self._index(shard)
        return report.skipped, self._digest(shard, entries), len(entries), error

    def _index(self, shard: int) -> tuple[list[Entry], SkipReport, ValueError | None]:
        """The entries of a file. Whatever a library raises at its bytes is the fault of this file, which then has none.

        A ValueError about the whole file, such as a missing column, comes back too.
        """
        report, prefix, entries, failed = SkipReport(), self.prefixes[shard], [], None
        try:
            entries = [(prefix + name, *rest) for name, *rest in self.index(self.files[shard], report)]
        except ImportError:
            raise
        except Exception as error:
            failed = error if isinstance(error, ValueError) else None
            report.add("", "unreadable file", f"{type(error).__name__}: {error}")
        for row in report.skipped:
            row["name"] = prefix + row["name"] if row["name"] else self.files[shard].url
        return entries, report, failed

    def _digest(self, shard: int, entries: list[Entry]) -> str:
        file = self.files[shard]
        digest = hashlib.sha256(f"{file.size} {file.version}\n".encode())
        for entry in entries:
            digest.update(json.dumps(entry).encode("utf-8"))
        return digest.hexdigest()[:32]

    def _entries(self, shard: int) -> list[Entry]:
        with self._lock:
            if shard not in self._indices:
                entries, *_ = self._index(shard)
                if self._digest(shard, entries) != self.digests[shard]:
                    raise RuntimeError(f"{self.files[shard].url} has changed since this run began")
                self._indices[shard] = entries
                if len(self._indices) > KEPT:
                    self._indices.popitem(last=False)
            self._indices.move_to_end(shard)
            return self._indices[shard]

    def _forget(self) -> None:
        """Drop the cached indices."""
        self._indices: OrderedDict[int, list[Entry]] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self):
        state = {k: v for k, v in self.__dict__.items() if not k.startswith("_")}
        return state | {"report": SkipReport(self.report.strict)}

    def __setstate__(self, state):
        vars(self).update(state)
        self._forget()


def prefixes(urls: list[str]) -> list[str]:
    """The prefix of each file's clips, such as 'train-000/': its path below the common folder, without the suffix.

    A single file has the prefix "".
    """
    if len(urls) < 2:
        return [""] * len(urls)
    top = os.path.commonpath([os.path.dirname(url) for url in urls])
    return [f"{PurePosixPath(os.path.relpath(url, top)).with_suffix('')}/" for url in urls]

"""Data sets on object storage, read through a folder on this machine: "gs://bucket/latents" where a path could stand.

ArrayRecord files are read at random places, thousands of times an epoch, by a reader that wants local files. So the
small files of a data set are fetched when it is opened, and each shard when its first record is asked for: whole,
checked against the manifest's sha256, and under its name only when it is complete. What was fetched stays, for the next
run too. A host fetches the shards that its own rows come from, which after an epoch is all of them: the folder needs
room for that, and MINISORA_CACHE says where it lies (by default ~/.cache/minisora).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from minisora_jax.io.atomic import replacing
from minisora_jax.io.filesystem import filesystem, json_or_none
from minisora_jax.io.retry import DataError

CHUNK = 2**24  # bytes fetched at a time
log = logging.getLogger("minisora")


class Mirror:
    """The local folder of a data set at `url`. Another manifest there is another folder here.

    `directory` has manifest.json and the tables once this returns. DataError if there is no manifest.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        fs, path = filesystem(f"{self.url}/manifest.json")
        try:
            manifest = fs.cat_file(path)
        except FileNotFoundError as error:
            raise DataError(f"{self.url}/manifest.json is missing: expected a finished data set") from error
        name = f"{self.url.rpartition('/')[2]}-{hashlib.sha256(manifest).hexdigest()[:16]}"
        self.directory = cache_folder() / name
        metadata = json_or_none(manifest.decode("utf-8", "replace"))
        if not isinstance(metadata, dict):
            raise DataError(f"{self.url}/manifest.json is damaged: expected JSON, found {manifest[:20]!r}")
        for table in metadata.get("tables", {}).values():
            self.fetch(table["file"], table["sha256"])
        with replacing(self.directory / "manifest.json") as temporary:
            temporary.write_bytes(manifest)

    def fetch(self, name: str, sha256: str) -> Path:
        """A file of the data set, here. DataError if what comes has another sha256."""
        path = self.directory / name
        if path.exists():
            return path
        with _alone(path):
            if not path.exists():  # nobody else was quicker
                self._download(path, name, sha256)
        return path

    def _download(self, path: Path, name: str, sha256: str) -> None:
        fs, remote = filesystem(f"{self.url}/{name}")
        digest = hashlib.sha256()
        log.info("fetching %s/%s", self.url, name)
        with replacing(path) as temporary:
            with fs.open(remote, "rb", block_size=CHUNK) as theirs, open(temporary, "wb") as ours:
                while chunk := theirs.read(CHUNK):
                    digest.update(chunk)
                    ours.write(chunk)
            if digest.hexdigest() != sha256:
                raise DataError(f"{self.url}/{name} is damaged: expected sha256 {sha256}, found {digest.hexdigest()}")


def cache_folder() -> Path:
    """Where data sets of object storage are kept on this machine."""
    return Path(os.environ.get("MINISORA_CACHE") or "~/.cache/minisora").expanduser().absolute()


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process of this machine at a time fetches a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield

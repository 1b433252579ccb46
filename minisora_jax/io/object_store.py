"""Local copies of data sets on object storage: "gs://bucket/latents" works wherever a path does.

The ArrayRecord reader needs local files and reads them at random places, thousands of times an epoch. So the small
files of a data set are fetched when it is opened. A shard is fetched when its first record is read: whole, checked
against the manifest's sha256, and renamed to its final name when it is complete. Fetched files stay for later runs. A
host fetches the shards that its own rows come from. After an epoch these are all shards, so the cache folder needs
room for the whole data set. MINISORA_CACHE sets the folder (default: ~/.cache/minisora).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from minisora_jax.io.atomic import replacing
from minisora_jax.io.filesystem import filesystem, json_or_none, read_url
from minisora_jax.io.manifest import manifest_problem
from minisora_jax.io.retry import DataError

CHUNK = 2**24  # bytes fetched at a time
log = logging.getLogger("minisora")


class Mirror:
    """The local copy of the data set at `url`. Each version of its manifest gets a folder of its own.

    After construction, `directory` has manifest.json and the tables. Raises DataError if there is no valid manifest.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        try:
            manifest = read_url(f"{self.url}/manifest.json")
        except FileNotFoundError as error:
            raise DataError(f"{self.url}/manifest.json is missing: expected a finished data set") from error
        name = f"{self.url.rpartition('/')[2]}-{hashlib.sha256(manifest).hexdigest()[:16]}"
        self.directory = cache_folder() / name
        metadata = json_or_none(manifest.decode("utf-8", "replace"))
        if problem := manifest_problem(metadata):
            raise DataError(f"{self.url}/manifest.json is damaged: {problem}")
        assert isinstance(metadata, dict)
        for table in metadata.get("tables", {}).values():
            self.fetch(table["file"], table["sha256"])
        with replacing(self.directory / "manifest.json") as temporary:
            temporary.write_bytes(manifest)

    def fetch(self, name: str, sha256: str) -> Path:
        """The local path of a file of the data set, which is downloaded if need be; DataError for another sha256."""
        path = self.directory / name
        if path.exists():
            return path
        with _alone(path):
            if not path.exists():  # no other process has fetched it meanwhile
                self._download(path, name, sha256)
        return path

    def _download(self, path: Path, name: str, sha256: str) -> None:
        fs, remote = filesystem(f"{self.url}/{name}")
        digest = hashlib.sha256()
        log.info("fetching %s/%s", self.url, name)
        with replacing(path) as temporary:
            download = cast(BinaryIO, fs.open(remote, "rb", block_size=CHUNK))
            with download, open(temporary, "wb") as local:
                while chunk := download.read(CHUNK):
                    digest.update(chunk)
                    local.write(chunk)
            if digest.hexdigest() != sha256:
                raise DataError(f"{self.url}/{name} is damaged: expected sha256 {sha256}, found {digest.hexdigest()}")


def cache_folder() -> Path:
    """The folder of this machine that keeps local copies of remote data sets."""
    return Path(os.environ.get("MINISORA_CACHE") or "~/.cache/minisora").expanduser().absolute()


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock, so that one process of this machine at a time fetches a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield

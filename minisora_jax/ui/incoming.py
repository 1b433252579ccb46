"""The folders of uploads: as Gradio stores them, and as they are kept after they were checked. Both have limits."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from minisora_jax.ui.gallery import Gallery
from minisora_jax.ui.uploads import InvalidInput

log = logging.getLogger("minisora")

MOST_STORED, MOST_FILES = 2**30, 1000  # bytes and files of all uploads
KEPT_SECONDS = 3600  # an upload that no result names is deleted after it
SWEEP_EVERY = 60.0  # seconds
EXAMPLES = "examples"  # a folder that stays


class Incoming:
    """The uploads in `folder`, where Gradio puts them, and in the gallery.

    Gradio's own cleaner ends for good at the first path that a visitor names and that it cannot delete.
    """

    def __init__(self, folder: Path, gallery: Gallery):
        self.folder, self.gallery = folder, gallery
        self._bytes, self._files = 0, 0  # of the uploads that are under way

    @contextlib.contextmanager
    def room(self, size: int) -> Iterator[None]:
        """Reserve room for an upload of so many bytes while it arrives; InvalidInput if there is none."""
        stored = [entry.stat().st_size for entry in self._all()]
        if sum(stored) + self._bytes + size > MOST_STORED or len(stored) + self._files >= MOST_FILES:
            raise InvalidInput(
                f"the server keeps at most {MOST_FILES} uploads of {MOST_STORED // 2**20} MiB in all, each for an "
                "hour: try again later"
            )
        self._bytes, self._files = self._bytes + size, self._files + 1
        try:
            yield
        finally:
            self._bytes, self._files = self._bytes - size, self._files - 1

    def sweep(self, older: float = KEPT_SECONDS) -> None:
        """Delete uploads and folders that were written so many seconds ago or are dated in the future."""
        now = time.time()
        for top, _, files in os.walk(self.folder, topdown=False):
            if Path(top) == self.folder / EXAMPLES:
                continue
            for path in (*(Path(top) / name for name in files), *([Path(top)] if Path(top) != self.folder else [])):
                with contextlib.suppress(OSError):  # another process was faster, or a folder is not empty
                    if abs(now - path.lstat().st_mtime) > older:
                        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        self.gallery.prune(older)

    @contextlib.asynccontextmanager
    async def sweeping(self, _: object = None) -> AsyncIterator[None]:
        """Sweep now and then until the server ends."""

        async def sweep_on() -> None:
            while True:
                await asyncio.sleep(SWEEP_EVERY)
                try:
                    await asyncio.to_thread(self.sweep)
                except Exception:
                    log.exception("uploads could not be deleted; this is tried again")

        task = asyncio.create_task(sweep_on())
        try:
            yield
        finally:
            task.cancel()

    def _all(self) -> Iterator[os.DirEntry[str]]:
        pending = [self.folder, self.gallery.uploads]
        while pending:
            with contextlib.suppress(FileNotFoundError), os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending += [] if entry.name == EXAMPLES else [Path(entry.path)]
                    elif entry.is_file(follow_symlinks=False):
                        yield entry

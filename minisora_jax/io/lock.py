"""One folder, one writer: a lock that a run holds on the folder it writes, so that no two runs mix their results.

The lock is the operating system's (flock), so it ends with its process, however that ends. FOLDER/.lock names the run
that holds it. With several processes the main one holds it for all.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from minisora_jax.io.atomic import remove_leftovers
from minisora_jax.io.filesystem import json_or_none
from minisora_jax.parallel.processes import is_main

log = logging.getLogger("minisora")

NAME = ".lock"


class Busy(RuntimeError):
    """Another process is writing the folder."""


@contextlib.contextmanager
def only_writer(folder: str | os.PathLike, what: str) -> Iterator[None]:
    """Hold the lock of a folder, which is made if need be. Files that killed runs left half written are removed.

    Args:
        folder: where the run writes.
        what: the run in words, for the message of another one: "minisora encode".

    Raises:
        Busy: another process holds it. The message names that process.
    """
    if not is_main():
        yield
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / NAME, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise Busy(_busy(folder, file.read())) from None
        except OSError as error:  # some network file systems have no locks
            log.warning("%s cannot be locked (%s): let no second run write there", folder, error)
        holder = {"what": what, "process": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        file.truncate(0)
        file.write(json.dumps(holder))
        file.flush()
        remove_leftovers(folder)
        try:
            yield
        finally:
            file.truncate(0)


def _busy(folder: Path, text: str) -> str:
    holder = json_or_none(text)
    who = "another process"
    if isinstance(holder, dict) and isinstance(since := holder.get("since"), int | float):
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))
        who = f"`{holder.get('what')}` (process {holder.get('process')} on {holder.get('host')}, since {clock})"
    return f"{folder} is being written by {who}: wait until it ends, or name another folder"

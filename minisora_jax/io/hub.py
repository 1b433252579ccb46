"""Models on the Hugging Face Hub, by name: hf://OWNER/NAME[@REVISION][/FOLDER].

A model's files are downloaded once, into huggingface_hub's own cache (HF_HOME), and read from there. Data sets,
hf://datasets/OWNER/NAME/..., are not downloaded: filesystem.py reads them as it reads any other storage.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from minisora_jax.config import how_to_install

NAME = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/]+))?(?:/(?P<folder>.*?))?/?")


def is_model(name: str | Path) -> bool:
    """Whether a name is a model on the Hub."""
    name = os.fspath(name)
    return name.startswith("hf://") and not name.startswith("hf://datasets/")


def local_folder(name: str | Path) -> str | Path:
    """The local path of a model on the Hub, downloaded if it is not there yet; other names are returned as they are.

    Args:
        name: hf://OWNER/NAME, with @REVISION (a branch, a tag or a commit) and with a folder or file within it.

    Raises:
        ValueError: the name has another form.
        FileNotFoundError: there is no such repository, revision or folder, or it needs a login.
        ImportError: huggingface_hub is not installed.
    """
    if not is_model(name):
        return name
    if not (match := NAME.fullmatch(os.fspath(name))) or ".." in (match["folder"] or "").split("/"):
        raise ValueError(f"{name} must look like hf://OWNER/NAME, hf://OWNER/NAME/FOLDER or hf://OWNER/NAME@REVISION")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise ImportError(f"{name} needs the package huggingface_hub: {how_to_install('hf')}") from error
    folder = match["folder"] or ""
    wanted = [folder, f"{folder}/*"] if folder else None
    try:
        path = Path(snapshot_download(match["repository"], revision=match["revision"], allow_patterns=wanted)) / folder
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(f"{name} is not in the cache, and {_endpoint()} cannot be reached: {error}") from error
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{name}: {reason}. A private or gated model needs `hf auth login`") from error
    if not path.exists():
        raise FileNotFoundError(f"{name}: the repository {match['repository']} has no {folder!r}")
    return path


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")

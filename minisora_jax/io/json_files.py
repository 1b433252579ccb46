"""Read JSON files that may be damaged, foreign, or no files at all."""

from __future__ import annotations

import json
import os
from typing import Any

from minisora_jax.io.filesystem import json_or_none, open_regular
from minisora_jax.io.retry import DataError


def read_json(path: str | os.PathLike, kind: type = dict) -> Any:
    """The value of a JSON file.

    Args:
        path: a plain file; a pipe or a device, whose reading may never end, is refused.
        kind: the type that the value must have: dict or list.

    Raises:
        DataError: the file is damaged, or its value is of another type.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        content = file.read()
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: expected JSON ({error})") from error
    if not isinstance(value, kind):
        raise DataError(f"{path} is damaged: expected a JSON {kind.__name__}, found {type(value).__name__}")
    return value


def read_json_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, in order; [] without a file. Lines that a kill cut off are left out."""
    if not os.path.exists(path):
        return []
    with open_regular(path) as file:
        lines = file.read().decode("utf-8", "replace").split("\n")
    return [value for value in map(json_or_none, lines) if isinstance(value, dict)]

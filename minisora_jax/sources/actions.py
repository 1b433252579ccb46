"""Actions of clips: what a player or a robot did between the frames, as a vector for each frame.

`actions_TA[i]` is the action that led to frame i, and row 0 is zeros, since nothing leads to a clip's first frame. A
data set names the columns, such as "turn left", in the entry "actions" of its settings. So all of its clips that have
actions have the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from minisora_jax.io.filesystem import json_or_none
from minisora_jax.io.retry import DataError
from minisora_jax.sources.skips import SkipReport

TABLE = "actions.jsonl"  # at the top of a folder: {"file": "a.mp4", "actions": [[...], ...], "names": [...]} a line


def window(actions_TA: np.ndarray, start: int, count: int) -> np.ndarray:
    """The actions of frames start, ..., start + count - 1 as a clip of their own, float32 (T, A)."""
    actions_TA = actions_TA[start : start + count].astype(np.float32)  # a copy
    actions_TA[:1] = 0
    return actions_TA


def read_table(text: str, report: SkipReport) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """The names of the columns, and {file: actions (T, A)}, of a folder's `TABLE`. Bad rows go to the report.

    Raises:
        DataError: two rows have different names.
    """
    table: dict[str, np.ndarray] = {}
    named = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row = json_or_none(line)
        row = row if isinstance(row, dict) else {}
        file, names = row.get("file"), row.get("names")
        names = names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []
        try:
            actions_TA: Any = np.asarray(row.get("actions"), np.float32)
        except (TypeError, ValueError, OverflowError):  # no numbers, or rows of several lengths
            actions_TA = np.zeros(0, np.float32)
        if not isinstance(file, str) or not names or actions_TA.ndim != 2 or not np.isfinite(actions_TA).all():
            detail = "it needs 'file', 'names' of the columns, and 'actions': a list of as many numbers for each frame"
        elif actions_TA.shape[1] != len(names):
            detail = f"it has {len(names)} names, and {actions_TA.shape[1]} numbers a frame"
        else:
            named.append((f"{TABLE}:{number}", names))
            table[file] = actions_TA
            continue
        report.add(f"{TABLE}:{number}", "bad action row", detail)
    return common_names(named), table


def named_in(settings: dict[str, Any], where: str) -> tuple[str, ...]:
    """The names of the columns in a data set's settings; () if its clips have no actions.

    Raises:
        DataError: the entry is no list of names.
    """
    names = settings.get("actions", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where}/manifest.json is damaged: its actions are {names!r:.80}, not a list of names")
    return tuple(names)


def of_record(arrays: dict[str, np.ndarray], names: Sequence[str], where: str) -> np.ndarray | None:
    """The actions of a record, float32 (T, A); None if it has none.

    Raises:
        DataError: they are not finite float32, or have another width than the data set.
    """
    if (actions_TA := arrays.get("actions")) is None:
        return None
    whole = actions_TA.dtype == np.float32 and actions_TA.ndim == 2 and np.isfinite(actions_TA).all()
    if not whole or actions_TA.shape[1] != len(names):
        raise DataError(
            f"{where} is corrupt: its actions are {actions_TA.dtype} {actions_TA.shape}, and should be finite float32 "
            f"(frames, {len(names)})"
        )
    return actions_TA


def common_names(named: Iterable[tuple[str, Sequence[str]]]) -> tuple[str, ...]:
    """The names of the actions of data sets that are joined. Data sets without actions join any others.

    Args:
        named: (where, names of the columns) of each.

    Raises:
        DataError: two data sets have different actions.
    """
    first: tuple[str, tuple[str, ...]] | None = None
    for where, names in named:
        if names and first is None:
            first = where, tuple(names)
        elif names and first and tuple(names) != first[1]:
            raise DataError(
                f"{first[0]} has the actions {', '.join(first[1]):.200}, and {where} has {', '.join(names):.200}: data "
                "sets whose actions differ cannot be joined"
            )
    return first[1] if first else ()

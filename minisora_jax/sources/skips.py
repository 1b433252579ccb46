"""What a source or a stage leaves out: each file is counted, and named with its reason."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Iterable

from minisora_jax.io.atomic import write_text
from minisora_jax.io.filesystem import printable

NAMES_SHOWN = 5  # names that a summary lists for each reason


class BadClip(ValueError):
    """A file cannot become a clip. `reason` is a fixed phrase for counting, `detail` has the numbers."""

    def __init__(self, name: str, reason: str, detail: str = ""):
        super().__init__(f"{name}: {reason}" + (f" ({detail})" if detail else ""))
        self.name, self.reason, self.detail = name, reason, detail

    def __reduce__(self):
        return BadClip, (self.name, self.reason, self.detail)


class SkipReport:
    """The count of kept clips, and the list `skipped` of {"name", "stage", "reason", "detail"}."""

    def __init__(self, strict: bool = False):
        self.kept = 0
        self.skipped: list[dict[str, str]] = []
        self.shortened = 0  # kept clips that were cut to max_frames
        self.remarks: list[dict[str, str]] = []  # {"name", "remark"} of kept clips, such as that it was interlaced
        self.source_bytes = self.bytes = 0  # of the kept clips' files, and of the data set
        self.strict = strict

    def add(self, name: str, reason: str, detail: str = "", stage: str = "scan") -> None:
        """Add a skipped file, with the stage that skipped it; BadClip if strict."""
        if self.strict:
            raise BadClip(name, reason, detail)
        self.skipped.append({"name": name, "stage": stage, "reason": reason, "detail": detail})

    @property
    def counts(self) -> dict[str, int]:
        """Skipped files by reason, the most frequent first."""
        return dict(collections.Counter(row["reason"] for row in self.skipped).most_common())

    def summary(self) -> str:
        """One line, such as '9 clips kept, 3 skipped: 2 no caption (a.mp4, b.mp4); 1 truncated (c.mp4)'."""
        reasons = _listed((row["reason"], row["name"]) for row in self.skipped)
        remarks = _listed((row["remark"], row["name"]) for row in self.remarks)
        text = f"{self.kept} clips kept, {len(self.skipped)} skipped"
        text += f": {'; '.join(reasons)}" if reasons else ""
        text += f". {self.shortened} cut to their first frames" if self.shortened else ""
        return text + (f". Remarks: {'; '.join(remarks)}" if remarks else "")

    def write(self, path: str | os.PathLike) -> None:
        """Write the skipped files as JSON lines."""
        write_text(path, "".join(json.dumps(row) + "\n" for row in self.skipped))


def _listed(rows: Iterable[tuple[str, str]]) -> list[str]:
    """'3 REASON (NAME, NAME, NAME)' of (reason, name) rows, the most frequent reason first."""
    names: dict[str, list[str]] = {}
    for reason, name in rows:
        names.setdefault(reason, []).append(printable(name))
    more = lambda count: f", and {count - NAMES_SHOWN} more" if count > NAMES_SHOWN else ""
    return [
        f"{len(named)} {reason} ({', '.join(named[:NAMES_SHOWN])}{more(len(named))})"
        for reason, named in sorted(names.items(), key=lambda item: -len(item[1]))
    ]

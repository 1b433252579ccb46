"""Which class a caption or a prompt means: by its name, by a name of WordNet's, or by its number.

["ApplyEyeMakeup", "Archery"]                     "Archery", "archery" and "1" are class 1
["n02099601 golden retriever", "n02106662 ..."]   lines of ImageNet's LOC_synset_mapping.txt: "n02099601" (the name
                                                  of its folder), "golden retriever" and "0" are class 0
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Sequence

SYNSET = re.compile(r"(n\d{8})[\s,]+(.+)")


class ClassNames:
    """Classes 0, 1, ... and their names.

    Args:
        classes: Their number.
        names: A name of each; none: they have numbers only.
    """

    def __init__(self, classes: int, names: Sequence[str] = ()) -> None:
        self.classes, self.names = classes, tuple(names)
        self._exact: dict[str, int] = {}
        loose: dict[str, set[int]] = {}
        for number, name in enumerate(self.names):
            synset = SYNSET.fullmatch(name)
            for exact in (name, synset[1]) if synset else (name,):
                self._exact.setdefault(exact, number)
            words = (name, synset[1], synset[2], *synset[2].split(",")) if synset else (name,)
            for word in {_loosely(word) for word in words}:
                loose.setdefault(word, set()).add(number)
        self._loose = loose

    def of_caption(self, caption: str) -> int | None:
        """The class with exactly this name; None if there is none."""
        return self._exact.get(caption)

    def of_prompt(self, prompt: str) -> int:
        """The class that a person means by a name, in capitals or not, or by a number. Names come first.

        Raises:
            ValueError: It is no class, or several.
        """
        if (number := self._exact.get(prompt)) is not None:
            return number
        if meant := self._loose.get(_loosely(prompt)):
            if len(meant) > 1:
                several = " or ".join(f"{n} ({self.names[n]})" for n in sorted(meant))
                raise ValueError(f"prompt {prompt!r} is the name of several classes: give the number {several}")
            return next(iter(meant))
        if prompt.isdecimal() and int(prompt) < self.classes:
            return int(prompt)
        numbers = f"the number of a class, 0 to {self.classes - 1}"
        if not self.names:
            raise ValueError(f"prompt {prompt!r} must be {numbers}")
        near = difflib.get_close_matches(_loosely(prompt), self._loose, 3) or list(map(_loosely, self.names[:3]))
        raise ValueError(
            f"prompt {prompt!r} must be {numbers}, or its name. Of {len(self.names)} names the nearest are "
            f"{', '.join(map(repr, near))}"
        )


@functools.lru_cache(100_000)
def _loosely(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())

"""Prompts that change over time: "a red circle grows [4s] it moves left" has a second line, which begins at 4 s.

The model sees one line at a time. So a line without a subject of its own, such as "it moves left" or "moves left",
takes that of the line before it: in the grammar of shapes by its rules (`toy/grammar.py`), else by English word order.
"""

from __future__ import annotations

import logging
import re

from minisora_jax.toy.grammar import continued

log = logging.getLogger("minisora")

# Not with the spaces around it: many of them would take long.
_TIME = re.compile(r"\[\s*([-+\d.:,]+)\s*s(?:ecs?|econds?)?\s*\]", re.I)
_ADVERBS = "and|but|then|now|next|finally|suddenly|afterwards?|later|slowly|quickly"
_OPENING = re.compile(rf"^(?:(?:{_ADVERBS})\b[\s,]*)+", re.I)
_PRONOUN = re.compile(r"^(it|they|he|she|this one|these|those|both)\b(?!')\s*", re.I)
_POSSESSIVE = re.compile(r"^(its|their|his|her)\b\s*", re.I)
_CHANGES = "is|gets|becomes|turns|starts? to|begins to"
_WEATHER = "rain|snow|dark|night|day|dawn|morning|evening|sunny|foggy|cold|warm|late"
_IMPERSONAL = re.compile(rf"^it (?:(?:{_CHANGES}) )?(?:{_WEATHER})", re.I)  # "it" stands for nothing there
_VERBS = frozenset("""
    appears are becomes begins bends blinks blooms bounces bursts changes climbs closes collapses comes crawls
    crosses dances disappears dives draws drifts eats enters explodes fades flips floats flows follows gallops
    gets glides glows goes grows has hides hops hovers is jumps keeps lands laughs leans leaps lies lifts melts
    moves opens passes pauses pours pulls pushes reaches reads rests returns rides rises rolls rotates runs
    sails shakes shines shrinks sings sinks sits slows smiles speeds spins splashes stands starts stays stirs
    stops stretches takes talks throws tilts travels trembles trots tumbles turns twists vanishes waits wakes
    was wears were will zooms
""".split())  # fmt: skip
_NOUNS_TOO = frozenset("""
    breaks circles drives drops falls flies holds leaves lights looks nods paints pans plays slides steps swims
    swings walks watches waves
""".split())  # fmt: skip
_PLURALS = frozenset(verb.removesuffix("s") for verb in _VERBS if len(verb) > 4)
_PLURALS |= {"do", "fall", "fly", "go", "have", "play", "swim", "walk"}
_AFTER_VERBS = frozenset("""
    a across after again along an around at away back behind by down for from her his in inside into its left
    off on onto out outside over past right the their through to together towards under up with
""".split())  # fmt: skip
_PICTURE = re.compile(r"^an? (?:[\w-]+ ){0,3}(?:photo|video|shot|picture|clip|painting|view|close-?up) of ", re.I)
_BEFORE_NOUNS = frozenset("a an the of in on with by at from to and two three four five many some his her its".split())


def lines(prompt: str) -> list[tuple[float, str, str]]:
    """(second at which it begins, the line as it is written, the line with its subject) of each part of a prompt.

    Raises:
        ValueError: the times do not rise, or a line is empty.
    """
    pieces = _TIME.split(prompt)
    pieces = [piece.strip() for piece in pieces] if len(pieces) > 1 else pieces
    starts = [0.0, *map(_seconds, pieces[1::2])]
    if starts != sorted(set(starts)):
        raise ValueError(f"the times in the prompt must rise: {', '.join(f'{s:g}s' for s in starts)}")
    parts: list[tuple[float, str, str]] = []
    for start, line in zip(starts, pieces[::2]):
        if len(starts) > 1 and not line.strip():
            raise ValueError(f"the prompt says nothing from {start:g} s on: write what the video shows there")
        parts.append((start, line, with_subject(line, parts[-1][2]) if parts else line))
    return parts


def whole_lines(prompt: str) -> list[str]:
    """The lines of a prompt, each with its subject; the prompt itself if its times are wrong."""
    try:
        return [whole for _, _, whole in lines(prompt)]
    except ValueError:
        return [prompt]


def storyboard(prompt: str, fps: float) -> list[tuple[int, str]]:
    """(first frame, prompt) of each part of "a red circle grows [4s] a red circle moves up".

    A line without a subject takes that of the line before it, with a word in the log.
    """
    parts = lines(prompt)
    for start, written, whole in parts:
        if whole != written:
            log.info("from %g s on, %r is taken as %r", start, written, whole)
    return [(round(start * fps), whole) for start, _, whole in parts]


def with_subject(line: str, before: str) -> str:
    """The line, with the subject of the line before it if it has none of its own.

    Example:
        >>> with_subject("it jumps down", "a black cat sits on a sofa")
        'a black cat jumps down'
    """
    if shapes := continued(before, line):
        return shapes
    if _IMPERSONAL.match(line):
        return line
    rest = _OPENING.sub("", line)
    subject = _subject(before)
    if possessive := _POSSESSIVE.match(rest):
        return f"{subject}'s {rest[possessive.end() :]}"
    pronoun = _PRONOUN.match(rest)
    if not subject or not (pronoun or _begins_with_verb(rest)):
        return line
    return f"{subject} {rest[pronoun.end() :] if pronoun else rest}".strip()


def _begins_with_verb(line: str) -> bool:
    """Whether a line begins with its verb. "leaves fall" does not; "leaves to the right" does."""
    first, second, *_ = [*(word.lower().strip(".,;") for word in line.split()), "", ""]
    if first in _NOUNS_TOO:
        return not second or second in _AFTER_VERBS or second.endswith("ly")
    return first in _VERBS or (first.endswith("ing") and len(first) > 5)


def _subject(line: str) -> str:
    """The words of a line before its verb; the whole line if it has none."""
    words = _PICTURE.sub("", _OPENING.sub("", line)).strip(" .").split()
    plain = [word.lower().strip(".,;:") for word in words]
    verbs = _VERBS | _NOUNS_TOO | _PLURALS
    for i in range(1, len(words)):
        if plain[i - 1] not in _BEFORE_NOUNS and (plain[i] in verbs or (plain[i].endswith("ing") and i > 1)):
            return " ".join(words[:i]).rstrip(",")
    for i in range(2, len(words)):  # a verb that is not among the common ones
        ends_so = plain[i].endswith("s") and not plain[i].endswith("ss")
        if ends_so and plain[i - 1] not in _BEFORE_NOUNS:
            return " ".join(words[:i]).rstrip(",")
    return " ".join(words)


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"[{text}s] in the prompt is no time: write seconds, such as [4s] or [2.5s]") from None

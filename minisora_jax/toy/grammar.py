"""The words of the procedural world: colours, shapes and motions; the scene of a clip; the grammar of captions."""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Sequence

import numpy as np

FPS = 8.0
SIDES = (32, 48, 64)
COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 175, 60),
    "blue": (50, 90, 235),
    "yellow": (240, 220, 50),
    "cyan": (60, 220, 230),
    "magenta": (220, 60, 200),
    "orange": (250, 140, 25),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross")
BACKGROUNDS = {"black": (10, 10, 10), "grey": (95, 95, 95), "navy": (15, 20, 75), "brown": (75, 45, 20)}
CHECKER = ((28, 28, 28), (70, 70, 70))  # the two tones of the "checkered" background
CHECKER_CELL = 8  # pixels
WALL = (160, 160, 145)
DIRECTIONS = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up-left": (-1, -1),
    "up-right": (1, -1),
    "down-left": (-1, 1),
    "down-right": (1, 1),
}
PHRASES = {
    **{d: f"moves {d}" for d in DIRECTIONS},
    "still": "stays still",
    "bounce": "bounces off the walls",
    "grow": "grows",
    "shrink": "shrinks",
    "orbit": "moves in a circle",
    "hide-left": "moves left behind a wall and comes back",
    "hide-right": "moves right behind a wall and comes back",
    "pan-left": "the camera pans left past",
    "pan-right": "the camera pans right past",
}
MOTIONS = tuple(PHRASES)
HELD_OUT_SHARE = 8  # one triple in so many is held out of training
NO_PATH = lambda: np.zeros(0)
RADIUS = {"small": 0.19, "large": 0.28, "": 0.25}  # as a share of the frame's shorter side


@dataclasses.dataclass(frozen=True)
class Object:
    """A coloured shape with its motion. `_place` adds its path."""

    colour: str
    shape: str
    motion: str
    size: str = ""  # "small", "large", or "" if the caption does not mention it
    speed: str = ""  # "slowly", "quickly", or "" if the caption does not mention it
    x_T: np.ndarray = dataclasses.field(default_factory=NO_PATH, repr=False, compare=False)  # the centre, in pixels
    y_T: np.ndarray = dataclasses.field(default_factory=NO_PATH, repr=False, compare=False)
    radius_T: np.ndarray = dataclasses.field(default_factory=NO_PATH, repr=False, compare=False)

    @property
    def triple(self) -> tuple[str, str, str]:
        """(colour, shape, motion)."""
        return self.colour, self.shape, self.motion


@dataclasses.dataclass(frozen=True)
class Scene:
    """The content of a clip, from which `render` draws it and `caption` describes it."""

    size_THW: tuple[int, int, int]  # frames, and pixels
    objects: tuple[Object, ...]
    background: str  # a name of BACKGROUNDS, or "checkered"
    wall: tuple[float, float] | None = None  # left and right edge in pixels
    scroll_T: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)  # texture shift, pixels


def held_out(triple: tuple[str, str, str]) -> bool:
    """Whether this (colour, shape, motion) is held out of training. A checksum of the words decides."""
    return zlib.crc32(" ".join(triple).encode()) % HELD_OUT_SHARE == 0


# ---- Captions


def caption(scene: Scene) -> str:
    """The caption of a scene: one sentence of the grammar that `parse_caption` reads."""
    return _sentence(scene.objects, scene.background, scene.size_THW[0] == 1)


def _sentence(objects: Sequence[Object], background: str, still: bool) -> str:
    first, place = objects[0], f"on a {background} background"
    noun = lambda o: " ".join(w for w in (_article(o.size or o.colour), o.size, o.colour, o.shape) if w)
    if still:
        return f"a photo of {noun(first)} {place}"
    if first.motion.startswith("pan"):
        return f"{PHRASES[first.motion]} {noun(first)} {place}"
    clauses = [" ".join(w for w in (noun(o), PHRASES[o.motion], o.speed) if w) for o in objects]
    return f"{' and '.join(clauses)} {place}"


def example_captions() -> tuple[str, ...]:
    """Captions of four kinds of clips, as examples of prompts."""
    return (
        "a large red circle moves left slowly on a black background",
        "the camera pans right past a small cyan cross on a checkered background",
        "a red circle moves up and a blue square stays still on a grey background",
        "a photo of a small green triangle on a navy background",
    )


def vocabulary() -> frozenset[str]:
    """Every word that a caption of these clips can contain."""
    phrases = " ".join([*PHRASES.values(), *COLOURS, *SHAPES, *BACKGROUNDS, *RADIUS])
    return frozenset(
        re.findall(r"[a-z]+(?:-[a-z]+)*", f"{phrases} a an on and checkered background photo of slowly quickly")
    )


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


_NOUN = rf"an? (?:(?P<size>small|large) )?(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})"
_PHRASES = sorted((p for m, p in PHRASES.items() if not m.startswith("pan")), key=len, reverse=True)
_CLAUSE = re.compile(rf"{_NOUN} (?P<phrase>{'|'.join(_PHRASES)})(?: (?P<speed>slowly|quickly))?")
_PAN = re.compile(rf"(?P<phrase>the camera pans (?:left|right) past) {_NOUN}")
_PHOTO = re.compile(rf"a photo of {_NOUN}")
_PLACE = re.compile(rf" on an? (?P<background>{'|'.join(BACKGROUNDS)}|checkered) background$")


def parse_caption(text: str) -> tuple[list[Object], str, bool]:
    """(objects without paths, background, whether it is an image); ValueError for a caption outside the grammar."""
    place = _PLACE.search(text)
    if place:
        body = text[: place.start()]
        motions = {phrase: motion for motion, phrase in PHRASES.items()}
        for pattern in (_PHOTO, _PAN):
            if m := pattern.fullmatch(body):
                motion = motions[m["phrase"]] if pattern is _PAN else "still"
                objects = [Object(m["colour"], m["shape"], motion, m["size"] or "")]
                return objects, place["background"], pattern is _PHOTO
        matches = list(_CLAUSE.finditer(body))
        if matches and " and ".join(m[0] for m in matches) == body:
            objects = [
                Object(m["colour"], m["shape"], motions[m["phrase"]], m["size"] or "", m["speed"] or "")
                for m in matches
            ]
            return objects, place["background"], False
    raise ValueError(
        f"caption {text!r} is outside the grammar of shapes. Write one such as "
        f"'a large red circle moves left slowly on a black background'. Colours: {', '.join(COLOURS)}; "
        f"shapes: {', '.join(SHAPES)}; motions: {', '.join(PHRASES.values())}; "
        f"backgrounds: {', '.join(BACKGROUNDS)}, checkered"
    )


# ---- Captions that go on from another

_OPENING = r"(?:(?:and|but|then|now|next|finally|later),? )*"
_NAMED = rf"the (?:(?P<size>small|large) )?(?:(?P<colour>{'|'.join(COLOURS)}) )?(?:{'|'.join(SHAPES)})"
_WHO = rf"(?P<who>it|they|both|{_NAMED})"
_plural = lambda phrase: re.sub(r"^(\w+)s\b", r"\1", phrase).replace(" and comes ", " and come ")
_MOVES = "|".join(dict.fromkeys(p for phrase in _PHRASES for p in (phrase, _plural(phrase))))
_GOES_ON = re.compile(rf"{_OPENING}(?:{_WHO} )?(?P<phrase>{_MOVES})(?: (?P<speed>slowly|quickly))?")
_PANS_ON = re.compile(rf"{_OPENING}(?P<phrase>the camera pans (?:left|right))(?: past {_WHO})?")


def continued(before: str, text: str) -> str:
    """The caption that a text means after another caption: it takes over what the text does not say.

    "it", "they", "the circle" or nothing stands for the objects before; those that it does not name go on as they did.

    Returns:
        A caption of the grammar; "" if `before` is none, or the text is a whole caption itself or cannot become one.

    Example:
        >>> continued("a red circle grows on a navy background", "then it moves left")
        'a red circle moves left on a navy background'
    """
    try:
        objects, background, _ = parse_caption(before)
    except ValueError:
        return ""
    text = " ".join(text.lower().split()).rstrip(".!")
    place = _PLACE.search(f" {text}")
    body = f" {text}"[: place.start()].strip() if place else text
    background = place["background"] if place else background
    for clause in (body, re.sub(rf"^{_OPENING}", "", body)):
        try:
            said, _, still = parse_caption(f"{clause} on a {background} background")
        except ValueError:
            continue
        whole = _sentence(said, background, still)
        return "" if place and whole == text else whole
    if not body:  # another background only
        return _sentence(objects, background, False)
    match = _GOES_ON.fullmatch(body) or _PANS_ON.fullmatch(body)
    if match is None:
        return ""
    motion = _motion_of(match["phrase"])
    meant = [o for o in objects if _is_meant(o, match["who"] or "it", match["size"], match["colour"])]
    if not meant:
        return ""
    meant = meant if match["who"] in ("they", "both") else meant[:1]
    moved = {"motion": motion, "speed": match.groupdict().get("speed") or ""}
    others = objects if not motion.startswith("pan") else meant
    return _sentence([dataclasses.replace(o, **moved) if o in meant else o for o in others], background, False)


def _is_meant(thing: Object, who: str, size: str | None, colour: str | None) -> bool:
    named = who.split()[-1]
    return (
        (named not in SHAPES or named == thing.shape)
        and (size is None or size == thing.size)
        and (colour is None or colour == thing.colour)
    )


def _motion_of(phrase: str) -> str:
    """The motion of a phrase such as "moves left", "move left" or "the camera pans left"."""
    return next(motion for motion, known in PHRASES.items() if _plural(known.removesuffix(" past")) == _plural(phrase))

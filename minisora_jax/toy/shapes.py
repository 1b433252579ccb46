"""The procedural data set: captioned clips of coloured shapes in motion, drawn on demand.

Clip i of a split is a pure function of (split, i). Clips have 32 to 64 pixels a side, 1 to 17 frames at 8 frames per
second, one or two objects, and a plain or checkered background. Objects stay, move in eight directions, bounce off the
frame, grow, shrink, move in a circle, slide by as the camera pans, or pass behind a wall and come back.

    train    no object of any clip has a held-out (colour, shape, motion) triple
    heldout  every clip has such an object: training contains its words, but not their combination
"""

from __future__ import annotations

import dataclasses
import re
import zlib

import numpy as np

from minisora_jax.types import Clip

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


class Shapes:
    """Clips `offset`, `offset` + 1, ... of a split. With `size_THW` None, sizes are random."""

    def __init__(self, split: str, length: int, *, offset: int = 0, size_THW: tuple[int, int, int] | None = None):
        if split not in ("train", "heldout"):
            raise ValueError(f"split={split!r} must be 'train' or 'heldout'")
        self.split, self.length, self.offset, self.size_THW = split, length, offset, size_THW

    @classmethod
    def from_spec(cls, spec: str, count: int) -> Shapes:
        """The clips of "shapes[:SPLIT[:COUNT]]"; the defaults are train and `count`."""
        _, split, number, *_ = [*spec.split(":"), "", ""]
        if number and not number.isdigit():
            raise ValueError(f"{spec!r}: the count of clips must be a whole number, as in shapes:train:5000")
        return cls(split or "train", int(number or count))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Clip:
        if not 0 <= i < self.length:
            raise IndexError(f"clip {i} is out of range for {self.length} clips")
        scene = sample_scene(i + self.offset, self.split, self.size_THW)
        return Clip(render(scene), caption(scene), FPS, f"shapes/{self.split}/{i + self.offset}")


# ---- Captions


def caption(scene: Scene) -> str:
    """The caption of a scene: one sentence of the grammar that `parse_caption` reads."""
    first, place = scene.objects[0], f"on a {scene.background} background"
    noun = lambda o: " ".join(w for w in (_article(o.size or o.colour), o.size, o.colour, o.shape) if w)
    if scene.size_THW[0] == 1:
        return f"a photo of {noun(first)} {place}"
    if first.motion.startswith("pan"):
        return f"{PHRASES[first.motion]} {noun(first)} {place}"
    clauses = [" ".join(w for w in (noun(o), PHRASES[o.motion], o.speed) if w) for o in scene.objects]
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


# ---- Scenes


def sample_scene(index: int, split: str = "train", size_THW: tuple[int, int, int] | None = None) -> Scene:
    """Scene `index` of a split, the same on every machine."""
    rng = np.random.default_rng([{"train": 0, "heldout": 1}[split], index])
    while True:
        scene = _draw_scene(rng, size_THW)
        kept_from_training = any(held_out(o.triple) for o in scene.objects)
        if kept_from_training == (split == "heldout"):
            return scene


def _draw_scene(rng: np.random.Generator, size_THW: tuple[int, int, int] | None) -> Scene:
    pick = lambda options: options[int(rng.integers(len(options)))]
    kind = pick(["image", "two", "two", "hide", "pan"] + ["one"] * 10)
    T, H, W = size_THW or (pick((5, 9, 13, 17)), pick(SIDES), pick(SIDES))
    if max(H, W) > 2 * min(H, W):
        raise ValueError(f"height={H}, width={W}: the aspect must be between 1:2 and 2:1")
    if T == 1 or (kind == "image" and not size_THW):
        T, kind = 1, "image"
    colour, shape, background = pick(list(COLOURS)), pick(SHAPES), pick([*BACKGROUNDS, "checkered"])
    size = pick(("small", "large"))
    if kind == "image":
        thing = Object(colour, shape, "still", size)
        return Scene((1, H, W), (_place(rng, thing, 1, (0, 0, W, H), min(H, W)),), background)
    if kind == "two":
        return _two_objects(rng, pick, (T, H, W), background)
    if kind == "hide":
        return _behind_a_wall(rng, pick, (T if size_THW else 17, H, max(W, 48)), colour, shape, background)
    if kind == "pan":
        T = T if size_THW else pick((9, 13, 17))  # the texture moves slowly enough to follow
        motion = pick(("pan-left", "pan-right"))
        world = "right" if motion == "pan-left" else "left"  # the scene moves against the camera
        thing = _place(rng, Object(colour, shape, world, size, pick(("slowly", "quickly"))), T, (0, 0, W, H), min(H, W))
        thing = dataclasses.replace(thing, motion=motion, speed="")
        return Scene((T, H, W), (thing,), "checkered", scroll_T=thing.x_T - thing.x_T[0])
    motion = pick(("bounce", "bounce", "orbit", "orbit", "grow", "shrink", "grow", "shrink", "still", *DIRECTIONS))
    if motion in ("bounce", "orbit") and not size_THW:
        T = pick((13, 17))  # enough frames for a whole turn
    speed = pick(("slowly", "quickly")) if motion in DIRECTIONS else ""
    thing = Object(colour, shape, motion, "" if motion in ("grow", "shrink") else size, speed)
    return Scene((T, H, W), (_place(rng, thing, T, (0, 0, W, H), min(H, W)),), background)


def _two_objects(rng, pick, size_THW, background) -> Scene:
    """Two objects of different colours, each in its own half of the frame, so that they never meet."""
    T, H, W = size_THW
    H, W = (max(H, 48), W) if H >= W else (H, max(W, 48))
    lanes = [(0, 0, W, H // 2), (0, H // 2, W, H)] if H >= W else [(0, 0, W // 2, H), (W // 2, 0, W, H)]
    colours = rng.permutation(list(COLOURS))[:2]
    objects = []
    for lane, colour in zip(lanes, colours):
        motion = pick(("still", "grow", "shrink", "left", "right", "up", "down"))
        thing = Object(str(colour), pick(SHAPES), motion)
        objects.append(_place(rng, thing, T, lane, 0.95 * min(lane[2] - lane[0], lane[3] - lane[1])))
    return Scene((T, H, W), tuple(objects), background)


def _behind_a_wall(rng, pick, size_THW, colour, shape, background) -> Scene:
    """A small object that crosses the frame. A wall near the middle hides it for about three frames."""
    T, H, W = size_THW
    direction = pick(("left", "right"))
    thing = Object(colour, shape, direction, "small", "quickly")
    thing = _place(rng, thing, T, (0, 0, W, H), min(H, W, 34), share=1.0)
    thing = dataclasses.replace(thing, motion=f"hide-{direction}", speed="")
    step = abs(thing.x_T[-1] - thing.x_T[0]) / (T - 1)
    half = thing.radius_T[0] * 1.1 + 1.5 * step
    middle = W / 2 + rng.uniform(-0.05, 0.05) * W
    return Scene((T, H, W), (thing,), background, wall=(middle - half, middle + half))


def _place(rng, thing: Object, T: int, box: tuple[int, int, int, int], side: float, share=None) -> Object:
    """`thing` with a path of T frames inside `box` (left, top, right, bottom). Its radius is relative to `side`."""
    time = np.linspace(0.0, 1.0, T) if T > 1 else np.zeros(1)
    radius = np.full(T, RADIUS[thing.size] * side)
    if thing.motion in ("grow", "shrink"):
        low, high = 0.15 * side, rng.uniform(0.28, 0.34) * side
        radius = low + (high - low) * (time if thing.motion == "grow" else 1.0 - time)
    reach = radius.max() + 1.0  # it stays a pixel away from the edge
    low = np.array([box[0] + reach, box[1] + reach])
    free = np.array([box[2] - reach, box[3] - reach]) - low
    start, move = low + rng.uniform(size=2) * free, np.zeros((T, 2))
    if thing.motion in DIRECTIONS:
        way = np.array(DIRECTIONS[thing.motion], float)
        share = share or (rng.uniform(0.85, 1.0) if thing.speed != "slowly" else rng.uniform(0.45, 0.6))
        length = share * min(f for f, w in zip(free, way) if w)
        slack = free - length * np.abs(way)
        start = low + rng.uniform(size=2) * slack + length * np.maximum(-way, 0.0)
        move = time[:, None] * way * length
    elif thing.motion == "bounce":
        # Along one axis it reflects after at least a third of its way, and comes back at least half of the way.
        axis = int(rng.integers(2)) if min(free) * 1.5 > max(free) else int(np.argmax(free))
        travel = np.zeros(2)
        travel[axis] = rng.uniform(1.3, 1.7) * free[axis]
        travel[1 - axis] = rng.uniform(0.0, 0.5) * free[1 - axis]
        begin = np.array([rng.uniform(0.0, 0.4) if a == axis else rng.uniform(0.0, 0.5) for a in (0, 1)]) * free
        path = begin + time[:, None] * travel
        path = free - np.abs(free - path % (2 * free))
        path = np.where(rng.uniform(size=2) < 0.5, free - path, path)
        start, move = low, path
    elif thing.motion == "orbit":
        ring = 0.5 * min(free) * rng.uniform(0.85, 1.0)
        turn = 2 * np.pi * (rng.uniform() + rng.choice([-1.0, 1.0]) * rng.uniform(0.85, 1.05) * time)
        slack = free - 2 * ring
        start = low + ring + rng.uniform(size=2) * slack
        move = ring * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    path = start + move
    return dataclasses.replace(thing, x_T=path[:, 0], y_T=path[:, 1], radius_T=radius)


# ---- Pixels


def render(scene: Scene) -> np.ndarray:
    """The frames of a scene: uint8 (T, H, W, 3), with edges anti-aliased by the distance to them."""
    T, H, W = scene.size_THW
    y, x = np.mgrid[0:H, 0:W] + 0.5
    frames = np.empty((T, H, W, 3), np.float32)
    if scene.background == "checkered":
        scroll = np.zeros(T) if scene.scroll_T is None else scene.scroll_T
        along = (x[0][None] - scroll[:, None]) * np.pi / CHECKER_CELL
        # The product of anti-aliased horizontal and vertical stripes is a checker with cells of +1 and -1.
        stripe = lambda a: np.clip(np.sin(a) * CHECKER_CELL / np.pi * 2, -1, 1)
        cells = stripe(along)[:, None, :] * stripe(y[:, 0] * np.pi / CHECKER_CELL)[None, :, None]
        dark, light = (np.array(c, np.float32) for c in CHECKER)
        frames[:] = dark + (0.5 + 0.5 * cells[..., None]) * (light - dark)
    else:
        frames[:] = BACKGROUNDS[scene.background]
    for thing in scene.objects:
        dx, dy = x[None] - thing.x_T[:, None, None], y[None] - thing.y_T[:, None, None]
        cover = np.clip(0.5 - distance(thing.shape, dx, dy, thing.radius_T[:, None, None]), 0.0, 1.0)[..., None]
        frames += cover.astype(np.float32) * (np.array(COLOURS[thing.colour], np.float32) - frames)
    if scene.wall:
        left, right = scene.wall
        cover = np.clip(np.minimum(x[0] - left, right - x[0]) + 0.5, 0.0, 1.0)[None, None, :, None]
        frames += cover.astype(np.float32) * (np.array(WALL, np.float32) - frames)
    return np.round(frames).astype(np.uint8)


def distance(shape: str, dx: np.ndarray, dy: np.ndarray, r: np.ndarray | float) -> np.ndarray:
    """The signed distance in pixels to the edge of a shape of radius r, negative inside; y points down."""
    if shape == "circle":
        return np.hypot(dx, dy) - r
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - 0.87 * r
    if shape == "triangle":
        corner = 1.15 * r
        sides = np.sqrt(0.75) * np.abs(dx) - 0.5 * dy
        return np.maximum(dy, sides) - 0.5 * corner
    bar = lambda a, b: np.maximum(np.abs(a) - r, np.abs(b) - 0.34 * r)
    return np.minimum(bar(dx, dy), bar(dy, dx))

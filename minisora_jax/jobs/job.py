"""A job: one video asked for in words, paths and numbers, as in a line of a batch file, a form or a command.

{"prompt": "a red circle moves left"}                                     text to video
{"prompt": "...", "frames": 1, "size": [512, 512]}                        an image
{"prompt": "...", "image": "cat.png"}                                     image to video
{"prompt": "...", "image": "a.png", "last": "b.png"}                      from one image to another
{"prompt": "...", "video": "cat.mp4", "strength": 0.6}                    video to video
{"prompt": "...", "video": "cat.mp4", "mask": "mask.png"}                 inpaint where the mask is white
{"prompt": "...", "video": "cat.mp4", "size": [480, 832]}                 outpaint: a larger frame around it
{"prompt": "...", "video": "cat.mp4", "extend": "forward", "seconds": 2}  or "backward", or "both"
{"prompt": "...", "video": "cat.mp4", "transition": "dog.mp4"}            a transition between them
{"prompt": "...", "loop": true}                                           a seamless loop; with "video", of that
{"prompt": "a red circle grows [4s] a red circle shrinks", "seconds": 9}     a long video, whose prompt changes
"""

from __future__ import annotations

import dataclasses
from typing import Any

MOST_SECONDS = 60.0
LEAST_FPS, MOST_FPS = 0.1, 120.0  # frames per second that a file can say
MOST_FRAMES, MOST_SIDE, MOST_SEED = 7200, 8192, 2**63  # a minute at 120 per second; pixels
MOST_WORDS = 10_000  # characters of a prompt
SIDES = ("forward", "backward", "both")
INPUTS = ("image", "last", "video", "mask", "transition")  # fields that name a file
_RENAMED = {"connect": "transition"}  # names of fields before 0.2


@dataclasses.dataclass(frozen=True)
class Job:
    """One video asked for. `jobs/starting.py` starts its task."""

    prompt: str = ""
    negative: str = ""
    size: tuple[int, int] | None = None  # height, width; None: the input's, or 48x48
    frames: int | None = None  # 1 + 4k, 4k of a loop; None: the input's, or 17
    seconds: float | None = None  # of a long video, of what is added to one, or between two
    fps: float | None = None  # None: the input's, or 8
    seed: int = 0
    image: str | None = None
    last: str | None = None
    video: str | None = None
    strength: float | None = None
    mask: str | None = None
    extend: str | None = None
    transition: str | None = None
    loop: bool = False

    def __post_init__(self):
        self._require_types()
        self.task  # noqa: B018 (raises where fields do not go together)
        for name in ("prompt", "negative"):
            text = getattr(self, name)
            if len(text) > MOST_WORDS:
                raise ValueError(f"the {name} has {len(text):,} characters, and at most {MOST_WORDS:,} are read")
            if any("\ud800" <= c <= "\udfff" for c in text):
                raise ValueError(f"the {name} has half of a character (a lone surrogate): write it as UTF-8")
        if not self.prompt.strip():
            raise ValueError("the prompt is empty; say what the video shows")
        if self.seconds is not None and not 0 < self.seconds <= MOST_SECONDS:  # also False for NaN
            raise ValueError(f"seconds={self.seconds:g} must be above 0 and at most {MOST_SECONDS:g}")
        if self.fps is not None and not LEAST_FPS <= self.fps <= MOST_FPS:
            raise ValueError(f"fps={self.fps:g} must be at least {LEAST_FPS:g} and at most {MOST_FPS:g}")
        if self.frames is not None and not 1 <= self.frames <= MOST_FRAMES:
            raise ValueError(f"frames={self.frames} must be at least 1 and at most {MOST_FRAMES}")
        if not 0 <= self.seed < MOST_SEED:
            raise ValueError(f"seed={_shortened(self.seed)} must be at least 0 and below 2^63")
        if self.size is not None and not all(1 <= n <= MOST_SIDE for n in self.size):
            sides = " x ".join(map(_shortened, self.size))
            raise ValueError(f"size={sides} must have sides of 1 to {MOST_SIDE} pixels")

    def _require_types(self) -> None:
        """Raise ValueError unless each field is of its type. A size may also be a list, or text such as "64x64"."""
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            if value is None and "None" in kind:
                continue
            if field.name == "size":
                object.__setattr__(self, "size", _size(value))
                continue
            base, *_ = kind.split(" | ")
            if base == "float" and isinstance(value, int) and not isinstance(value, bool):
                value = float(min(value, 10**300))
                object.__setattr__(self, field.name, value)
            if type(value).__name__ != base:
                what = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}[base]
                raise ValueError(f"{field.name}={_shortened(value)} must be {what}")

    @classmethod
    def from_dict(cls, values: Any) -> Job:
        """The job in a line of a batch file. Raises ValueError, which names what it does not know."""
        if not isinstance(values, dict):
            raise ValueError(f'a job is an object, such as {{"prompt": "..."}}, and not {values!r}')
        if twice := [f"{old} and {new}" for old, new in _RENAMED.items() if old in values and new in values]:
            raise ValueError(f"a job has both {twice[0]}, which are the same field: give the second only")
        values = {_RENAMED.get(name, name): value for name, value in values.items()}
        names = [f.name for f in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise ValueError(f"a job has no {', '.join(unknown)}; it has {', '.join(names)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from the defaults, as in a line of a batch file."""
        return {f.name: v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) != f.default}

    @property
    def task(self) -> str:
        """The name of the task in generate/tasks.py. Raises ValueError if the fields fit several tasks or none."""
        fits = {
            "image_to_video": self.image and not self.last,
            "interpolate": self.image and self.last,
            "video_to_video": self.video and self.strength is not None,
            "inpaint": self.video and self.mask,
            "extend": self.video and self.extend,
            "transition": self.video and self.transition,
            "loop": self.video and self.loop,
        }
        names = [name for name, fit in fits.items() if fit]
        if len(names) > 1 or (self.image and self.video):
            both = " and ".join(names) if len(names) > 1 else "an image and a video"
            raise ValueError(f"{both} do not go together: ask for one task at a time")
        for name, needs in (("last", "image"), ("strength", "video"), ("mask", "video"), ("extend", "video"),
                            ("transition", "video")):  # fmt: skip
            if getattr(self, name) is not None and not getattr(self, needs):
                raise ValueError(
                    f'{name}={getattr(self, name)!r} needs {needs}: give --{needs} (in a job "{needs}") too'
                )
        if self.extend is not None and self.extend not in SIDES:
            raise ValueError(f"extend={self.extend!r} must be one of {', '.join(SIDES)}")
        if names:
            return names[0]
        if self.video:
            if not self.size:
                raise ValueError(
                    "video: say what to do with it: strength, mask, extend, transition, loop or a larger size"
                )
            return "outpaint"
        return "long_video" if self.seconds is not None and not self.loop else "text_to_video"

    @property
    def inputs(self) -> list[str]:
        """The files that the job reads."""
        return [path for name in INPUTS if (path := getattr(self, name))]


def _size(value: Any) -> tuple[int, int]:
    """(height, width) of [64, 48] or "64x48"."""
    sides = value.lower().split("x") if isinstance(value, str) else value
    if isinstance(sides, list | tuple) and len(sides) == 2:
        numbers = [int(n) if isinstance(n, str) and n.strip().isdecimal() and len(n) < 10 else n for n in sides]
        if all(type(n) is int for n in numbers):
            return int(numbers[0]), int(numbers[1])
    raise ValueError(f'size={_shortened(value)} must be height and width in pixels, as [64, 48] or "64x48"')


def _shortened(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= 10**30:  # Python refuses to write numbers of thousands of digits
        return "a number of more than 30 digits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

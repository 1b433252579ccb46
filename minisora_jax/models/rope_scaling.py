"""Rotary positions beyond those of training, for each axis (t, y, x) by itself: which frequencies turn, and how sharp.

An axis of s times the positions of training, and a pair of channels i of d that turns by b^(-2i/d) per position:

    method         frequency                                                               paper
    linear         1 / s of it: position interpolation                                     arXiv:2306.15595
    ntk            of the base b s^(d/(d-2)): the first pair stays, the last is linear     transformers' "dynamic"
    ntk-by-parts   as it is where a pair turns often in training, linear where it does not arXiv:2309.00071
    yarn           as ntk-by-parts, and attention is sharper by (0.1 ln s + 1)^2           arXiv:2309.00071
    riflex         the first of at most one turn in training becomes 0.9 * 2 pi / length   arXiv:2502.15894
    abf            of a larger base, and attention is sharper by ln(length) / ln(trained)  arXiv:2401.07004

"riflex:K" names the pair, counted from 1, as its authors do by looking for the first repetition. "abf:BASE" names the
base. The sharpness is that of the whole clip: its s is the product over the axes, and its lengths are tokens.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

ROPE_BASE = 10_000.0  # the longest wavelength of a rotation, in units of 2 pi positions
ABF_BASE = 500_000.0  # of Entropy-ABF
MOST_TURNS, FEWEST_TURNS = 32, 1  # in training: above it a pair stays as it is, below it is interpolated (YaRN)
METHODS = ("none", "linear", "ntk", "ntk-by-parts", "yarn", "riflex", "abf")
MOST_FACTOR = 1e4

# The axes that a kind of attention runs over.
_AXES = {"joint": (0, 1, 2), "causal": (0, 1, 2), "spatial": (1, 2), "temporal": (0,)}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are scaled.

    Raises:
        ValueError: The method is unknown, a factor is below 1, or it needs lengths that are not given.
    """

    method: str = "none"  # of METHODS, "riflex:K" or "abf:BASE"
    factors: tuple[float, float, float] = (1.0, 1.0, 1.0)  # positions of t, y, x over those of training; 1: as trained
    trained: tuple[int, int, int] = (0, 0, 0)  # tokens along t, y, x in training

    def __post_init__(self) -> None:
        name, number = self.name, self.number
        whole = number is not None and number.is_integer()
        if name not in METHODS or (":" in self.method and not (name == "riflex" and whole or name == "abf" and number)):
            methods = ", ".join(METHODS)
            raise ValueError(f"rope_scaling={self.method!r:.60} must be one of {methods}, riflex:K or abf:BASE")
        if number is not None and not (1 if name == "riflex" else 2) <= number <= 1e12:
            raise ValueError(f"rope_scaling={self.method!r}: the number must be at least 1 (riflex) or 2 (abf)")
        if len(self.factors) != 3 or not all(1 <= factor <= MOST_FACTOR for factor in self.factors):
            raise ValueError(f"rope_factors={self.factors} must be three numbers (t, y, x), each at least 1")
        needed = [0, 1, 2] if name == "abf" else [i for i in range(3) if self.factors[i] > 1]
        if name in ("ntk-by-parts", "yarn", "riflex", "abf") and any(self.trained[i] < 1 for i in needed):
            raise ValueError(
                f"rope_scaling={self.method!r} needs rope_trained={self.trained}: tokens along t, y, x of the longest "
                f"clips of training, each at least 1"
            )

    @property
    def name(self) -> str:
        """The method without its number."""
        return self.method.partition(":")[0]

    @property
    def number(self) -> float | None:
        """The number after the method's name; None for none."""
        text = self.method.partition(":")[2]
        try:
            return float(text) if text else None
        except ValueError:
            raise ValueError(f"rope_scaling={self.method!r:.60}: {text!r:.40} is no number") from None

    def scales(self, axis: int) -> bool:
        """Whether the positions of an axis (0, 1, 2 for t, y, x) are other than in training."""
        return self.name != "none" and self.factors[axis] > 1

    def frequencies(self, axis: int, width: int) -> np.ndarray:
        """Angles per position, float64 (width / 2), of the pairs of channels that turn with an axis."""
        s, trained, i = self.factors[axis], self.trained[axis], np.arange(0, width, 2, dtype=np.float64)
        frequency = ROPE_BASE ** (-i / width)
        if not self.scales(axis):
            return frequency
        if self.name == "linear":
            return frequency / s
        if self.name == "ntk":
            return (ROPE_BASE * s ** (width / max(width - 2, 1))) ** (-i / width)
        if self.name == "abf":
            return (self.number or ABF_BASE) ** (-i / width)
        if self.name == "riflex":
            k = int(self.number or _pair_of_one_turn(frequency, trained))
            if k > len(frequency):
                raise ValueError(f"rope_scaling={self.method!r}: the axis has {len(frequency)} pairs of channels")
            frequency[k - 1] = 0.9 * 2 * np.pi / (s * trained)
            return frequency
        kept = 1 - _ramp(width, trained)
        return frequency * kept + frequency / s * (1 - kept)

    def sharpness(self, kind: str = "joint") -> float:
        """The factor on the logits of an attention over the axes of `kind`: above 1, it is as sharp as in training."""
        s = math.prod(self.factors[axis] for axis in _AXES[kind])
        if self.name == "yarn":
            return (0.1 * math.log(s) + 1) ** 2
        if self.name == "abf" and (trained := math.prod(self.trained[axis] for axis in _AXES[kind])) > 1:
            return max(1.0, math.log(s * trained) / math.log(trained))
        return 1.0


UNSCALED = RopeScaling()


def _ramp(width: int, trained: int) -> np.ndarray:
    """From 0, pairs that turn often within `trained` positions, to 1, those that do not turn once; as YaRN's code."""
    pair = lambda turns: width * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(ROPE_BASE))
    low, high = max(math.floor(pair(MOST_TURNS)), 0), min(math.ceil(pair(FEWEST_TURNS)), width - 1)
    return np.clip((np.arange(width // 2) - low) / (high - low or 0.001), 0, 1)


def _pair_of_one_turn(frequency: np.ndarray, trained: int) -> int:
    """The first pair, counted from 1, that does not turn more than once within `trained` positions."""
    slow = np.flatnonzero(2 * np.pi / frequency >= trained)
    return int(slow[0]) + 1 if len(slow) else len(frequency)

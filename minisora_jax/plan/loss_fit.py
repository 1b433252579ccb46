"""The law of losses L(N, D) = E + A / N^a + B / D^b (Hoffmann et al. 2022, arXiv:2203.15556, section 3.3).

N is the number of parameters that a token passes and D the number of tokens, so that training takes C = 6 N D FLOPs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import least_squares
from scipy.special import logsumexp

DELTA = 1e-3  # errors of ln L above it count linearly (Huber), as in the paper
NUMBERS = 5  # of a law, so a fit needs more losses than that
# The paper's grid of starts, thinned: each is followed downhill, and the best end is kept.
STARTS = tuple(itertools.product((0.0, 5.0), (0.0, 5.0), (-1.0, 0.0), (0.3, 1.0), (0.3, 1.0)))


@dataclasses.dataclass(frozen=True)
class Law:
    """The numbers of L(N, D) = E + A / N^a + B / D^b."""

    E: float  # the loss that no training gets below
    A: float
    a: float
    B: float
    b: float

    def loss(self, size: float | np.ndarray, tokens: float | np.ndarray) -> float | np.ndarray:
        """L(N, D)."""
        return self.E + self.A * np.power(size, -self.a) + self.B * np.power(tokens, -self.b)

    def best_size(self, flops: float) -> float:
        """The N of the lowest loss among all N and D with 6 N D = `flops` (the paper's equation 4)."""
        g = (self.a * self.A / (self.b * self.B)) ** (1 / (self.a + self.b))
        return g * (flops / 6) ** (self.b / (self.a + self.b))

    def best_loss(self, flops: float) -> float:
        """The lowest loss with 6 N D = `flops`."""
        size = self.best_size(flops)
        return float(self.loss(size, flops / (6 * size)))


def fit(size: np.ndarray, tokens: np.ndarray, loss: np.ndarray, start: Law | None = None) -> Law:
    """The law with the least sum of Huber losses of ln L.

    Args:
        size: N of each run.
        tokens: D of each run.
        loss: Its loss, above 0.
        start: Search from here only; None: from `STARTS`.

    Raises:
        ValueError: There are too few runs, sizes or numbers of tokens for five numbers.
    """
    distinct = len(np.unique(np.stack([size, tokens]), axis=1).T), len(np.unique(size)), len(np.unique(tokens))
    if distinct[0] <= NUMBERS or min(distinct[1:]) < 2:
        raise ValueError(
            f"{distinct[0]} runs of {distinct[1]} sizes and {distinct[2]} numbers of tokens cannot fit the {NUMBERS} "
            f"numbers of L = E + A / N^a + B / D^b: give at least {NUMBERS + 1} runs, such as three --widths times "
            f"three --budgets"
        )
    # N and D relative to their means, which makes the five numbers alike in size and the search short.
    log_n, log_d, log_l = np.log(size), np.log(tokens), np.log(loss)
    mean_n, mean_d = log_n.mean(), log_d.mean()

    def terms(x: np.ndarray) -> np.ndarray:
        log_a, log_b, log_e, a, b = x
        return np.stack([log_a - a * (log_n - mean_n), log_b - b * (log_d - mean_d), np.full_like(log_n, log_e)])

    def slopes(x: np.ndarray) -> np.ndarray:
        share = np.exp((each := terms(x)) - logsumexp(each, axis=0))
        return np.stack([*share, -share[0] * (log_n - mean_n), -share[1] * (log_d - mean_d)], axis=1)

    def end(x: np.ndarray) -> Any:
        errors = lambda x: logsumexp(terms(x), axis=0) - log_l
        bounds = ([-np.inf] * 3 + [1e-3] * 2, [np.inf] * 3 + [5.0] * 2)
        jac: Any = slopes
        return least_squares(errors, x, jac, bounds, loss="huber", f_scale=DELTA, x_scale="jac", max_nfev=500)

    if start is None:
        starts = [np.array([log_l.min() - p, log_l.min() - q, log_l.min() + e, a, b]) for p, q, e, a, b in STARTS]
    else:
        logs = [math.log(start.A) - start.a * mean_n, math.log(start.B) - start.b * mean_d, math.log(start.E)]
        starts = [np.array([*logs, start.a, start.b])]
    ends = [end(x) for x in starts]
    log_a, log_b, log_e, a, b = min(ends, key=lambda end: end.cost).x
    return Law(math.exp(log_e), math.exp(log_a + a * mean_n), float(a), math.exp(log_b + b * mean_d), float(b))


def bootstrap(
    size: np.ndarray, tokens: np.ndarray, loss: np.ndarray, law: Law, count: int = 200, seed: int = 0
) -> list[Law]:
    """The laws of `count` samples of the runs, drawn with replacement; samples that fit no law are drawn again."""
    rng, laws = np.random.default_rng(seed), []
    for _ in range(20 * count):
        of = rng.integers(len(size), size=len(size))
        try:
            laws.append(fit(size[of], tokens[of], loss[of], law))
        except ValueError:
            continue
        if len(laws) == count:
            break
    return laws


def interval(values: Sequence[float], share: float = 0.9) -> tuple[float, float]:
    """The bounds of the middle `share` of values."""
    low, high = np.quantile(values, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def best_rate(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The learning rate of the lowest loss, on the parabola in ln(rate) through the lowest and its neighbours.

    It is the lowest itself where it has no neighbour on one side.
    """
    order = np.argsort(rates)
    x, y = np.log(np.asarray(rates, float)[order]), np.asarray(losses, float)[order]
    at = int(np.argmin(y))
    if not 0 < at < len(x) - 1:
        return float(np.exp(x[at]))
    square, linear, _ = np.polyfit(x[at - 1 : at + 2] - x[at], y[at - 1 : at + 2], 2)
    return float(np.exp(x[at] - linear / (2 * square)))

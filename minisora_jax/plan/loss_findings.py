"""What a study of losses finds: the law of its grid, best learning rates, and a prediction that is checked.

OUT/prediction.json    what the law says about a larger training, written before that is trained
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minisora_jax.io.atomic import write_text
from minisora_jax.io.json_files import read_json
from minisora_jax.io.retry import DataError
from minisora_jax.parallel.processes import is_main
from minisora_jax.plan.loss_fit import Law, best_rate, bootstrap, fit, interval
from minisora_jax.plan.loss_study import Cell, LossStudy, Trained

log = logging.getLogger("minisora")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A training that was not made yet, and its loss by the law."""

    cell: Cell
    size: float  # N
    tokens: float  # D
    flops: float  # C
    loss: float
    low: float  # of the middle 90 % of the bootstrap's laws
    high: float


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a study found so far."""

    results: list[Trained]
    law: Law | None = None
    laws: Sequence[Law] = ()  # of bootstrap samples
    why_none: str = ""  # why there is no law
    prediction: Prediction | None = None
    checked: Trained | None = None  # the training that was predicted

    @property
    def largest(self) -> float:
        """C of the largest training of the grid."""
        return max(r.flops for r in self.results)


def conclude(study: LossStudy, cells: Sequence[Cell], check: float = 0.0) -> Iterator[Findings]:
    """Train the grid, fit its law, predict a larger training and train that too. Yields after each training.

    Args:
        study: The study.
        cells: Its grid.
        check: FLOPs of the predicted training, in budgets of the grid's largest; 0: none.

    Raises:
        ValueError: `check` is set, and the grid fits no law.
    """
    results: list[Trained] = []
    for result in study.run(cells):
        results.append(result)
        yield Findings(list(results), why_none="the grid is not finished")
    best = best_of_each(results)
    size, tokens, loss = (np.array([getattr(r, name) for r in best]) for name in ("size", "tokens", "loss"))
    try:
        law = fit(size, tokens, loss)
    except ValueError as error:
        if check:
            raise ValueError(f"--check={check:g} needs a law: {error}") from error
        yield Findings(results, why_none=str(error))
        return
    found = Findings(results, law, bootstrap(size, tokens, loss, law))
    yield found
    if check:
        prediction = predict(study, found, check * found.largest)
        yield (found := dataclasses.replace(found, prediction=prediction))
        log.info("predicted: a loss of %.4f (%.4f to %.4f)", prediction.loss, prediction.low, prediction.high)
        yield dataclasses.replace(found, checked=next(study.run([prediction.cell])))


def best_of_each(results: Sequence[Trained]) -> list[Trained]:
    """Of trainings that differ in rate and batch alone, the one of the lowest loss. Tokens are equal within 5 %."""
    of_each = groups(results, lambda r: (r.cell.width, round(20 * np.log(r.tokens))))
    return [min(group, key=lambda r: r.loss) for group in of_each.values()]


def best_rates(results: Sequence[Trained]) -> list[tuple[list[Trained], float]]:
    """Groups of at least three trainings that differ in rate alone, each with its best rate (`best_rate`)."""
    of_each = groups(results, lambda r: (r.cell.width, r.cell.steps, r.cell.rows)).values()
    at_least_three = [group for group in of_each if len(group) > 2]
    return [(g, best_rate([r.cell.learning_rate for r in g], [r.loss for r in g])) for g in at_least_three]


def groups(results: Sequence[Trained], key: Callable[[Trained], Any]) -> dict[Any, list[Trained]]:
    """The results by key."""
    by_key = defaultdict(list)
    for r in results:
        by_key[key(r)].append(r)
    return by_key


def predict(study: LossStudy, found: Findings, flops: float) -> Prediction:
    """The prediction of a training with `flops` and the law's best N for them, as OUT/prediction.json has it.

    The batch is that of the grid's best training. The rate is the mean of the best rates, in the logarithm, or the
    best training's. A prediction is written once, before its training, and not changed afterwards.

    Raises:
        ValueError: There is a prediction of another grid.
    """
    assert found.law
    best = min(found.results, key=lambda r: r.loss).cell
    rates = [rate for _, rate in best_rates(found.results)] or [best.learning_rate]
    width = study.width_for(found.law.best_size(flops), best.rows)
    costs = study.costs(width, best.rows)
    cell = Cell(width, round(flops / costs.flops), float(f"{np.exp(np.mean(np.log(rates))):.3g}"), best.rows)
    tokens = cell.steps * costs.tokens
    low, high = interval([float(law.loss(costs.size, tokens)) for law in found.laws])
    loss = float(found.law.loss(costs.size, tokens))
    prediction = Prediction(cell, costs.size, tokens, cell.steps * costs.flops, loss, low, high)
    path = study.out / "prediction.json"
    if path.exists():
        before = _read(path)
        if before.cell != prediction.cell or abs(before.loss / loss - 1) > 1e-6:
            raise ValueError(
                f"{path} predicts {before.loss:.6g} for {before.cell.name}, and this grid {loss:.6g} for {cell.name}: "
                f"a prediction stays as it was made. Name another --out, or move it away"
            )
        return before
    if is_main():
        entries = dataclasses.asdict(prediction) | {"law": dataclasses.asdict(found.law)}
        write_text(path, json.dumps(entries, indent=1) + "\n")
    return prediction


def _read(path: Path) -> Prediction:
    entries = read_json(path)
    entries.pop("law", None)
    try:
        return Prediction(**entries | {"cell": Cell(**entries["cell"])})
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: delete it, and the prediction is made again") from error

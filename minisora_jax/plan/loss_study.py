"""A study of losses: trains a grid of widths, budgets, learning rates and batches under muP.

    OUT/cells/NAME/    the work directory of one training, and its result.json when it is finished

A finished training is not repeated, and one that was killed goes on from its checkpoint.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from minisora_jax.data.latents import open_latents
from minisora_jax.io.atomic import write_text
from minisora_jax.io.json_files import read_json
from minisora_jax.io.progress import Progress
from minisora_jax.io.retry import DataError
from minisora_jax.models.dit_config import DiTConfig
from minisora_jax.parallel.processes import is_main
from minisora_jax.plan.workload import parameter_count
from minisora_jax.training.clip_plan import pack_plan, padded_sizes, with_row_size
from minisora_jax.training.diffusion_task import DiffusionTask, train_diffusion
from minisora_jax.training.flops import count_work
from minisora_jax.training.metrics import read_rows
from minisora_jax.training.mup import base_model
from minisora_jax.training.same_config import require_same_config

COUNTED_STEPS = 64  # the first steps of a plan, by which the tokens and FLOPs of a step are known
LEAST_STEPS = 50  # of a training; shorter ones tell of the warm-up
LONGEST_WARMUP = 0.2  # of a training's steps

log = logging.getLogger("minisora")


@dataclasses.dataclass(frozen=True)
class Cell:
    """The settings of one training."""

    width: int
    steps: int
    learning_rate: float
    rows: int  # packed rows of a step

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"width{self.width}-steps{self.steps}-rate{self.learning_rate:g}-rows{self.rows}"


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a step or a whole training costs."""

    tokens: float  # useful ones
    flops: float

    @property
    def size(self) -> float:
        """N = C / (6 D): the parameters that a token passes, with attention counted as such."""
        return self.flops / (6 * self.tokens)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished training."""

    cell: Cell
    tokens: float  # D: video tokens that it was trained on, without padding
    flops: float  # C: useful FLOPs of the whole training for its video tokens (training/flops.py)
    parameters: int
    loss: float  # of the held-out clips, mean of the noise levels
    by_level: dict[str, float]

    @property
    def size(self) -> float:
        """N, see `Costs`."""
        return Costs(self.tokens, self.flops).size


class LossStudy:
    """The trainings of one task and data set at several widths.

    Args:
        task: The settings of all trainings. Its `mup_base_width` is muP's, or its own width if that is 0.
        out: The folder of the study.

    Raises:
        ValueError: The task names no held-out cache, or the caches do not fit together.
    """

    def __init__(self, task: DiffusionTask, out: Path) -> None:
        if not task.data.held_out:
            raise ValueError(
                "a study of losses measures them on clips that training never sees: name their latent cache by "
                "--config.data.held_out=DIR (`minisora encode` writes one)"
            )
        self.out, self.latents = out, open_latents(task.data.path)
        self.held_out = open_latents(task.data.held_out, codec_hash=self.latents.codec_hash)
        base = task.mup_base_width or task.dit.width
        self.task = with_row_size(dataclasses.replace(task, mup_base_width=base), self.latents)
        self.head_width = task.dit.width // task.dit.heads
        self._costs: dict[tuple[int, int], Costs] = {}

    def dit(self, width: int) -> DiTConfig:
        """The transformer of a width, with heads as wide as the config's."""
        if width < 1 or width % self.head_width:
            raise ValueError(
                f"--widths: {width} must be a multiple of {self.head_width}, the head width of "
                f"dit.width={self.task.dit.width} with dit.heads={self.task.dit.heads}. For narrower heads raise "
                f"--config.dit.heads"
            )
        return base_model(self.task.dit, width)

    def costs(self, width: int, rows: int) -> Costs:
        """Means over the first steps of the plan of batches.

        Captions are left out: the layers that refine them do not grow with the width, so they belong to no N.
        """
        if (width, rows) in self._costs:
            return self._costs[width, rows]
        task = self._with_rows(rows)
        plan = pack_plan(task, self.latents)
        sizes = padded_sizes(task, self.latents) * np.array([1, 1, 1, 0])
        of_steps = [
            count_work(self.dit(width), task.pack, [sizes[row] for row in plan.rows(number)])
            for number in range(COUNTED_STEPS)
        ]
        mean = lambda key: float(np.mean([of_step[key] for of_step in of_steps]))
        self._costs[width, rows] = Costs(mean("useful_tokens"), mean("useful_flops"))
        return self._costs[width, rows]

    def grid(
        self,
        widths: Sequence[int],
        rates: Sequence[float],
        rows: Sequence[int],
        *,
        budgets: Sequence[float] = (),
        tokens: Sequence[float] = (),
    ) -> list[Cell]:
        """All trainings of at least `LEAST_STEPS` steps, the cheapest first.

        Their length is given by budgets in FLOPs, or by tokens.

        Raises:
            ValueError: Both or none are given, or all trainings are too short.
        """
        if bool(budgets) == bool(tokens):
            raise ValueError("give the lengths of the trainings by --budgets (FLOPs) or by --tokens, one of the two")
        cells, short = [], 0
        for width, batch, length in itertools.product(widths, rows, budgets or tokens):
            costs = self.costs(width, batch)
            steps = round(length / (costs.flops if budgets else costs.tokens))
            if steps < LEAST_STEPS:
                short += 1
                log.info("left out: %d steps at width %d with %d rows, below %d", steps, width, batch, LEAST_STEPS)
            else:
                cells += [Cell(width, steps, rate, batch) for rate in rates]
        if not cells:
            costs = [self.costs(width, batch) for width, batch in itertools.product(widths, rows)]
            one = min(of.flops if budgets else of.tokens for of in costs)
            unit = "--budgets" if budgets else "--tokens"
            raise ValueError(
                f"all {short} trainings have fewer than {LEAST_STEPS} steps, which tell of the warm-up and of no law: "
                f"give {unit} of at least {LEAST_STEPS * one:.2g}, or fewer --rows"
            )
        return sorted(set(cells), key=lambda cell: (self.flops(cell), cell.learning_rate))

    def flops(self, cell: Cell) -> float:
        """C of a training."""
        return cell.steps * self.costs(cell.width, cell.rows).flops

    def run(self, cells: Sequence[Cell]) -> Iterator[Trained]:
        """Yields the result of each cell, after it is trained if it was not finished.

        The bar counts FLOPs, so its time left holds for trainings of all sizes.
        """
        of_cells = [self.flops(cell) for cell in cells]
        finished = [self.finished(cell) for cell in cells]
        before = sum(flops for flops, done in zip(of_cells, finished) if done)
        with Progress(total=sum(of_cells), initial=before, desc="study", unit="FLOP", unit_scale=True) as bar:
            for number, (cell, flops, done) in enumerate(zip(cells, of_cells, finished), 1):
                if not done:
                    bar.set_postfix_str(f"{number} of {len(cells)}: {cell.name}")
                    done = self.train(cell)
                    bar.update(flops)
                yield done

    def task_of(self, cell: Cell) -> DiffusionTask:
        """The settings of a training."""
        task, run = self._with_rows(cell.rows), self.task.run
        warmup = min(run.optim.warmup, max(int(LONGEST_WARMUP * cell.steps), 1))
        optim = dataclasses.replace(run.optim, learning_rate=cell.learning_rate, warmup=warmup)
        run = dataclasses.replace(run, steps=cell.steps, sample_every=0, evaluate_every=cell.steps, optim=optim)
        return dataclasses.replace(task, dit=self.dit(cell.width), run=run)

    def finished(self, cell: Cell) -> Trained | None:
        """The result of a training that is finished; None for another.

        Raises:
            ValueError: It was trained with another config.
        """
        path = self._folder(cell) / "result.json"
        if not path.exists():
            return None
        require_same_config(path.parent, dataclasses.asdict(self.task_of(cell)))
        entries = read_json(path)
        try:
            return Trained(**entries | {"cell": Cell(**entries["cell"])})
        except (KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged: delete it and its folder, and the cell is trained again") from error

    def train(self, cell: Cell) -> Trained:
        """Train one cell and keep its result. Its checkpoints are removed then."""
        task, folder = self.task_of(cell), self._folder(cell)
        settings = dataclasses.asdict(task)
        export = {"codec": self.latents.codec_hash, "text": self.latents.text}
        train_diffusion(task, folder, self.latents, settings, export, held_out=self.held_out)
        last = [row for row in read_rows(folder / "metrics.jsonl") if "held_out_loss" in row][-1]
        costs = self.costs(cell.width, cell.rows)
        result = Trained(
            cell,
            cell.steps * costs.tokens,
            cell.steps * costs.flops,
            parameter_count(task),
            last["held_out_loss"],
            {k.removeprefix("held_out_loss/"): v for k, v in last.items() if k.startswith("held_out_loss/")},
        )
        if is_main():
            write_text(folder / "result.json", json.dumps(dataclasses.asdict(result), indent=1) + "\n")
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return result

    def width_for(self, size: float, rows: int) -> int:
        """The width whose N comes nearest to `size`."""
        width, size_of = self.head_width, lambda width: self.costs(width, rows).size
        while size_of(width + self.head_width) <= size:
            width += self.head_width
        above = width + self.head_width
        return width if size / size_of(width) < size_of(above) / size else above

    def _with_rows(self, rows: int) -> DiffusionTask:
        return dataclasses.replace(self.task, pack=dataclasses.replace(self.task.pack, rows=rows))

    def _folder(self, cell: Cell) -> Path:
        return self.out / "cells" / cell.name

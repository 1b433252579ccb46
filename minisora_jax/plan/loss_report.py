"""The report of a study of losses: results.csv, README.md and plots."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from minisora_jax.plan.loss_findings import Findings, best_of_each, best_rates, groups
from minisora_jax.plan.loss_fit import interval
from minisora_jax.plan.loss_study import LossStudy, Trained
from minisora_jax.plan.table import write_csv
from minisora_jax.training.held_out import LEVELS

FURTHER = (1.0, 4.0, 16.0)  # times the largest budget of the grid: rows of the table of best sizes


def write(found: Findings, study: LossStudy, title: str) -> None:
    """Write results.csv, README.md and the plots of what a study found, in its folder."""
    out, task = study.out, study.task
    out.mkdir(parents=True, exist_ok=True)
    rows = [_entries(r, "grid") for r in found.results]
    if found.checked:
        rows.append(_entries(found.checked, "check"))
    write_csv(out / "results.csv", rows)
    plots = _plots(found, out)
    settings = (
        f"Depth {task.dit.depth}, heads of {study.head_width}, {task.run.optim.name} with muP from width "
        f"{task.mup_base_width}. The loss is the mean over {len(LEVELS)} noise levels on {len(study.held_out)} clips "
        f"that no training saw, of the averaged weights at the end of a training."
    )
    lines = [f"# {title}", "", settings, "", *(f"![{name}]({name})" for name in plots), ""]
    lines += [*_law(found, study), *_check(found), *_rates(found), *_table(found)]
    (out / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _entries(r: Trained, part: str) -> dict[str, Any]:
    entries = {"part": part} | dataclasses.asdict(r.cell)
    entries |= {"size": r.size, "tokens": r.tokens, "flops": r.flops, "parameters": r.parameters, "loss": r.loss}
    return {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in (entries | r.by_level).items()}


# ---- README.md


def _law(found: Findings, study: LossStudy) -> list[str]:
    if found.law is None:
        return ["## Law", "", f"None was fitted: {found.why_none}.", ""]
    law, rows = found.law, min(found.results, key=lambda r: r.loss).cell.rows
    of = lambda name: "{:.3g} ({:.3g} to {:.3g})".format(
        getattr(law, name), *interval([getattr(x, name) for x in found.laws])
    )
    errors = np.array([float(law.loss(r.size, r.tokens)) / r.loss - 1 for r in best_of_each(found.results)])
    lines = [
        "## Law",
        "",
        f"L(N, D) = E + A / N^a + B / D^b, with N = C / (6 D) the parameters that a token passes, D the tokens of the "
        f"training and C its useful FLOPs. In brackets: the middle 90 % of {len(found.laws)} bootstrap samples.",
        "",
        "| E | A | a | B | b |",
        "|--:|--:|--:|--:|--:|",
        f"| {of('E')} | {of('A')} | {of('a')} | {of('B')} | {of('b')} |",
        "",
        f"Its losses are within {100 * np.max(np.abs(errors)):.2f} % of the {len(errors)} that it was fitted to "
        f"(root mean square {100 * np.sqrt(np.mean(np.square(errors))):.2f} %).",
        "",
        "| C, FLOPs | best N | its width | D, tokens | loss |",
        "|--:|--:|--:|--:|--:|",
    ]
    for times in FURTHER:
        flops = times * found.largest
        size, low, high = law.best_size(flops), *interval([x.best_size(flops) for x in found.laws])
        loss = "{:.4f} ({:.4f} to {:.4f})".format(
            law.best_loss(flops), *interval([x.best_loss(flops) for x in found.laws])
        )
        lines.append(
            f"| {flops:.3g} | {size:.3g} ({low:.3g} to {high:.3g}) | {study.width_for(size, rows)} "
            f"| {flops / (6 * size):.3g} | {loss} |"
        )
    return [*lines, ""]


def _check(found: Findings) -> list[str]:
    if not found.prediction:
        return []
    p = found.prediction
    lines = [
        "## A prediction",
        "",
        f"`prediction.json` was written before this training began: {p.flops:.3g} FLOPs, "
        f"{p.flops / found.largest:.2g} times the largest of the grid, at width {p.cell.width} "
        f"(N = {p.size:.3g}) for {p.cell.steps:,} steps (D = {p.tokens:.3g}).",
        "",
    ]
    predicted = f"Predicted loss: {p.loss:.4f} ({p.low:.4f} to {p.high:.4f})."
    if not found.checked:
        return [*lines, f"{predicted} It is not trained yet.", ""]
    loss = found.checked.loss
    error = 100 * (p.loss / loss - 1)
    return [*lines, f"{predicted} Trained: **{loss:.4f}**. The prediction is {error:+.2f} % off.", ""]


def _rates(found: Findings) -> list[str]:
    of_rates = best_rates(found.results)
    if not of_rates:
        return []
    lines = ["## Learning rate", "", "| width | steps | rows | losses by rate | best |", "|--:|--:|--:|---|--:|"]
    for group, best in of_rates:
        cell = group[0].cell
        losses = ", ".join(
            f"{r.cell.learning_rate:g}: {r.loss:.4f}" for r in sorted(group, key=lambda r: r.cell.learning_rate)
        )
        lines.append(f"| {cell.width} | {cell.steps:,} | {cell.rows} | {losses} | {best:.2g} |")
    return [*lines, ""]


def _table(found: Findings) -> list[str]:
    lines = [
        "## Trainings",
        "",
        "| width | parameters | N | D, tokens | C, FLOPs | steps | rows | rate | loss |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in [*found.results, *([found.checked] if found.checked else [])]:
        c = r.cell
        lines.append(
            f"| {c.width} | {r.parameters:,} | {r.size:.3g} | {r.tokens:.3g} | {r.flops:.3g} | {c.steps:,} | {c.rows} "
            f"| {c.learning_rate:g} | {r.loss:.4f} |"
        )
    return lines


# ---- Plots


def _plots(found: Findings, out: Path) -> list[str]:
    """Write the plots. Returns their file names."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names, law = [], found.law
    best = best_of_each(found.results)
    smallest = min(r.flops for r in best)
    levels = groups(best, lambda r: round(4 * np.log2(r.flops / smallest)))  # whole steps: budgets are nearly equal
    if max(map(len, levels.values())) > 1:
        names.append("isoflop.png")
        figure, axes = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
        sizes = np.geomspace(min(r.size for r in best) / 1.5, max(r.size for r in best) * 1.5, 100)
        for level in sorted(levels):
            points = sorted((r.size, r.loss) for r in levels[level])
            flops = float(np.mean([r.flops for r in levels[level]]))
            line = axes.plot(*zip(*points), marker="o", linestyle="" if law else "-", label=f"{flops:.2g} FLOPs")[0]
            if law:
                axes.plot(sizes, law.loss(sizes, flops / (6 * sizes)), color=line.get_color(), linewidth=1)
        if law:
            budgets = np.geomspace(smallest, 4 * found.largest, 50)
            axes.plot([law.best_size(c) for c in budgets], [law.best_loss(c) for c in budgets], "k--", label="best N")
        axes.set(xlabel="N, parameters that a token passes", ylabel="held-out loss", xscale="log")
        _save(figure, axes, out / "isoflop.png")
    if law:
        names.append("extrapolation.png")
        figure, axes = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
        budgets = np.geomspace(smallest, 16 * found.largest, 60)
        bounds = np.array([interval([x.best_loss(c) for x in found.laws]) for c in budgets])
        axes.fill_between(budgets, bounds[:, 0], bounds[:, 1], alpha=0.2, label="90 % of bootstrap samples")
        axes.plot(budgets, [law.best_loss(c) for c in budgets], label="law at the best N")
        axes.plot([r.flops for r in best], [r.loss for r in best], "k.", label="grid")
        if found.checked:
            axes.plot(
                found.checked.flops, found.checked.loss, "r*", markersize=12, label="trained after the prediction"
            )
        axes.set(xlabel="C, FLOPs of a training", ylabel="held-out loss", xscale="log")
        _save(figure, axes, out / "extrapolation.png")
    if of_rates := best_rates(found.results):
        names.append("rates.png")
        figure, axes = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
        for group, _ in of_rates:
            points = sorted((r.cell.learning_rate, r.loss) for r in group)
            axes.plot(*zip(*points), marker="o", label=f"width {group[0].cell.width}, {group[0].cell.steps:,} steps")
        axes.set(xlabel="learning rate (muP)", ylabel="held-out loss", xscale="log")
        _save(figure, axes, out / "rates.png")
    return names


def _save(figure: Any, axes: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)

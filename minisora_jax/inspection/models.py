"""Show an exported model or a run: parameters by module, config, progress, and the use of time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax import traverse_util

from minisora_jax.generate.known import tasks_of
from minisora_jax.generate.loading import trained_masks
from minisora_jax.inspection.datasets import short
from minisora_jax.io.atomic import replacing
from minisora_jax.io.json_files import read_json, read_json_lines
from minisora_jax.io.model_dir import model_hash, open_model, saved_settings
from minisora_jax.models.dit_config import DiTConfig
from minisora_jax.training.metrics import read_rows


def model_facts(directory: Path) -> list[tuple[str, str]]:
    """The lines (name, value) of an exported model: kind, hash, parameters by module, and its config."""
    stored, config = open_model(directory)
    sizes, types = defaultdict(int), defaultdict(int)
    tensors: dict[str, Any] = traverse_util.flatten_dict(stored, sep="/")
    for name, tensor in tensors.items():
        count = math.prod(tensor.shape)
        sizes["/".join(name.removeprefix("params/").split("/")[:1])] += count
        types[str(tensor.dtype)] += count
    total = sum(sizes.values())
    lines = [
        ("kind", config.get("kind", "?")),
        ("hash", model_hash(directory)),
        ("parameters", f"{total:,} ({', '.join(f'{n / total:.0%} {t}' for t, n in types.items())})"),
    ]
    lines += [(f"  {name}", f"{n:>13,}  {n / total:6.1%}") for name, n in sorted(sizes.items(), key=lambda i: -i[1])]
    if config.get("kind") in ("dit", "lora"):
        shape = saved_settings(DiTConfig, config, "dit", directory)
        lines.append(("tasks", tasks_of(trained_masks(config, directory), shape)))
    return lines + [(name, value) for name, value in _flat({k: v for k, v in config.items() if k != "training"})]


def run_facts(workdir: Path) -> list[tuple[str, str]]:
    """The lines (name, value) of a run: checkpoints, step, last metrics, use of time, skipped data, and its config."""
    rows = metrics(workdir)
    checkpoints = sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())
    config = read_json(workdir / "config.json")
    lines = [("checkpoints", ", ".join(map(str, checkpoints)) or "none")]
    if rows:
        last = rows[-1]
        run = config.get("run")
        steps = run.get("steps") if isinstance(run, dict) else None
        lines.append(("step", f"{last['step']:,} of {f'{steps:,}' if isinstance(steps, int) else '?'}"))
        for name in ("loss", "grad_norm", "tokens_per_s", "clips_per_s", "padding_share", "goodput"):
            if name in last:
                lines.append((name, f"{last[name]:.4g}"))
        if held_out := held_out_losses(workdir):
            lines.append(("held-out loss", f"{held_out[-1][1]:.4g} at step {held_out[-1][0]:,}"))
        parts = defaultdict(float)
        for row in rows:
            for name, value in row.items():
                if name.startswith("time_"):
                    parts[name.removeprefix("time_")] += value
        lines.append(("time", ", ".join(f"{name} {taken:,.0f} s" for name, taken in sorted(parts.items())) or "?"))
    for path in sorted(workdir.glob("damaged_*.jsonl")):
        lines.append(("damaged clips", f"{len(read_json_lines(path))}, see {path.name}"))
    if (workdir / "left_out.json").exists():
        lines.append(("skipped batches", short(read_json(workdir / "left_out.json", list))))
    return lines + list(_flat(config))


def metrics(workdir: Path) -> list[dict]:
    """The rows of metrics.jsonl that have a loss: training steps, without held-out scores."""
    return [row for row in read_rows(workdir / "metrics.jsonl") if "loss" in row]


def held_out_losses(workdir: Path) -> list[tuple[int, float]]:
    """(step, loss of the held-out clips), each time that a run with `data.held_out` measured it."""
    rows = read_rows(workdir / "metrics.jsonl")
    return [(row["step"], row["held_out_loss"]) for row in rows if "held_out_loss" in row]


def draw_run(path: str | Path, rows: list[dict], held_out: list[tuple[int, float]]) -> None:
    """Plot the losses, that of training with its running mean, the norm of the gradient, and the shares of time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    steps = np.array([row["step"] for row in rows])
    figure, (loss_axes, norm_axes, time_axes) = plt.subplots(1, 3, figsize=(14, 3.4), constrained_layout=True)
    loss = np.array([row["loss"] for row in rows])
    window = max(1, len(loss) // 30)
    loss_axes.plot(steps, loss, color="tab:blue", alpha=0.3 if window > 1 else 1.0, linewidth=0.8)
    if window > 1:
        smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
        loss_axes.plot(steps[window - 1 :], smooth, color="tab:blue")
    if held_out:
        loss_axes.plot(*zip(*held_out), color="tab:red", marker=".", label="held-out clips")
        loss_axes.legend(fontsize=8)
    loss_axes.set(xlabel="step", ylabel="loss")
    norm_axes.plot(steps, [row.get("grad_norm", float("nan")) for row in rows], color="tab:orange", linewidth=0.8)
    norm_axes.set(xlabel="step", ylabel="norm of the gradient", yscale="log")
    names = sorted({name for row in rows for name in row if name.startswith("time_")})
    parts = np.array([[row.get(name, 0.0) for row in rows] for name in names])
    if len(names) and parts.sum():
        shares = parts / np.maximum(parts.sum(axis=0), 1e-9)
        time_axes.stackplot(steps, shares, labels=[name.removeprefix("time_") for name in names])
        time_axes.legend(fontsize=8, loc="lower left")
    time_axes.set(xlabel="step", ylabel="share of time", ylim=(0, 1))
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110)
    plt.close(figure)


def _flat(config: dict, at: str = "") -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{at}{name}.")
        else:
            yield f"{at}{name}", short(value)

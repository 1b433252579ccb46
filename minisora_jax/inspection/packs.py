"""Show how clips fill rows: the share of slots in use, the balance of costs, and a picture of rows."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minisora_jax.data.packing import PackConfig, PackPlan, StagedPlan
from minisora_jax.io.atomic import replacing
from minisora_jax.models.dit import DiTConfig
from minisora_jax.training.flops import count_work

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def packing_report(
    plan: PackPlan | StagedPlan, sizes_thwL: np.ndarray, dit: DiTConfig, steps: Sequence[int]
) -> dict[str, float]:
    """Statistics of some steps of a plan.

    Returns:
        steps, rows: their numbers.
        clips_per_row: the mean.
        fill, text_fill: the shares of video and caption slots in use.
        useful_flops: the share of useful FLOPs, for a program that computes every slot and all pairs of a row. Kernels
            that skip tiles do better.
        straggler: the cost of a step's costliest row over its mean row, averaged over steps. Devices with a row each
            wait for the costliest, so 1 is best.
    """
    pack, clips, tokens, text, useful, dense, straggler = plan.config, 0, 0.0, 0.0, 0.0, 0.0, []
    rows_seen = 0
    for step in steps:
        costs = []
        for row in plan.rows(step):
            work = count_work(dit, pack, [sizes_thwL[row]])
            costs.append(work["useful_flops"])
            clips, tokens, text = clips + len(row), tokens + work["useful_tokens"], text + sizes_thwL[row, 3].sum()
            useful, dense = useful + work["useful_flops"], dense + work["hardware_flops"]
            rows_seen += 1
        straggler.append(max(costs) / np.mean(costs))
    return {
        "steps": len(straggler),
        "rows": rows_seen,
        "clips_per_row": clips / rows_seen,
        "fill": tokens / (rows_seen * pack.tokens),
        "text_fill": float(text) / (rows_seen * pack.text_tokens),
        "straggler": float(np.mean(straggler)),
        "useful_flops": useful / dense,
    }


def draw_rows(
    path: str | Path,
    rows: Sequence[Sequence[tuple[tuple[int, int, int], str, np.ndarray | None]]],
    pack: PackConfig,
    title: str = "",
) -> None:
    """Write a PNG with a bar for each row. Each block is a clip, as wide as its token count.

    Images are orange. Videos are blue to green; longer ones are greener. Empty slots are hatched.

    Args:
        rows: for each row its clips: the grid of patches (t, h, w), a label, and a frame (uint8 HWC) or None.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    width, row_height = 14.0, 0.92  # inches
    longest = max(size[0] for row in rows for size, _, _ in row)
    figure, axes = plt.subplots(figsize=(width, row_height * len(rows) + 0.9), constrained_layout=True)
    for number, row in enumerate(rows):
        at, y = 0, -number
        for (t, h, w), label, frame in row:
            n = t * h * w
            axes.add_patch(Rectangle((at, y), n, 0.84, facecolor=_colour(t, longest), edgecolor="white", linewidth=1.2))
            inches = width * 0.93 * n / pack.tokens
            if frame is not None and inches > 0.3:
                _thumbnail(axes, frame, at, y, n, pack.tokens, width)
            if inches > 0.07 * max(len(line) for line in label.split("\n")):
                axes.text(at + n / 2, y + 0.075, label, ha="center", va="bottom", fontsize=6.5, color="white")
            at += n
        if at < pack.tokens:
            empty = {"facecolor": "white", "edgecolor": "0.75", "hatch": "////", "linewidth": 0}
            axes.add_patch(Rectangle((at, y), pack.tokens - at, 0.84, **empty))
        axes.text(-0.006 * pack.tokens, y + 0.42, f"row {number}", ha="right", va="center", fontsize=8)
    axes.set(xlim=(-0.05 * pack.tokens, pack.tokens * 1.003), ylim=(-len(rows) + 0.95, 0.95), yticks=[])
    axes.set_xlabel("tokens of a row")
    axes.set_title(title, fontsize=9, loc="left")
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110)
    plt.close(figure)


def _colour(frames: int, longest: int) -> tuple[float, float, float]:
    if frames == 1:
        return colorsys.hsv_to_rgb(0.08, 0.72, 0.90)
    share = np.log(frames) / np.log(max(longest, 2))
    return colorsys.hsv_to_rgb(0.62 - 0.22 * share, 0.62, 0.78 - 0.14 * share)


def _thumbnail(axes: Axes, frame_HWC: np.ndarray, at: float, y: float, n: int, row_tokens: int, width: float) -> None:
    """Draw a frame with its own aspect in the upper part of its block."""
    H, W = frame_HWC.shape[:2]
    inch = row_tokens / (width * 0.93)  # the tokens of an inch
    wide = min(0.92 * 0.54 * inch * W / H, 0.9 * n)
    tall, middle = wide * H / (0.92 * inch * W), at + n / 2
    axes.imshow(
        frame_HWC,
        extent=(middle - wide / 2, middle + wide / 2, y + 0.54 - tall / 2, y + 0.54 + tall / 2),
        aspect="auto",
        interpolation="nearest",
        zorder=3,
    )

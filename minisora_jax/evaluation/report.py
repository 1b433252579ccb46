"""A report of measurements on one page: a table of goals and results, plots by kind, contact sheets.

The page is one file without scripts, fonts or links.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from minisora_jax.io.atomic import write_text
from minisora_jax.media.contact_sheet import contact_sheet

SHOWN = 8  # rows of a contact sheet on the page

# The goals of the bundled model: (measurement, score) -> (at least or at most, bound)
GOALS = {
    ("image-to-video", "colour"): (">=", 0.95),
    ("image-to-video", "shape"): (">=", 0.95),
    ("image-to-video", "motion"): (">=", 0.85),
    ("extend-forward", "seam_psnr"): (">=", 30.0),
    ("extend-forward", "motion"): (">=", 0.85),
    ("extend-backward", "seam_psnr"): (">=", 30.0),
    ("extend-backward", "motion"): (">=", 0.85),
    ("loop", "seam_at_most_1.5"): (">=", 0.9),
    ("loop", "ghost_free"): (">=", 0.9),
    ("transition-true", "ghost_free"): (">=", 0.9),
    ("transition", "no_step_above_2"): (">=", 1.0),
    ("permanence", "permanence"): (">=", 0.8),
}

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{border-bottom:1px solid #ddd;padding:.25em .8em;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}.good{color:#17723b}.short{color:#b3261e;font-weight:600}
img{max-width:100%;border:1px solid #ddd;margin:.5em 0}h2{margin-top:2em;border-top:2px solid #eee;padding-top:.6em}
small{color:#666}"""


def write_report(path: Path, title: str, facts: dict, results: dict[str, tuple[dict, list]]) -> None:
    """Write the page, and beside it a contact sheet for each measurement.

    Args:
        facts: the table at the top, such as the model and the settings.
        results: {measurement: (scores, rows)}; a row is (frames, label).
    """
    parts = [f"<h1>{_text(title)}</h1>", _table([(k, v) for k, v in facts.items()]), "<h2>Goals</h2>"]
    goals = []
    for (name, score), (sign, bound) in GOALS.items():
        if name in results and score in results[name][0]:
            value = results[name][0][score]
            good = value >= bound if sign == ">=" else value <= bound
            goals.append((f"{name}: {score}", f"{sign} {bound:g}", _mark(value, good)))
    parts.append(_table(goals, ("measurement", "goal", "result")) if goals else "<p>No measurement has a goal.</p>")
    for name, (scores, rows) in results.items():
        parts.append(f"<h2>{_text(name)}</h2>")
        by_kind = {
            k: v
            for k, v in scores.items()
            if isinstance(v, dict) and v and all(isinstance(x, list) for x in v.values())
        }
        parts.append(_table([(k, _counts(v)) for k, v in scores.items() if k not in by_kind]))
        parts += [_plot(f"{name}: {key}", shares) for key, shares in by_kind.items()]
        if rows:
            sheet = path.parent / f"{name}.png"
            contact_sheet(sheet, rows[:SHOWN])
            parts.append(_image(sheet.read_bytes(), f"frames of {name}"))
    head = f"<!doctype html><meta charset=utf-8><title>{_text(title)}</title><style>{STYLE}</style>"
    write_text(path, head + "\n".join(parts) + "\n")


def _counts(value: Any) -> Any:
    """{what: how many} in words."""
    return ", ".join(f"{count} {what}" for what, count in value.items()) or "none" if isinstance(value, dict) else value


def _mark(value: float, good: bool) -> str:
    return f'<span class="{"good" if good else "short"}">{value:.4g}{"" if good else " (missed)"}</span>'


def _table(rows: Iterable[Sequence[Any]], header: Sequence[str] = ()) -> str:
    cell = lambda v: v if isinstance(v, str) and v.startswith("<span") else _text(_number(v))
    body = "".join(
        "<tr>" + "".join(f'<td class="{"n" if i else ""}">{cell(v)}</td>' for i, v in enumerate(row)) + "</tr>"
        for row in rows
    )
    head = "<tr>" + "".join(f"<th>{_text(h)}</th>" for h in header) + "</tr>" if header else ""
    return f"<table>{head}{body}</table>"


def _plot(title: str, by_kind: dict[str, list]) -> str:
    """Bars with the share of each kind; the label has the number of videos of the kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(by_kind)[::-1]
    figure, axes = plt.subplots(figsize=(7, 0.28 * len(kinds) + 0.9), constrained_layout=True)
    shares = [by_kind[k][0] for k in kinds]
    axes.barh(
        [f"{k} ({by_kind[k][1]})" for k in kinds], shares, color=["#2a7f62" if s >= 0.85 else "#c8553d" for s in shares]
    )
    axes.set_xlim(0, 1)
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    plt.close(figure)
    return _image(picture.getvalue(), title)


def _image(png: bytes, words: str) -> str:
    return f'<img alt="{_text(words)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _text(value: Any) -> str:
    return html.escape(str(value))

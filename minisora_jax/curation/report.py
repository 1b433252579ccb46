"""The report of `prepare`, one page: counts by stage and reason, histograms of the measurements, pictures.

The page is one file without scripts, fonts or links. Names and captions come from the source and are escaped. The page
contains no time and no host, so the same run writes the same bytes.
"""

from __future__ import annotations

import collections
import html
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from minisora_jax.curation.filters import MEASURES, Filters, Measure
from minisora_jax.io.atomic import write_text

PICTURES = 24  # pictures of kept clips; a quarter of that for each reason to drop
BINS = 40  # of a histogram
STAGES = ("scan", "probe", "decode", "filter", "duplicates", "caption")  # the stages that drop files or clips


class Summary:
    """The sum of all parts' results, which are added in order."""

    def __init__(self, filters: Filters, scanned: list[dict[str, str]]):
        self.filters = filters
        self.skipped = list(scanned)
        self.kept = self.held_out = self.shortened = self.frames = 0
        self.seconds = 0.0
        self.kept_scores: dict[str, list[float]] = collections.defaultdict(list)
        self.dropped_scores: dict[str, list[float]] = collections.defaultdict(list)
        self.pictures: list[dict[str, Any]] = []
        self.remarks: list[dict[str, str]] = []
        self.source_bytes = 0

    def add(self, gathered: dict[str, Any], done: dict[str, Any] | None) -> None:
        """Add the JSON of a part's first round, and of its second round if there is one."""
        later = {row["clip"]: row for row in done["drops"]} if done else {}
        captions = done["captions"] if done else {}
        by_name = {clip["name"]: n for n, clip in enumerate(gathered["clips"])}
        for row in [*gathered["drops"], *later.values()]:
            self.skipped.append({key: row[key] for key in ("name", "stage", "reason", "detail")})
            for name, value in row.get("scores", {}).items():
                self.dropped_scores[name].append(value)
        for n, clip in enumerate(gathered["clips"]):
            scores = self.dropped_scores if n in later else self.kept_scores
            for name, value in clip["scores"].items():
                scores[name].append(value)
            self.held_out += n not in later and clip["split"] == "heldout"
        self.kept += len(gathered["clips"]) - len(later)
        self.shortened += gathered["shortened"]
        self.remarks += gathered["remarks"]
        self.source_bytes += gathered["source_bytes"]
        for picture in gathered["pictures"]:
            n = by_name.get(picture["name"])
            if not picture["reason"] and n in later:
                picture |= {"reason": later[n]["reason"], "caption": later[n]["detail"]}
            elif not picture["reason"] and str(n) in captions:
                picture["captions"] = captions[str(n)]
            self.pictures.append(picture)


def write_report(path: str | os.PathLike, summary: Summary, opening: dict[str, Any]) -> None:
    """Write the page of a run. `opening` is the head of the manifest; its settings are shown."""
    body = [
        "<h1>Prepared data set</h1>",
        f"<p><b>{summary.kept:,}</b> clips kept"
        + (f", of which {summary.held_out:,} held out" if summary.held_out else "")
        + f"; <b>{len(summary.skipped):,}</b> clips and files skipped. "
        + (f"{summary.shortened:,} clips are the first frames of longer files. " if summary.shortened else "")
        + "<code>skipped.jsonl</code> names every skipped one.</p>",
        _reasons(summary),
        "<h2>Measurements</h2>",
        "<p class=key><i class=kept></i> kept <i class=dropped></i> skipped <i class=limit></i> filter's limit</p>",
        '<div class="grid charts">',
        *(_histogram(m, summary) for m in MEASURES),
        "</div>",
        *_pictures("Kept", [p for p in summary.pictures if not p["reason"]], PICTURES),
    ]
    for reason in sorted({p["reason"] for p in summary.pictures} - {""}):
        body += _pictures(f"Skipped: {reason}", [p for p in summary.pictures if p["reason"] == reason], PICTURES // 4)
    settings = opening["settings"]
    limits = ", ".join(f"{name} {value}" for name, value in settings["filters"].items() if value is not None)
    rows = {**settings, "filters": limits or "none", "captioner": settings["captioner"] or "none"}
    body += ["<h2>Settings</h2>", _table(("setting", "value"), rows.items())]
    page = (
        f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>minisora prepare</title>\n<style>{STYLE}</style>\n"
    )
    write_text(path, page + "\n".join(body) + "\n</html>\n")


def _reasons(summary: Summary) -> str:
    counts = collections.Counter((row["stage"], row["reason"]) for row in summary.skipped)
    if not counts:
        return "<p>No file and no clip was skipped.</p>"
    order = sorted(counts, key=lambda key: (STAGES.index(key[0]), -counts[key], key[1]))
    most = max(counts.values())
    rows = "".join(
        f"<tr><td>{_text(stage)}<td>{_text(reason)}<td class=number>{counts[stage, reason]:,}"
        f'<td class=wide><span class=bar style="width:{100 * counts[stage, reason] / most:.1f}%"></span>'
        for stage, reason in order
    )
    return f"<table><tr><th>stage<th>reason<th class=number>skipped<th>{rows}</table>"


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    cells = lambda kind, row: "<tr>" + "".join(f"<{kind}>{_text(cell)}" for cell in row)
    return f"<table>{cells('th', head)}{''.join(cells('td', row) for row in rows)}</table>"


def _histogram(measure: Measure, summary: Summary) -> str:
    """An inline SVG of a measurement's distribution, with skipped clips on top of kept clips."""
    kept, dropped = summary.kept_scores.get(measure.name, []), summary.dropped_scores.get(measure.name, [])
    if not kept and not dropped:
        return ""
    values = np.array([*kept, *dropped])
    limit = getattr(summary.filters, measure.limit)
    low, high = float(values.min()), float(values.max())
    if high > 3 * np.quantile(values, 0.99):  # a few outliers
        high = float(np.quantile(values, 0.99))
    if limit is not None:
        low, high = min(low, limit), max(high, limit)
    high = high if high > low else low + 1.0
    counts = [np.histogram(np.clip(x, low, high), BINS, (low, high))[0] for x in (np.array(kept), np.array(dropped))]
    most, width, height = max(1, int(np.sum(counts, axis=0).max())), 8, 120
    bars = []
    for b in range(BINS):
        base = height
        for kind, count in zip(("kept", "dropped"), counts):
            tall = height * int(count[b]) / most
            base -= tall
            if tall:
                bars.append(f"<rect class={kind} x={b * width} y={base:.1f} width={width - 1} height={tall:.1f} />")
    if limit is not None:
        at = (limit - low) / (high - low) * BINS * width
        bars.append(f"<line class=limit x1={at:.1f} x2={at:.1f} y1=0 y2={height} />")
    bound = "" if limit is None else f", {'at least' if measure.is_minimum else 'at most'} {limit:g}"
    statistics = f"{bound} <small>{len(values):,} clips, median {np.median(values):.4g}</small>"
    return (
        f"<figure><figcaption><b>{_text(measure.name)}</b>{statistics}</figcaption>"
        f'<svg viewBox="0 0 {BINS * width} {height + 14}" role=img>{"".join(bars)}'
        f"<text x=0 y={height + 12}>{low:.3g}</text><text x={BINS * width} y={height + 12} text-anchor=end>{high:.3g}"
        f"{' and more' if values.max() > high else ''}</text></svg></figure>"
    )


def _pictures(title: str, pictures: list[dict[str, Any]], most: int) -> list[str]:
    """A heading, and up to `most` pictures that are evenly spaced in the order of the source."""
    if not pictures:
        return []
    chosen = np.unique(np.linspace(0, len(pictures) - 1, min(most, len(pictures))).round().astype(int))
    figures = []
    for picture in (pictures[i] for i in chosen):
        words = [f"<b>{_text(picture['name'])}</b>", _text(picture["caption"])]
        words += [f"<i>{kind}:</i> {_text(caption)}" for kind, caption in picture.get("captions", {}).items()]
        figures.append(
            f'<figure><img src="data:image/jpeg;base64,{picture["jpeg"]}" alt="">'
            f"<figcaption>{'<br>'.join(filter(None, words))}</figcaption></figure>"
        )
    return [f"<h2>{_text(title)}</h2>", '<div class="grid">', *figures, "</div>"]


def _text(value: Any) -> str:
    """The value as escaped HTML that encodes to UTF-8."""
    return html.escape(str(value).encode("utf-8", "backslashreplace").decode("utf-8"))


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fafaf8; max-width: 1100px; margin: 2em auto;
  padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: .15em .8em .15em 0;
  border-bottom: 1px solid #e4e4de; vertical-align: top; overflow-wrap: anywhere; }
.number { text-align: right; font-variant-numeric: tabular-nums; } .wide { width: 50%; }
.bar { display: inline-block; height: .8em; min-width: 2px; background: #c8643c; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 1em; }
.charts { grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); }
figure { margin: 0; font-size: .85em; overflow-wrap: anywhere; } img { max-width: 100%; display: block; }
svg { width: 100%; background: #fff; border: 1px solid #e4e4de; } svg text { font-size: 11px; fill: #666; }
.kept { fill: #4a7f9c; background: #4a7f9c; } .dropped { fill: #c8643c; background: #c8643c; }
line.limit { stroke: #222; stroke-dasharray: 3 3; } i.limit { background: #222; }
.key i { display: inline-block; width: .8em; height: .8em; margin-left: 1em; }
"""

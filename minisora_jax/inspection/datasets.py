"""Show a prepared data set or a latent cache: numbers, a contact sheet, and plots of sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from minisora_jax.data.latents import Latents
from minisora_jax.io.atomic import replacing
from minisora_jax.io.records import Shards
from minisora_jax.media.contact_sheet import contact_sheet
from minisora_jax.sources.clips import Records
from minisora_jax.types import ClipSequence

SHOWN = 12  # clips on a contact sheet
MOST_SIZES = 6  # sizes that the table lists
COUNTED = 256  # clips whose actions are counted


def facts_of(shards: Shards) -> list[tuple[str, str]]:
    """The lines (name, value) of a data set: counts, bytes, settings, and the distribution of sizes."""
    manifest, sizes = shards.manifest, np.asarray(shards.sizes)
    T, H, W, text = sizes.T
    unit = "frames x rows x columns" + (" of latents" if shards.kind == "latents" else "")
    lines = [
        ("records", f"{len(shards):,} in {len(manifest['shards'])} shards"),
        ("bytes", f"{sum(s['bytes'] for s in manifest['shards']) / 2**20:,.1f} MiB"),
        ("images, videos", f"{int((T == 1).sum()):,}, {int((T > 1).sum()):,}"),
        ("frames", f"{int(T.sum()):,}; a clip has {_spread(T)}"),
        ("rows, columns", f"{_spread(H)}; {_spread(W)}"),
        ("captions", f"{_spread(text)} {'tokens' if shards.kind == 'latents' else 'bytes'}"),
    ]
    kinds, counts = np.unique(sizes[:, :3], axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    for i in order[:MOST_SIZES]:
        size = "x".join(map(str, kinds[i]))
        lines.append((unit if i == order[0] else "", f"{size:<14}{counts[i]:>8,}  {counts[i] / len(shards):6.1%}"))
    if len(order) > MOST_SIZES:
        rest = counts[order[MOST_SIZES:]].sum()
        lines.append(("", f"{len(order) - MOST_SIZES} other sizes {rest:>8,}  {rest / len(shards):6.1%}"))
    lines += [(name, short(value)) for name, value in manifest["settings"].items() if name != "actions"]
    skipped = manifest.get("skipped")
    if isinstance(skipped, dict) and isinstance(counts := skipped.get("counts"), dict):
        lines.append(("skipped", ", ".join(f"{n} {why}" for why, n in counts.items()) or "none"))
    return lines


def action_facts(clips: Records | Latents) -> list[tuple[str, str]]:
    """The lines (name, value) of the actions of a data set: how often each happens. [] if there are none.

    A column of numbers, such as a joint's angle, has its mean and its range instead. Up to 256 clips are read, evenly
    spaced.
    """
    if not clips.actions:
        return []
    chosen = np.unique(np.linspace(0, len(clips) - 1, min(COUNTED, len(clips))).astype(int))
    read = [actions_TA[1:] for i in chosen if (actions_TA := clips[int(i)].actions_TA) is not None]
    every = "" if len(chosen) == len(clips) else f" of {len(chosen):,} read"
    lines = [("actions", f"{len(clips.actions)}, of {len(read):,} clips{every}; how often each happens:")]
    if not (steps := sum(map(len, read))):
        return lines
    table = np.concatenate(read)
    for name, column in zip(clips.actions, table.T):
        happens = f"{int(column.sum()):>8,}  {column.sum() / steps:6.1%}"
        numbers = f"mean {column.mean():.3g}, {column.min():.3g} to {column.max():.3g}"
        lines.append(("", f"{name:<22}{happens if np.isin(column, (0, 1)).all() else numbers}"))
    return lines


def draw_clips(path: str | Path, clips: ClipSequence) -> None:
    """Write a contact sheet of up to 12 clips that are evenly spaced in the data set."""
    chosen = np.unique(np.linspace(0, len(clips) - 1, min(SHOWN, len(clips))).astype(int))
    label = lambda c: f"{c.name}  {'x'.join(map(str, c.size_THW))}  {c.fps:g} fps  {c.caption}"
    contact_sheet(path, [(clip.frames_THWC, label(clip)) for clip in (clips[int(i)] for i in chosen)])


def draw_sizes(path: str | Path, sizes_thwL: np.ndarray, patch: tuple[int, int, int] = (1, 1, 1)) -> None:
    """Plot histograms of tokens, latent frames and caption tokens, and the heights and widths.

    Args:
        sizes_thwL: (n, 4): latent frames, rows, columns and caption tokens of each clip.
        patch: the latents of one token: (t, h, w).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    t, h, w, text = np.asarray(sizes_thwL, np.int64).T
    figure, all_axes = plt.subplots(1, 4, figsize=(14, 3.2), constrained_layout=True)
    for axes, values, label in (
        (all_axes[0], t * h * w // np.prod(patch), "latent positions of a clip"),
        (all_axes[1], t, "latent frames"),
        (all_axes[2], text, "caption tokens"),
    ):
        axes.hist(values, bins=min(40, max(len(np.unique(values)), 2)), color="tab:blue")
        axes.set(xlabel=label, ylabel="clips")
    (columns, rows), counts = np.unique(np.stack([w, h]), axis=1, return_counts=True)
    all_axes[3].scatter(columns, rows, s=12 + 300 * counts / counts.max(), alpha=0.5, color="tab:orange")
    all_axes[3].set(xlabel="latent columns", ylabel="latent rows", xlim=(0, 1.1 * w.max()), ylim=(0, 1.1 * h.max()))
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110)
    plt.close(figure)


def _spread(values: np.ndarray) -> str:
    if values.min() == values.max():
        return f"{values.min():,}"
    return f"{values.min():,} to {values.max():,} (median {np.median(values):,.0f})"


def short(value: object) -> str:
    """A value as text of at most 90 characters."""
    text = str(value)
    return text if len(text) < 90 else f"{text[:87]}..."

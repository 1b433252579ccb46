"""Floating-point operations of a training step, counted from shapes (a multiply-add is two).

Useful work is what the clips themselves need: their tokens, and attention within each clip. Hardware work is what
the dense program does: every slot of every row, attention between all pairs of a row.
"""

from __future__ import annotations

import numpy as np

from minisora_jax.data.packing import PackConfig
from minisora_jax.models.dit import DiTConfig
from minisora_jax.models.text import BYTES_PER_TOKEN


def forward_flops(
    cfg: DiTConfig, tokens: float, text: float, pairs: dict[str, float], cross_pairs: float, text_pairs: float
) -> float:
    """Of one forward pass over so many video tokens, caption tokens, and query-key pairs of each attention.

    `pairs` counts those of self-attention by group; a pair costs 2 K operations a head, twice.
    """
    D, E = cfg.width, cfg.text_width
    cross = [group != "temporal" and cfg.caption != "label" for group in cfg.attention_pattern]
    block = 4 * D * D + 2 * cfg.mlp_ratio * D * D + (6 * D * D if cfg.modulation == "block" else 0)
    stem = (cfg.token_width + cfg.out_width + 256 + (192 if cfg.positions == "learned" else 0) + D) * D
    stem += (0 if cfg.modulation == "block" else 6 * D * D) + (0 if cfg.modulation == "single" else 2 * D * D)
    per_token = cfg.depth * (len(cfg.attention_pattern) * block + sum(cross) * 2 * D * D) + stem
    if cfg.caption == "refined":
        enter = 4 * (384 * 64 + 448 * 2 * E) + 2 * E * E if cfg.text_features == 1 else cfg.text_features * E
        per_text = enter + 12 * E * E * cfg.text_depth + cfg.depth * sum(cross) * 2 * E * D
    else:
        per_text = sum(cross) and (cfg.text_features + D) * D + cfg.depth * sum(cross) * 2 * D * D
    attention = cfg.depth * D * (sum(pairs[group] for group in cfg.attention_pattern) + sum(cross) * cross_pairs)
    if cfg.caption == "refined":
        attention += cfg.text_depth * E * text_pairs
    return 2.0 * (tokens * per_token + text * per_text) + 4.0 * attention


def count_work(cfg: DiTConfig, pack: PackConfig, rows_thwL: list[np.ndarray]) -> dict[str, float]:
    """Counts of one training step over these rows of clips (forward and backward: three forwards; remat adds one)."""
    sizes = np.concatenate(rows_thwL).astype(np.float64)
    frame = sizes[:, 1] * sizes[:, 2] / (cfg.patch[1] * cfg.patch[2])
    n = sizes[:, 0] * frame
    pooled = BYTES_PER_TOKEN if cfg.text_features == 1 and cfg.caption == "refined" else 1
    text = sizes[:, 3] / pooled
    B, S, L = len(rows_thwL), pack.tokens, pack.text_tokens / pooled
    pairs = {"joint": (n * n).sum(), "spatial": (n * frame).sum(), "temporal": (n * sizes[:, 0]).sum()}
    useful = forward_flops(cfg, n.sum(), text.sum(), pairs, (n * text).sum(), (text * text).sum())
    dense = forward_flops(cfg, B * S, B * L, dict.fromkeys(pairs, B * S * S), B * S * L, B * L * L)
    return {
        "clips": float(len(sizes)),
        "tokens": float(B * S),
        "useful_tokens": float(n.sum()),
        "useful_flops": 3.0 * useful,
        "hardware_flops": (4.0 if cfg.remat == "full" else 3.0) * dense,
    }

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
    cfg: DiTConfig, tokens: float, text: float, self_pairs: float, cross_pairs: float, text_pairs: float
) -> float:
    """Of one forward pass over so many video tokens, refined caption tokens, and query-key pairs of each attention."""
    D, E = cfg.width, cfg.text_width
    head = 2 * cfg.token_width * D + (256 + 192) * D + 9 * D * D
    per_token = cfg.depth * (6 * D * D + 2 * cfg.mlp_ratio * D * D) + head
    stem = 4 * (384 * 64 + 448 * 2 * E) + 2 * E * E if cfg.text_features == 1 else cfg.text_features * E
    per_text = cfg.depth * 2 * E * D + 12 * E * E * cfg.text_depth + stem
    attention = cfg.depth * D * (self_pairs + cross_pairs) + cfg.text_depth * E * text_pairs
    return 2.0 * (tokens * per_token + text * per_text) + 4.0 * attention


def count_work(cfg: DiTConfig, pack: PackConfig, rows_thwL: list[np.ndarray]) -> dict[str, float]:
    """Counts of one training step over these rows of clips (forward and backward: three forwards; remat adds one)."""
    sizes = np.concatenate(rows_thwL).astype(np.float64)
    n = sizes[:, 0] * sizes[:, 1] * sizes[:, 2] / (cfg.patch[0] * cfg.patch[1] * cfg.patch[2])
    pooled = BYTES_PER_TOKEN if cfg.text_features == 1 else 1
    text = sizes[:, 3] / pooled
    B, S, L = len(rows_thwL), pack.tokens, pack.text_tokens / pooled
    useful = forward_flops(cfg, n.sum(), text.sum(), (n * n).sum(), (n * text).sum(), (text * text).sum())
    dense = forward_flops(cfg, B * S, B * L, B * S * S, B * S * L, B * L * L)
    return {
        "clips": float(len(sizes)),
        "tokens": float(B * S),
        "useful_tokens": float(n.sum()),
        "useful_flops": 3.0 * useful,
        "hardware_flops": (4.0 if cfg.remat == "full" else 3.0) * dense,
    }

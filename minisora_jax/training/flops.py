"""Floating-point operations of a training step, counted from shapes. A multiply-add is two operations.

Useful work is the work for the clips: their tokens, and attention within each clip. Hardware work is the work of a
dense program: all tokens of every row including padding, and attention between all pairs of tokens in a row.
"""

from __future__ import annotations

import numpy as np

from minisora_jax.data.packing import PackConfig
from minisora_jax.models.dit import DiTConfig
from minisora_jax.models.levels import table_size
from minisora_jax.models.text import BYTES_PER_TOKEN


def forward_flops(
    cfg: DiTConfig,
    tokens: float,
    text: float,
    pairs: dict[str, float],
    cross_pairs: float,
    text_pairs: float,
    levels: float | None = None,
) -> float:
    """FLOPs of one forward pass.

    Args:
        cfg: The model.
        tokens: Video tokens.
        text: Caption tokens.
        pairs: Query-key pairs of self-attention, for each kind in `attention_kinds`. A pair costs 4 K FLOPs a head.
        cross_pairs: Pairs of cross-attention.
        text_pairs: Pairs of self-attention in the caption's refiner.
        levels: Noise levels that adaLN is computed for (models/levels.py); None: each token's.
    """
    D, E = cfg.width, cfg.text_width
    blocks = len(cfg.attention_pattern)
    cross_blocks = sum(kind != "temporal" and cfg.caption != "label" for kind in cfg.attention_pattern)
    # A block: q, k, v and out; the MLP
    block = 4 * D * D + 2 * cfg.mlp_ratio * D * D
    # Outside of the blocks: patch_in, patch_out, position_in
    stem = (cfg.token_width + cfg.given_width + cfg.out_width + (192 if cfg.positions == "learned" else 0)) * D
    per_token = cfg.depth * (blocks * block + cross_blocks * 2 * D * D) + stem
    if cfg.motion_modules:  # two attentions, the MLP, proj_in and proj_out
        per_token += cfg.depth * (block + 6 * D * D)
    # time1 and time2; adaLN of the blocks and of the head
    per_level = (256 + D) * D + 6 * D * D * (cfg.depth * blocks if cfg.modulation == "block" else 1)
    per_level += 0 if cfg.modulation == "single" else 2 * D * D
    if cfg.caption == "refined":
        # Bytes: four of them a token, through the embedding (384 x 64), "words" and "tokens" of models/text.py
        enter = 4 * (384 * 64 + 448 * 2 * E) + 2 * E * E if cfg.text_features == 1 else cfg.text_features * E
        per_text = enter + 12 * E * E * cfg.text_depth + cfg.depth * cross_blocks * 2 * E * D
    elif cross_blocks:
        per_text = (cfg.text_features + D) * D + cfg.depth * cross_blocks * 2 * D * D
    else:
        per_text = 0
    attention = cfg.depth * D * (sum(pairs[kind] for kind in cfg.attention_kinds) + cross_blocks * cross_pairs)
    if cfg.caption == "refined":
        attention += cfg.text_depth * E * text_pairs
    levels = tokens if levels is None else levels
    return 2.0 * (tokens * per_token + levels * per_level + text * per_text) + 4.0 * attention


def count_work(cfg: DiTConfig, pack: PackConfig, rows_thwL: list[np.ndarray], frozen: bool = False) -> dict[str, float]:
    """Counts of one training step. Backward costs two forward passes, and remat="full" or "host" adds one.

    A frozen model has no gradients of weights: one product less for each weight.

    Args:
        cfg: The model.
        pack: The packing.
        rows_thwL: For each row, the latent size and caption tokens (t, h, w, L) of its clips, (clips, 4).
        frozen: Only adapters are trained. Their own products are not counted.

    Returns:
        clips, tokens, useful_tokens, useful_flops, hardware_flops.
    """
    sizes = np.concatenate(rows_thwL).astype(np.float64)
    frame = sizes[:, 1] * sizes[:, 2] / (cfg.patch[1] * cfg.patch[2])
    n = sizes[:, 0] * frame
    pooled = BYTES_PER_TOKEN if cfg.text_features == 1 and cfg.caption == "refined" else 1
    text = sizes[:, 3] / pooled
    B, S, L = len(rows_thwL), pack.tokens, pack.text_tokens / pooled
    pairs = {"joint": (n * n).sum(), "spatial": (n * frame).sum(), "temporal": (n * sizes[:, 0]).sum()}
    table = table_size(pack.frames, S)
    frames, levels = (sizes[:, 0].sum(), float(B * table)) if table else (None, None)
    none, every = (dict.fromkeys(pairs, count) for count in (0.0, float(B * S * S)))
    useful = forward_flops(cfg, n.sum(), text.sum(), pairs, (n * text).sum(), (text * text).sum(), frames)
    dense = forward_flops(cfg, B * S, B * L, every, B * S * L, B * L * L, levels)
    # A token takes its level's vectors by a product with the table: six in each block, two in the head.
    dense += 2.0 * B * S * table * (6 * cfg.depth * len(cfg.attention_pattern) + 2) * cfg.width
    weights = lambda tokens, text, levels: forward_flops(cfg, tokens, text, none, 0, 0, levels) if frozen else 0.0
    return {
        "clips": float(len(sizes)),
        "tokens": float(B * S),
        "useful_tokens": float(n.sum()),
        "useful_flops": 3.0 * useful - weights(n.sum(), text.sum(), frames),
        "hardware_flops": (4.0 if cfg.remat in ("full", "host") else 3.0) * dense - weights(B * S, B * L, levels),
    }

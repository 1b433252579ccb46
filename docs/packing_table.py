"""Useful share of token slots: packed, bucketed by size, and padded. Prints the table of docs/benchmarks.md.

uv run python docs/packing_table.py
"""

import numpy as np

from minisora_jax.data.packing import PackConfig, pack_rows, token_counts
from minisora_jax.models.text import encode_bytes
from minisora_jax.toy.grammar import caption
from minisora_jax.toy.scenes import sample_scene

S = 4096


def shapes(n: int) -> np.ndarray:
    """(t, h, w, L) of procedural clips under the 4x8x8 codec."""
    scenes = [sample_scene(i) for i in range(n)]
    return np.array(
        [
            (1 + (s.size_THW[0] - 1) // 4, s.size_THW[1] // 8, s.size_THW[2] // 8, len(encode_bytes(caption(s))))
            for s in scenes
        ]
    )


def web_mix(n: int) -> np.ndarray:
    """Half images of 256 to 1024 pixels a side, half videos of 144p to 288p and 1 to 5 s, at most 4096 tokens each."""
    rng = np.random.default_rng(0)
    sizes = []
    while len(sizes) < n:
        if rng.uniform() < 0.5:
            t, h, w = 1, *(2 * rng.integers(16, 65, 2))
        else:
            side, aspect = rng.choice([18, 26, 36]), rng.choice([9 / 16, 3 / 4, 1.0, 4 / 3, 16 / 9])
            t, h, w = 1 + rng.integers(5, 31), 2 * round(side / 2), 2 * round(side * aspect / 2)
        if t * h * w // 4 <= S:
            sizes.append((t, h, w, 4 * rng.integers(8, 64)))
    return np.array(sizes)


def useful_shares(sizes: np.ndarray, patch: tuple[int, int, int], config: PackConfig) -> dict[str, float]:
    tokens, text = token_counts(sizes, patch)
    rows = pack_rows(tokens, text, config, seed=0, epoch=0)
    buckets = {}
    for size, n in zip(map(tuple, sizes[:, :3]), tokens):
        buckets.setdefault(size, []).append(n)
    # A bucket's row holds as many clips of its one size as fit in S; what is over in the last row is padding.
    bucket_rows = sum(-(-len(ns) // max(S // ns[0], 1)) for ns in buckets.values())
    return {
        "packed (this project)": tokens.sum() / (len(rows) * S),
        "bucketed by (t, h, w)": tokens.sum() / (bucket_rows * S),
        "padded to the longest": tokens.sum() / (len(tokens) * tokens.max()),
    }


if __name__ == "__main__":
    cases = {
        "procedural shapes, 4000 clips": (shapes(4000), (1, 1, 1)),
        "half images, half videos, 4000 clips": (web_mix(4000), (1, 2, 2)),
    }
    for name, (sizes, patch) in cases.items():
        config = PackConfig(tokens=S, text_tokens=8192, slots=128, rows=8)
        for how, share in useful_shares(sizes, patch, config).items():
            print(f"| {name} | {how} | {share:.1%} |")

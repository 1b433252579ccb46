"""Find duplicate clips by perceptual hash. The earlier clip of a pair is kept.

A clip's hash is the 64-bit pHash of three of its frames: 192 bits, which survive re-encoding, scaling and small changes
of colour. Two clips are duplicates if at most `distance` bits differ. `repeated` finds all such pairs exactly, without
comparing every pair: of `distance` + 1 bands of the bits, two duplicates share at least one (multi-index hashing:
Norouzi et al. 2012, arXiv:1307.2982). Pieces of one shot are compared too, so an hour of a talking head leaves few
clips.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from PIL import Image

from minisora_jax.curation.filters import curate_module

BITS = 192  # of a clip's hash
PLACES = (1 / 6, 1 / 2, 5 / 6)  # of the three frames, as shares of the clip's length


def clip_hash(frames_THWC: np.ndarray) -> str:
    """The hash of a clip of uint8 RGB frames: 48 hexadecimal digits."""
    imagehash = curate_module("imagehash", "the filter of duplicates")
    frames = (frames_THWC[int(place * len(frames_THWC))] for place in PLACES)
    return "".join(str(imagehash.phash(Image.fromarray(frame))) for frame in frames)


def repeated(hashes: Iterable[str], distance: int) -> dict[int, int]:
    """{number of a duplicate: number of the earlier clip that it repeats}, in order. The earlier clip is no duplicate.

    Args:
        hashes: `clip_hash` of every clip, in order.
        distance: duplicates differ in at most so many bits.
    """
    first: dict[str, int] = {}  # hash -> number of its first clip
    same = {i: j for i, text in enumerate(hashes) if (j := first.setdefault(text, i)) != i}
    numbers = np.fromiter(first.values(), np.int64, len(first))
    packed = np.frombuffer(bytes.fromhex("".join(first)), np.uint8).reshape(-1, BITS // 8)
    near: dict[int, list[int]] = defaultdict(list)
    for early, late in zip(*(numbers[side].tolist() for side in _near_pairs(packed, distance))):
        near[late].append(early)
    repeats: dict[int, int] = {}
    for late in sorted(near):
        if kept := [early for early in near[late] if early not in repeats]:
            repeats[late] = min(kept)
    repeats |= {i: repeats.get(j, j) for i, j in same.items()}
    return dict(sorted(repeats.items()))


def _near_pairs(packed_n24: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """(i, j) with i < j: all pairs of rows that differ in at most `distance` bits; some pairs come more than once.

    Sorting by a band makes rows that share it neighbours. Each row is compared with its 1st, 2nd, ... next neighbour,
    until no neighbours share the band.
    """
    bits, edges = np.unpackbits(packed_n24, axis=1), [BITS * i // (distance + 1) for i in range(distance + 2)]
    pairs = [np.zeros((2, 0), np.int64)]
    for low, high in zip(edges, edges[1:]):
        width = min(high - low, 62)  # an int64 key holds at most 62 bits of a band
        keys = bits[:, low : low + width] @ (1 << np.arange(width))
        order = np.argsort(keys, kind="stable")
        keys, words = keys[order], np.ascontiguousarray(packed_n24[order]).view(np.uint64)
        at = np.arange(len(keys))
        for step in range(1, len(keys)):
            at = at[: np.searchsorted(at, len(keys) - step)]
            at = at[keys[at] == keys[at + step]]
            if not len(at):
                break
            close = at[np.bitwise_count(words[at] ^ words[at + step]).sum(1) <= distance]
            pairs.append(np.stack([order[close], order[close + step]]))
    i, j = np.concatenate(pairs, axis=1)
    return np.minimum(i, j), np.maximum(i, j)

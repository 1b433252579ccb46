"""Weights that both sides of a parity check draw for themselves, by name: so that fixtures hold only results."""

import zlib

import numpy as np


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32: norm scales around 1, everything else scaled to keep activations near unit size."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith(("gamma", "norm.weight", "norm1.weight", "norm2.weight", "norm3.weight", "layer_norm.weight")):
        return (1.0 + 0.1 * noise).astype(np.float32)
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 100
    return (noise / np.sqrt(fan_in)).astype(np.float32)


def draw_input(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def draw_ids(name: str, shape: tuple[int, ...], vocabulary: int) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(name.encode())).integers(0, vocabulary, shape)

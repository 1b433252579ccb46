"""Classifier-free guidance inside one packed row (Ho & Salimans 2022, arXiv:2207.12598).

Each request is two segments of its row: with its caption, and with the empty one. Both start from the same noise
and take the same guided step, so they stay equal and the second one is free of bookkeeping.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def guide(v_BSP: jax.Array, with_caption_BS: jax.Array, without_BS: jax.Array, scale: jax.Array | float) -> jax.Array:
    """v_without + scale * (v_with - v_without), for each token of either segment.

    `with_caption_BS` and `without_BS` give, for each token, the index in its row of its twin in the segment with
    the caption and in that without. scale 1 is the model itself.
    """
    take = lambda index_BS: jnp.take_along_axis(v_BSP, index_BS[..., None], axis=1)
    v_with, v_without = take(with_caption_BS), take(without_BS)
    return v_without + scale * (v_with - v_without)

"""Muon (Jordan 2024): the momentum of each matrix, made orthogonal. Each device works on its share of the matrices.

Updates are scaled as in Liu et al. 2025, arXiv:2502.16982, to the root mean square of AdamW's, so that its learning
rates carry over.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import optax
import optax.contrib

from minisora_jax.models.layers import matrix_axes
from minisora_jax.parallel.layers import map_layers

RMS = 0.2  # of an update, that of AdamW's


def scale_by_muon(momentum: float) -> optax.GradientTransformation:
    """The update of kernels: their Nesterov momentum, orthogonal. Every parameter must have `matrix_axes`."""
    return optax.chain(optax.trace(momentum, nesterov=True), optax.stateless(_orthogonal))


def is_matrix(path: tuple) -> bool:
    """Whether a parameter is a kernel, which Muon updates."""
    return path[-1].key == "kernel"


def kernel_axes(params: Any) -> Any:
    """The tree of (input axes, output axes) of each kernel; None for other parameters."""

    def axes(path: tuple, p: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        layers, inputs = matrix_axes(path, p.ndim)
        every = tuple(range(layers, p.ndim))
        return (every[:inputs], every[inputs:]) if is_matrix(path) else None

    return jax.tree_util.tree_map_with_path(axes, params)


def _orthogonal(updates: Any, params: Any = None) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, x: _of_kernel(x, *matrix_axes(path, x.ndim)), updates)


def _of_kernel(x: jax.Array, layers: int, inputs: int) -> jax.Array:
    """The orthogonal update of one kernel, sharded like the kernel."""
    shape = x.shape[layers:]
    fan_in, fan_out = math.prod(shape[:inputs]), math.prod(shape[inputs:])
    orthogonal = lambda x: _newton_schulz(x.reshape(fan_in, fan_out)).reshape(x.shape)
    update = map_layers(orthogonal, x) if layers else map_layers(orthogonal, x[None])[0]
    return RMS * math.sqrt(max(fan_in, fan_out)) * update


def _newton_schulz(x: jax.Array) -> jax.Array:
    """A matrix with its singular values moved to about 1, by optax's five Newton-Schulz steps."""
    orthogonal: Any = optax.contrib.scale_by_muon(beta=0.0, nesterov=False)
    return orthogonal.update(x, orthogonal.init(x))[0]

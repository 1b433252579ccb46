"""The optimiser: AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101) with warm-up, decay and a gradient clip.

"muon" makes the update of each matrix orthogonal (Jordan 2024) and leaves vectors and tables to AdamW. Its updates are
scaled as in Liu et al. 2025, arXiv:2502.16982, so AdamW's learning rates carry over. It keeps whole matrices on every
device, so it is for small models, where it needs fewer steps.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax
import optax.contrib
from jax.sharding import PartitionSpec as P

from minisora_jax.parallel.mesh import like, shard
from minisora_jax.training.mup import growth, with_mup


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimiser's settings.

    Raises:
        ValueError: The name is unknown, or a number is out of range.
    """

    name: str = "adamw"  # or "muon"
    learning_rate: float = 3e-4  # peak
    warmup: int = 500  # steps of linear warm-up
    final: float = 0.1  # learning rate of the last step as a share of the peak (cosine decay)
    weight_decay: float = 0.0  # on parameters of rank 2 and above only, so not on norms and biases
    clip: float = 1.0  # largest global norm of the gradient
    b1: float = 0.9  # decay of the first moment; of the momentum in muon
    b2: float = 0.99  # decay of the second moment
    ema: float = 0.999  # decay of the averaged weights, ramped up over the first steps
    accumulate: int = 1  # microbatches that are summed into one step

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon"):
            raise ValueError(f"optim.name={self.name!r} must be 'adamw' or 'muon'")
        if self.learning_rate <= 0 or self.clip <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} and clip={self.clip} must be positive")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema={self.ema} must be in [0, 1)")
        if self.accumulate < 1:
            raise ValueError(f"accumulate={self.accumulate} must be at least 1")


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate by step: linear warm-up, then a cosine from the peak to `final` times the peak."""
    warmup = min(config.warmup, max(steps - 1, 1))
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, max(steps, warmup + 1), config.final * config.learning_rate
    )


def make_optimizer(config: OptimConfig, steps: int, base_shapes: Any = None) -> optax.GradientTransformation:
    """The gradient transformation for a run of `steps` steps.

    Args:
        config: The settings.
        steps: Steps of the whole run.
        base_shapes: The parameters at muP's base width (`mup.base_shapes`); None: the standard parametrisation.
    """
    schedule = learning_rate(config, steps)
    matrices = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    if config.name == "muon":
        update = _on_whole_matrices(
            optax.contrib.muon(
                schedule,
                beta=config.b1,
                adam_b1=config.b1,
                adam_b2=config.b2,
                weight_decay=config.weight_decay,
                weight_decay_mask=matrices,
                consistent_rms=0.2,
                muon_weight_dimension_numbers=_matrix_axes,
            )
        )
    else:
        update = optax.adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=matrices)
    clip = optax.clip_by_global_norm(config.clip)
    if base_shapes is None:
        return optax.chain(clip, update)
    muon = config.name == "muon"
    factor = lambda of: of.muon if muon else of.adam
    return with_mup(clip, update, lambda params: growth(params, base_shapes, _matrix_axes(params)), factor)


def _matrix_axes(params: Any) -> Any:
    """The input and output axes of each kernel; None for other parameters, which AdamW updates."""

    def axes(path, p):
        names = [k.key for k in path]
        if names[-1] != "kernel":
            return None
        layer = 1 if "blocks" in names else 0  # the first axis of a scanned stack counts its layers
        if p.ndim - layer == 5:  # (t, h, w, in, out)
            return optax.contrib.MuonDimensionNumbers((0, 1, 2, 3), 4)
        inputs = 2 if names[-2] == "out" and p.ndim - layer == 3 else 1
        every = tuple(range(layer, p.ndim))
        return optax.contrib.MuonDimensionNumbers(every[:inputs], every[inputs:])

    return jax.tree_util.tree_map_with_path(axes, params)


def _on_whole_matrices(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` with gradients and parameters gathered to every device. Its updates are sharded like the parameters."""
    gather = lambda tree: jax.tree.map(lambda x: shard(x, P(*(None,) * x.ndim)), tree)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(gather(updates), state, gather(params))
        return jax.tree.map(like, updates, params), state

    return optax.GradientTransformation(lambda params: gather(inner.init(gather(params))), update)

"""The optimiser: AdamW with warm-up, decay and a gradient clip (Loshchilov & Hutter 2017, arXiv:1711.05101)."""

from __future__ import annotations

import dataclasses

import jax
import optax


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    learning_rate: float = 3e-4  # peak
    warmup: int = 500  # steps of linear warm-up
    final: float = 0.1  # learning rate of the last step, as a share of the peak (cosine decay)
    weight_decay: float = 0.0  # on matrices only: never on norms, biases or embeddings of rank < 2
    clip: float = 1.0  # global norm of the gradient
    b1: float = 0.9
    b2: float = 0.99
    ema: float = 0.999  # decay of the averaged weights, ramped up over the first steps
    accumulate: int = 1  # microbatches summed into one step

    def __post_init__(self):
        if self.learning_rate <= 0 or self.clip <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} and clip={self.clip} must be positive")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema={self.ema} must be in [0, 1)")
        if self.accumulate < 1:
            raise ValueError(f"accumulate={self.accumulate} must be at least 1")


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then a cosine from the peak to `final` times it at the last step."""
    warmup = min(config.warmup, max(steps - 1, 1))
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, max(steps, warmup + 1), config.final * config.learning_rate
    )


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
    )

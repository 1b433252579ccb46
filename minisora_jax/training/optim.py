"""The optimiser: AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101) with warm-up, decay and a gradient clip.

"muon" makes the update of each matrix orthogonal (muon.py) and leaves vectors and tables to AdamW.

Bytes of a parameter that the optimiser keeps, beside 4 of the parameter and 4 of its average (none with ema=0):

    moments    adamw  muon, of a matrix
    float32        8                  4
    bfloat16       4                  2    as DeepSeek-V3 trains (arXiv:2412.19437)
    factored       2                  2    Adafactor (Shazeer & Stern 2018, arXiv:1804.04235) with a bfloat16 momentum
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from minisora_jax.training.muon import is_matrix, kernel_axes, scale_by_muon
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
    moments: str = "float32"  # how the moments are stored: "float32", "bfloat16" or "factored", see optim.py
    ema: float = 0.999  # decay of the averaged weights, ramped up over the first steps; 0: no average is kept
    accumulate: int = 1  # microbatches that are summed into one step

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon"):
            raise ValueError(f"optim.name={self.name!r} must be 'adamw' or 'muon'")
        if self.learning_rate <= 0 or self.clip <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} and clip={self.clip} must be positive")
        if self.moments not in ("float32", "bfloat16", "factored"):
            raise ValueError(f"optim.moments={self.moments!r} must be 'float32', 'bfloat16' or 'factored'")
        if self.moments == "bfloat16" and self.b2 > 0.99:
            raise ValueError(
                f"optim.b2={self.b2} with moments='bfloat16': a bfloat16 second moment cannot follow changes of less "
                f"than 1 % a step. Set b2 to at most 0.99"
            )
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

    def update(scaled: optax.GradientTransformation) -> optax.GradientTransformation:
        decay = optax.add_decayed_weights(config.weight_decay, matrices)
        return optax.chain(scaled, decay, optax.scale_by_learning_rate(schedule))

    clip, by_adam, muon = optax.clip_by_global_norm(config.clip), update(_scale_by_adam(config)), config.name == "muon"
    by_muon = update(_stored(scale_by_muon(config.b1), config.moments))
    kind = lambda path, _: "muon" if is_matrix(path) else "adamw"
    kinds = lambda params: jax.tree_util.tree_map_with_path(kind, params)
    step = optax.partition({"muon": by_muon, "adamw": by_adam}, kinds) if muon else by_adam
    if base_shapes is None:
        return optax.chain(clip, step)
    factor = lambda of: of.muon if muon else of.adam
    return with_mup(clip, step, lambda params: growth(params, base_shapes, kernel_axes(params)), factor)


def _scale_by_adam(config: OptimConfig) -> optax.GradientTransformation:
    """Adam's update, or with factored moments Adafactor's, which has the momentum after the scaling."""
    if config.moments != "factored":
        return _stored(optax.scale_by_adam(config.b1, config.b2), config.moments)
    momentum = optax.ema(config.b1, debias=False)
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), _stored(momentum, config.moments))


def _stored(inner: optax.GradientTransformation, moments: str) -> optax.GradientTransformation:
    """`inner` computing in float32, with its moments stored in bfloat16 unless `moments` is "float32"."""
    if moments == "float32":
        return inner
    cast = lambda state, old, new: jax.tree.map(lambda x: x.astype(new) if x.dtype == old else x, state)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(updates, cast(state, jnp.bfloat16, jnp.float32), params)
        return updates, cast(state, jnp.float32, jnp.bfloat16)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), jnp.float32, jnp.bfloat16), update)

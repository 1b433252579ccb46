"""muP: the best learning rate of a narrow transformer is that of a wide one (Yang et al. 2022, arXiv:2203.03466).

Only the optimiser differs from the standard parametrisation. The initial weights are muP's already: their standard
deviation is 1 / sqrt(fan in), and the output layer, adaLN and cross-attention's output begin at zero. Heads have one
width at every width of the model, so attention's 1 / sqrt(K) is a constant. What remains is table 3 of the paper, for
parameters that grow from a base width by `inputs` times along their input axes and `outputs` times along the others:

                           inputs  outputs     AdamW's rate times    Muon's rate times
    hidden kernels         m       m           1 / m                 1 / sqrt(m)
    input kernels          1       m           1                     1
    the output kernel      m       1           1 / m                 1 / m
    biases, scales, tables 1       m           1                     1

Muon: an update's spectral norm is to grow as sqrt(outputs / inputs) (Yang, Simon & Bernstein 2023, arXiv:2310.17813).
That of ours is 0.2 sqrt(max(fan in, fan out)) (optim.py). The column is the quotient, for fan in = fan out.

Weight decay is not rescaled: a step removes the share rate * weight_decay of each weight at every width (Wang &
Aitchison 2024, arXiv:2405.13698). The norm that `clip` limits weighs each gradient by sqrt(outputs / inputs), without
which the output layer's gradient grows as sqrt(m). Gradients enter AdamW times `outputs`, so that its epsilon weighs
the same at every width (Everett et al. 2024, arXiv:2407.05872). At the base width all factors are 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import optax

from minisora_jax.models.dit import abstract_params
from minisora_jax.models.dit_config import DiTConfig


@dataclasses.dataclass(frozen=True)
class Growth:
    """How a parameter differs from its counterpart at the base width."""

    inputs: float  # fan in over the fan in there
    outputs: float
    larger: float  # the larger one of fan in and fan out, over that there

    @property
    def adam(self) -> float:
        """The factor of AdamW's learning rate."""
        return 1 / self.inputs

    @property
    def muon(self) -> float:
        """The factor of Muon's learning rate, whose updates have a spectral norm of 0.2 sqrt(larger)."""
        return math.sqrt(self.outputs / self.inputs / self.larger)

    @property
    def norm(self) -> float:
        """The weight of its gradient in the norm that is clipped."""
        return math.sqrt(self.outputs / self.inputs)


def base_model(dit: DiTConfig, base_width: int) -> DiTConfig:
    """The model at the base width. It differs in `width` and `heads` only, so its heads are as wide.

    Raises:
        ValueError: `base_width` is no multiple of the head width.
    """
    head_width = dit.width // dit.heads
    if base_width < 1 or base_width % head_width:
        raise ValueError(
            f"mup_base_width={base_width} must be a multiple of {head_width}, the head width of dit.width={dit.width} "
            f"with dit.heads={dit.heads}: muP compares models whose heads are equally wide"
        )
    return dataclasses.replace(dit, width=base_width, heads=base_width // head_width)


def base_shapes(dit: DiTConfig, base_width: int) -> Any:
    """The parameters of `base_model` as `jax.ShapeDtypeStruct`s; None for base_width=0, without muP."""
    if not base_width:
        return None
    return abstract_params(dataclasses.replace(base_model(dit, base_width), attention="reference"))


def growth(params: Any, base: Any, axes: Any) -> Any:
    """The `Growth` of each parameter.

    Args:
        params: Arrays, or their shapes.
        base: The same parameters at the base width.
        axes: (input axes, output axes) of each kernel; None for other parameters, which have no fan in.

    Raises:
        ValueError: The trees differ.
    """

    def of(shape: tuple[int, ...], shape_there: tuple[int, ...], its: tuple[tuple[int, ...], ...] | None) -> Growth:
        size = lambda shape, over: math.prod(shape[axis] for axis in over)
        if its is None:
            grown = math.prod(shape) / math.prod(shape_there)
            return Growth(1.0, grown, grown)
        fan = [size(shape, over) for over in its]
        fan_there = [size(shape_there, over) for over in its]
        return Growth(fan[0] / fan_there[0], fan[1] / fan_there[1], max(fan) / max(fan_there))

    return jax.tree.map(lambda p, b, its: of(p.shape, b.shape, its), params, base, axes)


def with_mup(
    clip: optax.GradientTransformation,
    update: optax.GradientTransformation,
    growth_of: Callable[[Any], Any],
    factor: Callable[[Growth], float],
) -> optax.GradientTransformation:
    """optax.chain(clip, update) of parameters that are divided by `factor`, and multiplied by it where they are used.

    So an update is multiplied by the factor, and weight decay is not. Its state is that of the chain.

    Args:
        clip: Limits the norm of the gradients.
        update: From gradients to updates, with weight decay and learning rate.
        growth_of: The tree of `Growth`s of parameters.
        factor: Of the learning rate, by growth.
    """
    chain = optax.chain(clip, update)

    def apply(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        grown = growth_of(params)
        times = lambda tree, by: jax.tree.map(lambda x, g: x if by(g) == 1 else x * by(g), tree, grown)
        gradients, clip_state = clip.update(times(updates, lambda g: g.norm), state[0], params)
        gradients = times(gradients, lambda g: g.outputs / g.norm)
        updates, update_state = update.update(gradients, state[1], times(params, lambda g: 1 / factor(g)))
        return times(updates, factor), (clip_state, update_state)

    return optax.GradientTransformation(chain.init, apply)

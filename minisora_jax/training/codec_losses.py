"""The loss of a codec's training, in up to three stages.

    reconstruction   |x - y| + l2 (x - y)^2 / 2 + w LPIPS(x, y)
    codec            reconstruction + kl KL(q(z|x) || N(0, I)) - a mean D(y)
    discriminator    (mean max(0, 1 - D(x)) + mean max(0, 1 + D(y))) / 2

LPIPS and the discriminator D begin at a step of their own. The weight a is adaptive (VQGAN, Esser et al. 2020,
arXiv:2012.09841, equation 7): weight |d reconstruction / d K| / (|d mean D / d K| + 1e-4), with K the decoder's last
kernel. Every term is a mean over its own elements. Open-Sora 2.0 sums over the elements of a frame: its terms are ours
times their number.

One gradient serves both players: each term stops it at the parameters of the other. So both step from the same
reconstruction, as in Open-Sora 2.0.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from minisora_jax.models.discriminator import Discriminator, scores
from minisora_jax.models.perceptual import LPIPS, frame_distances
from minisora_jax.parallel.mesh import like, shard
from minisora_jax.training.optim import OptimConfig, make_optimizer

LAST = ("params", "decoder", "conv_out", "conv", "kernel")  # the decoder's last kernel
MOST = 1e4  # of the adaptive weight
Terms = dict[str, jax.Array]  # name -> value of each clip (B,)


@dataclasses.dataclass(frozen=True)
class PerceptualConfig:
    """LPIPS as a part of the loss.

    Raises:
        ValueError: A number is negative.
    """

    path: str = ""  # what `minisora import lpips` wrote; "": without LPIPS
    weight: float = 1.0  # beside the absolute error
    start: int = 0  # the step from which it counts

    def __post_init__(self) -> None:
        _require_positive(self, "lpips", weight=self.weight, start=self.start)


@dataclasses.dataclass(frozen=True)
class AdversarialConfig:
    """The discriminator, and its part of the loss.

    Raises:
        ValueError: A number is out of range.
    """

    weight: float = 0.0  # beside the reconstruction, by the gradients at the decoder's last kernel; 0: none
    start: int = 0  # the step from which both players play
    base: int = 64  # channels of the discriminator's first layer
    layers: int = 3  # of the discriminator that halve the frames
    learning_rate: float = 1e-4  # of the discriminator, whose optimiser is AdamW

    def __post_init__(self) -> None:
        _require_positive(self, "gan", weight=self.weight, start=self.start)
        if self.base < 1 or self.layers < 1 or self.learning_rate <= 0:
            raise ValueError(
                f"gan.base={self.base} and gan.layers={self.layers} must be at least 1, and gan.learning_rate="
                f"{self.learning_rate} positive"
            )

    @property
    def discriminator(self) -> Discriminator:
        """The Flax module."""
        return Discriminator(self.base, self.layers)


def _require_positive(config: Any, where: str, **numbers: float) -> None:
    for name, number in numbers.items():
        if number < 0:
            raise ValueError(f"{where}.{name}={number} must be at least 0")


def per_clip(x: jax.Array) -> jax.Array:
    """The mean of each clip: (B, ...) -> (B,)."""
    return jnp.mean(x, axis=range(1, x.ndim))


def divergence(mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """KL(N(mean, exp(logvar)) || N(0, 1)) of each clip, a mean over its latents: (B,)."""
    return per_clip(0.5 * (mean**2 + jnp.exp(logvar) - 1.0 - logvar))


def reconstruction(
    x_BTHWC: jax.Array, y_BTHWC: jax.Array, step: jax.Array, l2: float, config: PerceptualConfig, lpips: LPIPS | None
) -> tuple[jax.Array, Terms]:
    """How far the pictures y are from x.

    Args:
        x_BTHWC: Pixels in [-1, 1].
        y_BTHWC: The codec's.
        step: The number of the step.
        l2: Weight of half the squared error.
        config: The weight and the start of LPIPS.
        lpips: The network; None: without.

    Returns:
        (the loss of each clip (B,), its terms).
    """

    def pixels(y: jax.Array) -> tuple[jax.Array, Terms]:
        terms = {"l1": per_clip(jnp.abs(x_BTHWC - y)), "mse": per_clip((x_BTHWC - y) ** 2)}
        return terms["l1"] + 0.5 * l2 * terms["mse"], terms

    def with_lpips(lpips: LPIPS, y: jax.Array) -> tuple[jax.Array, Terms]:
        loss, terms = pixels(y)
        terms["lpips"] = frame_distances(lpips.config, lpips.params, x_BTHWC, y)
        return loss + config.weight * terms["lpips"], terms

    if lpips is None:
        return pixels(y_BTHWC)
    return staged(config.start, step, functools.partial(with_lpips, lpips), pixels, y_BTHWC)


def against(
    config: AdversarialConfig,
    params: dict,
    x_BTHWC: jax.Array,
    y_BTHWC: jax.Array,
    rebuild: Callable[[jax.Array], tuple[jax.Array, Terms]],
    at_last: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, Terms]:
    """The reconstruction with a discriminator against it.

    Args:
        config: The settings.
        params: {"params": ...} of the discriminator.
        x_BTHWC: Pixels in [-1, 1].
        y_BTHWC: The codec's.
        rebuild: y -> (the reconstruction's loss of each clip, its terms), see `reconstruction`.
        at_last: A gradient by y -> that by the decoder's last kernel.

    Returns:
        (the codec's and the discriminator's loss of each clip, the terms with "generator", "discriminator" and
        "adaptive_weight").
    """
    critic = lambda params, y: scores(config.discriminator, params, y)
    still = jax.lax.stop_gradient
    loss, pull, terms = jax.vjp(rebuild, y_BTHWC, has_aux=True)
    generator, pull_generator = jax.vjp(lambda y: -per_clip(critic(still(params), y)), y_BTHWC)
    by_loss, by_generator = (f(jnp.ones_like(loss))[0] for f in (pull, pull_generator))
    # Norms of the gradients of means over clips: the constant below is to be small beside these.
    norms = [jnp.linalg.norm(at_last(still(g)).reshape(-1)) / len(loss) for g in (by_loss, by_generator)]
    weight = still(config.weight * jnp.clip(norms[0] / (norms[1] + 1e-4), 0.0, MOST))
    real, fake = critic(params, x_BTHWC), critic(params, still(y_BTHWC))
    judged = 0.5 * (per_clip(jax.nn.relu(1.0 - real)) + per_clip(jax.nn.relu(1.0 + fake)))
    terms |= {
        "generator": generator,
        "discriminator": judged,
        "adaptive_weight": like(jnp.full(judged.shape, weight), judged),
    }
    # The gradients by y are at hand. A product with them has the value and the gradient, and computes neither again.
    along = still(by_loss + weight * by_generator) * (y_BTHWC - still(y_BTHWC))
    return still(loss + weight * generator) + jnp.sum(along, axis=range(1, along.ndim)) + judged, terms


def staged(start: int, step: jax.Array, after: Callable, before: Callable, *inputs: Any) -> Any:
    """after(*inputs) from step `start` on, and before(*inputs) until then, with zeros for the terms that it lacks.

    The terms that do not count yet are not computed. Both return (loss of each clip, terms).
    """
    if start == 0:
        return after(*inputs)

    def filled(*inputs):
        loss, terms = before(*inputs)
        missing = jax.eval_shape(after, *inputs)[1]
        return loss, jax.tree.map(_zeros, missing) | terms

    return jax.lax.cond(step >= start, after, filled, *inputs)


def _zeros(abstract: jax.ShapeDtypeStruct) -> jax.Array:
    zeros = jnp.zeros(abstract.shape, abstract.dtype)
    return zeros if jax.sharding.get_abstract_mesh().empty else shard(zeros, abstract.sharding.spec)


def last_kernel(params: Any) -> jax.Array:
    """The decoder's last kernel."""
    for key in LAST:
        params = params[key]
    return params


def with_last_kernel(params: Any, kernel: jax.Array, at: tuple[str, ...] = LAST) -> Any:
    """The codec's parameters with another last kernel."""
    return {**params, at[0]: with_last_kernel(params[at[0]], kernel, at[1:])} if at else kernel


def two_optimizers(codec: OptimConfig, gan: AdversarialConfig, steps: int) -> optax.GradientTransformation:
    """The optimiser of {"codec": ..., "discriminator": ...}: each has its own, and its own limit of the gradient."""
    other = dataclasses.replace(codec, name="adamw", learning_rate=gan.learning_rate, weight_decay=0.0)
    each: dict[Hashable, Any] = {"codec": make_optimizer(codec, steps), "discriminator": make_optimizer(other, steps)}
    return optax.partition(each, {name: name for name in each})

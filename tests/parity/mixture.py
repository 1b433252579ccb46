"""Data whose every estimate is known in closed form: a mixture of Gaussians, each coordinate for itself.

At x_t = a x + s e each component is Gaussian with mean a m and variance a^2 d^2 + s^2, so that E[x | x_t] is a mean of
each component's own estimate, weighed by its posterior.
"""

import numpy as np

WEIGHTS, MEANS, DEVIATIONS = np.array([0.5, 0.3, 0.2]), np.array([-1.2, 0.5, 1.6]), np.array([0.3, 0.5, 0.2])


def clean(x_t, a, s, xp=np):
    """E[x | x_t] of any array; a and s broadcast against it. `xp` is numpy or jax.numpy."""
    x_t, a, s = x_t[..., None], xp.asarray(a)[..., None], xp.asarray(s)[..., None]
    weights, means, deviations = (v.astype(x_t.dtype) for v in (WEIGHTS, MEANS, DEVIATIONS))
    variance = a**2 * deviations**2 + s**2
    off = x_t - a * means
    log_p = np.log(weights) - 0.5 * xp.log(variance) - 0.5 * off**2 / variance
    p = xp.exp(log_p - log_p.max(-1, keepdims=True))
    estimate = means + a * deviations**2 / variance * off
    return (p * estimate).sum(-1) / p.sum(-1)


def noise(x_t, a, s, xp=np):
    """E[e | x_t], where s is not 0."""
    return (x_t - a * clean(x_t, a, s, xp)) / s


def draw(rng: np.random.Generator, shape) -> np.ndarray:
    which = rng.choice(3, p=WEIGHTS, size=shape)
    return MEANS[which] + DEVIATIONS[which] * rng.standard_normal(shape)

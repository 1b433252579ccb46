"""The adaptive sampler: Dormand-Prince by diffrax (Kidger 2021, arXiv:2202.02435)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from minisora_jax.diffusion.denoiser import Denoiser
from minisora_jax.diffusion.sampler import ddim

LAST = 1e-4  # share of the way that ends with a DDIM step: near clean data some velocities are infinite or undefined


def dopri5(
    denoiser: Denoiser, x_BSP: jax.Array, times: Callable[[jax.Array], jax.Array], tolerance: float
) -> tuple[jax.Array, jax.Array]:
    """Sample with Dormand and Prince's fifth-order pair and steps of adaptive size.

    It solves dx/du = v(x, t) dt/du, with all rows in one system. The last 1e-4 of the way is one DDIM step.

    Args:
        denoiser: The model.
        x_BSP: The state at times(1).
        times: The time of each token (B, S) at a common u from 1 to 0. times(0) must be 0. A token that is given has
            time 0 at every u, so it does not move.
        tolerance: Error of a step, relative and absolute; the data have unit variance.

    Returns:
        (the state at times(0), the number of model calls).

    Raises:
        RuntimeError: 4096 steps are not enough (diffrax's error).
    """
    import diffrax

    def slope(u, x_BSP, _):
        time_BS, rate_BS = jax.jvp(times, (u,), (jnp.ones_like(u),))
        v_BSP = jnp.where(rate_BS[..., None] == 0, 0.0, denoiser.velocity(x_BSP, time_BS))
        return rate_BS[..., None] * v_BSP

    one = jnp.ones((), x_BSP.dtype)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(slope),
        diffrax.Dopri5(),
        t0=one,
        t1=LAST * one,
        dt0=None,
        y0=x_BSP,
        saveat=diffrax.SaveAt(t1=True),
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
        max_steps=4096,
    )
    states = solution.ys
    assert states is not None  # SaveAt(t1=True) saves the last one
    x_BSP, _ = ddim(denoiser, states[-1], times(LAST * one), times(0 * one))
    return x_BSP, 6 * solution.stats["num_steps"] + 1

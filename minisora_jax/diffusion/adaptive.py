"""Dormand-Prince with steps of its own choosing, by diffrax (Kidger 2021, arXiv:2202.02435)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from minisora_jax.diffusion.denoiser import Denoiser
from minisora_jax.diffusion.sampler import ddim

LAST = 1e-4  # of the way: there some velocities are infinite or, being e of clean data, undefined


def dopri5(
    denoiser: Denoiser, x_BSP: jax.Array, times: Callable[[jax.Array], jax.Array], tolerance: float
) -> tuple[jax.Array, jax.Array]:
    """(x at the end, model calls), from the state at times(1) down to times(0), which must be clean data.

    `times(u)` is each token's time (B, S) at a common u, so that dx/du = v(x, t) dt/du and known tokens, whose time
    stays 0, do not move. Steps of Dormand & Prince's fifth-order pair are chosen for an error of `tolerance`, relative
    and absolute (the data are of unit variance), over all rows together; the last 1e-4 is a DDIM step.
    Raises when 4096 steps do not reach it.
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
    x_BSP, _ = ddim(denoiser, solution.ys[-1], times(LAST * one), times(0 * one))
    return x_BSP, 6 * solution.stats["num_steps"] + 1

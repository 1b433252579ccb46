"""Samplers: one step from noise towards data. The caller runs the loop.

    step(denoiser, x_BSP, time_BS, next_BS, past, noise_BSP, eta) -> (x_BSP, past)

    time_BS, next_BS   time of each token before and after the step; a token whose time stays the same does not move,
                       so tokens that are given stay at time 0
    past               the earlier steps that a multistep sampler uses (multistep.py); () for the others
    noise_BSP          fresh standard normal noise for stochastic samplers; None: the step is deterministic
    eta                share of the noise that is renewed

"dopri5" (adaptive.py) chooses its own steps.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from minisora_jax.diffusion.denoiser import Denoiser, where_moving
from minisora_jax.diffusion.multistep import Past, begin, dpmpp_2m, unipc
from minisora_jax.diffusion.noise_path import DDPM_STEPS, solve
from minisora_jax.diffusion.time import MOST_SHIFT, TIME_SCHEDULES

Step = tuple[jax.Array, tuple[Past, ...]]  # (x_BSP, past)


class StepFn(Protocol):
    """One step of a sampler; the module docstring has the arguments."""

    def __call__(
        self,
        denoiser: Denoiser,
        x_BSP: jax.Array,
        time_BS: jax.Array,
        next_BS: jax.Array,
        past: tuple[Past, ...],
        noise_BSP: jax.Array | None,
        eta: jax.Array | float,
        /,
    ) -> Step: ...


def euler(
    denoiser: Denoiser,
    x_BSP: jax.Array,
    time_BS: jax.Array,
    next_BS: jax.Array,
    past: tuple[Past, ...] = (),
    noise_BSP: jax.Array | None = None,
    eta: jax.Array | float = 0.0,
) -> Step:
    """First order, one model call: x + (t' - t) v(x, t). On the linear and "ve" paths this is DDIM."""
    return x_BSP + (next_BS - time_BS)[..., None] * denoiser.velocity(x_BSP, time_BS), past


def heun(
    denoiser: Denoiser,
    x_BSP: jax.Array,
    time_BS: jax.Array,
    next_BS: jax.Array,
    past: tuple[Past, ...] = (),
    noise_BSP: jax.Array | None = None,
    eta: jax.Array | float = 0.0,
) -> Step:
    """Second order, two model calls: the mean of the slopes at both ends of an Euler step (Heun 1900).

    On "ve" with the schedule "karras" this is EDM's sampler (Karras et al. 2022, arXiv:2206.00364, algorithm 1). As in
    that paper and in diffusers, the step onto clean data is an Euler step. The exception is a model that predicts the
    velocity: it can predict it at t' = 0 too, so the last step is Heun's (diffusers' FlowMatchHeun ends with Euler).
    """
    step = (next_BS - time_BS)[..., None]
    v = denoiser.velocity(x_BSP, time_BS)
    v_next = denoiser.velocity(x_BSP + step * v, next_BS)
    if denoiser.prediction != "velocity":
        v_next = jnp.where((next_BS > 0)[..., None], v_next, v)
    return where_moving(time_BS, next_BS, x_BSP + step * 0.5 * (v + v_next), x_BSP), past


def ddim(
    denoiser: Denoiser,
    x_BSP: jax.Array,
    time_BS: jax.Array,
    next_BS: jax.Array,
    past: tuple[Past, ...] = (),
    noise_BSP: jax.Array | None = None,
    eta: jax.Array | float = 0.0,
) -> Step:
    """x' = a' x + s' (sqrt(1 - q) e + sqrt(q) z),   q = eta^2 (1 - r^2),   r = (s'/a') / (s/a),   z ~ N(0, I).

    First order, one model call, exact if the estimates of x and e stay constant over the step. This is Song et al.
    2020, arXiv:2010.02502, eq. 12 and 16, for any path; on their path r^2 = (1 - A') A / (A' (1 - A)) with A = a^2.
    eta = 0 is deterministic. eta = 1 is the ancestral sampler of DDPM with its smaller variance (Ho et al. 2020,
    arXiv:2006.11239, eq. 7).
    """
    mean_BSP, spread_BS1 = ddim_distribution(denoiser, x_BSP, time_BS, next_BS, 0.0 if noise_BSP is None else eta)
    moved_BSP = mean_BSP if noise_BSP is None else mean_BSP + spread_BS1 * noise_BSP
    return where_moving(time_BS, next_BS, moved_BSP, x_BSP), past


def ddim_distribution(
    denoiser: Denoiser, x_BSP: jax.Array, time_BS: jax.Array, next_BS: jax.Array, eta: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """(mean_BSP, standard deviation (B, S, 1)) of the normal distribution from which `ddim` draws x'."""
    clean_BSP, e_BSP = denoiser.clean_and_noise(x_BSP, time_BS)
    renewed = eta**2 * (1.0 - denoiser.sigma_alpha_decay(time_BS, next_BS) ** 2)
    mean_BSP = denoiser.path.mix(clean_BSP, jnp.sqrt(1.0 - renewed) * e_BSP, next_BS[..., None])
    return mean_BSP, denoiser.path.sigma(next_BS)[..., None] * jnp.sqrt(renewed)


def ddpm(
    denoiser: Denoiser,
    x_BSP: jax.Array,
    time_BS: jax.Array,
    next_BS: jax.Array,
    past: tuple[Past, ...] = (),
    noise_BSP: jax.Array | None = None,
    eta: jax.Array | float = 1.0,
) -> Step:
    """DDIM with eta = 1. A model that learned the variance of its steps renews as much noise as that says.

    The learned variance lies between the posterior's (that of `ddim`) and the forward step's, v = -1 to 1, on the line
    of logarithms (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15):

        log variance = (1 + v) / 2 log b + (1 - v) / 2 log b~,   b = 1 - (a / a')^2,   b~ = b s'^2 / s^2
    """
    if denoiser.with_variance is None or noise_BSP is None:
        return ddim(denoiser, x_BSP, time_BS, next_BS, past, noise_BSP, eta)
    p_BSP, v_BSP = denoiser.with_variance(x_BSP, time_BS)
    clean_BSP, e_BSP = solve(denoiser.path, denoiser.prediction, p_BSP, x_BSP, time_BS[..., None])
    ratio, next_ratio = (denoiser.path.ratio(t)[..., None] for t in (time_BS, next_BS))
    b = (ratio**2 - next_ratio**2) / (1.0 + ratio**2)  # a and s by sigma / alpha: no difference of near numbers
    falls = denoiser.sigma_alpha_decay(time_BS, next_BS) ** 2
    smaller = b * falls * (1.0 + ratio**2) / (1.0 + next_ratio**2)
    share = 0.5 * (1.0 + v_BSP)
    log = lambda variance: jnp.log(jnp.maximum(variance, 1e-30))
    spread = jnp.exp(0.5 * (share * log(b) + (1.0 - share) * log(smaller)))
    kept = jnp.sqrt(1.0 - eta**2 * (1.0 - falls))
    moved = denoiser.path.mix(clean_BSP, kept * e_BSP, next_BS[..., None])
    moved = moved + jnp.where((next_BS > 0)[..., None], eta * spread * noise_BSP, 0.0)
    return where_moving(time_BS, next_BS, moved, x_BSP), past


def euler_maruyama(
    denoiser: Denoiser,
    x_BSP: jax.Array,
    time_BS: jax.Array,
    next_BS: jax.Array,
    past: tuple[Past, ...] = (),
    noise_BSP: jax.Array | None = None,
    eta: jax.Array | float = 1.0,
) -> Step:
    """One step of the reverse-time SDE  dx = (v + w e / (2 s)) dt + sqrt(w) dW,   w = 2 eta s (a s' - s a').

    Every w >= 0 has the flow's marginals (Song et al. 2020, arXiv:2011.13456; SiT: Ma et al. 2024, arXiv:2401.08740,
    eq. 6). This w is the forward diffusion g^2 times a, so it is finite at pure noise too: 2t on the linear path, and
    EDM's on "ve". Euler-Maruyama has order 1 in distribution. The step onto clean data is DDIM's.
    """
    clean_BSP, e_BSP = denoiser.clean_and_noise(x_BSP, time_BS)
    a, s = denoiser.path.alpha(time_BS), denoiser.path.sigma(time_BS)
    a_slope, s_slope = denoiser.path.slopes(time_BS)
    half_w_over_s = (eta * (a * s_slope - s * a_slope))[..., None]
    step, s = (next_BS - time_BS)[..., None], s[..., None]
    v_BSP = a_slope[..., None] * clean_BSP + s_slope[..., None] * e_BSP
    moved = x_BSP + step * (v_BSP + half_w_over_s * e_BSP)
    if noise_BSP is not None:
        moved = moved + jnp.sqrt(-2.0 * step * half_w_over_s * s) * noise_BSP
    last = denoiser.path.mix(clean_BSP, e_BSP, next_BS[..., None])
    moved = jnp.where((next_BS > 0)[..., None], moved, last)
    return where_moving(time_BS, next_BS, moved, x_BSP), past


def consistency(
    denoiser: Denoiser,
    x_BSP: jax.Array,
    time_BS: jax.Array,
    next_BS: jax.Array,
    past: tuple[Past, ...] = (),
    noise_BSP: jax.Array | None = None,
    eta: jax.Array | float = 1.0,
) -> Step:
    """x' = a' x + s' (sqrt(1 - eta^2) e + eta z): the clean estimate with fresh noise z. One model call.

    With eta = 1 this is multistep consistency sampling (Song et al. 2023, arXiv:2303.01469, algorithm 1), for models
    whose clean estimate is right at once; with eta = 0 it is DDIM.
    """
    clean_BSP, e_BSP = denoiser.clean_and_noise(x_BSP, time_BS)
    if noise_BSP is not None:
        e_BSP = jnp.sqrt(1.0 - eta**2) * e_BSP + eta * noise_BSP
    return where_moving(time_BS, next_BS, denoiser.path.mix(clean_BSP, e_BSP, next_BS[..., None]), x_BSP), past


def mean_flow(
    denoiser: Denoiser,
    x_BSP: jax.Array,
    time_BS: jax.Array,
    next_BS: jax.Array,
    past: tuple[Past, ...] = (),
    noise_BSP: jax.Array | None = None,
    eta: jax.Array | float = 0.0,
) -> Step:
    """x + (t' - t) u(x, t', t): exact for a model of the mean velocity u (MeanFlow: arXiv:2505.13447, eq. 12).

    Raises:
        ValueError: The model does not predict it.
    """
    if denoiser.mean_velocity is None:
        raise ValueError("sampler 'mean-flow' is for models distilled with method=meanflow: use sampler='heun'")
    return x_BSP + (next_BS - time_BS)[..., None] * denoiser.mean_velocity(x_BSP, time_BS, next_BS), past


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A step function with its settings."""

    step: StepFn
    memory: int = 0  # earlier steps that it uses
    calls: int = 1  # model calls of a step
    eta: float | None = None  # default share of the noise that is renewed; None: the sampler is deterministic

    def begin(self, x_BSP: jax.Array, time_BS: jax.Array) -> tuple[Past, ...]:
        """The `past` of the first step."""
        return begin(self.memory, x_BSP, time_BS)


SAMPLERS = {
    "euler": Sampler(euler),
    "heun": Sampler(heun, calls=2),
    "ddim": Sampler(ddim, eta=0.0),
    "ddpm": Sampler(ddpm, eta=1.0),
    "sde": Sampler(euler_maruyama, eta=1.0),
    "consistency": Sampler(consistency, eta=1.0),
    "mean-flow": Sampler(mean_flow),
    "dpm++2m": Sampler(dpmpp_2m, memory=1),
    "unipc": Sampler(unipc, memory=2),
}

SAMPLER_NAMES = (*SAMPLERS, "dopri5")


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """A sampler by name, with its steps.

    Raises:
        ValueError: A name is unknown, a number is out of range, or `eta` is given for a deterministic sampler.
    """

    name: str = "heun"
    steps: int = 20  # one model call each, two for "heun"; "dopri5" chooses its own
    time_schedule: str = "even"  # the times at which it steps, see diffusion/time.py
    eta: float | None = None  # share of the noise that a stochastic sampler renews; None: the sampler's default
    tolerance: float = 1e-3  # error of a step of "dopri5"
    shift: float | None = None  # of the times towards noise, see `TimeConfig.sampling_shift`; None: the model's own
    reuse: str = ""  # of each model call "1" if it reuses the last one's blocks, else "0" (generate/step_cache.py)

    def __post_init__(self) -> None:
        if self.name not in SAMPLER_NAMES:
            raise ValueError(f"sampler={self.name!r} must be one of {', '.join(SAMPLER_NAMES)}")
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1, and whole")
        if self.time_schedule not in TIME_SCHEDULES:
            raise ValueError(f"time_schedule={self.time_schedule!r} must be one of {', '.join(TIME_SCHEDULES)}")
        if self.time_schedule in ("leading", "linspace", "trailing") and self.steps > DDPM_STEPS:
            raise ValueError(
                f"steps={self.steps} must be at most {DDPM_STEPS} with time_schedule={self.time_schedule!r}"
            )
        if self.shift is not None and not 1 / MOST_SHIFT <= self.shift <= MOST_SHIFT:
            raise ValueError(f"shift={self.shift} must be from {1 / MOST_SHIFT:g} to {MOST_SHIFT:g} (1: no shift)")
        if not 0 < self.tolerance < float("inf"):
            raise ValueError(f"tolerance={self.tolerance} must be a number above 0")
        if self.eta is not None:
            stochastic = [name for name, sampler in SAMPLERS.items() if sampler.eta is not None]
            if self.name not in stochastic:
                raise ValueError(
                    f"eta={self.eta} is for the samplers {', '.join(stochastic)}: {self.name} is deterministic"
                )
            if not 0 <= self.eta < float("inf") or (self.eta > 1 and self.name != "sde"):
                raise ValueError(f"eta={self.eta} must be in [0, 1]; only sampler 'sde' takes values above 1")

        if self.reuse:
            if self.name == "dopri5":
                raise ValueError("reuse is for samplers of fixed steps, and dopri5 chooses its own: use unipc or heun")
            calls = self.steps * SAMPLERS[self.name].calls
            if len(self.reuse) != calls or not set(self.reuse) <= {"0", "1"} or self.reuse[0] != "0":
                raise ValueError(
                    f"reuse={self.reuse!r:.60} has {len(self.reuse)} letters: give 0 or 1 for each of the {calls} "
                    f"model calls of {self.steps} steps of {self.name}, and 0 first"
                )

    def last(self, steps: int) -> SamplerConfig:
        """A sampler with fewer steps, for a sampling that starts at less noise. `reuse` is that of the last steps."""
        reuse = self.reuse and "0" + self.reuse[-steps * SAMPLERS[self.name].calls :][1:]
        return dataclasses.replace(self, steps=steps, reuse=reuse)

    @property
    def noise(self) -> float:
        """The share of the noise that is renewed; 0 for deterministic samplers."""
        if self.name == "dopri5":
            return 0.0
        return (SAMPLERS[self.name].eta or 0.0) if self.eta is None else self.eta

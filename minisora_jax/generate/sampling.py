"""From requests to latents: requests are packed into rows, and the sampler steps through time.

The noise of a request, at the start and at every step of a stochastic sampler, comes from its own seed, so that its
video does not depend on the batch. Known tokens are at time 0 and stay, or are held (known.py). The latents of a loop
lie on a circle. At each step the circle is cut for the model at another latent frame, by shifting the time positions,
so that no frame is always the end (latent shift: Bi et al. 2025, arXiv:2502.20307).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from minisora_jax.data.rows import padded_text
from minisora_jax.diffusion.adaptive import dopri5
from minisora_jax.diffusion.guidance import GuidanceConfig
from minisora_jax.diffusion.noise_path import NoisePath
from minisora_jax.diffusion.sampler import SAMPLERS, SamplerConfig
from minisora_jax.diffusion.time import TimeConfig, latest_time, sampling_times, sampling_token_times
from minisora_jax.generate.experts import LowNoise
from minisora_jax.generate.guided import Alone, guided_denoiser
from minisora_jax.generate.known import Held
from minisora_jax.generate.noise import Noise
from minisora_jax.generate.packed import PackedRequests
from minisora_jax.generate.request import Request
from minisora_jax.generate.step_cache import CachedCalls, branches, empty_cache, reuse_by_step
from minisora_jax.models.dit import DiTConfig
from minisora_jax.parallel.mesh import TOKENS, cuts, on_device, put_batch
from minisora_jax.parallel.processes import whole
from minisora_jax.parallel.programs import make_room
from minisora_jax.types import PackedBatch

CUTS = 2  # cuts of a circle at each step; their results are averaged
GOLDEN = 0.6180339887  # turn of the cut from step to step: its multiples cover the circle evenly
STEPS_UNIT = 32  # one program serves all numbers of steps up to a multiple of it


def sample(
    packed: PackedRequests,
    captions: Sequence[Sequence[np.ndarray]],
    models: Sequence[tuple[DiTConfig, dict]],
    times: TimeConfig,
    objective,
    guidance: GuidanceConfig,
    sampler: SamplerConfig,
    low_noise: LowNoise | None = None,
    on_step: Callable[[int, Callable[[], dict[int, np.ndarray]]], None] | None = None,
    measure: Callable[[int, np.ndarray], None] | None = None,
) -> dict[int, np.ndarray]:
    """latents_thwc by number of request.

    After each step, on_step(k, look) is called; look() estimates the clean latents. Of a sampler with `reuse`
    measure(k, change_CG) is called too. Without both all steps are one program, and the host waits for its end alone.

    Raises:
        ValueError: guidance has more channels than the latents, "dopri5" is to make a loop or is used with a pair, or
            `reuse` is for a loop or a guide model.
    """
    make_room()
    channels = packed.config.latent_channels
    if (guidance.channels or 1) > channels:
        raise ValueError(f"guidance of {guidance.channels} channels: the latents have {channels}")
    if sampler.shift is not None:
        times = dataclasses.replace(times, sampling_shift=sampler.shift)
    path, latest = objective.noise_path, latest_time(objective.noise_path, objective.prediction)
    batch, noise, held = put_batch(packed.batch(captions)), packed.noise(), packed.held()
    tokens = lambda values: put_batch(values, TOKENS)
    start_BS = tokens(
        packed.per_token(lambda i: packed.requests[i].given.strength if packed.requests[i].given else 1.0)
    )
    static = (tuple(config for config, _ in models), objective, guidance.static)
    both = tuple(tokens(index) for index in packed.twins())
    alone = None
    if packed.copies > 1 and guidance.interval != (0, 1):
        short, from_BR, to_BS = packed.alone(captions, cuts()[1])
        alone = Alone(put_batch(short), tokens(from_BR), tokens(to_BS))

    def inputs_of(every_params: Sequence[dict], scale: float) -> tuple:
        on_devices = tuple(on_device(params) for params in every_params)
        return on_devices, batch, *both, _scale(packed, scale), guidance.interval, alone

    of_models = functools.partial(inputs_of, [params for _, params in models], guidance.scale)
    circle = [packed.grids[i][0] if request.loop else 0 for i, request in enumerate(packed.requests)]
    circle_BS = tokens(packed.per_token(lambda i: circle[i]).astype(np.int32)) if any(circle) else None

    if sampler.reuse and (len(models) > 1 or any(circle)):
        which = "a loop, which is cut elsewhere at each step" if any(circle) else "a guide model: it has room for one"
        raise ValueError(f"a step cache is not for {which}; leave out --step-cache")
    if sampler.name == "dopri5":
        if low_noise:
            raise ValueError(
                "dopri5 has no fixed steps at which the expert for low noise takes over: use --sampler unipc"
            )
        if any(circle):
            raise ValueError("a loop is cut elsewhere at each step, and dopri5 has no fixed steps: use --sampler heun")
        if held:
            raise ValueError("what is given is held at each step, and dopri5 has no fixed steps: use --sampler heun")
        first_BS = jnp.minimum(sampling_token_times(times, start_BS, batch), latest)
        x = _begin(path, batch, noise, first_BS, start_BS)
        x = _integrate(static, times, latest, sampler.tolerance, x, start_BS, of_models())
        if on_step:
            on_step(1, lambda: packed.latents(whole(x)))
        return packed.latents(whole(x))

    times_KBS = sampling_times(times, sampler.steps, batch, path, sampler.time_schedule, latest, start_BS)
    # Wan's authors begin at time 0.9998 with the noise itself.
    pure = jnp.full_like(times_KBS[0], latest) if sampler.time_schedule == "wan" else times_KBS[0]
    x = _begin(path, batch, noise, times_KBS[0], start_BS, pure)
    if held:
        x = held.back(path, x, batch.tokens_BSP, times_KBS[0])
    cache = functools.partial(empty_cache, packed.config, sampler.name, x) if sampler.reuse else lambda: None
    state = x, SAMPLERS[sampler.name].begin(x, times_KBS[0]), cache()
    times_KBS = jnp.pad(times_KBS, ((0, -len(times_KBS) % STEPS_UNIT), (0, 0), (0, 0)))
    handover = low_noise.first_step(objective, times_KBS, sampler.steps) if low_noise else sampler.steps
    reuse_KC = reuse_by_step(sampler, len(times_KBS), handover) if sampler.reuse else None
    fresh = noise if sampler.noise else None
    advance = lambda state, first, end, inputs: sampling_steps(
        static, sampler.name, state, first, end, times_KBS, fresh, sampler.noise, circle_BS, held, inputs, reuse_KC
    )
    inputs, at_once, k = None, on_step is None and measure is None, 0
    while k < sampler.steps:
        if low_noise and k == handover:
            jax.block_until_ready(state)
            inputs = None  # an expert that waits in the host's memory leaves the devices before the other comes
            inputs = inputs_of([low_noise.params], low_noise.scale(guidance))
            state = *state[:2], cache()
        inputs = inputs or of_models()
        before, end = state[0], (handover if k < handover else sampler.steps) if at_once else k + 1
        state = advance(state, k, end, inputs)
        if not at_once:
            jax.block_until_ready(state)
        if measure:
            measure(k, whole(state[2].change_CG))
        if on_step:
            so_far = functools.partial(_clean_estimate, path, before, state[0], times_KBS[k], times_KBS[k + 1])
            on_step(k + 1, lambda estimate=so_far: packed.latents(whole(estimate())))
        k = end
    return packed.latents(whole(state[0]))


def require_finite(latents_thwc: np.ndarray, request: Request) -> None:
    """Raise ValueError for latents that hold NaN or infinity: they would decode to a black video."""
    if bad := int(np.size(latents_thwc) - np.isfinite(latents_thwc).sum()):
        raise ValueError(
            f"sampling {request.prompt!r:.100} gave {bad} of {np.size(latents_thwc)} latents that are NaN or infinite: "
            f"use --dtype float32, a lower --guidance, or another sampler; or the weights are damaged"
        )


def _scale(packed: PackedRequests, scale: float) -> jax.Array | float:
    """The guidance scale; of each token (B, S), if it differs between requests or from `scale`."""
    if all(request.guided == 1.0 for request in packed.requests):
        return scale
    return put_batch(packed.per_token(lambda i: 1.0 + (scale - 1.0) * packed.requests[i].guided), TOKENS)


@functools.partial(jax.jit, static_argnums=0)
def _begin(path: NoisePath, batch: PackedBatch, noise: Noise, time_BS, start_BS, pure_BS=None) -> jax.Array:
    """Noise at the spread of noisy data; latents that are known or have strength below 1, with noise of their time.

    pure_BS: the time whose spread noise alone has; None: time_BS.
    """
    noise_BSP = noise.draw(0, batch.tokens_BSP.shape[-1])
    pure_BS = time_BS if pure_BS is None else pure_BS
    given_BS1 = (batch.cond_mask_BS | (start_BS < 1))[..., None]
    mixed_BSP = path.mix(batch.tokens_BSP, noise_BSP, time_BS[..., None])
    return jnp.where(given_BS1, mixed_BSP, noise_BSP * path.spread(pure_BS)[..., None])


def _turned(batch: PackedBatch, circle_BS: jax.Array, share) -> PackedBatch:
    """The batch with the time positions of loops shifted by that share of their circle; positions start at 1."""
    t_BS = batch.position_BS3[..., 0]
    by_BS = jnp.round(share * circle_BS).astype(jnp.int32)
    turned_BS = 1 + (t_BS - 1 + by_BS) % jnp.maximum(circle_BS, 1)
    t_BS = jnp.where(circle_BS > 0, turned_BS, t_BS)
    return dataclasses.replace(
        batch, position_BS3=jnp.concatenate([t_BS[..., None], batch.position_BS3[..., 1:]], axis=-1)
    )


@functools.partial(jax.jit, static_argnums=0)
def _clean_estimate(path: NoisePath, before_BSP, x_BSP, now_BS, then_BS):
    """The clean data from two states of one trajectory, if data and noise stay the same between them (as in DDIM)."""
    a, s, a2, s2 = (f(t)[..., None] for t in (now_BS, then_BS) for f in (path.alpha, path.sigma))
    det = a2 * s - a * s2
    return jnp.where(jnp.abs(det) > 1e-6, (s * x_BSP - s2 * before_BSP) / jnp.where(det == 0, 1.0, det), x_BSP)


def features(captions, requests: Sequence[Request], copies: int, padded_to: int) -> list[list[np.ndarray]]:
    """For each request the caption features of its copies: of its prompt and of its negative prompt."""
    pairs = [[r.prompt, r.negative][:copies] for r in requests]
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    encoded = {text: padded_text(x_LE, padded_to) for text, x_LE in zip(texts, captions.encode(texts), strict=True)}
    return [[encoded[text] for text in pair] for pair in pairs]


@functools.partial(jax.jit, static_argnums=(0, 1))
def sampling_steps(
    static,
    sampler: str,
    state,
    first,
    end,
    times_KBS,
    noise: Noise | None,
    eta,
    circle_BS: jax.Array | None,
    held: Held | None,
    inputs,
    reuse_KC: jax.Array | None = None,
):
    """(x_BSP, past, cache) after the steps first, ..., end - 1: one program, whatever their number.

    noise: for stochastic samplers. circle_BS: latent frames of the loop that a token lies on, 0 for none. reuse_KC: see
    `step_cache.reuse_by_step`; None: there is no cache.
    """
    params, batch, *rest = inputs

    def one_step(k, state):
        x_BSP, past, cache = state
        calls = None if reuse_KC is None else CachedCalls(reuse_KC[k], cache, branches(batch, *rest[:2]))
        fresh_BSP = None if noise is None else noise.draw(k + 1, x_BSP.shape[-1])
        seen = [batch]
        if circle_BS is not None:
            seen = [_turned(batch, circle_BS, (k * GOLDEN + n / CUTS) % 1.0) for n in range(CUTS)]
        denoisers = [guided_denoiser(static, (params, each, *rest), calls) for each in seen]
        step = lambda denoiser: SAMPLERS[sampler].step(
            denoiser, x_BSP, times_KBS[k], times_KBS[k + 1], past, fresh_BSP, eta
        )
        results = [step(denoiser) for denoiser in denoisers]
        x_BSP, past = jax.tree.map(lambda *each: sum(each) / len(each), *results) if len(results) > 1 else results[0]
        if held is not None:
            x_BSP = held.back(static[1].noise_path, x_BSP, batch.tokens_BSP, times_KBS[k + 1])
        return x_BSP, past, calls.cache if calls else None

    return jax.lax.fori_loop(first, end, one_step, state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _integrate(static, times: TimeConfig, latest, tolerance, x_BSP, start_BS, inputs):
    batch = inputs[1]
    time_at = lambda u: jnp.minimum(sampling_token_times(times, u * start_BS, batch), latest)
    return dopri5(guided_denoiser(static, inputs), x_BSP, time_at, tolerance)[0]

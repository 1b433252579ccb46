"""One training step of the codec or the diffusion transformer: a pure function of its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from minisora_jax.training.optim import OptimConfig
from minisora_jax.types import TrainState

# (params, batch, key, step) -> {"loss": (values, weights), other terms for the log}; nothing is reduced yet
LossFn = Callable[[Any, Any, jax.Array, jax.Array], dict[str, tuple[jax.Array, jax.Array]]]


def init_state(params: Any, optimizer: optax.GradientTransformation, ema: bool = True) -> TrainState:
    """The state at step 0. The averaged weights start as the parameters; without `ema` there are none."""
    # A copy: params and ema must not share buffers, which donation would free twice.
    average = jax.tree.map(lambda p: p + jnp.zeros_like(p), params) if ema else None
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, ema=average, opt_state=optimizer.init(params))


def train_step(
    state: TrainState,
    batch: Any,
    key: jax.Array,
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    config: OptimConfig,
    frozen: Any = (),
    join: Callable[[Any, Any], Any] = lambda trained, frozen: trained,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Take one step.

    The gradients of all A microbatches are summed and then divided by the weight of all A * B rows on every device. So
    accumulation does not change the weight of a token.

    Args:
        state: The state before the step.
        batch: A tree of arrays (A, B, ...).
        key: The run's root key. Step n draws from fold_in(key, n), so a resumed run repeats the uninterrupted run.
        loss_fn: The loss of each element, with its weights.
        optimizer: From `make_optimizer`.
        config: Its `ema` is used.
        frozen: Parameters that are not trained.
        join: (trained parameters, frozen ones) -> the parameters that `loss_fn` takes.

    Returns:
        (the state after the step, the mean of each loss term and "grad_norm").
    """
    key = jax.random.fold_in(key, state.step)
    microbatches = jax.tree.leaves(batch)[0].shape[0]

    def summed(params, microbatch, key):
        terms = loss_fn(join(params, frozen), microbatch, key, state.step)
        sums = {name: (jnp.sum(v * w), jnp.sum(w)) for name, (v, w) in terms.items()}
        return sums["loss"][0], sums

    gradients = jax.value_and_grad(summed, has_aux=True)

    def microstep(carry, inputs):
        i, microbatch = inputs
        (_, sums), grads = gradients(state.params, microbatch, jax.random.fold_in(key, i))
        return jax.tree.map(jnp.add, carry, (grads, sums)), None

    first = jax.tree.map(lambda x: x[0], batch)
    if microbatches == 1:
        (_, sums), grads = gradients(state.params, first, jax.random.fold_in(key, 0))
    else:  # one loop over all microbatches, starting from zeros, so the gradient is compiled once
        (_, sums), _ = jax.eval_shape(gradients, state.params, first, key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
        start = (jax.tree.map(jnp.zeros_like, state.params), zeros)
        (grads, sums), _ = jax.lax.scan(microstep, start, (jnp.arange(microbatches), batch))

    weight = jnp.maximum(sums["loss"][1], 1.0)
    grads = jax.tree.map(lambda g: g / weight, grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # The decay ramps up, so the average forgets the random start (similar to Karras et al. 2023, arXiv:2312.02696).
    decay = jnp.minimum(config.ema, (1.0 + state.step) / (10.0 + state.step))
    ema = state.ema if state.ema is None else jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, params)
    metrics = {name: total / jnp.maximum(w, 1.0) for name, (total, w) in sums.items()}
    metrics["grad_norm"] = optax.global_norm(grads)
    return TrainState(step=state.step + 1, params=params, ema=ema, opt_state=opt_state), metrics


def jit_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    config: OptimConfig,
    join: Callable[[Any, Any], Any] = lambda trained, frozen: trained,
) -> Any:
    """The jitted train step (state, batch, key, frozen=()) -> (state, metrics). It reuses the old state's memory."""

    def step(state: TrainState, batch: Any, key: jax.Array, frozen: Any = ()) -> Any:
        options: Any = dict(loss_fn=loss_fn, optimizer=optimizer, config=config, frozen=frozen, join=join)
        return train_step(state, batch, key, **options)

    return jax.jit(step, donate_argnums=0)

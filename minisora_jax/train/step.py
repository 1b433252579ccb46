"""One training step, for the codec and the diffusion transformer alike: a pure function of its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from minisora_jax.train.optim import OptimConfig
from minisora_jax.types import TrainState

# (params, batch, key) -> {"loss": (values, weights), further terms the same}, values before any reduction
LossFn = Callable[[Any, Any, jax.Array], dict[str, tuple[jax.Array, jax.Array]]]


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    # The copy keeps params and ema from sharing buffers, which donation would free twice.
    ema = jax.tree.map(lambda p: p + jnp.zeros_like(p), params)
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, ema=ema, opt_state=optimizer.init(params))


def train_step(
    state: TrainState,
    batch: Any,
    key: jax.Array,
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    config: OptimConfig,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state after one step, and the step's metrics.

    `batch` leaves are (A, B, ...): A microbatches, whose gradients are summed before they are divided by the
    weight of all A * B rows on every device, so accumulation never changes what a token counts. `key` is the
    run's root key: step n draws from fold_in(key, n), so a resumed run repeats the uninterrupted one.
    """
    key = jax.random.fold_in(key, state.step)
    microbatches = jax.tree.leaves(batch)[0].shape[0]

    def summed(params, microbatch, key):
        terms = loss_fn(params, microbatch, key)
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
    else:  # all in one loop, from zeros: the gradient is compiled once
        (_, sums), _ = jax.eval_shape(gradients, state.params, first, key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
        start = (jax.tree.map(jnp.zeros_like, state.params), zeros)
        (grads, sums), _ = jax.lax.scan(microstep, start, (jnp.arange(microbatches), batch))

    weight = jnp.maximum(sums["loss"][1], 1.0)
    grads = jax.tree.map(lambda g: g / weight, grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # Ramp the average up so that it forgets the random start (as in Karras et al. 2023, arXiv:2312.02696, in spirit).
    decay = jnp.minimum(config.ema, (1.0 + state.step) / (10.0 + state.step))
    ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, params)
    metrics = {name: total / jnp.maximum(weight, 1.0) for name, (total, weight) in sums.items()}
    metrics["grad_norm"] = optax.global_norm(grads)
    return TrainState(step=state.step + 1, params=params, ema=ema, opt_state=opt_state), metrics

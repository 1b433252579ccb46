"""The training loop, from mesh to last save: one function, read top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from minisora_jax.data.atomic import replacing
from minisora_jax.parallel.mesh import MeshConfig, laid_out, make_mesh, place, require_divisible
from minisora_jax.parallel.processes import barrier, gathered, is_main, require_started, several
from minisora_jax.train.checkpoint import Checkpoints
from minisora_jax.train.metrics import Metrics
from minisora_jax.train.optim import OptimConfig, learning_rate, make_optimizer
from minisora_jax.train.step import LossFn, init_state, train_step
from minisora_jax.types import TrainState

log = logging.getLogger("minisora")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    steps: int = 1000
    seed: int = 0
    log_every: int = 10
    save_every: int = 500
    sample_every: int = 500  # steps between sample videos; 0 for none
    keep: int = 2  # checkpoints kept
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        for name in ("steps", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


class AskedToEnd(RuntimeError):
    """The system is taking the machine back, and the run is saved."""


class NonFiniteLoss(RuntimeError):
    """The loss of a step was NaN or infinite; the last checkpoint before it is intact."""


def train(
    config: RunConfig,
    workdir: Path,
    *,
    name: str,
    rows: int,
    tokens: int = 0,
    heads: int = 0,
    init_params: Callable[[jax.Array], Any],
    loss_fn: LossFn,
    batches: Callable[[int], Iterator[tuple[Any, dict[str, float]]]],
    describe: dict,
    start_params: Callable[[Any], Any] | None = None,
    sample: Callable[[int, Any, Metrics], None] | None = None,
) -> TrainState:
    """Train for `config.steps` steps under `workdir`, from its newest checkpoint where it has one.

    `rows` is the length of B on all devices together; `tokens` a row's and `heads` the model's, where it has them.
    `init_params(key)` draws the parameters; `start_params(abstract)` instead gives those to start from, each of its
    abstract array's shape, type and layout. `batches(start)` yields, from step `start` on, a pytree of NumPy arrays
    (A, B, ...) and the batch's counts: `tokens`, `useful_tokens`, `useful_flops`, `hardware_flops` where known.
    `sample(step, ema_params, metrics)` writes sample videos, from parameters on the host; of several processes the main
    one calls it. `describe` is the whole configuration: a workdir that was begun with another one, but for
    the mesh, is refused. Of several processes all call this, with one `workdir` that all of them see.
    """
    # ---- Mesh
    require_started()
    mesh = make_mesh(config.mesh)
    require_divisible(mesh, rows=rows, tokens=tokens, heads=heads)
    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        # ---- Init or restore: checkpoint, else given weights, else random; the data state is the step
        workdir.mkdir(parents=True, exist_ok=True)
        _refuse_another_config(workdir, describe)
        key = jax.random.key(config.seed)
        optimizer = make_optimizer(config.optim, config.steps)
        # It runs once: on CPUs, LLVM's optimisation of the random draws would take minutes and save nothing.
        quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        init = jax.jit(lambda k: init_state(init_params(k), optimizer), compiler_options=quick)
        checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints", keep=config.keep))
        if checkpoints.latest() is None and start_params:
            params = start_params(laid_out(jax.eval_shape(init, key).params, mesh))
            state = jax.jit(lambda p: init_state(p, optimizer), donate_argnums=0)(params)
        elif checkpoints.latest() is None:
            state = init(jax.random.fold_in(key, 2**31 - 1))
        else:
            state = checkpoints.restore(jax.eval_shape(init, key), mesh)
            log.info("%s: resumed at step %d of %d", name, int(state.step), config.steps)
        start = int(state.step)
        count = sum(p.size for p in jax.tree.leaves(state.params))
        log.info("%s: %.2f M parameters, mesh %s", name, count / 1e6, dict(mesh.shape))

        # ---- Steps
        step_fn = jitted(loss_fn, optimizer, config.optim)
        metrics = stack.enter_context(contextlib.closing(Metrics(workdir, start=start, steps=config.steps, name=name)))
        schedule = jax.jit(learning_rate(config.optim, config.steps))
        pending, window, since = None, [], time.perf_counter()
        stream = iter(batches(start))
        for step in range(start + 1, config.steps + 1):
            batch, counts = next(stream)
            state, values = step_fn(state, place(batch, mesh), key)
            # Fetch the step before, so that the device never waits for the host.
            pending, late = (step, values), pending
            _require_finite(late)
            window.append(counts)
            metrics.advance()
            if step % config.log_every == 0 or step == config.steps:
                _require_finite(pending)
                now = time.perf_counter()
                scalars = {k: float(v) for k, v in values.items()}
                scalars |= {"learning_rate": float(schedule(step - 1))} | _rates(window, now - since)
                metrics.scalars(step, scalars)
                window, since = [], now
            if config.sample_every and sample and (step % config.sample_every == 0 or step == config.steps):
                _sample_alone(sample, step, state.ema, metrics)
                since = time.perf_counter()
            ending = checkpoints.asked_to_end(step)
            if step % config.save_every == 0 or step == config.steps or ending:
                checkpoints.save(step, state)
            if ending and step < config.steps:
                checkpoints.wait()
                raise AskedToEnd(f"ended at step {step}, which is saved: the same command goes on from there")
        return state


def jitted(loss_fn: LossFn, optimizer, config: OptimConfig):
    """The train step as it runs: (state, batch, key) -> (state, metrics), the state's memory used again."""
    step = functools.partial(train_step, loss_fn=loss_fn, optimizer=optimizer, config=config)
    return jax.jit(step, donate_argnums=0)


def _rates(window: list[dict[str, float]], seconds: float) -> dict[str, float]:
    """Per-second rates of the counts in a logging window, and the share of token slots that were padding."""
    total = {k: sum(c.get(k, 0.0) for c in window) for k in set().union(*window)}
    rates = {f"{k}_per_s": v / seconds for k, v in total.items()} | {"steps_per_s": len(window) / seconds}
    if total.get("tokens"):
        rates["padding_share"] = 1.0 - total["useful_tokens"] / total["tokens"]
    return rates


def _sample_alone(sample, step: int, params: Any, metrics: Metrics) -> None:
    """`sample` on the main process's first device; other processes only hand over their part of the parameters."""
    params = gathered(params)
    if is_main():
        with jax.set_mesh(make_mesh(MeshConfig(), jax.local_devices()[:1])):
            sample(step, params, metrics)


def _require_finite(pending) -> None:
    if pending is not None and not math.isfinite(loss := float(pending[1]["loss"])):
        raise NonFiniteLoss(
            f"loss={loss} at step {pending[0]}: lower optim.learning_rate or optim.clip; "
            f"the newest checkpoint is from before it"
        )


def _refuse_another_config(workdir: Path, describe: dict) -> None:
    path = workdir / "config.json"
    text = json.dumps(describe, indent=2, sort_keys=True) + "\n"
    if path.exists():
        before, now = (_without_mesh(json.loads(t)) for t in (path.read_text(encoding="utf-8"), text))
        if changed := _changes(before, now):
            raise ValueError(f"{workdir} was begun with another config ({'; '.join(changed)}): use a new --workdir")
    elif is_main():
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
    barrier("config.json")
    deadline = time.monotonic() + 10  # for file systems that remember for some seconds what was not there
    while several() and not path.exists():
        if time.monotonic() > deadline:
            raise ValueError(
                f"process {jax.process_index()} does not see {path}, which process 0 wrote: --workdir must lie on a "
                f"file system that all {jax.process_count()} processes share"
            )
        time.sleep(0.2)


def _without_mesh(describe: dict) -> dict:
    """A run may go on on other devices: the layout is no part of what is computed."""
    run = describe.get("run")
    return describe | {"run": {k: v for k, v in run.items() if k != "mesh"}} if isinstance(run, dict) else describe


def _changes(old: Any, new: Any, at: str = "config") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [c for k in keys for c in _changes(old.get(k), new.get(k), f"{at}.{k}")]
    return [] if old == new else [f"{at}: {old} -> {new}"]

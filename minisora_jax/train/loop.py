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

from minisora_jax.config import with_current_names
from minisora_jax.io.atomic import write_text
from minisora_jax.parallel.mesh import MeshConfig, make_mesh, require_divisible, to_global, with_shardings
from minisora_jax.parallel.processes import (
    Preempted,
    barrier,
    gathered,
    is_main,
    preemption_handler,
    require_started,
    several,
)
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
    rollbacks: int = 0  # how often a non-finite loss may go back to a checkpoint and leave its batch out; then it stops
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        for name in ("steps", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.rollbacks < 0:
            raise ValueError(f"rollbacks={self.rollbacks} must be 0 or more")


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient of a step was NaN or infinite; the last checkpoint before it is intact."""

    def __init__(self, message: str, batch: int):
        super().__init__(message)
        self.batch = batch


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
    batches: Callable[[range], Iterator[tuple[Any, dict[str, float]]]],
    run_config: dict,
    start_params: Callable[[Any], Any] | None = None,
    sample: Callable[[int, Any, Metrics], None] | None = None,
    clip_names: Callable[[int], list[str]] | None = None,
) -> TrainState:
    """Train for `config.steps` steps under `workdir`, from its newest checkpoint where it has one.

    `rows` is the length of B on all devices together; `tokens` a row's and `heads` the model's, where it has them.
    `init_params(key)` draws the parameters; `start_params(abstract)` instead gives those to start from, each of its
    abstract array's shape, type and layout. `batches(numbers)` yields, for each number of a range, a pytree of NumPy
    arrays (A, B, ...) and the batch's counts: `tokens`, `useful_tokens`, `useful_flops`, `hardware_flops` where known;
    `clip_names(n)` says what batch n was made of. `sample(step, ema_params, metrics)` writes sample videos, from
    parameters on the host; of several processes the main one calls it. `describe` is the whole configuration: a
    workdir that was begun with another one, but for the mesh, is refused. Of several processes all call this, with one
    `workdir` that all of them see.

    On SIGTERM the step under way is finished and saved, then AskedToEnd raised. A loss or gradient that is not finite
    is NonFiniteLoss, before anything is saved that it reached; with `config.rollbacks` the run goes on from its newest
    checkpoint without that batch.
    """
    # ---- Mesh
    require_started()
    mesh = make_mesh(config.mesh)
    require_divisible(mesh, rows=rows, tokens=tokens, heads=heads)
    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        # ---- State: of the newest checkpoint, else of given weights, else random
        workdir.mkdir(parents=True, exist_ok=True)
        _refuse_another_config(workdir, run_config)
        stack.enter_context(preemption_handler())
        key = jax.random.key(config.seed)
        optimizer = make_optimizer(config.optim, config.steps)
        # It runs once: on CPUs, LLVM's optimisation of the random draws would take minutes and save nothing.
        quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        init = jax.jit(lambda k: init_state(init_params(k), optimizer), compiler_options=quick)
        checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints", keep=config.keep))

        def newest() -> TrainState:
            if checkpoints.latest() is not None:
                state = checkpoints.restore(jax.eval_shape(init, key), mesh)
                log.info("%s: resumed at step %d of %d", name, int(state.step), config.steps)
                return state
            if start_params:
                params = start_params(with_shardings(jax.eval_shape(init, key).params, mesh))
                return jax.jit(lambda p: init_state(p, optimizer), donate_argnums=0)(params)
            return init(jax.random.fold_in(key, 2**31 - 1))

        step_fn = jitted(loss_fn, optimizer, config.optim)
        schedule = jax.jit(learning_rate(config.optim, config.steps))

        # ---- Steps
        def steps(state: TrainState, left_out: list[int], metrics: Metrics) -> TrainState:
            start, clock = int(state.step), metrics.clock
            number = batch_number(start, left_out)
            stream = iter(batches(range(number, config.steps + len(left_out))))
            pending, window = None, []
            for step in range(start + 1, config.steps + 1):
                with clock.part("data"):
                    batch, counts = next(stream)
                    while number in left_out:
                        (batch, counts), number = next(stream), number + 1
                # The first call compiles.
                with clock.part("compile" if step == start + 1 else "step"):
                    state, values = step_fn(state, to_global(batch, mesh), key)
                    # Fetch the step before, so that the device never waits for the host.
                    pending, late = (step, number, values), pending
                    _require_finite(late)
                number += 1
                window.append(counts)
                metrics.advance()
                ending = checkpoints.preempted(step)
                saving = step % config.save_every == 0 or step == config.steps or ending
                if step % config.log_every == 0 or saving:
                    with clock.part("step"):
                        _require_finite(pending)
                if step % config.log_every == 0 or step == config.steps:
                    scalars = {k: float(v) for k, v in values.items()}
                    scalars |= {"learning_rate": float(schedule(step - 1))}
                    metrics.window(step, scalars, window)
                    window = []
                if config.sample_every and sample and (step % config.sample_every == 0 or step == config.steps):
                    with clock.part("sample"):
                        _sample_alone(sample, step, state.ema, metrics)
                if saving:
                    with clock.part("save"):
                        checkpoints.save(step, state)
                if ending and step < config.steps:
                    checkpoints.wait()
                    raise Preempted(f"ended at step {step}, which is saved: the same command goes on from there")
            return state

        while True:
            state, left_out = newest(), _left_out(workdir)
            count = sum(p.size for p in jax.tree.leaves(state.params))
            log.info("%s: %.2f M parameters, mesh %s", name, count / 1e6, dict(mesh.shape))
            try:
                with contextlib.closing(Metrics(workdir, int(state.step), config.steps, name)) as metrics:
                    return steps(state, left_out, metrics)
            except NonFiniteLoss as error:
                del state
                _tell_of_batch(workdir, error, clip_names)
                checkpoints.wait()
                if len(left_out) >= config.rollbacks:
                    raise
                log.warning("%s; leaving its batch out (%d of %d times)", error, len(left_out) + 1, config.rollbacks)
                _leave_out(workdir, [*left_out, error.batch])


def jitted(loss_fn: LossFn, optimizer, config: OptimConfig):
    """The train step as it runs: (state, batch, key) -> (state, metrics), the state's memory used again."""
    step = functools.partial(train_step, loss_fn=loss_fn, optimizer=optimizer, config=config)
    return jax.jit(step, donate_argnums=0)


def batch_number(step: int, left_out: list[int]) -> int:
    """The batch of step `step + 1`: batches are numbered from 0, and those of the list are never trained on."""
    for number in sorted(left_out):
        step += number <= step
    return step


def _sample_alone(sample, step: int, params: Any, metrics: Metrics) -> None:
    """`sample` on the main process's first device; other processes only hand over their part of the parameters."""
    params = gathered(params)
    if is_main():
        with jax.set_mesh(make_mesh(MeshConfig(), jax.local_devices()[:1])):
            sample(step, params, metrics)


def _require_finite(pending) -> None:
    if pending is None:
        return
    step, batch, values = pending
    for name in ("loss", "grad_norm"):
        if not math.isfinite(value := float(values[name])):
            raise NonFiniteLoss(
                f"{name}={value} at step {step}: lower optim.learning_rate or optim.clip, or set run.rollbacks=3 to "
                f"leave such batches out; the newest checkpoint is from before it",
                batch,
            )


def _tell_of_batch(workdir: Path, error: NonFiniteLoss, clip_names: Callable[[int], list[str]] | None) -> None:
    """WORKDIR/nonfinite_NUMBER.json: what was said, and the names of the batch's clips."""
    if is_main():
        told = {"error": str(error), "batch": error.batch, "clips": clip_names(error.batch) if clip_names else []}
        write_text(workdir / f"nonfinite_{error.batch:07d}.json", json.dumps(told, indent=1, ensure_ascii=False) + "\n")


def _left_out(workdir: Path) -> list[int]:
    path = workdir / "left_out.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def _leave_out(workdir: Path, batches: list[int]) -> None:
    if is_main():
        write_text(workdir / "left_out.json", json.dumps(batches))
    barrier("left_out.json")


def _refuse_another_config(workdir: Path, run_config: dict) -> None:
    path = workdir / "config.json"
    text = json.dumps(run_config, indent=2, sort_keys=True) + "\n"
    if path.exists():
        before, now = (
            _without_mesh(with_current_names(json.loads(t))) for t in (path.read_text(encoding="utf-8"), text)
        )
        if changed := _changes(before, now):
            raise ValueError(f"{workdir} was begun with another config ({'; '.join(changed)}): use a new --workdir")
    elif is_main():
        write_text(path, text)
    barrier("config.json")
    deadline = time.monotonic() + 10  # for file systems that remember for some seconds what was not there
    while several() and not path.exists():
        if time.monotonic() > deadline:
            raise ValueError(
                f"process {jax.process_index()} does not see {path}, which process 0 wrote: --workdir must lie on a "
                f"file system that all {jax.process_count()} processes share"
            )
        time.sleep(0.2)


def _without_mesh(run_config: dict) -> dict:
    """A run may go on on other devices: the layout is no part of what is computed."""
    run = run_config.get("run")
    return run_config | {"run": {k: v for k, v in run.items() if k != "mesh"}} if isinstance(run, dict) else run_config


def _changes(old: Any, new: Any, at: str = "config") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [c for k in keys for c in _changes(old.get(k), new.get(k), f"{at}.{k}")]
    return [] if old == new else [f"{at}: {old} -> {new}"]

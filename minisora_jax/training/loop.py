"""The training loop, from the mesh to the last save, in one function."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import optax

from minisora_jax.io.atomic import write_text
from minisora_jax.io.json_files import read_json
from minisora_jax.io.lock import only_writer
from minisora_jax.io.retry import DataError
from minisora_jax.parallel.mesh import MeshConfig, make_mesh, require_divisible, to_global, with_shardings
from minisora_jax.parallel.processes import (
    Preempted,
    barrier,
    gathered,
    is_main,
    preemption_handler,
    require_started,
)
from minisora_jax.training.checkpoint import Checkpoints
from minisora_jax.training.frozen import NOTHING, Frozen
from minisora_jax.training.goodput import Goodput
from minisora_jax.training.metrics import Metrics
from minisora_jax.training.optim import OptimConfig, learning_rate, make_optimizer
from minisora_jax.training.profiler import Profiler, profile_window
from minisora_jax.training.rollouts import RollOut
from minisora_jax.training.same_config import require_same_config
from minisora_jax.training.step import LossFn, init_state, jit_train_step
from minisora_jax.training.wandb_sink import wandb_package
from minisora_jax.types import TrainState

log = logging.getLogger("minisora")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The settings of a run that do not depend on what is trained.

    Raises:
        ValueError: A number is too small.
    """

    steps: int = 1000  # optimiser steps of the whole run
    seed: int = 0  # of weights, batches and noise
    log_every: int = 10  # steps between lines of metrics
    save_every: int = 500  # steps between checkpoints
    sample_every: int = 500  # steps between sample videos; 0: none
    evaluate_every: int = 500  # steps between losses of `data.held_out`, if a transformer has one; 0: none
    keep: int = 2  # the number of checkpoints that are kept
    wandb: str = ""  # a project of Weights & Biases, or ENTITY/PROJECT, that gets the metrics and samples too
    profile: str = ""  # first and last step of a trace for xprof in WORKDIR/profile, such as 20:23
    goodput: str = ""  # a log of Google's Cloud Logging that gets what ML Goodput is computed from, see goodput.py
    rollbacks: int = 0  # restarts from a checkpoint, without the bad batch, after a non-finite loss
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.rollbacks < 0:
            raise ValueError(f"rollbacks={self.rollbacks} must be 0 or more")
        profile_window(self.profile)


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient of a step was NaN or infinite. The checkpoint before it is intact.

    Attributes:
        batch: The number of the step's batch.
    """

    def __init__(self, message: str, batch: int) -> None:
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
    optimizer: optax.GradientTransformation | None = None,
    batches: Callable[[range], Iterator[tuple[Any, dict[str, float]]]],
    run_config: dict,
    settings: type | None = None,
    start_params: Callable[[Any], Any] | None = None,
    frozen: Frozen = NOTHING,
    roll_out: RollOut | None = None,
    sample: Callable[[int, Any, Metrics], None] | None = None,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    clip_names: Callable[[int], list[str]] | None = None,
) -> TrainState:
    """Train for `config.steps` steps, from the newest checkpoint of `workdir` if it has one.

    With several processes, all of them call this function. After a non-finite loss the run goes on from its newest
    checkpoint without that batch, up to `config.rollbacks` times.

    Args:
        config: The settings.
        workdir: The work directory, which all processes share.
        name: Label for the log and the progress bar.
        rows: B on all devices together.
        tokens: S, if batches have it.
        heads: Attention heads, if the model has them.
        init_params: Draws random parameters from a key.
        loss_fn: The loss, see `train_step`.
        optimizer: None: that of `config.optim` for all parameters.
        batches: Yields for each number of a range a tree of NumPy arrays (A, B, ...) and its counts: tokens,
            useful_tokens, useful_flops, hardware_flops where they are known.
        run_config: The run's whole configuration. A work directory with another one is refused; FREE may differ.
        settings: Its dataclass. Its defaults stand for what the configuration of an older version lacks.
        start_params: Returns the parameters to start from, given abstract arrays with shapes, dtypes and shardings.
            None: random parameters.
        frozen: The parameters that are not trained. `loss_fn`, `sample` and `evaluate` take all of them, joined.
        roll_out: Makes of the parameters, a batch of `batches` and its number what `loss_fn` takes. None: the batch.
        sample: Writes sample videos of a step from averaged parameters on the host. Only the main process calls it.
        evaluate: Scalars of averaged parameters on the mesh. All processes call it.
        clip_names: The names of the clips of a batch, for the report about a non-finite loss.

    Returns:
        The last state.

    Raises:
        Preempted: After SIGTERM, when the step in progress is finished and saved.
        NonFiniteLoss: A loss or gradient is not finite. Nothing that it affected is saved.
        ValueError: The batch or the model does not divide over the mesh, or `workdir` has another configuration.
    """
    # ---- Mesh
    require_started()
    if config.wandb:
        wandb_package(config.wandb)  # else it would be missed after minutes of compiling
    mesh = make_mesh(config.mesh)
    require_divisible(mesh, rows=rows, tokens=tokens, heads=heads)
    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        # ---- State: from the newest checkpoint, else from given weights, else random
        stack.enter_context(only_writer(workdir, "minisora train"))
        workdir.mkdir(parents=True, exist_ok=True)
        require_same_config(workdir, run_config, settings)
        stack.enter_context(preemption_handler())
        goodput = stack.enter_context(contextlib.closing(Goodput(config.goodput, workdir)))
        key = jax.random.key(config.seed)
        optimizer = optimizer or make_optimizer(config.optim, config.steps)
        # This program runs once. On CPUs, LLVM would spend minutes on optimising its random draws.
        compiler_options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        init = jax.jit(
            lambda k: init_state(init_params(k), optimizer, config.optim.ema > 0), compiler_options=compiler_options
        )
        checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints", keep=config.keep))

        def first_state() -> TrainState:
            if checkpoints.latest() is not None:
                state = checkpoints.restore(jax.eval_shape(init, key), mesh)
                log.info("%s: resumed at step %d of %d", name, int(state.step), config.steps)
                return state
            if start_params:
                params = start_params(with_shardings(jax.eval_shape(init, key).params, mesh))
                return jax.jit(lambda p: init_state(p, optimizer, config.optim.ema > 0), donate_argnums=0)(params)
            return init(jax.random.fold_in(key, 2**31 - 1))

        step_fn, fixed = jit_train_step(loss_fn, optimizer, config.optim, frozen.join), frozen.on(mesh)
        schedule = jax.jit(learning_rate(config.optim, config.steps))
        profiler = stack.enter_context(
            contextlib.closing(Profiler(profile_window(config.profile), workdir / "profile"))
        )

        # ---- Steps
        def run_steps(state: TrainState, skipped: list[int], metrics: Metrics) -> TrainState:
            start, clock = int(state.step), metrics.clock
            number = batch_number(start, skipped)
            stream = iter(batches(range(number, config.steps + len(skipped))))
            pending, window = None, []
            goodput.prepared()
            for step in range(start + 1, config.steps + 1):
                with goodput.data(), clock.part("data"):
                    batch, counts = next(stream)
                    while number in skipped:
                        (batch, counts), number = next(stream), number + 1
                goodput.step(step)
                if roll_out:
                    with clock.part("rollout"):
                        batch = roll_out(frozen.join(state.params, fixed), batch, number)
                # The first call compiles.
                with clock.part("compile" if step == start + 1 else "step"), profiler.step(step):
                    state, values = step_fn(state, batch if roll_out else to_global(batch, mesh), key, fixed)
                    # Check the values of the step before, so that the device never waits for the host.
                    pending, previous = (step, number, values), pending
                    _require_finite(previous, config.rollbacks)
                if profiler.after(step, values):
                    log.info("trace: uvx xprof --logdir=%s", workdir / "profile")
                number += 1
                window.append(counts)
                metrics.advance()
                ending = checkpoints.preempted(step)
                saving = step % config.save_every == 0 or step == config.steps or ending
                if step % config.log_every == 0 or saving:
                    with clock.part("step"):
                        _require_finite(pending, config.rollbacks)
                if step % config.log_every == 0 or step == config.steps:
                    scalars = {k: float(v) for k, v in values.items()}
                    scalars |= {"learning_rate": float(schedule(step - 1))}
                    metrics.window(step, scalars, window)
                    window = []
                if config.sample_every and sample and (step % config.sample_every == 0 or step == config.steps):
                    with clock.part("sample"):
                        _sample_on_main(sample, step, frozen.join(state.average, fixed), metrics)
                if evaluate and config.evaluate_every and (step % config.evaluate_every == 0 or step == config.steps):
                    with clock.part("evaluate"):
                        metrics.scalars(step, evaluate(frozen.join(state.average, fixed)))
                if saving:
                    with clock.part("save"):
                        checkpoints.save(step, state)
                if ending and step < config.steps:
                    checkpoints.wait()
                    raise Preempted(f"ended at step {step}, which is saved: the same command goes on from there")
            return state

        metrics_of = functools.partial(
            Metrics, workdir, steps=config.steps, name=name, wandb=config.wandb, config=run_config
        )
        while True:
            state, skipped = first_state(), _skipped_batches(workdir)
            count = sum(p.size for p in jax.tree.leaves(state.params))
            log.info("%s: %.2f M parameters, mesh %s", name, count / 1e6, dict(mesh.shape))
            try:
                with contextlib.closing(metrics_of(int(state.step))) as metrics:
                    return run_steps(state, skipped, metrics)
            except NonFiniteLoss as error:
                del state
                _report_nonfinite(workdir, error, clip_names)
                checkpoints.wait()
                if len(skipped) >= config.rollbacks:
                    raise
                log.warning("%s; skipping its batch (rollback %d of %d)", error, len(skipped) + 1, config.rollbacks)
                _skip_batches(workdir, [*skipped, error.batch])


def batch_number(step: int, skipped: list[int]) -> int:
    """The number of the batch of step `step + 1`. Batches count from 0, and the batches in `skipped` are not used."""
    for number in sorted(skipped):
        step += number <= step
    return step


def _sample_on_main(sample: Callable[[int, Any, Metrics], None], step: int, params: Any, metrics: Metrics) -> None:
    """Call `sample` on the first device of the main process. Other processes only send their part of the parameters."""
    params = gathered(params)
    if is_main():
        with jax.set_mesh(make_mesh(MeshConfig(), jax.local_devices()[:1])):
            sample(step, params, metrics)


def _require_finite(pending: tuple[int, int, dict[str, jax.Array]] | None, rollbacks: int) -> None:
    """Raise NonFiniteLoss unless the values of (step, batch number, values) are finite."""
    if pending is None:
        return
    step, batch, values = pending
    for name in ("loss", "grad_norm"):
        if not math.isfinite(value := float(values[name])):
            more = "set run.rollbacks=3 to skip such batches" if not rollbacks else f"raise run.rollbacks={rollbacks}"
            raise NonFiniteLoss(
                f"{name}={value} at step {step}: lower optim.learning_rate or optim.clip, or {more}; the newest "
                f"checkpoint is from an earlier step",
                batch,
            )


def _report_nonfinite(workdir: Path, error: NonFiniteLoss, clip_names: Callable[[int], list[str]] | None) -> None:
    """Write WORKDIR/nonfinite_NUMBER.json: the error, and the names of the batch's clips."""
    if is_main():
        report = {"error": str(error), "batch": error.batch, "clips": clip_names(error.batch) if clip_names else []}
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        write_text(workdir / f"nonfinite_{error.batch:07d}.json", text)


def _skipped_batches(workdir: Path) -> list[int]:
    path = workdir / "left_out.json"
    batches = read_json(path, list) if path.exists() else []
    if not all(isinstance(number, int) for number in batches):
        raise DataError(f"{path} is damaged: expected the numbers of batches")
    return batches


def _skip_batches(workdir: Path, batches: list[int]) -> None:
    if is_main():
        write_text(workdir / "left_out.json", json.dumps(batches))
    barrier("left_out.json")

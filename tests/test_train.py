"""Runs that are killed go on bit for bit; runs that go wrong say so."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_tiny import make_cache, run, task

from minisora_jax.training.diffusion_task import DiffusionTask
from minisora_jax.training.loop import NonFiniteLoss, RunConfig, train
from minisora_jax.training.optim import OptimConfig
from minisora_jax.training.same_config import require_same_config

STEPS = 40


def losses(workdir) -> dict[int, str]:
    """The loss of each step, as the digits that were written."""
    rows = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, len(rows) + 1))
    return {r["step"]: repr((r["loss"], r["grad_norm"])) for r in rows}


def start(workdir, cache) -> subprocess.Popen:
    script = Path(__file__).with_name("train_tiny.py")
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache.parent / "compiled"),  # the seven starts compile once
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen([sys.executable, script, workdir, cache, str(STEPS)], env=environment)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cache") / "latents"
    make_cache(directory)
    return directory


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """The workdir of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    assert start(workdir, cache).wait(timeout=300) == 0
    return workdir


@pytest.mark.slow
def test_a_run_killed_at_five_moments_goes_on_bit_for_bit(whole, cache, tmp_path):
    killed = tmp_path / "killed"
    for kill_after in (2, 7, 12, 20, 31):  # steps logged; the kill falls somewhere behind
        process = start(killed, cache)
        log = killed / "metrics.jsonl"
        while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= kill_after):
            time.sleep(0.005)
        assert process.poll() is None, "the run ended before it could be killed"
        process.kill()
        process.wait()
    assert start(killed, cache).wait(timeout=300) == 0
    assert losses(killed) == losses(whole)
    assert len(losses(whole)) == STEPS
    weights = [(w / "export" / "model.safetensors").read_bytes() for w in (whole, killed)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_the_loss_falls(whole):
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert sum(r["loss"] for r in rows[-10:]) < 0.85 * sum(r["loss"] for r in rows[:10])
    assert all(0 <= r["padding_share"] < 0.5 and r["useful_flops_per_s"] < r["hardware_flops_per_s"] for r in rows)


@pytest.mark.slow
def test_a_workdir_of_another_config_is_refused(whole, cache):
    with pytest.raises(ValueError, match=r"begun with another config \(config.steps: 40 -> 3\)"):
        run(whole, cache, 3)


def test_a_work_directory_of_an_older_version_goes_on(tmp_path):
    """What its config lacks has the default, which is what the version before the setting did."""
    whole = dataclasses.asdict(task(steps=3))
    older = json.loads(json.dumps(whole))
    del older["mup_base_width"], older["run"]["optim"]["moments"], older["data"]["held_out"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    require_same_config(tmp_path, whole, DiffusionTask)
    whole["run"]["optim"]["moments"] = "bfloat16"
    with pytest.raises(ValueError, match="config.run.optim.moments: float32 -> bfloat16"):
        require_same_config(tmp_path, whole, DiffusionTask)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    def loss(params, x_B, key, step):
        return {"loss": ((params["w"] * x_B) ** 2, jnp.ones(x_B.shape))}

    with pytest.raises(NonFiniteLoss, match=r"at step \d+: lower optim.learning_rate"):
        train(
            RunConfig(steps=30, log_every=1, save_every=3, optim=OptimConfig(warmup=2, learning_rate=1e38, clip=1e30)),
            tmp_path,
            name="line",
            rows=8,
            init_params=lambda key: {"w": jax.random.normal(key)},
            loss_fn=loss,
            batches=lambda numbers: itertools.repeat((np.ones((1, 8), np.float32), {})),
            run_config={},
        )
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert 0 < len(rows) < 30 and all(np.isfinite(row["loss"]) for row in rows)


def test_rows_that_do_not_divide_over_the_devices_are_refused(cache, tmp_path):
    with pytest.raises(ValueError, match=r"=6 cannot be divided over mesh.data=8 x mesh.fsdp=1: .* multiple of 8"):
        run(tmp_path, cache, 2, rows=6)
    assert not (tmp_path / "metrics.jsonl").exists()

"""Runs and the world: a notice to end, a full disk, damaged and flaky storage, a batch that breaks the loss."""

import argparse
import itertools
import json
import os
import random
import resource
import shutil
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_tiny import make_cache, run, task

from minisora_jax.cli import _run
from minisora_jax.data.latents import Latents, open_latents
from minisora_jax.data.loader import packed_batches
from minisora_jax.io import checksum, retry
from minisora_jax.io.retry import Damaged, DataError, StorageError
from minisora_jax.parallel.processes import Preempted
from minisora_jax.training.checkpoint import CheckpointError
from minisora_jax.training.clip_plan import pack_plan
from minisora_jax.training.loop import NonFiniteLoss, RunConfig, batch_number, train
from minisora_jax.training.optim import OptimConfig


def loss(params, x_B, key, step):
    noise = 0.1 * jax.random.normal(key, x_B.shape)
    return {"loss": ((params["w"] @ jnp.ones(256) - x_B + noise) ** 2, jnp.ones(x_B.shape))}


def line(workdir, *, steps=12, before=lambda number: None, batch=lambda number: float(number), **settings):
    """Fit a line's height to batch numbers: a run of a second, with all of the real loop."""

    def batches(numbers):
        for number in numbers:
            before(number)
            yield np.full((1, 8), batch(number), np.float32), {"tokens": 8.0, "useful_tokens": 8.0}

    settings = {"log_every": 1, "save_every": 4, "keep": 3} | settings
    return train(
        RunConfig(steps=steps, sample_every=0, optim=OptimConfig(warmup=1, learning_rate=1e-2), **settings),
        workdir,
        name="line",
        rows=8,
        init_params=lambda key: {"w": jax.random.normal(key, (8, 256))},
        loss_fn=loss,
        batches=batches,
        run_config={"steps": steps},
        clip_names=lambda number: [f"clip of batch {number}"],
    )


def metrics(workdir) -> list[dict]:
    return [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]


def digits(workdir) -> list[str]:
    return [repr((r["step"], r["loss"], r["grad_norm"])) for r in metrics(workdir)]


def test_a_notice_to_end_saves_at_once_and_the_run_goes_on_bit_for_bit(tmp_path):
    line(tmp_path / "whole")
    notice = lambda number: os.kill(os.getpid(), signal.SIGTERM) if number == 6 else None
    with pytest.raises(Preempted, match="ended at step 7, which is saved") as ended:
        line(tmp_path / "ended", before=notice)
    assert ended.value.exit_code == 0 and (tmp_path / "ended" / "checkpoints" / "7").is_dir()
    line(tmp_path / "ended")
    assert digits(tmp_path / "ended") == digits(tmp_path / "whole")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_it_is_no_failure_to_the_caller(capsys):
    class Command:
        @staticmethod
        def run(args, flags):
            raise Preempted("ended at step 7")

    assert _run(Command, argparse.Namespace(), []) == 0 and "ended at step 7" in capsys.readouterr().err


def test_time_is_accounted_for(tmp_path):
    line(tmp_path, before=lambda number: time.sleep(0.02))
    rows = metrics(tmp_path)
    assert sum(r["time_data"] for r in rows) > 0.15 and [r["step"] for r in rows if "time_compile" in r] == [1]
    spent = sum(v for r in rows for k, v in r.items() if k.startswith("time_"))
    assert spent < sum(1 / r["steps_per_s"] for r in rows) * 1.01
    assert 0 < rows[-1]["goodput"] < 1 and rows[-1]["productive_s"] == pytest.approx(
        sum(r.get("time_step", 0) for r in rows)
    )
    shutil.rmtree(tmp_path / "checkpoints" / "12")  # four steps are lost, and done again later
    time.sleep(1)
    line(tmp_path)
    assert [r["step"] for r in metrics(tmp_path)] == list(range(1, 13))
    assert metrics(tmp_path)[-1]["goodput"] < rows[-1]["goodput"]


def broken(number):
    return float("nan") if number in (5, 9) else float(number)


def test_a_batch_that_breaks_the_loss_is_named_and_stops_the_run(tmp_path):
    with pytest.raises(NonFiniteLoss, match="loss=nan at step 6: lower .* or set run.rollbacks=3"):
        line(tmp_path, batch=broken)
    told = json.loads((tmp_path / "nonfinite_0000005.json").read_text())
    assert told["clips"] == ["clip of batch 5"] and "step 6" in told["error"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == ["4"]


def test_with_rollbacks_it_is_left_out(tmp_path):
    seen = []
    state = line(tmp_path / "a", batch=broken, rollbacks=2, before=seen.append)
    assert int(state.step) == 12 and np.isfinite(np.asarray(state.params["w"])).all()
    assert json.loads((tmp_path / "a" / "left_out.json").read_text()) == [5, 9]
    good = [n for n in range(14) if n not in (5, 9)]
    line(tmp_path / "b", batch=lambda number: float(good[number]))  # as if they had never been
    assert digits(tmp_path / "a") == digits(tmp_path / "b")
    with pytest.raises(NonFiniteLoss):
        line(tmp_path / "c", batch=broken, rollbacks=1)


def test_batches_are_numbered_around_those_left_out():
    for left_out in ([], [0], [5, 9], [3, 4, 5], [0, 1, 7]):
        rest = (n for n in itertools.count() if n not in left_out)
        assert [batch_number(step, left_out) for step in range(12)] == list(itertools.islice(rest, 12))


def test_a_full_disk_is_said_and_the_last_checkpoint_stays_good(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(number):
        if number == 6:  # as a quota does: no file may grow any more
            while not (tmp_path / "checkpoints" / "4").is_dir():
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))

    try:
        with pytest.raises((CheckpointError, OSError)) as error:
            line(tmp_path, before=full, log_every=100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(error.value, CheckpointError), error.value
    assert "the newest complete checkpoint is step 4; free disk space" in str(error.value)
    line(tmp_path, log_every=100)
    line(tmp_path / "whole", log_every=100)
    assert digits(tmp_path) == digits(tmp_path / "whole")


def test_a_checkpoint_half_written_is_ignored_and_a_damaged_one_set_aside(tmp_path, caplog):
    line(tmp_path)
    checkpoints = tmp_path / "checkpoints"
    half = checkpoints / "12.orbax-checkpoint-tmp-0"
    shutil.move(checkpoints / "12", half)
    shutil.rmtree(half / "default" / "d")
    line(tmp_path)  # from 8
    assert (checkpoints / "12").is_dir() and len(digits(tmp_path)) == 12
    for file in (checkpoints / "12" / "default" / "d").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    line(tmp_path)
    assert "is damaged: expected" in caplog.text and "12.damaged, going on from step 8" in caplog.text
    assert {"4", "8", "12", "12.damaged"} <= {p.name for p in checkpoints.iterdir()}
    line(tmp_path / "whole")
    assert digits(tmp_path) == digits(tmp_path / "whole")


def test_every_flipped_bit_of_a_checkpoint_is_noticed(tmp_path):
    line(tmp_path, steps=4)
    folder, rng = tmp_path / "checkpoints" / "4", random.Random(0)
    times = ("_CHECKPOINT_METADATA", "commit_success.txt", checksum.NAME)  # nothing of the state
    files = [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size and p.name not in times]
    assert checksum.damage(folder) == "" and len(files) > 5
    for path in files * 3:
        content = path.read_bytes()
        at, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
        path.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
        assert path.name in checksum.damage(folder)
        path.write_bytes(content)
    with_more = (folder / checksum.NAME).read_text().replace('"files": {', '"files": {"../../config.json": [1, "0"],')
    (folder / checksum.NAME).write_text(with_more)
    assert "not within its folder" in checksum.damage(folder)


def test_a_run_whose_only_checkpoint_is_damaged_does_not_begin_again_unasked(tmp_path, caplog):
    line(tmp_path, steps=4)
    manifest = tmp_path / "checkpoints" / "4" / "default" / "manifest.ocdbt"
    manifest.write_bytes(manifest.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"it is the last checkpoint. Delete .*/4 to begin again at step 0"):
        line(tmp_path, steps=4)
    assert "set aside" not in caplog.text and (tmp_path / "checkpoints" / "4").is_dir()


# ---- Damaged records, and storage that is away


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    directory = tmp_path_factory.mktemp("survival") / "latents"
    make_cache(directory)
    return directory


def damage(directory, copy, name: str) -> None:
    """A copy of a cache in which one clip's record has a wrong byte, its file's size and place as before."""
    shutil.copytree(directory, copy)
    (shard,) = copy.glob("latents-*.array_record")
    content = shard.read_bytes()
    at = content.index(f'"name": "{name}"'.encode()) + 60
    shard.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


def test_a_damaged_clip_is_left_out_counted_and_named(cache, tmp_path):
    damage(cache, tmp_path / "damaged", "17")
    with pytest.raises(DataError, match="is corrupt"):
        Latents(tmp_path / "damaged")[17]
    settings = task(14)
    damaged = Damaged(tmp_path / "run" / "damaged.jsonl")
    batches = []
    for directory, left_out in ((cache, None), (tmp_path / "damaged", damaged)):
        latents = Latents(directory)
        options = dict(
            patch=settings.dit.patch, conditioning=settings.conditioning, caption_dropout=0.1, damaged=left_out
        )
        batches.append(list(packed_batches(latents, pack_plan(settings, latents), range(14), **options)))
    whole, rest = (sum(int((batch.size_BG3[..., 0] > 0).sum()) for batch, _ in made) for made in batches)
    assert whole - rest == damaged.count >= 1
    (told,) = damaged.path.read_text().splitlines()
    assert "record 17 of" in told and "is corrupt" in told


def test_a_damaged_first_record_stops_no_training(cache, tmp_path):
    damage(cache, tmp_path / "damaged", "0")
    with pytest.raises(DataError):
        Latents(tmp_path / "damaged")[0]
    run(tmp_path / "run", tmp_path / "damaged", 2)
    assert len(metrics(tmp_path / "run")) == 2


def test_strict_stops_instead(cache, tmp_path):
    first = int(pack_plan(task(14), Latents(cache)).rows(0)[0][0])
    damage(cache, tmp_path / "damaged", str(first))
    with pytest.raises(DataError, match=f"record {first} of .* is corrupt"):
        run(tmp_path / "strict", tmp_path / "damaged", 14, strict=True)


def test_storage_that_comes_back_is_waited_for_and_one_that_does_not_is_named(cache, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(retry, "DELAYS", (0.2, 0.2, 0.2))
    shutil.copytree(cache, tmp_path / "away")
    latents = Latents(tmp_path / "away")
    (shard,) = (tmp_path / "away").glob("latents-*.array_record")
    shard.rename(tmp_path / "elsewhere")
    threading.Timer(0.3, lambda: (tmp_path / "elsewhere").rename(shard)).start()
    assert latents[3].name == "3" and "attempt 2 of 4" in caplog.text
    late = Latents(tmp_path / "away")
    shard.unlink()
    with pytest.raises(
        StorageError, match=r"record 5 of .*array_record could not be read in 4 attempts: .*No such file"
    ):
        late[5]


def test_a_mixture_is_one_sequence(cache, tmp_path):
    make_cache(tmp_path / "b")
    mixture = open_latents(f"{cache} + {tmp_path / 'b'}*0.5", codec_hash="test")
    assert mixture.counts == (100, 100) and mixture.weights == (1.0, 0.5) and len(mixture) == 200
    assert [mixture[i].name for i in (0, 99, 100, 199)] == ["0", "99", "0", "99"]
    make_cache(tmp_path / "c", codec_hash="another")
    with pytest.raises(DataError, match="made with the codec another"):
        open_latents(f"{cache}+{tmp_path / 'c'}")

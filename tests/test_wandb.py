"""The metrics of a run reach Weights & Biases, here its offline files. A run that goes on is the same run there."""

import functools
import json
import sys

import pytest
from train_tiny import make_cache, train_with

train = functools.partial(train_with, wandb="team/videos")


@pytest.mark.slow
def test_an_offline_run_has_every_loss(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    make_cache(tmp_path / "latents")
    for steps in (3, 5):
        train(tmp_path / "latents", tmp_path / "run", steps)
    identity = (tmp_path / "run" / "wandb_id").read_text()
    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{identity}.wandb"))
    assert len(files) == 2, "both processes wrote one run"
    sent = b"".join(path.read_bytes() for path in files)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(repr(row["loss"]).encode() in sent for row in rows)


def test_a_missing_package_is_named_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    make_cache(tmp_path / "latents")
    with pytest.raises(ImportError, match="pip install wandb"):
        train(tmp_path / "latents", tmp_path / "run", 1)
    assert not (tmp_path / "run" / "wandb_id").exists()

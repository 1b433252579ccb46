"""`minisora study`: what is batched how, and that a small study runs, counts and writes what people read."""

import csv

import pytest

from minisora_jax.cli import main
from minisora_jax.parallel.mesh import MeshConfig
from minisora_jax.plan.study import Case, batches, clip_lengths

ONE = MeshConfig(data=1, fsdp=1, ring=1, ulysses=1, tensor=1)


def case(**changes) -> Case:
    settings = dict(context=1024, clips=4, batching="packed", mixed=False, attention="auto", remat="none", mesh=ONE)
    return Case(**settings | changes)


def test_equal_clips():
    assert clip_lengths(case()) == [256] * 4
    assert batches(case(), 2) == [(1024, [[256] * 4] * 2)]
    assert batches(case(batching="padded"), 1) == [(256, [[256]] * 4)]


def test_a_video_among_images():
    lengths = clip_lengths(case(mixed=True))
    assert lengths == [512, *[32] * 16] and sum(lengths) == 1024
    assert batches(case(mixed=True), 1) == [(1024, [lengths])]
    assert batches(case(mixed=True, batching="padded"), 1) == [(512, [[n] for n in lengths])]
    assert batches(case(mixed=True, batching="bucketed"), 1) == [(32, [[32]] * 16), (512, [[512]])]


@pytest.mark.slow
def test_a_study_is_measured_and_written(tmp_path, capsys):
    command = ["study", f"--out={tmp_path}", "--contexts", "64,128", "--clips", "2", "--repeats", "1", "--peak", "0.01"]
    assert main([*command, "--meshes", "data=1,ring=4,ulysses=2"]) == 0
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [int(r["context"]) for r in rows] == [64, 128] and [int(r["useful_tokens"]) for r in rows] == [64, 128]
    assert all(float(r["seconds"]) > 0 and float(r["bytes"]) > 1e5 and 0 < float(r["mfu"]) < 1 for r in rows)
    text = (tmp_path / "README.md").read_text()
    assert "ring=4 ulysses=2" in text and "measured" in text
    for name in ("step_time.png", "memory.png", "mfu.png"):
        assert (tmp_path / name).stat().st_size > 5000 and name in text


@pytest.mark.parametrize("flags", [["--batching", "sorted"], ["--contexts", "many"], ["--meshes", "ring=3"]])
def test_mistakes_are_told(flags, tmp_path, capsys):
    assert main(["study", f"--out={tmp_path}", *flags]) == 2
    assert capsys.readouterr().err.startswith("minisora: ValueError: ")

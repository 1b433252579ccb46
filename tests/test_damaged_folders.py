"""Damaged data sets and runs: each verb ends in a sentence that names the file, and never in a trace."""

import contextlib
import hashlib
import json
import shutil

import numpy as np
import pytest
from train_tiny import make_cache

from minisora_jax.cli import main
from minisora_jax.curation.prepare import prepare
from minisora_jax.data.latents import Latents
from minisora_jax.io.manifest import seal
from minisora_jax.io.retry import DataError
from minisora_jax.media.video_writer import write_video


@pytest.mark.parametrize(
    "change",
    [{"bytes": None}, {"heldout": "x"}, {"remarks": [7]}, {"remarks": None}, {"shortened": []}, {"records": 10**19},
     {"skipped": {}}, {"settings": 7}],
)  # fmt: skip
def test_a_finished_data_set_with_a_damaged_report_is_named_and_no_trace(tmp_path, change):
    (tmp_path / "in").mkdir()
    write_video(tmp_path / "in/a.mp4", np.zeros((9, 32, 32, 3), np.uint8), 8)
    (tmp_path / "in/a.txt").write_text("a black clip")
    prepare(tmp_path / "in", tmp_path / "out")
    assert prepare(tmp_path / "in", tmp_path / "out").kept == 1
    path = tmp_path / "out/manifest.json"
    changed = json.loads(path.read_text()) | change
    path.write_text(json.dumps(changed | {"crc32": seal(changed)}))
    assert main(["inspect", str(tmp_path / "out"), "--out", str(tmp_path / "a.png")]) in (0, 2)
    if "skipped" not in change:  # which is read from its own file
        with pytest.raises(DataError, match="damaged"):
            prepare(tmp_path / "in", tmp_path / "out")


def test_sizes_of_another_form_are_refused(tmp_path):
    shapes = (np.zeros((3, 4)), np.zeros(3, np.int32), np.full((3, 4), -1, np.int32), np.zeros((3, 3), np.int32))
    for sizes in shapes:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(tmp_path / "out")
        make_cache(tmp_path / "out")
        path = tmp_path / "out/manifest.json"
        manifest = json.loads(path.read_text())
        np.save(tmp_path / "out/sizes.npy", sizes)
        manifest["tables"]["sizes"]["sha256"] = hashlib.sha256((tmp_path / "out/sizes.npy").read_bytes()).hexdigest()
        path.write_text(json.dumps(manifest | {"crc32": seal(manifest)}))
        with pytest.raises(DataError, match=r"sizes.npy is damaged"):
            Latents(tmp_path / "out")


@pytest.mark.parametrize("name, content", [
    ("config.json", "[]"), ("config.json", '{"run": 7}'), ("config.json", '{"run": {"steps": "x"}}'),
    ("metrics.jsonl", '{"step": 1, "loss": "x"}\n{"step": "1"}\n[]\n{"step": 2, "loss": null}\n'),
    ("left_out.json", "{}"), ("left_out.json", "\x1b["), ("damaged_0.jsonl", "\x85\n7\n"),
])  # fmt: skip
def test_a_damaged_file_of_a_run_ends_inspect_in_a_sentence(tmp_path, capsys, name, content):
    (tmp_path / "checkpoints/3").mkdir(parents=True)
    (tmp_path / "config.json").write_text('{"run": {"steps": 40}}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 1.5}\n')
    (tmp_path / name).write_text(content)
    code = main(["inspect", str(tmp_path), "--out", str(tmp_path / "a.png")])
    said = capsys.readouterr()
    assert (code == 0 and "checkpoints" in said.out) or (code == 2 and f"{name} is damaged" in said.err)
    assert "Traceback" not in said.err and "\x1b" not in said.out + said.err

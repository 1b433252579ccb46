"""`minisora inspect`: its numbers against a count by hand, and that each thing it knows is described and drawn."""

import json

import numpy as np
import pytest
from PIL import Image
from train_tiny import make_cache

from minisora_jax.bundled import MODEL
from minisora_jax.cli import main
from minisora_jax.curation.prepare import prepare
from minisora_jax.data.latents import Latents
from minisora_jax.data.packing import PackConfig, PackPlan, token_counts
from minisora_jax.inspection.packs import draw_rows, packing_report
from minisora_jax.models.dit import DiTConfig


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inspect") / "latents"
    make_cache(directory)
    return directory


def test_a_packing_is_counted(cache):
    latents, pack = Latents(cache), PackConfig(tokens=16, text_tokens=128, slots=8, rows=2)
    dit = DiTConfig(latent_channels=4, patch=(1, 2, 2), width=32, depth=1, heads=2, text_width=64, text_depth=0)
    plan = PackPlan(*token_counts(latents.sizes, dit.patch), pack, 0, per_step=4)
    report = packing_report(plan, latents.sizes, dit, range(3))
    rows = [row for step in range(3) for row in plan.rows(step)]
    tokens = [sum(int(t * h * w // 4) for t, h, w, _ in latents.sizes[row]) for row in rows]
    assert report["rows"] == 12 and report["clips_per_row"] == sum(map(len, rows)) / 12
    assert report["fill"] == sum(tokens) / (12 * 16)
    assert report["text_fill"] == sum(latents.sizes[row, 3].sum() for row in rows) / (12 * 128)
    assert 1 <= report["straggler"] < 2 and 0 < report["useful_flops"] < 1


def test_rows_are_drawn_as_wide_as_their_tokens(tmp_path):
    red = np.zeros((8, 8, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
    draw_rows(tmp_path / "rows.png", [[((1, 2, 4), "1x2x4", red), ((2, 2, 4), "", None)]], PackConfig(32, 32, 4, 1))
    picture = np.asarray(Image.open(tmp_path / "rows.png").convert("RGB")).astype(int)
    orange = (picture[..., 0] > picture[..., 2] + 100) & (picture[..., 1] > 80)
    green = picture[..., 1] > picture[..., 0] + 40
    assert 1.9 < green.any(0).sum() / orange.any(0).sum() < 2.1  # 16 tokens of video, 8 of image
    assert ((picture == [255, 0, 0]).all(-1)).sum() > 100  # the frame


def test_each_thing_is_described_and_drawn(cache, tmp_path, capsys):
    prepare("shapes", tmp_path / "clips", count=20)
    picture = tmp_path / "out.png"
    config = f"--config=configs/dit_tiny.py:data={cache},rows=2"
    settings = ["--config.dit.latent_channels=4", "--config.pack.tokens=16", "--config.pack.text_tokens=128"]
    run = tmp_path / "run"
    (run / "checkpoints" / "20").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"run": {"steps": 40}, "dit": {"width": 32}}))
    rows = [{"step": n, "loss": 1 / n, "grad_norm": 1.0, "time_step": 2.0, "time_data": 1.0} for n in range(1, 21)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 21, "lo')
    for what, words in (
        ([str(tmp_path / "clips"), "--verify"], ["20 in ", "every shard is what its sha256 says"]),
        ([str(cache)], ["100 in 1 shards", "codec_hash", "latents"]),
        ([config, *settings], ["rows of 16 tokens, 2 a step", "straggler", "% of video tokens"]),
        ([str(run)], ["20 of 40", "data 20 s, step 40 s", "dit.width"]),
    ):
        picture.unlink(missing_ok=True)
        assert main(["inspect", *what, f"--out={picture}"]) == 0
        said = capsys.readouterr().out
        assert all(word in said for word in words), said
        assert min(Image.open(picture).size) > 100
    assert main(["inspect", str(MODEL)]) == 0
    assert "4,306,752" in capsys.readouterr().out


def test_what_is_none_of_them_is_said(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 2 and "has no manifest.json" in capsys.readouterr().err
    assert main(["inspect"]) == 2 and "name one thing" in capsys.readouterr().err

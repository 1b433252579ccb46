"""`minisora study --loss`: the fit finds known laws, and a grid is trained once, predicted from and written down."""

import csv
import json

import numpy as np
import pytest
from train_tiny import make_cache

from minisora_jax.cli import main
from minisora_jax.plan.loss_fit import Law, best_rate, bootstrap, fit, interval

LAW = Law(E=0.35, A=12.0, a=0.45, B=60.0, b=0.4)
SIZE, TOKENS = np.repeat([3e4, 6e4, 1.2e5, 2.4e5], 4), np.tile([2e5, 4e5, 8e5, 1.6e6], 4)


def test_a_fit_recovers_the_law_of_exact_losses():
    found = fit(SIZE, TOKENS, LAW.loss(SIZE, TOKENS))
    for name in ("E", "A", "a", "B", "b"):
        np.testing.assert_allclose(getattr(found, name), getattr(LAW, name), rtol=1e-5, err_msg=name)


def test_noise_is_averaged_and_an_outlier_hardly_counts():
    rng = np.random.default_rng(0)
    loss = LAW.loss(SIZE, TOKENS) * np.exp(0.002 * rng.standard_normal(len(SIZE)))
    loss[5] *= 1.2
    found, flops = fit(SIZE, TOKENS, loss), 6 * 2.4e5 * 1.6e6 * 4
    laws = bootstrap(SIZE, TOKENS, loss, found, count=50)
    low, high = interval([law.best_loss(flops) for law in laws])
    assert low < LAW.best_loss(flops) < high and high - low < 0.05
    np.testing.assert_allclose(found.best_loss(flops), LAW.best_loss(flops), rtol=0.02)


def test_the_best_size_is_the_lowest_of_all():
    flops = 1e13
    sizes = np.geomspace(1e3, 1e8, 100_001)
    losses = LAW.loss(sizes, flops / (6 * sizes))
    np.testing.assert_allclose(LAW.best_size(flops), sizes[np.argmin(losses)], rtol=1e-3)
    np.testing.assert_allclose(LAW.best_loss(flops), losses.min(), rtol=1e-9)


def test_the_best_rate_lies_on_a_parabola():
    rates = np.array([1e-3, 2e-3, 4e-3, 8e-3])
    losses = 0.5 + 0.1 * np.log(rates / 3e-3) ** 2
    np.testing.assert_allclose(best_rate(rates[::-1], losses[::-1]), 3e-3, rtol=1e-6)
    assert best_rate(rates[1:], rates[1:]) == pytest.approx(2e-3)  # at the edge: no parabola


def test_too_few_runs_are_refused():
    with pytest.raises(ValueError, match="4 runs of 2 sizes and 2 numbers of tokens cannot fit the 5 numbers"):
        fit(SIZE[[0, 1, 4, 5]], TOKENS[[0, 1, 4, 5]], np.ones(4))
    with pytest.raises(ValueError, match="16 runs of 1 sizes"):
        fit(np.ones(16), np.arange(16) + 1.0, np.ones(16))


# ---- Trainings


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    directory = tmp_path_factory.mktemp("study") / "latents"
    make_cache(directory)
    return directory


def command(cache, out, *flags, held_out=True):
    small = dict(latent_channels=4, width=32, heads=2, depth=1, text_width=64, text_depth=0, qk_norm="none")
    changes = [f"--config.dit.{k}={v}" for k, v in small.items()]
    changes += [f"--config.data.held_out={cache}"] if held_out else []
    changes += [f"--config.pack.{k}={v}" for k, v in dict(tokens=16, text_tokens=128, slots=8).items()]
    changes += ["--config.run.optim.name=adamw"]
    return ["study", "--loss", f"--out={out}", f"--config=dit_tiny:data={cache},rows=8", *changes, *flags]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--widths=40", "--tokens=10k"], "--widths: 40 must be a multiple of 16, the head width of dit.width=32"),
        (["--tokens=10k", "--budgets=1e9"], "by --budgets (FLOPs) or by --tokens, one of the two"),
        ([], "by --budgets (FLOPs) or by --tokens, one of the two"),
        (["--tokens=1k"], "all 1 trainings have fewer than 50 steps"),
        (["--tokens=10k", "--rates=fast"], "--rates=fast must be numbers"),
        (["--tokens=10k", "--rates=-1"], "--rates=-1: each must be above 0"),
        (["--tokens=20k", "--check=-4"], "--check=-4 must be above 0"),
        (["--tokens=10k", "--topology=v5p:2x2x1"], "--topology belongs to a study of steps"),
    ],
)
def test_mistakes_are_told(flags, message, cache, tmp_path, capsys):
    assert main(command(cache, tmp_path, *flags)) == 2
    assert message in capsys.readouterr().err


def test_a_study_needs_clips_that_are_held_out(cache, tmp_path, capsys):
    assert main(command(cache, tmp_path, "--tokens=10k", held_out=False)) == 2
    assert "name their latent cache by --config.data.held_out=DIR" in capsys.readouterr().err
    assert main(["study", f"--out={tmp_path}", "--widths=64"]) == 2
    assert "--widths belongs to a study of losses: add --loss" in capsys.readouterr().err


@pytest.mark.slow
def test_a_grid_is_trained_once_predicted_from_and_checked(cache, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    flags = ["--widths=16,32,48", "--tokens=8k,16k", "--rates=3e-3"]
    assert main(command(cache, out, *flags, "--check=2")) == 0
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [row["part"] for row in rows] == ["grid"] * 6 + ["check"]
    assert sorted({int(row["width"]) for row in rows[:6]}) == [16, 32, 48]
    prediction = json.loads((out / "prediction.json").read_text())
    assert prediction["low"] <= prediction["loss"] <= prediction["high"]
    largest = max(float(row["flops"]) for row in rows[:6])
    assert 1.7 < float(rows[6]["flops"]) / largest < 2.3
    text = (out / "README.md").read_text()
    assert f"Trained: **{float(rows[6]['loss']):.4f}**" in text
    for name in ("isoflop.png", "extrapolation.png"):
        assert (out / name).stat().st_size > 5000 and name in text

    # Nothing is trained again, and what is new is.
    trained = []
    import minisora_jax.plan.loss_study as loss_study

    real = loss_study.train_diffusion
    monkeypatch.setattr(
        loss_study, "train_diffusion", lambda t, *a, **k: trained.append(t.run.steps) or real(t, *a, **k)
    )
    before = {path: path.read_bytes() for path in out.rglob("*.jsonl")}
    assert main(command(cache, out, *flags, "--check=2")) == 0
    assert not trained and before == {path: path.read_bytes() for path in out.rglob("*.jsonl")}
    assert (out / "README.md").read_text() == text
    assert main(command(cache, out, "--widths=16", "--tokens=8k", "--rates=3e-3,6e-3,12e-3")) == 0
    assert len(trained) == 2 and "## Learning rate" in (out / "README.md").read_text()

    # A cell of another config is no result of this one.
    assert main(command(cache, out, *flags, "--config.dit.depth=2")) == 2
    assert "was begun with another config (config.dit.depth: 1 -> 2)" in capsys.readouterr().err

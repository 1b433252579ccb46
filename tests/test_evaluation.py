"""The measurements against cases whose answer is known."""

import json

import jax
import numpy as np
import pytest

from minisora_jax.bundled import CODEC
from minisora_jax.cli import main
from minisora_jax.evaluation import frames as F
from minisora_jax.evaluation.frechet import Extractor, distance, frechet, moments, open_extractor
from minisora_jax.evaluation.report import write_report
from minisora_jax.generate.frame_ops import largest_step
from minisora_jax.models.codec import Codec
from minisora_jax.models.perceptual import LPIPS, LPIPSConfig, LPIPSNet
from minisora_jax.toy.checker import observe
from minisora_jax.toy.grammar import parse_caption
from minisora_jax.toy.shapes import Shapes
from minisora_jax.training.codec_task import reconstruct


def test_frechet_of_gaussians_is_the_formula():
    rng = np.random.default_rng(0)
    spread_a, spread_b = np.array([1.0, 4.0, 0.25]), np.array([9.0, 1.0, 0.25])
    turn, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    a, b = (np.zeros(3), turn @ np.diag(spread_a) @ turn.T), (np.array([1.0, 2, 2]), turn @ np.diag(spread_b) @ turn.T)
    # Covariances that commute: the sum of the squared differences of the standard deviations
    assert distance(a, b) == pytest.approx(9 + np.sum((np.sqrt(spread_a) - np.sqrt(spread_b)) ** 2), abs=1e-9)
    assert distance(a, a) == pytest.approx(0, abs=1e-9)
    # and that do not: against scipy's root of the product
    from scipy.linalg import sqrtm

    c = rng.standard_normal((3, 5))
    c = c @ c.T
    direct = np.trace(a[1] + c - 2 * np.real(sqrtm(a[1] @ c)))
    assert distance((np.zeros(3), a[1]), (np.zeros(3), c)) == pytest.approx(direct, abs=1e-8)


def test_a_codec_is_measured_by_what_was_imported(tmp_path, capsys):
    """`eval codec --lpips --extractor`: the numbers of the two measures by themselves, on the same reconstructions."""
    small, x = LPIPSConfig(widths=(4, 8), depths=(1, 2)), np.zeros((1, 8, 8, 3), np.float32)
    lpips = LPIPS(small, jax.device_get(LPIPSNet(small).init(jax.random.key(5), x, x)))
    lpips.export(tmp_path / "lpips", {})
    flags = [f"--lpips={tmp_path / 'lpips'}", "--extractor=random", f"--out={tmp_path / 'eval'}"]
    assert main(["eval", "codec", "--data=shapes:heldout:3", *flags]) == 0
    scores = json.loads((tmp_path / "eval/codec.json").read_text())
    clips = [Shapes("heldout", 3)[i] for i in range(3)]
    pairs = reconstruct(Codec.load(CODEC), clips)[1]
    frame = lambda a, b: LPIPSNet(small).apply(lpips.params, a[None] / 127.5 - 1, b[None] / 127.5 - 1)[0]
    each = [np.mean([frame(a, b) for a, b in zip(clip.frames_THWC[:2], made[:2])]) for clip, made in pairs]
    halves = [lpips.distance(clip.frames_THWC[:2], made[:2]) for clip, made in pairs]
    np.testing.assert_allclose(halves, each, rtol=1e-4)
    whole = np.mean([lpips.distance(clip.frames_THWC, made) for clip, made in pairs])
    assert scores["lpips"] == pytest.approx(whole, abs=6e-5) and scores["lpips_by"] == str(tmp_path / "lpips")
    true, made = ([p[i] if i else p[i].frames_THWC for p in pairs] for i in (0, 1))
    assert scores["frechet"] == pytest.approx(frechet(made, true, open_extractor("random")), rel=1e-3, abs=1e-4)
    assert scores["extractor"] == "random-0"
    assert main(["eval", "codec", "--data=shapes:heldout:3", f"--lpips={CODEC}", flags[2]]) == 2
    assert "not LPIPS: `minisora import lpips`" in capsys.readouterr().err


def test_frechet_sees_what_differs_and_names_what_saw_it(tmp_path):
    world = Shapes("train", 60, size_THW=(5, 32, 32))
    clips = [world[i].frames_THWC for i in range(60)]
    extractor = open_extractor("random")
    negative = [255 - c for c in clips[30:]]
    assert frechet(clips[:30], clips[30:], extractor) < 0.3 * frechet(clips[:30], negative, extractor)
    assert extractor.name == "random-0"
    (tmp_path / "mean.py").write_text("def colour(frames):\n    return frames.mean((0, 1, 2))\n")
    named = open_extractor(f"{tmp_path}/mean.py:colour")
    assert named.name.startswith("mean.py:colour:") and len(named.name) == len("mean.py:colour:") + 16
    mean, _ = moments(clips, named)
    np.testing.assert_allclose(mean, np.mean([c.mean((0, 1, 2)) for c in clips], axis=0))
    with pytest.raises(ValueError, match="too few"):
        moments(clips[:1], Extractor("x", lambda f: f.mean((0, 1, 2))))
    with pytest.raises(FileNotFoundError, match="nothing is downloaded"):
        open_extractor(f"i3d:{tmp_path}/none.pt")
    with pytest.raises(ValueError, match="must be random, i3d"):
        open_extractor("fvd")


def moving(xs) -> np.ndarray:
    frames = np.zeros((len(xs), 24, 64, 3), np.uint8)
    for frame, x in zip(frames, xs):
        frame[8:16, int(x) : int(x) + 8] = 200
    return frames


def test_seams_and_steps_of_known_motions():
    there_and_back = moving([0, 4, 8, 12, 16, 12, 8, 4])
    one_way = moving(range(0, 48, 4))
    assert F.seam(there_and_back) == pytest.approx(1, abs=0.01) and F.seam(one_way) > 1.9
    jump = moving([0, 2, 4, 6, 20, 22, 24, 26])
    assert largest_step(jump) == pytest.approx(4, abs=0.01) and largest_step(jump, slice(0, 3)) == pytest.approx(1)
    assert F.seam(moving([5] * 6)) == 0 and largest_step(moving([5] * 6)) == 0
    assert F.psnr(jump, jump) == 99 and F.psnr(jump, 255 - jump) < 5
    blinking = moving([5] * 6)
    blinking[::2] += 10
    assert F.flicker(moving([5] * 6)) == 0 and F.flicker(blinking) == pytest.approx(10)


def test_a_true_bounce_keeps_its_speed():
    world = Shapes("train", 4000, size_THW=(17, 48, 48))
    found = []
    for clip in map(world.__getitem__, range(400)):
        if len(clip.frames_THWC) == 17 and parse_caption(clip.caption)[0][0].motion == "bounce":
            found += [u for o in observe(clip.frames_THWC) if (u := F.bounce(o)) is not None]
    assert len(found) > 10 and np.median(found) < 0.05


def test_a_report_has_counts_in_words_and_shares_as_a_plot(tmp_path):
    scores = {"ghost_free": 0.5, "ghosts": {"missing": 3, "jump": 1}, "motion_by_kind": {"left": [0.5, 4]}, "none": {}}
    write_report(tmp_path / "report.html", "title", {}, {"loop": (scores, [])})
    page = (tmp_path / "report.html").read_text()
    assert "3 missing, 1 jump" in page and "0.5 (missed)" in page
    assert page.count("<img") == 1 and "loop: motion_by_kind" in page


@pytest.mark.slow
def test_tasks_are_measured_from_the_command_line(tmp_path, capsys):
    argv = ["eval", "tasks", "--only", "loop", "extend-forward", "--count", "2", "--steps", "2", "--out", str(tmp_path)]
    assert main(argv) == 0
    scores = json.loads((tmp_path / "tasks.json").read_text())
    assert scores["loop"]["seam_median"] >= 0 and scores["extend-forward"]["seam_psnr"] > 25
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") >= 3 and "extend-forward: motion" in page and "<script" not in page
    assert (tmp_path / "loop.png").exists()
    assert main(["eval", "tasks", "--only", "fly", "--out", str(tmp_path)]) == 2
    assert "the tasks are text-to-video" in capsys.readouterr().err
    assert main(["eval", "frechet", "--out", str(tmp_path)]) == 2
    assert "name what sees" in capsys.readouterr().err

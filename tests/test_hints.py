"""What a model cannot do is said before it samples: pictures, words and sizes that it does not know."""

import dataclasses
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from minisora_jax.cli import main
from minisora_jax.generate import VideoPipeline
from minisora_jax.jobs.hints import picture_hints, size_hint
from minisora_jax.media.video_writer import write_video
from minisora_jax.toy.shapes import Shapes

PHOTO = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


@pytest.fixture(scope="module")
def pipeline():
    return VideoPipeline.load()


def test_a_photo_is_said_to_be_strange_and_shapes_are_not(pipeline, tmp_path):
    rng = np.random.default_rng(0)
    photo = Image.open(PHOTO).convert("RGB")
    photo.save(tmp_path / "photo.png")
    photo.crop((100, 50, 400, 350)).resize((64, 64)).save(tmp_path / "face.png")
    write_video(tmp_path / "noise.mp4", rng.integers(0, 255, (5, 64, 96, 3), np.uint8), 8)
    strangers = [str(tmp_path / name) for name in ("photo.png", "face.png", "noise.mp4")]
    hints = picture_hints(pipeline, [*strangers, strangers[0]])
    assert [hint.split(" is not of the world")[0] for hint in hints] == strangers
    assert all(" dB, and those of its world with 28 dB and more" in hint for hint in hints)
    assert not picture_hints(dataclasses.replace(pipeline, vocabulary=None), strangers)  # of another model we know less

    own, shapes = [], Shapes("heldout", 100)
    for i in range(12):
        own.append(str(tmp_path / f"{i}.mp4"))
        write_video(own[-1], shapes[i].frames_THWC, 8, upscale=1 + i % 3)  # compressed, and of other sizes
    (tmp_path / "broken.png").write_bytes(b"\\x89PNG")
    assert not picture_hints(pipeline, [*own, str(tmp_path / "broken.png"), str(tmp_path / "missing.png")])


def test_a_size_beyond_training_is_said(pipeline):
    assert size_hint(pipeline, (96, 128)).startswith(
        "96x128 is beyond the 64x64 pixels of training: it is made at 48x64"
    )
    assert size_hint(pipeline, (64, 64)) == size_hint(pipeline, None) == ""


def test_generate_says_it_first(tmp_path, caplog):
    """Before sampling: these end with an error of the job."""
    assert main(["generate", "a cat", "--negative", "blurry", "--image", str(PHOTO), "--frames", "6",
                 "--out", str(tmp_path)]) == 2  # fmt: skip
    for words in ('does not know "cat"', 'does not know "blurry"', "is not of the world of the bundled model"):
        assert words in caplog.text
    assert main(["generate", "a red circle", "--size", "96x96", "--frames", "6", "--out", str(tmp_path)]) == 2
    assert "96x96 is beyond the 64x64 pixels of training" in caplog.text

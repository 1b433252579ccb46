"""A frame that no memory holds is refused before sampling; the number is the compiler's."""

import jax
import numpy as np
import pytest
from PIL import Image

from minisora_jax.bundled import CODEC
from minisora_jax.cli import main
from minisora_jax.jobs import room
from minisora_jax.models.codec import Codec

RED = "a red circle moves left on a black background"


@pytest.fixture
def small_machine(monkeypatch):
    monkeypatch.setattr(room, "SURE", 96 * 96)
    monkeypatch.setattr(room, "device_memory", lambda: 8 * 2**20)


def test_a_size_beyond_the_memory_is_refused_before_sampling(tmp_path, capsys, small_machine):
    out = tmp_path / "out"
    assert main(["generate", RED, "--size", "160x160", "--out", str(out)]) == 2
    told = capsys.readouterr().err
    assert "a frame of 160x160 takes 0.0 GiB in the codec, and this machine has 0.0: use a smaller --size" in told
    assert "sampling" not in told and not list(out.glob("*"))


def test_so_is_a_picture_at_its_own_size(tmp_path, capsys, small_machine):
    Image.fromarray(np.zeros((160, 160, 3), np.uint8)).save(tmp_path / "large.png")
    assert main(["generate", RED, "--image", str(tmp_path / "large.png"), "--out", str(tmp_path / "out")]) == 2
    assert "a frame of 160x160 takes" in capsys.readouterr().err


def test_the_number_grows_with_the_pixels_and_is_more_for_a_video():
    codec = Codec.load(CODEC)
    small, middle, large = (codec.decode_bytes((side, side), video=False) for side in (128, 256, 512))
    assert 3.5 < (large - middle) / (middle - small) < 6  # each has the parameters too
    assert codec.decode_bytes((256, 256), video=True) > middle + 4 * 256 * 256 * 3  # its frames, uint8


def test_the_machine_has_memory():
    assert 2**30 < room.device_memory() < 2**50 and jax.devices()

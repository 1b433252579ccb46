"""The contact sheet: captions in any script."""

import numpy as np
import pytest
from PIL import Image

from minisora_jax.media.contact_sheet import contact_sheet

FRAMES = np.full((9, 16, 16, 3), 90, np.uint8)


def sheet(tmp_path, *captions):
    contact_sheet(tmp_path / "sheet.png", [(FRAMES, caption) for caption in captions])
    return np.asarray(Image.open(tmp_path / "sheet.png"))


@pytest.mark.parametrize("caption", ["красный круг", "κόκκινος κύκλος", "دائرة حمراء"])
def test_scripts_of_dejavu_sans_are_printed_as_glyphs(tmp_path, caption):
    pixels = sheet(tmp_path, caption)
    assert not np.array_equal(pixels, sheet(tmp_path, "".join("?" if c != " " else c for c in caption)))
    assert not np.array_equal(pixels, sheet(tmp_path, ascii(caption)[1:-1]))


@pytest.mark.parametrize("caption", ["一个红色的圆圈" * 40, "a circle 🔴 with 👩‍🚀", "\U0010fffe", ""])
def test_a_caption_without_glyphs_does_not_fail(tmp_path, caption):
    assert (sheet(tmp_path, caption, "a red circle") < 60).any()


def test_a_character_without_a_glyph_is_printed_as_its_escape(tmp_path):
    np.testing.assert_array_equal(sheet(tmp_path, "a \U0010fffe"), sheet(tmp_path, r"a \U0010fffe"))


def test_a_word_wider_than_the_sheet_is_broken(tmp_path):
    short, long = (sheet(tmp_path, "x" * n).shape for n in (10, 400))
    assert long[1] == short[1] and long[0] > short[0]

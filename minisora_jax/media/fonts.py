"""Draw text in any script with the fonts that are installed."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont

FOLDERS = {
    "darwin": ("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"),
    "win32": (os.path.join(os.environ.get("WINDIR", "C:/Windows"), "Fonts"),),
}
LINUX_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")
MISSING = "\U0010ffff"  # no font has a glyph for this code point


class FontStack:
    """Pillow's own font, then matplotlib's DejaVu Sans, then the system's fonts: each character takes the first match.

    Fonts are opened only when a character needs them. A character without a glyph is drawn as its Python escape.
    """

    def __init__(self, size: int):
        default = ImageFont.load_default(size)
        assert isinstance(default, FreeTypeFont), "Pillow lacks FreeType: install a wheel of Pillow"
        self._fonts, self._size, self._files = [default], size, _font_files()

    def length(self, text: str) -> float:
        """The width of a text in pixels."""
        return sum(font.getlength(run) for font, run in self._runs(text))

    def draw(self, draw: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, fill: tuple[int, int, int]) -> None:
        """Draw one line of text whose top left corner is `xy`."""
        x, baseline = xy[0], xy[1] + self._fonts[0].getmetrics()[0]
        for font, run in self._runs(text):
            draw.text((x, baseline), run, fill=fill, font=font, anchor="ls")
            x += font.getlength(run)

    def _runs(self, text: str) -> Iterator[tuple[FreeTypeFont, str]]:
        """The text cut where the font changes. Spaces stay in their run, so right-to-left text is laid out whole."""
        runs: list[tuple[FreeTypeFont | None, str]] = []
        for char in text:
            font = runs[-1][0] if runs and char.isspace() else self._font_of(char)
            if runs and runs[-1][0] is font:
                runs[-1] = (font, runs[-1][1] + char)
            else:
                runs.append((font, char))
        for font, run in runs:
            yield (font, run) if font else (self._fonts[0], ascii(run)[1:-1])

    @functools.cache  # noqa: B019 -- a FontStack lives for one sheet
    def _font_of(self, char: str) -> FreeTypeFont | None:
        return next((font for font in self._open_fonts() if char.isspace() or _has_glyph(font, char)), None)

    def _open_fonts(self) -> Iterator[FreeTypeFont]:
        yield from self._fonts
        for file in self._files:
            try:
                font = ImageFont.truetype(file, self._size)
            except OSError:  # a damaged font, or bitmaps of another size, such as colour emoji
                continue
            self._fonts.append(font)
            yield font


def _has_glyph(font: FreeTypeFont, char: str) -> bool:
    """Whether a character looks different from a missing one."""

    def pixels(c: str) -> tuple[tuple[int, int], list[int]]:
        mask = font.getmask(c)
        width, height = mask.size
        return (width, height), [mask.getpixel((x, y)) for y in range(height) for x in range(width)]

    return pixels(char) != pixels(MISSING)


def _font_files() -> Iterator[Path]:
    matplotlib = importlib.util.find_spec("matplotlib")
    if matplotlib and matplotlib.origin:
        yield Path(matplotlib.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"
    for folder in FOLDERS.get(sys.platform, LINUX_FOLDERS):
        for file in sorted(Path(folder).expanduser().rglob("*")):
            if file.suffix.lower() in (".ttf", ".otf", ".ttc"):
                yield file

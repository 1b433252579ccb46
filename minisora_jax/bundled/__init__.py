"""The tiny model that comes with the package: where its two exported parts are."""

from pathlib import Path

CODEC = Path(__file__).parent / "codec"
MODEL = Path(__file__).parent / "model"

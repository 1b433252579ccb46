"""The tiny models that come with the package: where their exported parts are."""

from pathlib import Path

CODEC = Path(__file__).parent / "codec"
MODEL = Path(__file__).parent / "model"
FAST = Path(__file__).parent / "fast"  # MODEL, distilled to 4 steps without guidance


def folder(model: str | Path | None) -> str | Path:
    """The folder of a model: of the bundled one for None, of its distilled one for "fast"."""
    return MODEL if model is None else FAST if model == "fast" else model

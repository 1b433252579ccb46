"""The error of everything that reads published weights."""

from minisora_jax.io.filesystem import printable


class WeightsFileError(ValueError):
    """A checkpoint cannot be read, or its tensors are not those of its family."""


def shown(name: object) -> str:
    """A name from an untrusted file as an error may show it: one line, printable, at most 80 characters."""
    text = name if isinstance(name, str) else type(name).__name__
    text = printable(text[:81])
    return text if len(text) <= 80 else text[:79] + "…"

"""Packages of the dependency group `slow`, which most checkouts lack."""

import pytest


def needs(package: str):
    """The package, or a skip that names it and the command that installs it. In CI a skip is an error (conftest.py)."""
    return pytest.importorskip(package, reason=f"could not import {package}: uv run --group slow pytest -m slow")

"""Every test sees 8 fake CPU devices, so that each parallel path runs everywhere."""

import json
import os

import jax
import numpy as np
import pytest
from hypothesis import settings

# Tests compile much and run little: without LLVM's optimisations they take a third of the time.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# The first example of a property often compiles.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")


@pytest.fixture
def parity(record_property):
    """parity(system, kind, ours, theirs, case): the largest error relative to the largest value is below 1e-4.

    It is recorded, and docs/parity.md is made of the records (tests/parity/table.py). `kind`: "forward", "gradient".
    """

    def check(system: str, kind: str, ours, theirs, case: str = "") -> None:
        error = float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())
        record_property("parity", json.dumps([system, kind, case, error]))
        assert error < 1e-4, f"{system} {kind} {case}: {error}"

    return check

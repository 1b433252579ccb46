"""Every test sees 8 fake CPU devices, so that each parallel path runs everywhere."""

import os

import jax
from hypothesis import settings

# Tests compile much and run little: without LLVM's optimisations they take a third of the time.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# The first example of a property often compiles.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")

"""Every test sees 8 fake CPU devices, so that each parallel path runs everywhere."""

import jax
from hypothesis import settings

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# The first example of a property often compiles.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")

"""Every test sees 8 fake CPU devices, so that each parallel path runs everywhere."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

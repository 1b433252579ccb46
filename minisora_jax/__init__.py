"""minisora_jax: an open Sora in JAX. Importing this package touches no device."""

__version__ = "0.1.0"

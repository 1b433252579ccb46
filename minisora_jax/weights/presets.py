"""The published models that `minisora import` knows, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from minisora_jax.models.vae import VAEConfig
from minisora_jax.weights import wan_vae
from minisora_jax.weights.rules import Rule


@dataclasses.dataclass(frozen=True)
class CodecPreset:
    """A video codec: its shape, its name map, and the statistics that its latents are normalised by."""

    what: str
    config: VAEConfig
    rules: Callable[[VAEConfig], list[Rule]]
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]


CODECS = {
    "wan2.1-vae": CodecPreset(
        "Wan 2.1's video VAE, 127 M parameters: vae/ of Wan-AI/Wan2.1-T2V-1.3B-Diffusers and its siblings",
        wan_vae.CONFIG,
        wan_vae.rules,
        wan_vae.LATENT_MEAN,
        wan_vae.LATENT_STD,
    ),
}

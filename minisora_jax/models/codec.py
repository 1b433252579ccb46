"""A trained VAE as a codec of clips: uint8 pixels <-> latents normalised to about unit variance.

    encode: x / 127.5 - 1 -> VAE encoder -> (mean - m) / s,  std / s
    decode: z * s + m -> VAE decoder, a latent frame at a time -> uint8

m and s are per-channel statistics of the latents of the training clips, measured once after training and
stored in the codec's config (as Wan's `latents_mean` and `latents_std`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from minisora_jax.models.files import config_fields, export_model, load_model, model_hash
from minisora_jax.models.vae import VAE, VAEConfig


@dataclasses.dataclass(frozen=True)
class Codec:
    config: VAEConfig
    params: dict  # {"params": ...} of VAE
    latent_mean: np.ndarray  # (c,)
    latent_std: np.ndarray  # (c,)
    hash: str = ""  # of the exported files; names the codec in latent caches

    @classmethod
    def load(cls, directory: str | Path) -> Codec:
        """The codec exported to `directory` by `minisora train-vae`."""
        params, config = load_model(directory)
        if config.get("kind") != "vae":
            raise ValueError(f"{directory} holds a {config.get('kind')!r} model, not a codec ('vae')")
        stats = (np.asarray(config[k], np.float32) for k in ("latent_mean", "latent_std"))
        return cls(VAEConfig(**config_fields(config["vae"])), params, *stats, hash=model_hash(directory))

    def export(self, directory: str | Path, training: dict, dtype: str | None = "float32", progress: str = "") -> str:
        """Write the codec for `load`; `training` is the record of how it was made. Returns its hash."""
        config = {
            "kind": "vae",
            "vae": dataclasses.asdict(self.config),
            "latent_mean": [round(float(x), 6) for x in self.latent_mean],
            "latent_std": [round(float(x), 6) for x in self.latent_std],
            "training": training,
        }
        return export_model(directory, self.params, config, dtype=dtype, progress=progress)

    def encode(self, frames_BTHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 clips of one size -> (mean_Bthwc, std_Bthwc) of the posterior, float32, normalised.

        Chunk by chunk, as `stream` decodes: the first frame, then as many at a time as make a latent frame.
        """
        self.config.latent_size(frames_BTHWC.shape[1:4])
        edges = [0, *range(1, frames_BTHWC.shape[1] + 1, self.config.time_factor)]
        past, moments = None, []
        for start, stop in zip(edges, edges[1:]):
            *chunk, past = _encode(self.config, self.params, frames_BTHWC[:, start:stop], past)
            moments.append(jax.device_get(chunk))
        mean, std = (np.concatenate(m, axis=1) for m in zip(*moments))
        return (mean - self.latent_mean) / self.latent_std, std / self.latent_std

    def decode(self, z_Bthwc: np.ndarray) -> np.ndarray:
        """Normalised latents -> uint8 frames_BTHWC."""
        return np.concatenate(list(self.stream(z_Bthwc)), axis=1)

    def stream(self, z_Bthwc: np.ndarray) -> Iterator[np.ndarray]:
        """`decode`, a latent frame at a time (1 frame, then 4, 4, ...): memory does not grow with length."""
        z = np.asarray(z_Bthwc, np.float32) * self.latent_std + self.latent_mean
        past = None
        for i in range(z.shape[1]):
            frames, past = _decode(self.config, self.params, z[:, i : i + 1], past)
            yield np.asarray(frames)


def to_float(frames: jax.Array) -> jax.Array:
    """uint8 0..255 -> float32 -1..1."""
    return frames.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(x: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round((x + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnums=0)
def _encode(config: VAEConfig, params, frames_BTHWC, past):
    mean, logvar, past = VAE(config).apply(params, to_float(frames_BTHWC), past, method="encode")
    return mean, jnp.exp(0.5 * logvar), past


@functools.partial(jax.jit, static_argnums=0)
def _decode(config: VAEConfig, params, z_Bthwc, past):
    x, past = VAE(config).apply(params, z_Bthwc, past, method="decode")
    return to_uint8(x), past

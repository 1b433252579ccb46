"""A trained VAE as a codec of clips: uint8 pixels <-> latents normalised to about unit variance.

    encode: x / 127.5 - 1 -> VAE encoder -> (mean - m) / s,  std / s
    decode: z * s + m -> VAE decoder, a latent frame at a time -> uint8

m and s are per-channel statistics of the latents of the training clips, measured once after training and
stored in the codec's config (as Wan's `latents_mean` and `latents_std`).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from minisora_jax.io.model_dir import config_fields, export_model, load_model, model_hash
from minisora_jax.models.vae import VAE, VAEConfig
from minisora_jax.parallel.halo import fetch_pictures, place_parameters, place_pictures, shard_height


@dataclasses.dataclass(frozen=True)
class Codec:
    config: VAEConfig
    params: dict  # {"params": ...} of VAE
    latent_mean: np.ndarray  # (c,)
    latent_std: np.ndarray  # (c,)
    hash: str = ""  # of the exported files
    latents: str = ""  # what its latents mean, for caches and models: the hash of the first codec with this encoder

    @classmethod
    def load(cls, directory: str | Path) -> Codec:
        """The codec exported to `directory` by `minisora train-vae`."""
        params, config = load_model(directory)
        if config.get("kind") != "vae":
            raise ValueError(f"{directory} holds a {config.get('kind')!r} model, not a codec ('vae')")
        stats = (np.asarray(config[k], np.float32) for k in ("latent_mean", "latent_std"))
        found = model_hash(directory)
        codec = cls(VAEConfig(**config_fields(config["vae"])), params, *stats, hash=found, latents=found)
        said = config.get("latents")
        if said and said["encoder"] == codec.encoder_digest():
            return dataclasses.replace(codec, latents=said["codec"])
        return codec

    def export(self, directory: str | Path, training: dict, dtype: str | None = "float32", progress: str = "") -> str:
        """Write the codec for `load`; `training` is the record of how it was made. Returns its hash.

        With `latents`, those are written as its own: its encoder must be that of the codec of this name.
        """
        config = {
            "kind": "vae",
            **({"latents": {"codec": self.latents, "encoder": self.encoder_digest()}} if self.latents else {}),
            "vae": dataclasses.asdict(self.config),
            "latent_mean": [round(float(x), 6) for x in self.latent_mean],
            "latent_std": [round(float(x), 6) for x in self.latent_std],
            "training": training,
        }
        return export_model(directory, self.params, config, dtype=dtype, progress=progress)

    def encoder_digest(self) -> str:
        """Of all that latents depend on: the encoder's weights, as float16, and the statistics, as exported."""
        digest = hashlib.sha256(repr(dataclasses.asdict(self.config)).encode())
        for path, leaf in jax.tree.leaves_with_path(self.params["params"]["encoder"]):
            digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf, np.float16).tobytes())
        for statistics in (self.latent_mean, self.latent_std):
            digest.update(repr([round(float(x), 6) for x in statistics]).encode())
        return digest.hexdigest()[:16]

    def encode(self, frames_BTHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 clips of one size -> (mean_Bthwc, std_Bthwc) of the posterior, float32, normalised.

        Chunk by chunk, as `stream` decodes: the first frame, then as many at a time as make a latent frame.
        """
        clips, frames = frames_BTHWC.shape[:2]
        _, h, _ = self.config.latent_size(frames_BTHWC.shape[1:4])
        params = self._half("encoder")

        def chunks():
            past = None
            for piece in self._pieces(frames, past):
                moments, past = _encode(self.config, h, params, place_pictures(frames_BTHWC[:, piece], h), past)
                yield moments

        fetched = ([fetch_pictures(m, clips, h) for m in moments] for moments in _one_ahead(chunks()))
        mean, std = (np.concatenate(m, axis=1) for m in zip(*fetched))
        return (mean - self.latent_mean) / self.latent_std, std / self.latent_std

    def decode(self, z_Bthwc: np.ndarray) -> np.ndarray:
        """Normalised latents -> uint8 frames_BTHWC."""
        B, *size_thw, _ = z_Bthwc.shape
        frames_BTHWC, at = np.empty((B, *self.config.pixel_size(size_thw), 3), np.uint8), 0
        for some in self.stream(z_Bthwc):
            frames_BTHWC[:, at : at + some.shape[1]] = some
            at += some.shape[1]
        return frames_BTHWC

    def stream(self, latents: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """`decode`, a latent frame at a time (1 frame, then 4, 4, ...): memory does not grow with length.

        latents: Bthwc in one piece, or in pieces as they come. With a mesh set, clips are divided over its axes of
        rows, and the height of each over its sequence axes.
        """
        params, sizes = self._half("decoder"), []

        def chunks():
            past = None
            for piece_Bthwc in [latents] if isinstance(latents, np.ndarray) else latents:
                clips, t, h = piece_Bthwc.shape[:3]
                sizes[:] = [clips, h]
                for i in range(t):
                    x_BTHWC, past = self._next(params, piece_Bthwc[:, i : i + 1], past)
                    yield x_BTHWC

        for x_BTHWC in _one_ahead(chunks()):
            yield fetch_pictures(x_BTHWC, *sizes)

    def encoder(self) -> Callable[[np.ndarray], np.ndarray]:
        """uint8 (T, H, W, 3) -> normalised latents (t, h, w, c), piece after piece of one clip, as `decoder` goes on:
        1 + 4k frames, then 4k at a time."""
        params, past = self._half("encoder"), None

        def more(frames_THWC: np.ndarray) -> np.ndarray:
            nonlocal past
            _, h, _ = self.config.latent_size((1, *frames_THWC.shape[1:3]))
            made = []
            for piece in self._pieces(len(frames_THWC), past):
                (mean, _), past = _encode(self.config, h, params, place_pictures(frames_THWC[None, piece], h), past)
                made.append(fetch_pictures(mean, 1, h)[0])
            return (np.concatenate(made) - self.latent_mean) / self.latent_std

        return more

    def decoder(self) -> Callable[[np.ndarray], np.ndarray]:
        """Normalised latents (t, h, w, c) -> uint8 (T, H, W, 3), piece after piece of one clip: each call goes on from
        the one before, and is equal to having decoded all at once."""
        params, past = self._half("decoder"), None

        def more(z_thwc: np.ndarray) -> np.ndarray:
            nonlocal past
            made = []
            for z_hwc in z_thwc:
                x_BTHWC, past = self._next(params, z_hwc[None, None], past)
                made.append(fetch_pictures(x_BTHWC, 1, len(z_hwc))[0])
            return np.concatenate(made)

        return more

    def decode_loop(self, z_Bthwc: np.ndarray) -> np.ndarray:
        """Normalised latents of a circle in time -> uint8 frames_BTHWC, 4 t of them, whose end meets their beginning.

        The decoder sees only backwards, and has gone round as far as it remembers before what it makes is kept: so each
        frame follows from those before it on the circle, the first ones from the last.
        """
        t = z_Bthwc.shape[1]
        turns = -(-(1 + self.config.decoder_reach) // t)
        frames = [f for i, f in enumerate(self.stream(z_Bthwc for _ in range(turns + 1))) if i >= turns * t]
        return np.concatenate(frames, axis=1)

    def _pieces(self, frames: int, past) -> list[slice]:
        """Which of so many frames make a latent frame each: of a clip's beginning, or of what follows `past`."""
        factor = self.config.time_factor
        edges = [0, *range(1 if past is None else factor, frames + 1, factor)]
        return [slice(*ends) for ends in zip(edges, edges[1:])]

    def _next(self, params, z_B1hwc: np.ndarray, past):
        """(frames of the next latent frame, still on the devices; the states to go on with)."""
        z, h = np.asarray(z_B1hwc, np.float32) * self.latent_std + self.latent_mean, z_B1hwc.shape[2]
        return _decode(self.config, h, params, place_pictures(z, h), past)

    def _half(self, name: str):
        """The encoder's or the decoder's parameters, on the devices."""
        return place_parameters({"params": {name: self.params["params"][name]}})


def _one_ahead(results: Iterator) -> Iterator:
    """The same, each after the next was asked for: devices compute one while the host takes the other."""
    waiting = collections.deque()
    for result in results:
        waiting.append(result)
        if len(waiting) == 2:
            yield waiting.popleft()
    yield from waiting


def to_float(frames: jax.Array) -> jax.Array:
    """uint8 0..255 -> float32 -1..1."""
    return frames.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(x: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round((x + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _encode(config: VAEConfig, units: int, params, frames_BTHWC, past):
    """((mean_Bthwc, std_Bthwc), the states to go on with) of the next chunk of pictures, `units` latent rows high."""

    def encode(params, frames_BTHWC, past):
        mean, logvar, past = VAE(config).apply(params, to_float(frames_BTHWC), past, method="encode")
        return (mean, jnp.exp(0.5 * logvar)), past

    return shard_height(encode, units, params, frames_BTHWC, past)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _decode(config: VAEConfig, units: int, params, z_Bthwc, past):
    """(uint8 frames_BTHWC, the states to go on with) of the next latent frames."""

    def decode(params, z_Bthwc, past):
        x, past = VAE(config).apply(params, z_Bthwc, past, method="decode")
        return to_uint8(x), past

    return shard_height(decode, units, params, z_Bthwc, past)

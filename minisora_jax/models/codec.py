"""A trained VAE as a codec of clips: uint8 pixels <-> latents normalised to about unit variance.

    encode: x / 127.5 - 1 -> VAE encoder -> (mean - m) / s,  std / s
    decode: z * s + m -> VAE decoder, one latent frame at a time -> uint8

m and s are the mean and standard deviation of each latent channel over the training clips. They are measured once after
training and stored in the codec's config, like Wan's `latents_mean` and `latents_std`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minisora_jax.io.hub import local_folder
from minisora_jax.io.model_dir import (
    check_shapes,
    export_model,
    in_words,
    load_model,
    model_hash,
    require_kind,
    saved_settings,
)
from minisora_jax.models.vae import VAE, VAEConfig, abstract_params
from minisora_jax.parallel.halo import fetch_frames, put_frames, put_params, shard_height
from minisora_jax.parallel.programs import make_room, memory_of

AT_ONCE = 16  # clips of one size that go through a codec together


@dataclasses.dataclass(frozen=True, repr=False)
class Codec:
    """A VAE with its weights and latent statistics.

    Two codecs with the same encoder make the same latents. `latents` identifies the latents for caches and models.

    Example:
        >>> import numpy as np
        >>> import minisora_jax as ms
        >>> codec = ms.VideoPipeline.load().codec  # or ms.Codec.load(DIRECTORY)
        >>> mean, std = codec.encode(np.zeros((1, 9, 48, 64, 3), np.uint8))
        >>> codec.decode(mean).shape
        (1, 9, 48, 64, 3)
    """

    config: VAEConfig
    params: dict  # {"params": ...} of VAE
    latent_mean: np.ndarray  # (c,)
    latent_std: np.ndarray  # (c,)
    hash: str = ""  # of the exported files
    latents: str = ""  # hash of the first codec that had this encoder

    def __repr__(self) -> str:
        c = self.config
        factors = f"{c.time_factor}x{c.space_factor}x{c.space_factor} pixels to {c.latent_channels} numbers"
        return f"Codec({in_words(self.params, self.hash)}, {factors})"

    @classmethod
    def load(cls, directory: str | Path) -> Codec:
        """The codec that `minisora train-vae` or `minisora import` wrote to `directory`.

        Raises:
            ValueError: The directory holds another kind of model, or one of another shape.
        """
        directory = local_folder(directory)
        params, config = load_model(directory)
        require_kind(config, "vae", directory)
        vae = saved_settings(VAEConfig, config, "vae", directory)
        check_shapes(params, abstract_params(vae), directory)
        mean, std = (
            saved_statistics(config, key, vae.latent_channels, directory) for key in ("latent_mean", "latent_std")
        )
        own_hash = model_hash(directory)
        codec = cls(vae, params, mean, std, hash=own_hash, latents=own_hash)
        origin = config.get("latents")
        if isinstance(origin, dict) and origin.get("encoder") == codec.encoder_digest():
            return dataclasses.replace(codec, latents=str(origin.get("codec")))
        return codec

    def export(self, directory: str | Path, training: dict, dtype: str | None = "float32", progress: str = "") -> str:
        """Write the codec to `directory`, so that `load` reads it.

        With `self.latents` set, it is stored as the codec that these latents come from. The encoder must then be that
        codec's encoder.

        Args:
            directory: The directory to write.
            training: The record of how the codec was trained, stored in its config.
            dtype: dtype of the stored weights; None: as they are.
            progress: Label of the progress bar; "": no bar.

        Returns:
            The hash of the written files.
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
        """A digest of all that latents depend on: config, encoder weights as float16, and exported statistics."""
        digest = hashlib.sha256(repr(dataclasses.asdict(self.config)).encode())
        for path, leaf in jax.tree.leaves_with_path(self.params["params"]["encoder"]):
            digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf, np.float16).tobytes())
        for statistics in (self.latent_mean, self.latent_std):
            digest.update(repr([round(float(x), 6) for x in statistics]).encode())
        return digest.hexdigest()[:16]

    def encode(self, frames_BTHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The posterior of clips of one size.

        The encoder runs chunk by chunk: the first frame, then the frames of one latent frame at a time.

        Args:
            frames_BTHWC: uint8, T = 1 + 4 k for a codec that compresses time by 4.

        Returns:
            (mean_Bthwc, std_Bthwc), float32, normalised.

        Raises:
            ValueError: The codec's factors do not divide the size.
        """
        clips, T, H, W, _ = frames_BTHWC.shape
        _, h, _ = self.config.latent_size((T, H, W))
        params = self._params_of("encoder")

        def chunks() -> Iterator[tuple[jax.Array, jax.Array]]:
            past = None
            for chunk in self._chunks(T, past):
                moments, past = _encode(self.config, h, params, put_frames(frames_BTHWC[:, chunk], h), past)
                yield moments

        moments = ([fetch_frames(m, clips, h) for m in pair] for pair in _one_ahead(chunks()))
        mean, std = (np.concatenate(m, axis=1) for m in zip(*moments))
        return (mean - self.latent_mean) / self.latent_std, std / self.latent_std

    def decode(self, z_Bthwc: np.ndarray) -> np.ndarray:
        """The frames (B, T, H, W, 3), uint8, of normalised latents."""
        B, t, h, w, _ = z_Bthwc.shape
        frames_BTHWC, at = np.empty((B, *self.config.pixel_size((t, h, w)), 3), np.uint8), 0
        for chunk_BTHWC in self.stream(z_Bthwc):
            frames_BTHWC[:, at : at + chunk_BTHWC.shape[1]] = chunk_BTHWC
            at += chunk_BTHWC.shape[1]
        return frames_BTHWC

    def stream(self, latents: np.ndarray | Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yields the frames of each latent frame, uint8 (B, 1 or 4, H, W, 3). Memory does not grow with length.

        On a mesh, clips are divided over the axes of rows, and the height of frames over the sequence axes.

        Args:
            latents: Normalised latents (B, t, h, w, c), or their chunks along t.
        """
        params, sizes = self._params_of("decoder"), []

        def chunks() -> Iterator[jax.Array]:
            past = None
            for z_Bthwc in [latents] if isinstance(latents, np.ndarray) else latents:
                clips, t, h = z_Bthwc.shape[:3]
                sizes[:] = [clips, h]
                for i in range(t):
                    x_BTHWC, past = self._decode_next(params, z_Bthwc[:, i : i + 1], past)
                    yield x_BTHWC

        for x_BTHWC in _one_ahead(chunks()):
            yield fetch_frames(x_BTHWC, *sizes)

    def encoder(self) -> Callable[[np.ndarray], np.ndarray]:
        """A function that encodes one clip piece by piece.

        It maps uint8 (T, H, W, 3) to normalised latents (t, h, w, c). The first piece has 1 + 4k frames, later ones
        4k. Each call continues the clip, so the result equals encoding the whole clip at once.
        """
        params, past = self._params_of("encoder"), None

        def encode_next(frames_THWC: np.ndarray) -> np.ndarray:
            nonlocal past
            T, H, W, _ = frames_THWC.shape
            _, h, _ = self.config.latent_size((1, H, W))
            means = []
            for chunk in self._chunks(T, past):
                (mean, _), past = _encode(self.config, h, params, put_frames(frames_THWC[None, chunk], h), past)
                means.append(fetch_frames(mean, 1, h)[0])
            return (np.concatenate(means) - self.latent_mean) / self.latent_std

        return encode_next

    def decoder(self) -> Callable[[np.ndarray], np.ndarray]:
        """A function that decodes one clip piece by piece.

        It maps normalised latents (t, h, w, c) to uint8 (T, H, W, 3). Each call continues the clip, so the result
        equals decoding the whole clip at once.
        """
        params, past = self._params_of("decoder"), None

        def decode_next(z_thwc: np.ndarray) -> np.ndarray:
            nonlocal past
            frames = []
            for z_hwc in z_thwc:
                x_BTHWC, past = self._decode_next(params, z_hwc[None, None], past)
                frames.append(fetch_frames(x_BTHWC, 1, len(z_hwc))[0])
            return np.concatenate(frames)

        return decode_next

    def decode_loop(self, z_Bthwc: np.ndarray) -> np.ndarray:
        """The frames (B, 4 t, H, W, 3), uint8, of a loop, whose end meets its beginning.

        The decoder looks only backwards. It first decodes enough turns of the loop to fill its memory, and drops their
        frames. In the turn that is kept, each frame follows from the frames before it on the loop.

        Args:
            z_Bthwc: Normalised latents of one turn.
        """
        t = z_Bthwc.shape[1]
        turns = -(-(1 + self.config.decoder_reach) // t)
        frames = [f for i, f in enumerate(self.stream(z_Bthwc for _ in range(turns + 1))) if i >= turns * t]
        return np.concatenate(frames, axis=1)

    def decode_bytes(self, size_HW: tuple[int, int], *, video: bool) -> int:
        """The bytes of a device that decoding one latent frame takes, by the compiler: nothing is computed.

        Args:
            size_HW: Height and width in pixels, multiples of `space_factor`.
            video: The frames of a latent frame within a video; False: an image.
        """
        _, h, w = self.config.latent_size((1, *size_HW))
        params = {"params": {"decoder": self.params["params"]["decoder"]}}
        z_Bthwc = jax.ShapeDtypeStruct((1, 1, h, w, self.config.latent_channels), jnp.float32)
        past = jax.eval_shape(functools.partial(_decode, self.config, h), params, z_Bthwc, None)[1] if video else None
        memory = memory_of(_decode.lower(self.config, h, params, z_Bthwc, past).compile())
        return memory.temp_size_in_bytes + memory.output_size_in_bytes + memory.argument_size_in_bytes

    def _chunks(self, frames: int, past: Any) -> list[slice]:
        """Slices of `frames` frames, one latent frame each. A clip's first chunk (past is None) has 1 frame."""
        factor = self.config.time_factor
        edges = [0, *range(1 if past is None else factor, frames + 1, factor)]
        return [slice(*ends) for ends in zip(edges, edges[1:])]

    def _decode_next(self, params: Any, z_B1hwc: np.ndarray, past: Any) -> tuple[jax.Array, Any]:
        """(frames of the next latent frame, on the devices; the decoder's new states)."""
        z, h = np.asarray(z_B1hwc, np.float32) * self.latent_std + self.latent_mean, z_B1hwc.shape[2]
        return _decode(self.config, h, params, put_frames(z, h), past)

    def _params_of(self, half: str) -> Any:
        """The parameters of the "encoder" or "decoder", on the devices. Every pass over a clip begins with them."""
        make_room()
        return put_params({"params": {half: self.params["params"][half]}})


def _one_ahead[X](results: Iterator[X]) -> Iterator[X]:
    """The same results, each after the next was requested, so that devices compute while the host fetches."""
    waiting: collections.deque[X] = collections.deque()
    for result in results:
        waiting.append(result)
        if len(waiting) == 2:
            yield waiting.popleft()
    yield from waiting


def to_float(frames: jax.Array) -> jax.Array:
    """uint8 0..255 -> float32 -1..1."""
    return frames.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(x: jax.Array) -> jax.Array:
    """float32 -1..1 -> uint8 0..255; other values are clipped."""
    return jnp.clip(jnp.round((x + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _encode(config: VAEConfig, units: int, params, frames_BTHWC, past):
    """((mean_Bthwc, std_Bthwc), new states) of the next chunk of frames, `units` latent rows high."""

    def encode(params, frames_BTHWC, past):
        encoded: Any = VAE(config).apply(params, to_float(frames_BTHWC), past, method="encode")
        mean, logvar, past = encoded
        return (mean, jnp.exp(0.5 * logvar)), past

    return shard_height(encode, units, params, frames_BTHWC, past)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _decode(config: VAEConfig, units: int, params, z_Bthwc, past):
    """(uint8 frames_BTHWC, new states) of the next latent frames, `units` latent rows high."""

    def decode(params, z_Bthwc, past):
        x, past = VAE(config).apply(params, z_Bthwc, past, method="decode")
        return to_uint8(x), past

    return shard_height(decode, units, params, z_Bthwc, past)


def by_size(
    apply: Callable,
    arrays: Sequence[np.ndarray],
    keys: Sequence,
    *,
    full: bool = False,
    at_once: Callable[[Any], int] = lambda key: AT_ONCE,
) -> list[Any]:
    """apply(arrays, key) for arrays of one key together, some at a time; results in order.

    Args:
        apply: Of a codec, such as `lambda same_size, _: codec.decode(np.stack(same_size))`.
        arrays: Clips, or latents.
        keys: Of each; their sizes.
        full: Whether as many arrays are passed always, the last one repeated: one shape, one compilation.
        at_once: How many arrays of a key go together at most.
    """
    groups: dict = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    results: list = [None] * len(arrays)
    for key, members in groups.items():
        most = at_once(key)
        for batch in (members[k : k + most] for k in range(0, len(members), most)):
            passed = batch + batch[-1:] * (most - len(batch)) if full else batch
            for i, result in zip(batch, apply([arrays[i] for i in passed], key)):
                results[i] = result
    return results


def saved_statistics(config: dict, key: str, channels: int, directory: str | Path) -> np.ndarray:
    """The mean or the spread of each channel, as an exported codec's config has it."""
    values = config.get(key)
    least = 0 if key == "latent_std" else -1e30
    numbers = isinstance(values, list) and all(isinstance(x, int | float) and least < x < 1e30 for x in values)
    if not isinstance(values, list) or not numbers or len(values) != channels:
        raise ValueError(f"{directory}/config.json: {key}={values!r:.200} must be {channels} numbers, a spread above 0")
    return np.asarray(values, np.float32)

"""The latent cache: every clip encoded once, posterior moments and caption features of its own size.

    LatentClip, LatentClip, ...  ->  latents-00000-of-00007.array_record, sizes.npy, empty_text.npy, manifest.json

Moments and float features are stored as float16, ids as they are. The manifest says which codec, preprocessing and
text encoder made them, and a reader that expects others gets an error.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from minisora_jax.data.epochs import parse_mixture
from minisora_jax.data.records import DataError, Item, Shards, pack_record, write_shards
from minisora_jax.data.sources import PREPROCESSING_VERSION
from minisora_jax.types import LatentClip


def write_latents(
    out_dir: str | os.PathLike,
    clips: Iterable[LatentClip] | Callable[[int], Iterable[LatentClip]],
    *,
    codec_hash: str,
    text: dict[str, Any],
    empty_text_LE: np.ndarray,
    source: str = "",
    preprocessing_version: int = PREPROCESSING_VERSION,
    shard_bytes: int = 256 * 2**20,
) -> dict[str, Any]:
    """Write the cache and return its manifest.

    clips: the encoded clips, or a function of n that gives them from number n on: with it an interrupted encode,
    started again, does not encode the finished shards anew (an iterable is read through to that point instead).
    codec_hash: of the codec's weights and config.   text: the text encoder's identity, such as {"encoder": "bytes"}.
    empty_text_LE: features of the empty caption, for guidance.   source: which clips these are (`Records.identity`),
    so that a folder that holds other clips' latents is refused, and not taken for finished.

    Raises ValueError for moments that float16 cannot hold, DataError where `out_dir` holds a cache of other settings.
    """

    def items_after(done: int | None) -> Iterator[Item]:
        start = done or 0
        rest = clips(start) if callable(clips) else itertools.islice(clips, start, None)
        for number, clip in enumerate(rest, start):
            yield Item(_to_record(clip), (*clip.mean_thwc.shape[:3], clip.text_LE.shape[0]), number + 1)

    return write_shards(
        out_dir,
        "latents",
        items_after,
        settings={
            "codec_hash": codec_hash,
            "preprocessing_version": preprocessing_version,
            "text": text,
            "source": source,
        },
        tables={"empty_text": _stored(empty_text_LE, "the empty caption's features")},
        shard_bytes=shard_bytes,
    )


class Latents:
    """A finished cache as a sequence of LatentClip; threads and Grain workers may share it.

    sizes: int32 (n, 4), the t, h, w and L of each clip, read from one small file.
    empty_text_LE: features of the empty caption.

    Give codec_hash and text to insist on the codec and text encoder in use. A cache made with others, of another
    preprocessing, unfinished, or damaged anywhere is a DataError naming the file, what was expected and what was found.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        codec_hash: str | None = None,
        text: dict[str, Any] | None = None,
        preprocessing_version: int | None = PREPROCESSING_VERSION,
    ):
        expect = {"codec_hash": codec_hash, "preprocessing_version": preprocessing_version, "text": text}
        self.shards = Shards(directory, "latents", expect)
        self.sizes: np.ndarray = self.shards.sizes
        self.empty_text_LE = _restored(self.shards.table("empty_text"))
        self.text: dict[str, Any] = self.shards.manifest["settings"]["text"]
        self.codec_hash: str = self.shards.manifest["settings"]["codec_hash"]
        self.counts, self.weights = (len(self.shards),), (1.0,)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, i: int) -> LatentClip:
        arrays, facts = self.shards.read(i)
        mean, std, text = (_restored(arrays[name]) for name in ("mean", "std", "text"))
        return LatentClip(mean, std, text, facts["caption"], facts["fps"], facts["name"])


class Mixture:
    """Several caches end to end, as one sequence of LatentClip; `counts` and `weights` are of each."""

    def __init__(self, caches: list[Latents], weights: list[float]):
        first = caches[0]
        for cache in caches[1:]:
            for name, ours, theirs in (
                ("text encoder", first.text, cache.text),
                ("codec", first.codec_hash, cache.codec_hash),
            ):
                if ours != theirs:
                    raise DataError(
                        f"{cache.shards.directory} was made with the {name} {theirs}, {first.shards.directory} with "
                        f"{ours}: caches that are trained on together must share it"
                    )
        self.caches, self.weights = caches, tuple(weights)
        self.counts = tuple(len(cache) for cache in caches)
        self.sizes = first.sizes if len(caches) == 1 else np.concatenate([cache.sizes for cache in caches])
        self.empty_text_LE, self.text, self.codec_hash = first.empty_text_LE, first.text, first.codec_hash
        self._ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> LatentClip:
        cache = int(np.searchsorted(self._ends, i, side="right"))
        return self.caches[cache][i - int(self._ends[cache] - self.counts[cache])]


def open_latents(text: str, **expect) -> Mixture:
    """The caches of "data/a + data/b*0.5", each checked as `Latents` does."""
    named = parse_mixture(text)
    return Mixture([Latents(name, **expect) for name, _ in named], [weight for _, weight in named])


def _to_record(clip: LatentClip) -> bytes:
    if clip.mean_thwc.ndim != 4 or clip.mean_thwc.shape != clip.std_thwc.shape or clip.text_LE.ndim != 2:
        raise ValueError(
            f"{clip.name}: mean {clip.mean_thwc.shape} and std {clip.std_thwc.shape} must share a shape (t, h, w, c), "
            f"and text {clip.text_LE.shape} be (L, E)"
        )
    arrays = {"mean": clip.mean_thwc, "std": clip.std_thwc, "text": clip.text_LE}
    arrays = {name: _stored(a, f"{clip.name}: {name}") for name, a in arrays.items()}
    return pack_record(arrays, {"caption": clip.caption, "fps": float(clip.fps), "name": clip.name})


def _stored(array: np.ndarray, what: str) -> np.ndarray:
    """Floats as float16, integers as int32; ValueError for what float16 cannot hold."""
    array = np.asarray(array)
    if np.issubdtype(array.dtype, np.integer):
        return array.astype(np.int32)
    limit = np.finfo(np.float16).max
    if not np.all(np.abs(array) <= limit):  # NaN is not
        worst = array.flat[np.argmax(~(np.abs(array) <= limit))]
        raise ValueError(f"{what} has the value {worst}, and float16 holds finite numbers up to {limit}")
    return array.astype(np.float16)


def _restored(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float16 else array

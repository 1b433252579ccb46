"""The latent cache: every clip encoded once, posterior moments and caption features of its own size.

    LatentClip, LatentClip, ...  ->  latents-00000-of-00007.array_record, sizes.npy, empty_text.npy, manifest.json

Moments and float features are stored as float16, ids as they are. The manifest says which codec, preprocessing and
text encoder made them, and a reader that expects others gets an error.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from minisora_jax.data.epochs import parse_mixture
from minisora_jax.io import record_writer
from minisora_jax.io.concat_index import ConcatIndex
from minisora_jax.io.records import Shards, pack_record
from minisora_jax.io.retry import DataError
from minisora_jax.parallel.processes import barrier, is_main, several
from minisora_jax.sources.base import PREPROCESSING_VERSION
from minisora_jax.types import LatentClip

log = logging.getLogger("minisora")


def write_latents(
    out_dir: str | os.PathLike,
    clips: Sequence[LatentClip] | Callable[[range], Iterable[LatentClip | DataError]],
    *,
    codec_hash: str,
    text: dict[str, Any],
    empty_text_LE: np.ndarray,
    source: str = "",
    count: int | None = None,
    preprocessing_version: int = PREPROCESSING_VERSION,
    shard_bytes: int = 256 * 2**20,
    clips_per_part: int = 1024,
) -> dict[str, Any]:
    """Write the cache and return its manifest. Of several processes all call it, and each writes a share of the parts.

    clips: the encoded clips; or a function that gives those of a range of numbers below `count`, in order, with an
    error in the place of one that could not be read, which is left out and named in the manifest.
    codec_hash: what the latents mean, as `Codec.latents`.   text: the text encoder's identity: {"encoder": "bytes"}.
    empty_text_LE: features of the empty caption, for guidance.   source: which clips these are (`Records.identity`),
    so that a folder that holds other clips' latents is refused, and not taken for finished.
    clips_per_part: the unit of work, and of what an interrupted encode may have to do again.

    The bytes depend on the clips and settings, not on how many processes there were or how often they were interrupted.
    Raises ValueError for moments that float16 cannot hold, DataError where `out_dir` holds a cache of other settings.
    """
    out_dir, count = Path(out_dir), len(clips) if count is None else count
    parts = -(-count // clips_per_part)
    settings = {"codec_hash": codec_hash, "preprocessing_version": preprocessing_version, "text": text}
    settings |= {"source": source, "clips_per_part": clips_per_part}
    opening = record_writer.opening_of("latents", settings, shard_bytes, "group_size:1,uncompressed")
    if manifest := record_writer.finished(out_dir, opening):
        return manifest
    if is_main():
        record_writer.begin(out_dir, opening)
    barrier("an encode begins")

    def write_part(part: int, writer: record_writer.ShardWriter) -> list[str]:
        numbers, left_out = mine[part], []
        for clip in clips(numbers) if callable(clips) else clips[numbers.start : numbers.stop]:
            if isinstance(clip, DataError):
                log.warning("left out: %s", clip)
                left_out.append(str(clip))
            else:
                writer.add(_to_record(clip), (*clip.mean_thwc.shape[:3], clip.text_LE.shape[0]))
        return left_out

    mine = my_parts(count, clips_per_part)
    record_writer.write_parts(out_dir, opening, list(mine), write_part)
    barrier("an encode's parts")
    if is_main():
        empty = {"empty_text": _stored(empty_text_LE, "the empty caption's features")}
        together = lambda metadata: {"left_out": [name for part in metadata for name in part]}
        record_writer.finish_parts(out_dir, opening, parts, tables=empty, closing=together)
    barrier("an encode's manifest")
    return json.loads((out_dir / "manifest.json").read_text(encoding="utf-8"))


def my_parts(count: int, clips_per_part: int) -> dict[int, range]:
    """{part: the numbers of its clips} of those that fall to this process, of all that there are."""
    first, step = (jax.process_index(), jax.process_count()) if several() else (0, 1)
    parts = range(first, -(-count // clips_per_part), step)
    return {part: range(part * clips_per_part, min((part + 1) * clips_per_part, count)) for part in parts}


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
        arrays, metadata = self.shards.read(i)
        mean, std, text = (_restored(arrays[name]) for name in ("mean", "std", "text"))
        return LatentClip(mean, std, text, metadata["caption"], metadata["fps"], metadata["name"])


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
        self._index = ConcatIndex(self.counts)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> LatentClip:
        cache, at = self._index.locate(i)
        return self.caches[cache][at]


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

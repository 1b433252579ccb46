"""The latent cache: the posterior moments and the caption features of every clip, encoded once at the clip's own size.

    LatentClip, LatentClip, ...  ->  latents-00000-of-00007.array_record, sizes.npy, empty_text.npy, manifest.json

Moments and float features are stored as float16, ids as int32. The manifest names the codec, the preprocessing, the
text encoder, and the given frames if the clips have some; a reader that expects others gets an error.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from minisora_jax.data.actions import frames_of_latent
from minisora_jax.data.epochs import parse_mixture
from minisora_jax.io import record_writer
from minisora_jax.io.concat_index import ConcatIndex
from minisora_jax.io.json_files import read_json
from minisora_jax.io.records import Shards, pack_record
from minisora_jax.io.retry import DataError
from minisora_jax.models.captions import CLASSES, class_names, in_words
from minisora_jax.parallel.processes import barrier, is_main, several
from minisora_jax.sources.actions import common_names, named_in, of_record
from minisora_jax.sources.base import PREPROCESSING_VERSION
from minisora_jax.types import GivenFrames, LatentClip

log = logging.getLogger("minisora")


def write_latents(
    out_dir: str | os.PathLike,
    clips: Sequence[LatentClip] | Callable[[range], Iterable[LatentClip | DataError]],
    *,
    codec_hash: str,
    text: dict[str, Any],
    empty_text_LE: np.ndarray,
    source: str = "",
    examples: Sequence[dict[str, Any]] = (),
    count: int | None = None,
    given: dict[str, Any] | None = None,
    actions: Sequence[str] = (),
    preprocessing_version: int = PREPROCESSING_VERSION,
    shard_bytes: int = 256 * 2**20,
    clips_per_part: int = 1024,
) -> dict[str, Any]:
    """Write the cache and return its manifest. With several processes all call it, and each writes some of the parts.

    The bytes depend on the clips and the settings, not on the number of processes or on interruptions.

    Args:
        clips: the encoded clips; or a function that yields the clips of a range of numbers below `count`, in order. It
            yields an error for a clip that cannot be read; the clip is skipped, and the manifest names it.
        codec_hash: the hash of the latents' meaning, `Codec.latents`.
        text: the identity of the text encoder, such as {"encoder": "bytes"}.
        empty_text_LE: features of the empty caption, for guidance.
        source: the identity of the clips (`Records.identity`). A folder with the latents of other clips is refused.
        examples: {"prompt", "size_THW", "fps"} of held-out clips, which training samples.
        count: the number of clips; None if `clips` is a sequence.
        given: the record of the clips' given frames, `FrameEncoder.record`; None if they have none.
        actions: the names of the columns of the clips' actions; () if they have none.
        shard_bytes: a file ends when it reaches this size.
        clips_per_part: the unit of work; an interrupted encode repeats at most one part.

    Raises:
        ValueError: float16 cannot hold a moment.
        DataError: `out_dir` holds a cache with other settings.
    """
    out_dir = Path(out_dir)
    if count is None:
        if callable(clips):
            raise TypeError("write_latents needs `count` when `clips` is a function")
        count = len(clips)
    parts = -(-count // clips_per_part)
    settings = {"codec_hash": codec_hash, "preprocessing_version": preprocessing_version, "text": text}
    settings |= {"source": source, "clips_per_part": clips_per_part} | ({"given": given} if given else {})
    settings |= {"actions": list(actions)} if actions else {}
    opening = record_writer.opening_of("latents", settings, shard_bytes, "group_size:1,uncompressed")
    if manifest := record_writer.finished(out_dir, opening):
        return manifest
    if is_main():
        record_writer.begin(out_dir, opening)
    barrier("an encode begins")

    def write_part(part: int, writer: record_writer.ShardWriter) -> list[str]:
        numbers, skipped = mine[part], []
        for clip in clips(numbers) if callable(clips) else clips[numbers.start : numbers.stop]:
            if isinstance(clip, DataError):
                log.warning("skipped a clip: %s", clip)
                skipped.append(str(clip))
            else:
                writer.add(_to_record(clip), (*clip.mean_thwc.shape[:3], clip.text_LE.shape[0]))
        return skipped

    mine = my_parts(count, clips_per_part)
    record_writer.write_parts(out_dir, opening, list(mine), write_part)
    barrier("an encode's parts")
    if is_main():
        empty = {"empty_text": _stored(empty_text_LE, "the empty caption's features")}
        left_out = lambda metadata: [error for part in metadata for error in part]
        closing = lambda metadata: {"left_out": left_out(metadata), "examples": list(examples)}
        record_writer.finish_parts(out_dir, opening, parts, tables=empty, closing=closing)
    barrier("an encode's manifest")
    return read_json(out_dir / "manifest.json")


def my_parts(count: int, clips_per_part: int) -> dict[int, range]:
    """{part: the numbers of its clips} for the parts that this process writes, out of `count` clips."""
    first, step = (jax.process_index(), jax.process_count()) if several() else (0, 1)
    parts = range(first, -(-count // clips_per_part), step)
    return {part: range(part * clips_per_part, min((part + 1) * clips_per_part, count)) for part in parts}


class Latents:
    """A finished cache as a sequence of LatentClip. Threads and Grain workers may share it.

    `sizes` is int32 (n, 4): t, h, w and L of each clip, from one small file. `empty_text_LE` has the features of the
    empty caption, and `actions` the names of the columns of the clips' actions.

    Args:
        directory: a path, or a URL of object storage.
        codec_hash: the codec that the cache must be made with; None for any.
        text: the text encoder that the cache must be made with; None for any.
        preprocessing_version: the preprocessing that the cache must be made with; None for any.

    Raises:
        DataError: the cache is unfinished, damaged, or made with another codec, text encoder or preprocessing.
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
        settings = self.shards.manifest["settings"]
        self.text, self.codec_hash = settings.get("text"), settings.get("codec_hash")
        if not isinstance(self.text, dict) or not isinstance(self.codec_hash, str):
            raise DataError(f"{self.shards.directory}/manifest.json is damaged: it names no codec or no text encoder")
        try:
            self.classes = len(class_names(self.text)) if self.text.get("encoder") == CLASSES else 0
        except ValueError as error:
            raise DataError(f"{self.shards.directory}/manifest.json is damaged: {error}") from error
        self.given = settings.get("given")
        if self.given is not None and not _is_given(self.given):
            raise DataError(
                f"{self.shards.directory}/manifest.json is damaged: its given frames are {self.given!r:.80}"
            )
        self.actions = named_in(settings, os.fspath(self.shards.directory))
        self.counts, self.weights, self.masks = (len(self.shards),), (1.0,), ("",)

    @property
    def examples(self) -> list[dict[str, Any]]:
        """{"prompt", "size_THW", "fps"} of some held-out clips; [] if there are none, or the manifest's are damaged."""
        entries = self.shards.manifest.get("examples")
        return [e for e in entries if _is_example(e)] if isinstance(entries, list) else []

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, i: int) -> LatentClip:
        arrays, metadata = self.shards.read(i)
        caption, fps, name = self.shards.fields(i, metadata, {"caption": str, "fps": (int, float), "name": str})
        if not arrays.keys() >= {"mean", "std", "text"}:
            raise DataError(f"record {i} of {self.shards.directory} is corrupt: it has the arrays {sorted(arrays)}")
        mean, std, text = (_restored(arrays[name]) for name in ("mean", "std", "text"))
        if mean.ndim != 4 or mean.shape != std.shape or text.ndim != 2:
            raise DataError(
                f"record {i} of {self.shards.directory} is corrupt: {mean.shape}, {std.shape}, {text.shape}"
            )
        if self.classes and not (text.shape == (1, 1) and text.dtype.kind == "i" and 0 <= text[0, 0] < self.classes):
            raise DataError(f"record {i} of {self.shards.directory} is corrupt: {text!r:.50} is no class")
        self.shards.require_size(i, (*mean.shape[:3], len(text)))
        frames, actions_TA = self._frames(i, arrays, mean.shape[:3]), self._actions(i, arrays, len(mean))
        return LatentClip(mean, std, text, caption, float(fps), name, frames, actions_TA)

    def _actions(self, i: int, arrays: dict[str, np.ndarray], t: int) -> np.ndarray | None:
        """The actions of record i, of which a latent frame after the first has as many as it has frames of pixels."""
        where = f"record {i} of {self.shards.directory}"
        actions_TA = of_record(arrays, self.actions, where)
        if actions_TA is not None:
            try:
                frames_of_latent(len(actions_TA), t)
            except ValueError as error:
                raise DataError(
                    f"{where} is corrupt: it has {t} latent frames and {len(actions_TA)} actions"
                ) from error
        return actions_TA

    def _frames(self, i: int, arrays: dict[str, np.ndarray], size_thw: tuple[int, ...]) -> GivenFrames | None:
        """The given frames of record i."""
        if self.given is None:
            return None
        channels, image = (_restored(arrays[n]) if n in arrays else None for n in ("given", "image"))
        shapes = [None if x is None else list(x.shape) for x in (channels, image)]
        if channels is None or shapes != [[*size_thw, self.given["channels"]], self.given["image"]]:
            raise DataError(f"record {i} of {self.shards.directory} is corrupt: its given frames are {shapes}")
        return GivenFrames(channels, image)


class Mixture:
    """Several concatenated caches as one sequence of LatentClip, with the `counts`, `weights` and `masks` of each.

    Raises:
        DataError: the caches have different codecs, text encoders or actions.
    """

    def __init__(self, caches: list[Latents], weights: list[float], masks: list[str] | None = None):
        first = caches[0]
        for cache in caches[1:]:
            for ours, theirs in (
                (first.text, cache.text),
                (f"the codec {first.codec_hash}", f"the codec {cache.codec_hash}"),
                (f"given frames {first.given}", f"given frames {cache.given}"),
            ):
                if ours != theirs:
                    said = [x if isinstance(x, str) else in_words(x) for x in (theirs, ours)]
                    raise DataError(
                        f"{cache.shards.directory} was made with {said[0]}, {first.shards.directory} with {said[1]}: "
                        f"the caches of one mixture must share it. Encode one of them again (with --classes="
                        f"{first.shards.directory} for classes in common)"
                    )
        self.actions = common_names((os.fspath(cache.shards.directory), cache.actions) for cache in caches)
        self.caches, self.weights = caches, tuple(weights)
        self.masks = tuple(masks or [""] * len(caches))
        self.counts = tuple(len(cache) for cache in caches)
        self.sizes = first.sizes if len(caches) == 1 else np.concatenate([cache.sizes for cache in caches])
        self.empty_text_LE, self.text, self.codec_hash = first.empty_text_LE, first.text, first.codec_hash
        self.given = first.given
        self._index = ConcatIndex(self.counts)

    @property
    def examples(self) -> list[dict[str, Any]]:
        """Those of all caches."""
        return [example for cache in self.caches for example in cache.examples]

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> LatentClip:
        cache, at = self._index.locate(i)
        return self.caches[cache][at]


def open_latents(text: str | os.PathLike, **expect: Any) -> Mixture:
    """The latent cache in a directory, or a mixture of caches such as "data/a + data/b*0.5".

    Args:
        text: the directory, or the directories with their weights.
        **expect: further arguments of `Latents`, which a cache must match.

    Raises:
        FileNotFoundError: a directory is not a latent cache.
        ValueError: a cache does not match `expect`, or two caches do not fit together.

    Example:
        >>> import tempfile
        >>> import minisora_jax as ms
        >>> cache = ms.encode("shapes:train:2", tempfile.mkdtemp() + "/latents", progress=False)
        >>> ms.open_latents(cache)[0].caption == ms.open_clips("shapes:train:2")[0].caption
        True
    """
    mixture = parse_mixture(str(text))
    caches = [Latents(part.directory, **expect) for part in mixture]
    return Mixture(caches, [part.weight for part in mixture], [part.mask for part in mixture])


def _is_example(entry: Any) -> bool:
    if not (isinstance(entry, dict) and isinstance(entry.get("prompt"), str)):
        return False
    size, fps = entry.get("size_THW"), entry.get("fps")
    whole = isinstance(size, list) and len(size) == 3 and all(type(n) is int and 0 < n < 2**14 for n in size)
    return whole and isinstance(fps, int | float) and not isinstance(fps, bool) and 0 < fps <= 1000


def _is_given(record: Any) -> bool:
    """Whether the record of a cache's given frames is one that `FrameEncoder` makes."""
    if not (isinstance(record, dict) and isinstance(record.get("frames"), str)):
        return False
    image = record.get("image")
    of_two = isinstance(image, list) and len(image) == 2 and all(type(n) is int and n > 0 for n in image)
    return type(record.get("channels")) is int and (image is None or of_two)


def _to_record(clip: LatentClip) -> bytes:
    if clip.mean_thwc.ndim != 4 or clip.mean_thwc.shape != clip.std_thwc.shape or clip.text_LE.ndim != 2:
        raise ValueError(
            f"{clip.name}: mean {clip.mean_thwc.shape} and std {clip.std_thwc.shape} must have one shape "
            f"(t, h, w, c), and text {clip.text_LE.shape} must be (L, E)"
        )
    arrays = {"mean": clip.mean_thwc, "std": clip.std_thwc, "text": clip.text_LE}
    if clip.frames:
        arrays |= {"given": clip.frames.channels_thwc}
        arrays |= {} if clip.frames.image_IE is None else {"image": clip.frames.image_IE}
    arrays = {name: _stored(a, f"{clip.name}: {name}") for name, a in arrays.items()}
    arrays |= {} if clip.actions_TA is None else {"actions": np.asarray(clip.actions_TA, np.float32)}
    return pack_record(arrays, {"caption": clip.caption, "fps": float(clip.fps), "name": clip.name})


def _stored(array: np.ndarray, what: str) -> np.ndarray:
    """Floats as float16, integers as int32; ValueError for a value that float16 cannot hold."""
    array = np.asarray(array)
    if np.issubdtype(array.dtype, np.integer):
        return array.astype(np.int32)
    limit = np.finfo(np.float16).max
    if not np.all(np.abs(array) <= limit):  # also False for NaN
        worst = array.flat[np.argmax(~(np.abs(array) <= limit))]
        raise ValueError(f"{what} has the value {worst}, and float16 holds finite numbers up to {limit}")
    return array.astype(np.float16)


def _restored(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float16 else array

"""Read the clips that `minisora prepare` writes. Codecs are trained on them, and latents are made from them."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable

import numpy as np

from minisora_jax.io.filesystem import is_url
from minisora_jax.io.records import Shards, sha256
from minisora_jax.io.retry import DataError
from minisora_jax.media.opening import VideoError
from minisora_jax.sources.actions import named_in, of_record
from minisora_jax.sources.base import PREPROCESSING_VERSION, stored_frames
from minisora_jax.toy.shapes import Shapes
from minisora_jax.types import Clip, ClipSequence

LONG_CAPTIONS = 0.95  # share of samples with a long caption, as in DALL-E 3


class Records:
    """A prepared data set as a sequence of clips.

    `sizes` is (n, 4): frames, height and width in pixels, and the length of the longest caption in bytes. `actions` has
    the names of the columns of the clips' actions, () if they have none.

    Args:
        long_captions: the share of clips that get their long caption, if a captioner wrote captions (`choose_caption`);
            None: all keep the caption of their source.

    Raises:
        DataError: see io/records.py.
    """

    def __init__(self, directory: str | os.PathLike, *, long_captions: float | None = LONG_CAPTIONS):
        self.shards = Shards(directory, "clips", {"preprocessing_version": PREPROCESSING_VERSION})
        self.sizes: np.ndarray = self.shards.sizes
        self.actions = named_in(self.shards.manifest["settings"], os.fspath(self.shards.directory))
        self.long_captions = long_captions

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def identity(self) -> str:
        """The sha256 of the manifest, which has the sha256 of all other files, and the choice of captions."""
        manifest = sha256(self.shards.directory / "manifest.json")
        recaptioned = self.shards.manifest["settings"].get("captioner")
        if not recaptioned:
            return manifest
        return f"{manifest}+{'no' if self.long_captions is None else f'{self.long_captions:g}'} long captions"

    def __getitem__(self, i: int) -> Clip:
        arrays, metadata = self.shards.read(i)
        caption, fps, name = self.shards.fields(i, metadata, {"caption": str, "fps": (int, float), "name": str})
        frames_THWC = self._frames(i, arrays)
        self.shards.require_size(i, frames_THWC.shape[:3])
        if self.long_captions is not None and (captions := metadata.get("captions") or {}):
            self.shards.fields(i, captions, {"short": str, "long": str})
            caption = choose_caption(caption, captions, name, self.long_captions)
        return Clip(frames_THWC, caption, float(fps), name, self._actions(i, arrays))

    def caption(self, i: int) -> str:
        """The caption of clip i in its source, without decoding its frames."""
        [caption] = self.shards.fields(i, self.shards.read(i)[1], {"caption": str})
        return caption

    def window(self, i: int, start: int, count: int) -> np.ndarray:
        """Frames start, start + 1, ... of clip i, uint8 (T, H, W, 3), without decoding the others.

        Args:
            start: The first frame.
            count: How many; fewer where the clip ends.
        """
        frames_THWC = self._frames(i, self.shards.read(i)[0], start, count)
        T, H, W = self.sizes[i, :3].tolist()
        if frames_THWC.shape[:3] != (expected := (min(count, T - start), H, W)):
            raise DataError(
                f"record {i} of {self.shards.directory} is corrupt: frames {start} to {start + count} should have the "
                f"size {expected}, and have {frames_THWC.shape[:3]}"
            )
        return frames_THWC

    def _actions(self, i: int, arrays: dict[str, np.ndarray]) -> np.ndarray | None:
        where = f"record {i} of {self.shards.directory}"
        actions_TA = of_record(arrays, self.actions, where)
        if actions_TA is not None and len(actions_TA) != self.sizes[i, 0]:
            raise DataError(f"{where} is corrupt: it has {self.sizes[i, 0]} frames and {len(actions_TA)} actions")
        return actions_TA

    def _frames(self, i: int, arrays: dict[str, np.ndarray], start: int = 0, count: int | None = None) -> np.ndarray:
        try:
            frames_THWC = stored_frames(arrays, start, count)
        except (KeyError, VideoError) as error:
            raise DataError(f"record {i} of {self.shards.directory} is corrupt: {error}") from error
        if frames_THWC.dtype != np.uint8 or frames_THWC.ndim != 4 or frames_THWC.shape[-1] != 3:
            raise DataError(f"record {i} of {self.shards.directory} is corrupt: it has no uint8 frames (T, H, W, 3)")
        return frames_THWC


def open_clips(spec: str | os.PathLike, *, long_captions: float | None = LONG_CAPTIONS) -> ClipSequence:
    """The clips of "shapes", "shapes:heldout", "shapes:train:5000", or of a directory that `prepare` wrote.

    Args:
        spec: the clips.
        long_captions: see `Records`.

    Raises:
        FileNotFoundError: the directory is not a prepared data set.

    Example:
        >>> import minisora_jax as ms
        >>> ms.open_clips("shapes:heldout:100")[0].frames_THWC.shape[-1]
        3
    """
    spec = os.fspath(spec)
    if spec.split(":")[0] == "shapes":
        return Shapes.from_spec(spec, 100_000)
    if not is_url(spec) and not os.path.exists(os.path.join(spec, "manifest.json")):
        raise FileNotFoundError(f"{spec} is not a prepared data set: run `minisora prepare CLIPS_FOLDER {spec}` first")
    return Records(spec, long_captions=long_captions)


class Part:
    """clips[start:stop], which reads no clip until it is indexed."""

    def __init__(self, clips: ClipSequence, start: int, stop: int):
        self.clips, self.range = clips, range(start, stop)

    def __len__(self) -> int:
        return len(self.range)

    def __getitem__(self, i: int) -> Clip:
        return self.clips[self.range[i]]


def size_and_frames(clips: ClipSequence, i: int) -> tuple[tuple[int, ...], Callable[[int, int], np.ndarray]]:
    """The size (T, H, W) of clip i, and a function (start, count) that reads its frames.

    Of a prepared data set nothing is read until that function is called. Other clips are made whole.
    """
    if isinstance(clips, Part):
        return size_and_frames(clips.clips, clips.range[i])
    if isinstance(clips, Records):
        return tuple(clips.sizes[i, :3].tolist()), functools.partial(clips.window, i)
    frames_THWC = clips[i].frames_THWC
    return frames_THWC.shape[:3], lambda start, count: frames_THWC[start : start + count]


def hold_out(clips: ClipSequence, share: float = 1 / 16) -> tuple[ClipSequence, ClipSequence]:
    """(clips for training, clips for evaluation): the last `share` of the clips, at least one, is for evaluation.

    Raises:
        DataError: there are fewer than 2 clips.
    """
    if len(clips) < 2:
        raise DataError(f"the data set has {len(clips)} clips; training with held-out clips needs at least 2")
    cut = len(clips) - max(1, round(share * len(clips)))
    return Part(clips, 0, cut), Part(clips, cut, len(clips))


def choose_caption(original: str, captions: dict[str, str], name: str, long_share: float = LONG_CAPTIONS) -> str:
    """The caption for training: the long one with probability `long_share`, else the original or the short one.

    The original and the short caption are equally likely. The choice depends on the clip's name only, so it is the same
    in every epoch.

    Args:
        original: the source's caption; "" for none.
        captions: {"short": ..., "long": ...} of a captioner; {} for none.
        name: the clip's name.
        long_share: between 0 and 1.
    """
    if not 0 <= long_share <= 1:
        raise ValueError(f"the share of long captions is {long_share} and must be 0 to 1")
    if not captions:
        return original
    draw = int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8]) / 2**64
    others = [caption for caption in (original, captions["short"]) if caption]
    if draw < long_share or not others:
        return captions["long"]
    return others[int((draw - long_share) / (1 - long_share) * len(others))]

"""Clips that `minisora prepare` wrote, read again: the sequence that codecs are trained on and latents are made of."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import numpy as np

from minisora_jax.io.filesystem import is_url
from minisora_jax.io.records import Shards, sha256
from minisora_jax.io.retry import DataError
from minisora_jax.sources.base import PREPROCESSING_VERSION
from minisora_jax.toy.shapes import Shapes
from minisora_jax.types import Clip

LONG_CAPTIONS = 0.95  # share of samples, of DALL-E 3


class Records:
    """A prepared data set as a sequence of clips. `sizes` (n, 4): T, H, W, and the longest caption's length in bytes.

    long_captions: share of the clips of a data set with new captions that are given their long one (`choose`)."""

    def __init__(self, directory: str | os.PathLike, *, long_captions: float = LONG_CAPTIONS):
        self.shards = Shards(directory, "clips", {"preprocessing_version": PREPROCESSING_VERSION})
        self.sizes: np.ndarray = self.shards.sizes
        self.long_captions = long_captions

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def identity(self) -> str:
        """Of the manifest, which has the sha256 of everything else, and of the choice of captions."""
        manifest = sha256(self.shards.directory / "manifest.json")
        recaptioned = self.shards.manifest["settings"].get("captioner")
        return f"{manifest}+{self.long_captions:g} long captions" if recaptioned else manifest

    def __getitem__(self, i: int) -> Clip:
        arrays, metadata = self.shards.read(i)
        caption = choose(metadata["caption"], metadata.get("captions", {}), metadata["name"], self.long_captions)
        return Clip(arrays["frames"], caption, metadata["fps"], metadata["name"])


def open_clips(spec: str, *, long_captions: float = LONG_CAPTIONS) -> Sequence[Clip]:
    """Clips by name: "shapes", "shapes:heldout" or "shapes:train:5000", or a directory that `prepare` wrote."""
    if spec.split(":")[0] == "shapes":
        return Shapes.from_spec(spec, 100_000)
    if not is_url(spec) and not os.path.exists(os.path.join(spec, "manifest.json")):
        raise FileNotFoundError(f"{spec} is not a prepared data set: run `minisora prepare CLIPS_FOLDER {spec}` first")
    return Records(spec, long_captions=long_captions)


class Part(Sequence):
    """clips[start:stop] without reading any."""

    def __init__(self, clips: Sequence[Clip], start: int, stop: int):
        self.clips, self.range = clips, range(start, stop)

    def __len__(self) -> int:
        return len(self.range)

    def __getitem__(self, i: int) -> Clip:
        return self.clips[self.range[i]]


def hold_out(clips: Sequence[Clip], share: float = 1 / 16) -> tuple[Sequence[Clip], Sequence[Clip]]:
    """(for training, held out): the last clips of a data set, at least one, are kept for evaluation."""
    if len(clips) < 2:
        raise DataError(f"{len(clips)} clips: at least 2 are needed to train on some and hold some out")
    cut = len(clips) - max(1, round(share * len(clips)))
    return Part(clips, 0, cut), Part(clips, cut, len(clips))


def choose(original: str, captions: dict[str, str], name: str, long_share: float = LONG_CAPTIONS) -> str:
    """The caption that a clip of that name is trained on: the long one with probability `long_share`, else the original
    or the short one, each of which is as likely if there are both. A function of the name: the same in every epoch.

    original: "" for none.   captions: {"short": ..., "long": ...}, or {} where no captioner was at work."""
    if not 0 <= long_share <= 1:
        raise ValueError(f"the share of long captions is {long_share} and must be 0 to 1")
    if not captions:
        return original
    draw = int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8]) / 2**64
    others = [caption for caption in (original, captions["short"]) if caption]
    if draw < long_share or not others:
        return captions["long"]
    return others[int((draw - long_share) / (1 - long_share) * len(others))]

"""Captions as a model reads them: UTF-8 bytes, the number of a class, or the features of a published text encoder.

    "a red circle"  ->  text_LE:  ByT5 ids (L, 1)  |  a class (1, 1)  |  features (L, E)

A latent cache records which of them it holds. The record is copied into the run and its exported model, and it is used
when that model is sampled. The empty caption, which guidance needs, is encoded like any other.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minisora_jax.config import how_to_install
from minisora_jax.models.class_names import ClassNames
from minisora_jax.models.clip import CLIPConfig
from minisora_jax.models.dit import DiTConfig
from minisora_jax.models.encoder import TextEncoder
from minisora_jax.models.text import BYTE_VOCABULARY, PAD, encode_bytes

log = logging.getLogger("minisora")

MAX_TOKENS = 512  # of a caption, as most models with T5 train (CLIP has its own number)
BATCH = 8  # captions encoded together
CLASSES = "classes"  # the "encoder" of captions that are classes
TOKENIZER = "tokenizer"  # the folder beside an encoder's weights that `minisora import` copies its tokenizer to


@dataclasses.dataclass(frozen=True)
class Captions:
    """One way to turn captions into features."""

    # JSON: {"encoder": "bytes", "classes" or a hash, "path": directory of the encoder, "names" of the classes}
    record: dict[str, Any]
    width: int  # E
    encode: Callable[[list[str]], list[np.ndarray]]  # (L, E) for each caption


BYTES = Captions({"encoder": "bytes"}, 1, lambda captions: [encode_bytes(c) for c in captions])


def class_captions(classes: int, names: Sequence[str] = ()) -> Captions:
    """Captions that are the name or the number of a class, see `ClassNames`. The empty caption means "no class".

    Its `encode` raises ValueError for a caption that is no class.

    Args:
        classes: Rows of the model's table of labels. The last one means "no class".
        names: The name of each other class; none: they have numbers only.
    """
    known = ClassNames(classes - 1, names)

    def encode(caption: str) -> np.ndarray:
        return np.full((1, 1), known.of_prompt(caption) if caption else classes - 1, np.int32)

    record = {"encoder": CLASSES} | ({"names": list(names)} if names else {})
    return Captions(record, 1, lambda captions: [encode(c.strip()) for c in captions])


def class_names(record: dict | None) -> list[str]:
    """The names of the classes of a `Captions.record`; [] if it has none.

    Raises:
        ValueError: They are no list of different texts.
    """
    names = (record or {}).get("names", [])
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names) or len(set(names)) < len(names):
        raise ValueError(f"the names of classes are {names!r:.100}, and must be a list of different texts")
    return names


def in_words(record: dict | None) -> str:
    """What a `Captions.record` says, on a line."""
    if record and record.get("encoder") == CLASSES:
        names = class_names(record)
        return f"{len(names)} classes: {', '.join(map(repr, names)):.100}"
    return f"the text encoder {record}"


def encoder_captions(directory: str | Path) -> Captions:
    """Captions encoded by the text encoder that `minisora import` wrote to `directory`, with its tokenizer.

    Raises:
        FileNotFoundError: The directory has no tokenizer and the encoder needs one.
        ValueError: The directory holds another kind of model, or transformers is not installed.
    """
    encoder = TextEncoder.load(directory)
    config, params = encoder.config, jax.tree.map(jnp.asarray, encoder.params)
    limit = config.positions if isinstance(config, CLIPConfig) else MAX_TOKENS
    tokenize = load_tokenizer(directory, config.vocabulary, limit)
    apply = jax.jit(encoder.module.apply)

    def encode_batch(ids: list[list[int]]) -> list[np.ndarray]:
        # A batch has BATCH captions, and its length is a power of two: so few shapes are compiled.
        length = min(limit, max(16, 1 << (max(map(len, ids)) - 1).bit_length()))
        ids_BL, segment_BL = np.full((BATCH, length), PAD, np.int32), np.zeros((BATCH, length), np.int32)
        for b, row in enumerate(ids):
            ids_BL[b, : len(row)], segment_BL[b, : len(row)] = row, 1
        features = apply(params, ids_BL, segment_BL)
        features_BLE = np.asarray(features[0] if isinstance(features, tuple) else features, np.float32)
        return [features_BLE[b, : len(row)] for b, row in enumerate(ids)]

    def encode(captions: list[str]) -> list[np.ndarray]:
        ids = sorted(((tokenize(caption), caption) for caption in dict.fromkeys(captions)), key=lambda x: len(x[0]))
        features: dict[str, np.ndarray] = {}
        for start in range(0, len(ids), BATCH):
            chunk = ids[start : start + BATCH]
            features |= zip((caption for _, caption in chunk), encode_batch([row for row, _ in chunk]))
        return [features[caption] for caption in captions]

    return Captions({"encoder": encoder.hash, "path": str(Path(directory))}, config.width, encode)


def load_tokenizer(directory: str | Path, vocabulary: int, limit: int) -> Callable[[str], list[int]]:
    """A function from a caption to its token ids. Runs of white space count as one blank, as in Wan.

    Args:
        directory: A text encoder. Its tokenizer is in DIRECTORY/tokenizer; ByT5 needs none.
        vocabulary: Number of tokens that the encoder knows.
        limit: Longer captions are cut to this many tokens, with a warning.

    Raises:
        FileNotFoundError: The encoder needs a tokenizer and has none.
        ValueError: transformers is not installed.
    """
    path = Path(directory) / TOKENIZER
    if path.is_dir():
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # no warning of missing PyTorch
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ValueError(f"the tokenizer {path} needs transformers: {how_to_install('text')}") from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever the library raises on a damaged file, or one that wants its own code run
            raise ValueError(f"{path} holds no tokenizer that transformers reads: {error}") from error
        read = functools.partial(tokenizer, verbose=False)
        ids_of = lambda caption: read(caption).input_ids
    elif vocabulary == BYTE_VOCABULARY:
        ids_of = lambda caption: [i for i in encode_bytes(caption)[:, 0].tolist() if i != PAD]
    else:
        raise FileNotFoundError(
            f"{path} is missing: copy the tokenizer's files there (tokenizer.json or spiece.model, and "
            f"tokenizer_config.json), or import the encoder again with --tokenizer=DIR"
        )

    def tokenize(caption: str) -> list[int]:
        ids = ids_of(" ".join(caption.split()))
        if max(ids) >= vocabulary:
            raise ValueError(
                f"{path} gives the token {max(ids)}, and {directory} has a vocabulary of {vocabulary}: use the "
                f"tokenizer of this text encoder"
            )
        if len(ids) > limit:
            log.warning("a caption of %d tokens is cut to %d: %.60s...", len(ids), limit, caption)
            ids = ids[: limit - 1] + ids[-1:]  # the last token ends the caption
        return ids

    return tokenize


def captions_of(config: DiTConfig, record: dict | None, directory: str | Path | None, pair: str | None) -> Captions:
    """The captions that a model reads.

    Args:
        config: The model's config.
        record: `Captions.record` of the model's training, or None if the model has no record.
        directory: A text encoder to use in place of the recorded path, or None.
        pair: Preset of the text encoder that the model's family uses, for the error message.

    Raises:
        ValueError: The text encoder is missing, or it is not the one that the model was trained with.
    """
    if config.caption == "label" or config.text_features == 1:
        plain = _labels(config.classes, record) if config.caption == "label" else BYTES
        if directory:
            raise ValueError(f"--text-encoder={directory}: the model reads {plain.record['encoder']}, not features")
        return plain
    record = record or {}
    path = directory or record.get("path")
    if path is None or not Path(path).exists():
        problem = "does not name its text encoder" if path is None else f"has its text encoder at {path}, which is gone"
        hint = f" (`minisora import {pair}` writes it)" if pair else ""
        raise ValueError(
            f"the model reads features of width {config.text_features} and {problem}: give it by "
            f"--text-encoder=DIR{hint}"
        )
    captions = encoder_captions(path)
    if captions.width != config.text_features:
        raise ValueError(
            f"the text encoder {path} makes features of width {captions.width}, and the model reads "
            f"{config.text_features}: give the text encoder that the model was trained with by --text-encoder=DIR"
        )
    if record.get("encoder", captions.record["encoder"]) != captions.record["encoder"]:
        raise ValueError(
            f"the model was trained on features of text encoder {record['encoder']}, but {path} is text encoder "
            f"{captions.record['encoder']}: give the one it was trained with by --text-encoder=DIR"
        )
    return captions


def _labels(classes: int, record: dict | None) -> Captions:
    names = class_names(record)
    if names and len(names) != classes - 1:
        raise ValueError(
            f"the model's record names {len(names)} classes, and its table of labels has {classes} rows, of which one "
            f'is "no class": it needs {classes - 1} names'
        )
    return class_captions(classes, names)

"""Captions as a model reads them: UTF-8 bytes, the number of a class, or the features of a published text encoder.

    "a red circle"  ->  text_LE:  ByT5 ids (L, 1)  |  a class (1, 1)  |  features (L, E)

Which of them made a latent cache is recorded in it, goes from there into the run and its exported model, and comes
back when that model is sampled. The empty caption, which guidance needs, is encoded like any other.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minisora_jax.models.clip import CLIPConfig
from minisora_jax.models.dit import DiTConfig
from minisora_jax.models.encoder import TextEncoder
from minisora_jax.models.text import BYTE_VOCABULARY, PAD, encode_bytes

log = logging.getLogger("minisora")

MAX_TOKENS = 512  # of a caption: what T5's users train with (CLIP has its own number)
AT_ONCE = 8  # captions encoded together
TOKENIZER = "tokenizer"  # the folder beside an encoder's weights that `minisora import` copies its tokenizer to


@dataclasses.dataclass(frozen=True)
class Captions:
    """How captions become features. `record` is JSON: {"encoder": "bytes", "classes" or a hash, "path": ...}."""

    record: dict[str, Any]
    width: int  # E
    encode: Callable[[list[str]], list[np.ndarray]]  # one (L, E) a caption


BYTES = Captions({"encoder": "bytes"}, 1, lambda captions: [encode_bytes(c) for c in captions])


def class_captions(classes: int) -> Captions:
    """A caption is the number of a class, the last of which is no class: the empty caption."""

    def encode(caption: str) -> np.ndarray:
        number = int(caption) if caption.isdecimal() else classes if caption else classes - 1
        if number >= classes - bool(caption):
            raise ValueError(f"prompt {caption!r} must be the number of a class, 0 to {classes - 2}")
        return np.full((1, 1), number, np.int32)

    return Captions({"encoder": "classes"}, 1, lambda captions: [encode(c.strip()) for c in captions])


def encoder_captions(directory: str | Path) -> Captions:
    """By the text encoder that `minisora import` wrote to `directory`, with its tokenizer."""
    encoder = TextEncoder.load(directory)
    config, params = encoder.config, jax.tree.map(jnp.asarray, encoder.params)
    limit = config.positions if isinstance(config, CLIPConfig) else MAX_TOKENS
    tokenize = load_tokenizer(directory, config.vocabulary, limit)
    apply = jax.jit(encoder.module.apply)

    def some(ids: list[list[int]]) -> list[np.ndarray]:
        # Few shapes, so few compilations: a power of two of tokens, always AT_ONCE captions.
        length = min(limit, max(16, 1 << (max(map(len, ids)) - 1).bit_length()))
        ids_BL, segment_BL = np.full((AT_ONCE, length), PAD, np.int32), np.zeros((AT_ONCE, length), np.int32)
        for b, row in enumerate(ids):
            ids_BL[b, : len(row)], segment_BL[b, : len(row)] = row, 1
        features = apply(params, ids_BL, segment_BL)
        features_BLE = np.asarray(features[0] if isinstance(features, tuple) else features, np.float32)
        return [features_BLE[b, : len(row)] for b, row in enumerate(ids)]

    def encode(captions: list[str]) -> list[np.ndarray]:
        each = dict.fromkeys(captions)
        ids = sorted(((tokenize(caption), caption) for caption in each), key=lambda x: len(x[0]))
        for start in range(0, len(ids), AT_ONCE):
            chunk = ids[start : start + AT_ONCE]
            each |= zip((caption for _, caption in chunk), some([row for row, _ in chunk]))
        return [each[caption] for caption in captions]

    return Captions({"encoder": encoder.hash, "path": str(Path(directory))}, config.width, encode)


def load_tokenizer(directory: str | Path, vocabulary: int, limit: int) -> Callable[[str], list[int]]:
    """caption -> token ids, at most `limit`; ByT5's need no file. White space counts as one blank, as for Wan."""
    where = Path(directory) / TOKENIZER
    if where.is_dir():
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no PyTorch is no news
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ValueError(f"the tokenizer {where} needs transformers: pip install 'minisora_jax[text]'") from error
        read = functools.partial(AutoTokenizer.from_pretrained(where, local_files_only=True), verbose=False)
        ids_of = lambda caption: read(caption).input_ids
    elif vocabulary == BYTE_VOCABULARY:
        ids_of = lambda caption: [i for i in encode_bytes(caption)[:, 0].tolist() if i != PAD]
    else:
        raise FileNotFoundError(
            f"{where} is missing: copy the tokenizer's files there (tokenizer.json or spiece.model, and "
            f"tokenizer_config.json), or import the encoder again with --tokenizer=DIR"
        )

    def tokenize(caption: str) -> list[int]:
        ids = ids_of(" ".join(caption.split()))
        if max(ids) >= vocabulary:
            raise ValueError(
                f"{where} gives the token {max(ids)}, {directory} has a vocabulary of {vocabulary}: it is another's"
            )
        if len(ids) > limit:
            log.warning("a caption of %d tokens is cut to %d: %.60s...", len(ids), limit, caption)
            ids = ids[: limit - 1] + ids[-1:]  # the last ends it
        return ids

    return tokenize


def captions_of(config: DiTConfig, record: dict | None, directory: str | Path | None, pair: str | None) -> Captions:
    """What the model of that config reads. `record` is what it was trained with, None where it does not say.

    `directory` is the text encoder asked for, where the recorded path will not do; `pair` the preset that it should be.
    """
    if config.caption == "label" or config.text_features == 1:
        plain = class_captions(config.classes) if config.caption == "label" else BYTES
        if directory:
            raise ValueError(f"--text-encoder={directory}: the model reads {plain.record['encoder']}, not features")
        return plain
    record = record or {}
    where = directory or record.get("path")
    if where is None or not Path(where).exists():
        said = "does not name its text encoder" if where is None else f"has its text encoder at {where}, which is gone"
        made = f" (made by `minisora import {pair}`)" if pair else ""
        raise ValueError(f"the model reads features of width {config.text_features} and {said}: give it by "
                         f"--text-encoder=DIR{made}")  # fmt: skip
    captions = encoder_captions(where)
    if captions.width != config.text_features:
        raise ValueError(
            f"the text encoder {where} makes features of width {captions.width}, the model reads {config.text_features}"
        )
    if record.get("encoder", captions.record["encoder"]) != captions.record["encoder"]:
        raise ValueError(
            f"the model was trained on features of text encoder {record['encoder']}, but {where} is text encoder "
            f"{captions.record['encoder']}: give the one it was trained with by --text-encoder=DIR"
        )
    return captions

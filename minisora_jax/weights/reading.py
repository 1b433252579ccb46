"""From a published file to our parameters: its layout is found by its names. A file that is another one is named."""

from __future__ import annotations

import collections
import dataclasses
import logging
from pathlib import Path
from typing import Any

from minisora_jax.models import clip_vision, encoder, perceptual, vae
from minisora_jax.models.clip import CLIPConfig
from minisora_jax.models.clip_vision import CLIPVisionConfig
from minisora_jax.models.dit import abstract_params
from minisora_jax.models.dit_config import DiTConfig
from minisora_jax.models.perceptual import LPIPSConfig
from minisora_jax.models.vae import VAEConfig
from minisora_jax.weights import clip
from minisora_jax.weights.checkpoint import Checkpoint
from minisora_jax.weights.errors import WeightsFileError, shown
from minisora_jax.weights.identify import architecture, declared, stranger
from minisora_jax.weights.presets import Preset, presets
from minisora_jax.weights.rules import Rule, import_lazily

log = logging.getLogger("minisora")

DEEPEST = 12  # parts of a prefix


@dataclasses.dataclass(frozen=True)
class Match:
    """A file as a family's layout sees it."""

    checkpoint: Checkpoint  # its tensors without their prefix
    rules: list[Rule]
    count: int  # tensors of the file that have a rule
    prefix: str

    @property
    def complete(self) -> bool:
        """Whether no tensor is missing."""
        names = set(self.checkpoint.names)
        return all(names & {name, *rule.aliases} for rule in self.rules for name in rule.names)


def read_preset(name: str, path: str | Path) -> tuple[Any, Any]:
    """(the model's config, its parameters as `LazyArray`s in the precision they are stored in).

    Raises:
        FileNotFoundError: There is no such file.
        WeightsFileError: It is not this preset. The message says what it is, if its names, shapes or config.json do.
    """
    preset, checkpoint = presets()[name], Checkpoint(path)
    config = _config(preset, checkpoint)
    found = match(checkpoint, preset, config)
    try:
        params = _import(found, preset, config)
    except WeightsFileError as error:
        if what := stranger(checkpoint) or stranger(found.checkpoint):
            raise WeightsFileError(f"{path} is {what}") from error
        if other := _other(checkpoint, name):
            raise WeightsFileError(f"{_another(path, name, other)} ({error})") from error
        if what := architecture(checkpoint):
            raise WeightsFileError(f"{path} is {what}, and not {name}") from error
        if kind := checkpoint.config.get("_class_name"):
            raise WeightsFileError(f"{error}. Its config.json says {shown(kind)}") from error
        raise
    if what := stranger(found.checkpoint):
        raise WeightsFileError(f"{path} is {what}")
    if other := declared(checkpoint, name):
        raise WeightsFileError(_another(path, name, other))
    if found.prefix:
        rest = len(checkpoint.names) - len(found.checkpoint.names)
        log.info("%s: the tensors under %r are read, %d others are not", path, found.prefix, rest)
    return config, params


def match(checkpoint: Checkpoint, preset: Preset, config: Any) -> Match:
    """The layout and the prefix that most of a file's names fit. On a tie, averaged weights ("ema") come first.

    Where they fit less than half of the layout, it is the layout that one name tells, without a prefix.
    """
    inner, family = checkpoint.within(preset.within), preset.family
    usual = family.name_map_of(inner.names)
    best, place = None, (0, False, 0)
    for layout in sorted(family.NAME_MAPS, key=lambda layout: layout != usual):
        try:
            rules = family.rules(config, layout)
        except KeyError:  # the layout has no names for parts of this model
            continue
        expected = {name for rule in rules for name in (*rule.names, *rule.aliases)}
        fewest = len({name for rule in rules for name in rule.names}) / 2
        best = best or Match(inner, rules, 0, "")
        for prefix, count in _prefixes(inner.names, expected).items():
            if count >= fewest and (here := (count, "ema" in prefix, -len(prefix))) > place:
                best, place = Match(inner.within((prefix,)) if prefix else inner, rules, count, prefix), here
    assert best is not None  # every family has a layout of its own
    return best


def _prefixes(names: list[str], expected: set[str]) -> dict[str, int]:
    """How many names are an expected one after each prefix, which ends with a dot or is empty."""
    counts: collections.Counter[str] = collections.Counter()
    for name in names:
        at = 0
        for _ in range(DEEPEST):
            if name[at:] in expected:
                counts[name[:at]] += 1
            at = name.find(".", at) + 1
            if not at:
                break
    return counts


def _config(preset: Preset, checkpoint: Checkpoint) -> Any:
    """The preset's config; that of a CLIP without its projection, if the file has none."""
    config = preset.config
    if preset.family is clip and isinstance(config, CLIPConfig):
        inner = match(checkpoint, preset, config).checkpoint
        config = clip.fit(config, inner.names)
        if config != preset.config:
            log.info("%s holds no text_projection: the pooled features stay unprojected", checkpoint.path)
    return config


def _import(found: Match, preset: Preset, config: Any) -> Any:
    ignored = preset.family.IGNORED
    return import_lazily(found.checkpoint, found.rules, _abstract(config), ignored=ignored, keep_dtype=True)


def _abstract(config: Any) -> Any:
    """Our parameters as `jax.ShapeDtypeStruct`s."""
    if isinstance(config, DiTConfig):
        return abstract_params(config)
    if isinstance(config, VAEConfig):
        return vae.abstract_params(config)
    if isinstance(config, LPIPSConfig):
        return perceptual.abstract_params(config)
    if isinstance(config, CLIPVisionConfig):
        return clip_vision.abstract_params(config)
    return encoder.abstract_params(config)


def _other(checkpoint: Checkpoint, asked: str) -> str | None:
    """The preset whose names and shapes the file has, in place of those of `asked`; None for none."""
    for name, preset in presets().items():
        config = preset.config
        if name == asked or not (found := match(checkpoint, preset, config)).complete:
            continue
        try:
            _import(found, preset, config)
        except WeightsFileError:
            continue
        return declared(checkpoint, name) or name
    return None


def _another(path: str | Path, asked: str, other: str) -> str:
    return f"{path} is not {asked}: this is a {other}: use `minisora import {other} {path}`"

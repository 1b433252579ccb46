"""Whether a model can learn from a latent cache: its channels, its captions, and what the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minisora_jax.data.actions import action_width
from minisora_jax.data.latents import Latents, Mixture
from minisora_jax.io.retry import DataError
from minisora_jax.models.captions import CLASSES, class_names, in_words
from minisora_jax.models.dit_config import DiTConfig


def check_latents(dit: DiTConfig, latents: Latents | Mixture, init: str | Path | None, strict: bool) -> None:
    """Raise ValueError if the model cannot learn from these latents. It runs before anything is compiled."""
    channels, features = _channels(latents, strict), latents.empty_text_LE.shape[1]
    _check_given(dit, latents.given, init)
    _check_classes(dit, latents.text, init)
    if dit.makes_images and (videos := int((latents.sizes[:, 0] > 1).sum())):
        raise ValueError(
            f"{init or 'the model'} makes images, since its tokens have no place in time, and {videos} of the "
            f"{len(latents)} clips are videos: encode images alone, or set dit.positions='learned'"
        )
    if channels != dit.latent_channels:
        fix = f"set dit.latent_channels={channels}"
        if init:
            fix = (
                f"{init} takes {dit.latent_channels} channels: encode the clips with the codec that it was trained with"
            )
        raise ValueError(f"the latent cache has {channels} channels: {fix}")
    if features != dit.text_features:
        fix = f"set dit.text_features={features}"
        if init:
            fix = (
                f"{init} reads {dit.text_features}: encode the clips with the text encoder that it was trained with "
                f"(`minisora encode --text-encoder=DIR`)"
            )
        raise ValueError(f"the latent cache has caption features of width {features}: {fix}")


def check_actions(dit: DiTConfig, actions: Sequence[str], time_factor: int) -> None:
    """Raise ValueError unless the model reads actions of so many columns, or none.

    Args:
        actions: The names of the cache's columns.
        time_factor: Frames of pixels of a latent frame.
    """
    if dit.action_width and dit.action_width != (width := action_width(len(actions), time_factor)):
        raise ValueError(
            f"dit.action_width={dit.action_width}, and the latent cache has {len(actions)} actions "
            f"({', '.join(actions) or 'none'}), of {time_factor} frames for a latent frame: set dit.action_width="
            f"{width if actions else 0}"
        )


def _check_classes(dit: DiTConfig, text: dict[str, Any] | None, init: str | Path | None) -> None:
    """Raise ValueError unless the model reads classes and the cache has as many, or neither."""
    labels, of_classes = dit.caption == "label", bool(text) and text.get("encoder") == CLASSES
    who = init or f"dit.caption={dit.caption!r}"
    if labels and not of_classes:
        raise ValueError(
            f"{who} learns from {dit.classes - 1} classes, and the latent cache was made with {in_words(text)}: encode "
            f"the clips with --classes"
        )
    if of_classes and not labels:
        fix = (
            "encode the clips without --classes" if init else "set classes=N in --config, as in dit_tiny:classes=N,..."
        )
        raise ValueError(f"{who} learns from captions, and the latent cache has {in_words(text)}: {fix}")
    if labels and (count := len(class_names(text))) != dit.classes - 1:
        fix = f'set dit.classes={count + 1}: the last row of its table is "no class"'
        if init:
            fix = f"encode the clips with --classes=FILE of all {dit.classes - 1} names, in the order of {init}"
        raise ValueError(
            f"{who} learns from {dit.classes - 1} classes, and the latent cache has {in_words(text)}: {fix}"
        )


def _check_given(dit: DiTConfig, given: dict[str, Any] | None, init: str | Path | None) -> None:
    """Raise ValueError unless the model reads given frames as the cache holds them, or it has neither."""
    who = init or f"a model with dit.given_channels={dit.given_channels}"
    if given is None:
        if dit.given_channels:
            encoder = " --image-encoder=DIR" if dit.image_features else ""
            raise ValueError(
                f"{who} reads given frames, and the latent cache has none: encode the clips with "
                f"--given={'ends' if dit.image_positions else 'first'}{encoder}"
            )
        return
    if not dit.given_channels:
        raise ValueError(f"{who} reads no given frames as channels: encode the clips without --given")
    count, width = given["image"] or (0, 0)
    if (given["channels"], width) != (dit.given_channels, dit.image_features) or dit.image_positions not in (0, count):
        raise ValueError(
            f"{who} reads {dit.given_channels} channels of given frames, and {dit.image_positions or 'any number of'} "
            f"image tokens of width {dit.image_features}; the latent cache has {given['channels']}, and {count} of "
            f"width {width}: encode the clips with the codec, --given and --image-encoder that the model goes with"
        )


def _channels(latents: Latents | Mixture, strict: bool) -> int:
    """The latent channels of the first clip that can be read."""
    for i in range(len(latents)):
        try:
            return latents[i].mean_thwc.shape[-1]
        except DataError:
            if strict:
                raise
    raise DataError(f"none of the {len(latents)} clips can be read")

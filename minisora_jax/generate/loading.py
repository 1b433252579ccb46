"""Reading a trained model, its codec and its text encoder from their directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from minisora_jax.bundled import CODEC, MODEL
from minisora_jax.diffusion.objective import ObjectiveConfig
from minisora_jax.diffusion.time import TimeConfig
from minisora_jax.io.model_dir import config_fields, load_model, model_hash
from minisora_jax.models.captions import captions_of
from minisora_jax.models.codec import Codec
from minisora_jax.models.dit import DiTConfig
from minisora_jax.toy.grammar import vocabulary
from minisora_jax.weights.presets import TRANSFORMERS


def load_parts(
    model: str | Path, codec: str | Path | None, guide_model: str | Path | None, text_encoder: str | Path | None
) -> dict[str, Any]:
    """The fields of a `NativePipeline`. See `VideoPipeline.load`."""
    params, dit, config = _load_dit(model)
    pair = TRANSFORMERS.get(config.get("training", {}).get("imported", "")) if "codec" not in config else None
    if codec is None and pair:
        raise ValueError(
            f"{model} was imported and does not name its codec: give it by --codec=DIR (made by "
            f"`minisora import {pair.codec}`)"
        )
    codec = codec or CODEC
    loaded_codec = Codec.load(codec)
    _require_codec(config, dit, model, loaded_codec, codec)
    objective = ObjectiveConfig(**config_fields(config.get("objective", {})))
    guide = None
    if guide_model is not None:
        guide_params, guide_dit, guide_config = _load_dit(guide_model)
        _require_codec(guide_config, guide_dit, guide_model, loaded_codec, codec)
        _require_like(dit, objective, guide_dit, ObjectiveConfig(**config_fields(guide_config.get("objective", {}))))
        guide = (guide_dit, guide_params)
    frames, *sides = config.get("latent_size", [21])
    return {
        "codec": loaded_codec,
        "config": dit,
        "times": TimeConfig(**config_fields(config["times"])),
        "params": params,
        "hash": model_hash(model),
        "objective": objective,
        "captions": captions_of(dit, config.get("text"), text_encoder, pair and pair.text_encoder),
        "guide": guide,
        "window": frames,
        "sides": tuple(sides) or None,
        "leads_over": _leads_over(config.get("training", {})),
        "vocabulary": vocabulary() if Path(model).resolve() == Path(MODEL).resolve() else None,
    }


def _load_dit(model: str | Path) -> tuple[dict, DiTConfig, dict]:
    """(parameters, model config, whole exported config) of a model."""
    params, config = load_model(model)
    if config.get("kind") != "dit":
        raise ValueError(f"{model} holds a {config.get('kind')!r} model, not a diffusion transformer ('dit')")
    dit = DiTConfig(**config_fields(config["dit"]))
    if dit.image_features:
        raise ValueError(f"{model} needs the features of an image encoder, which this command does not compute yet")
    return jax.tree.map(jnp.asarray, params), dit, config


def _leads_over(training: dict) -> bool:
    """Whether a model was trained to lead from a known past to a known future (`ConditioningConfig.between`)."""
    share = training.get("conditioning", {}).get("between", 0)
    return share > 0 or "@between" in training.get("data", {}).get("path", "")


def _require_codec(config: dict, dit: DiTConfig, model: str | Path, loaded: Codec, codec: str | Path) -> None:
    """Raise ValueError unless the model was trained with that codec or, if it does not say, has as many channels."""
    if "codec" in config and config["codec"] != loaded.latents:
        raise ValueError(
            f"{model} was trained on latents of codec {config['codec']}, but {codec} makes those of {loaded.latents}: "
            f"their latents mean different things; give the codec it was trained with"
        )
    if dit.latent_channels != loaded.config.latent_channels:
        raise ValueError(
            f"{model} takes latents of {dit.latent_channels} channels, codec {codec} makes "
            f"{loaded.config.latent_channels}: give the codec it was trained with"
        )


def _require_like(dit: DiTConfig, objective: ObjectiveConfig, guide: DiTConfig, theirs: ObjectiveConfig) -> None:
    for name, ours, other in (
        ("patch", dit.patch, guide.patch),
        ("text_features", dit.text_features, guide.text_features),
        ("caption_tokens", dit.caption_tokens, guide.caption_tokens),
        ("path", objective.path, theirs.path),
        ("prediction", objective.prediction, theirs.prediction),
    ):
        if ours != other:
            raise ValueError(f"the guide model has {name}={other!r}, the model {ours!r}: they must be the same")

"""Reading a trained model, its codec and its text encoder from their directories."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from minisora_jax.bundled import CODEC, FAST, MODEL
from minisora_jax.data.conditioning import recorded_masks
from minisora_jax.diffusion.distillation import recorded_distillation
from minisora_jax.diffusion.objective import ObjectiveConfig
from minisora_jax.diffusion.time import TimeConfig
from minisora_jax.generate.experts import LowNoise
from minisora_jax.io.hub import local_folder
from minisora_jax.io.model_dir import (
    LOW_NOISE,
    check_shapes,
    in_memory,
    model_hash,
    onto_devices,
    open_model,
    require_kind,
    saved_settings,
)
from minisora_jax.models.captions import captions_of
from minisora_jax.models.clip_vision import image_encoder_of
from minisora_jax.models.codec import Codec
from minisora_jax.models.dit import DiTConfig, abstract_params
from minisora_jax.models.quantized import FORMS, held_as, read_as
from minisora_jax.parallel.mesh import in_host_memory, with_shardings
from minisora_jax.parallel.programs import keep_compiled_programs
from minisora_jax.toy.grammar import vocabulary
from minisora_jax.weights.adapters import Adapter, applied, read_adapter
from minisora_jax.weights.errors import shown
from minisora_jax.weights.presets import TRANSFORMERS

log = logging.getLogger("minisora")

DTYPES = ("float32", "bfloat16", *FORMS)


def load_parts(
    model: str | Path,
    codec: str | Path | None,
    guide_model: str | Path | None,
    text_encoder: str | Path | None,
    dtype: str | None = None,
    loras: Sequence[str] = (),
    image_encoder: str | Path | None = None,
    offload: bool = False,
) -> dict[str, Any]:
    """The fields of a `NativePipeline`. See `VideoPipeline.load`."""
    keep_compiled_programs()
    model = local_folder(model)
    codec, guide_model, text_encoder = (x and local_folder(x) for x in (codec, guide_model, text_encoder))
    waiting = in_host_memory if offload else lambda params: params
    params, dit, config = _load_dit(model, dtype)
    params = waiting(params)
    training = config.get("training")
    training = training if isinstance(training, dict) else {}
    preset = training.get("imported") if "codec" not in config else None
    pair = TRANSFORMERS.get(preset) if isinstance(preset, str) else None
    if codec is None and pair:
        raise ValueError(
            f"{model} was imported and does not name its codec: give it by --codec=DIR (made by "
            f"`minisora import {pair.codec}`)"
        )
    codec = codec or CODEC
    loaded_codec = Codec.load(codec)
    _require_codec(config, dit, model, loaded_codec, codec)
    objective = saved_settings(ObjectiveConfig, config, "objective", model)
    guide = None
    if guide_model is not None:
        guide_params, guide_dit, guide_config = _load_dit(guide_model, dtype)
        _require_codec(guide_config, guide_dit, guide_model, loaded_codec, codec)
        theirs = saved_settings(ObjectiveConfig, guide_config, "objective", guide_model)
        _require_like(dit, objective, guide_dit, theirs)
        guide = (guide_dit, guide_params)
    low_noise = _low_noise(config, dit, objective, model, dtype)
    if offload and not low_noise:
        raise ValueError(
            f"{model} is one model, and offload is for a pair of experts, of which one waits: leave it out"
        )
    if low_noise and guide:
        raise ValueError(f"{model} is a pair of experts: leave out --guide-model, which is for one model")
    digest, adapters = model_hash(model), [read_adapter(text, dit, model) for text in loras]
    if low_noise:
        low_digest = model_hash(Path(model) / LOW_NOISE)
        of_high, of_low = _by_expert(loras, adapters, (digest, low_digest), model)
        params = applied(params, of_high)
        low_noise = dataclasses.replace(low_noise, params=applied(waiting(low_noise.params), of_low))
        digest = f"{digest}+{low_digest}"
    else:
        for text, adapter in zip(loras, adapters):
            if adapter.base not in ("", digest):
                log.warning("%s was trained over the model %s, and %s is %s", text, adapter.base, model, digest)
        params = applied(params, adapters)
    if adapters:
        digest = hashlib.sha256(" ".join([digest, *(a.hash for a in adapters)]).encode()).hexdigest()[:16]
    frames, *sides = _latent_size(config, model)
    bundled = Path(model).resolve() in (MODEL.resolve(), FAST.resolve())
    return {
        "codec": loaded_codec,
        "config": dit,
        "times": saved_settings(TimeConfig, config, "times", model),
        "params": params,
        "hash": digest,
        "objective": objective,
        "captions": captions_of(dit, _text(config, model), text_encoder, pair and pair.text_encoder),
        "guide": guide,
        "low_noise": low_noise,
        "image_encoder": image_encoder_of(dit, image_encoder),
        "window": frames,
        "sides": tuple(sides) or None,
        "distilled": max(
            [recorded_distillation(config, model), *(a.distilled for a in adapters)], key=lambda record: record.steps
        ),
        "trained": trained_masks(config, model, adapters),
        "vocabulary": vocabulary() if not loras and bundled else None,
    }


def _load_dit(model: str | Path, dtype: str | None = None) -> tuple[dict, DiTConfig, dict]:
    """(parameters, model config, whole exported config) of a model, the parameters on the mesh in use if there is one.

    dtype: of the parameters and the arithmetic; None: parameters as stored, arithmetic as the model says; "int8" or
        "nf4": that arithmetic on kernels of 8 or 4 bits.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    stored, config = open_model(model)
    if config.get("kind") == "lora":
        raise ValueError(
            f"{model} is an adapter, not a whole model: name its base by --model, and the adapter by --lora"
        )
    require_kind(config, "dit", model)
    dit = saved_settings(DiTConfig, config, "dit", model)
    check_shapes(stored, abstract_params(dit), model)
    if dtype in ("float32", "bfloat16"):
        dit = dataclasses.replace(dit, dtype=dtype)
    mesh = jax.sharding.get_mesh()
    if mesh.empty and dtype not in FORMS:
        return jax.tree.map(jnp.asarray, in_memory(stored, model, dtype)), dit, config
    kept = None if dtype in FORMS else dtype
    typed = lambda at, x: jax.ShapeDtypeStruct(at.shape, kept or x.dtype, sharding=at.sharding)
    places = jax.tree.map(typed, abstract_params(dit), stored)
    if dtype in FORMS:
        places = held_as(dtype, places)
        return read_as(dtype, stored, places if mesh.empty else with_shardings(places, mesh), model), dit, config
    places = with_shardings(places, mesh)
    return onto_devices(stored, places, model), dit, config


def _low_noise(config: dict, dit: DiTConfig, objective: ObjectiveConfig, model: str | Path, dtype) -> LowNoise | None:
    """The expert for low noise in the folder of a model, whose config says from which time on it takes over."""
    if (below := config.get("low_noise_below")) is None:
        return None
    if not (isinstance(below, int | float) and 0 < below < 1):
        raise ValueError(f"{model}/config.json: low_noise_below={below!r:.100} must be a time between 0 and 1")
    params, low_dit, low_config = _load_dit(Path(model) / LOW_NOISE, dtype)
    if low_dit != dit or saved_settings(ObjectiveConfig, low_config, "objective", model) != objective:
        raise ValueError(f"{model}/{LOW_NOISE} is not the model's pair: its shape or objective is another")
    return LowNoise(params, float(below))


def _by_expert(
    loras: Sequence[str], adapters: Sequence[Adapter], digests: tuple[str, str], model: str | Path
) -> list[list[Adapter]]:
    """The adapters of each of a pair's experts, by the hash of the model that they were trained over."""
    for text, adapter in zip(loras, adapters):
        if adapter.base not in digests:
            raise ValueError(
                f"{text}: {model} is a pair of experts, and this adapter does not say that it is of one of them. "
                f"Import it: `minisora import lora FILE --base={model}` (high noise) or `--base={model}/{LOW_NOISE}`"
            )
    return [[adapter for adapter in adapters if adapter.base == digest] for digest in digests]


def trained_masks(config: dict, model: str | Path, adapters: Sequence[Adapter] = ()) -> frozenset[str] | None:
    """The kinds of conditioning mask that a model, or an adapter of it, was trained with; None: not recorded."""
    own = recorded_masks(config, model)
    return None if own is None else own.union(*(adapter.masks for adapter in adapters))


def _latent_size(config: dict, model: str | Path) -> list[int]:
    """Latent frames, height and width of training's largest clips; [frames] where only that is recorded."""
    size = config.get("latent_size", [21])
    if not (isinstance(size, list) and len(size) in (1, 3) and all(type(n) is int and 0 < n < 2**20 for n in size)):
        raise ValueError(f"{model}/config.json: latent_size={size!r:.100} must be [frames, height, width]")
    return size


def _text(config: dict, model: str | Path) -> dict | None:
    """The record of the text encoder."""
    text = config.get("text")
    if text is not None and not (
        isinstance(text, dict) and all(isinstance(text.get(k, ""), str) for k in ("path", "encoder"))
    ):
        raise ValueError(f"{model}/config.json: text={text!r:.100} must be an object that names its encoder")
    return text


def _require_codec(config: dict, dit: DiTConfig, model: str | Path, loaded: Codec, codec: str | Path) -> None:
    """Raise ValueError unless the model was trained with that codec or, if it does not say, has as many channels."""
    if "codec" in config and config["codec"] != loaded.latents:
        raise ValueError(
            f"{model} was trained on latents of codec {shown(config['codec'])}, but {codec} makes those of "
            f"{shown(loaded.latents)}: their latents mean different things; give the codec it was trained with"
        )
    if dit.latent_channels != loaded.config.latent_channels:
        raise ValueError(
            f"{model} takes latents of {dit.latent_channels} channels, codec {codec} makes "
            f"{loaded.config.latent_channels}: give the codec it was trained with"
        )
    of_codec = loaded.config.time_factor + loaded.config.latent_channels
    if dit.given_channels not in (0, of_codec):
        raise ValueError(
            f"{model} reads {dit.given_channels} channels of given frames, codec {codec} makes {of_codec} (frames of a "
            f"latent frame and channels): give the codec it was trained with"
        )


def _require_like(dit: DiTConfig, objective: ObjectiveConfig, guide: DiTConfig, theirs: ObjectiveConfig) -> None:
    for name, ours, other in (
        ("patch", dit.patch, guide.patch),
        ("text_features", dit.text_features, guide.text_features),
        ("caption_tokens", dit.caption_tokens, guide.caption_tokens),
        ("given_channels", dit.given_channels, guide.given_channels),
        ("image_features", dit.image_features, guide.image_features),
        ("image_positions", dit.image_positions, guide.image_positions),
        ("path", objective.path, theirs.path),
        ("prediction", objective.prediction, theirs.prediction),
    ):
        if ours != other:
            raise ValueError(f"the guide model has {name}={other!r}, the model {ours!r}: they must be the same")

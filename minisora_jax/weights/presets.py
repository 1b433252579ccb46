"""The published models that `minisora import` can read, by name."""

from __future__ import annotations

import dataclasses
from types import ModuleType

from minisora_jax.diffusion.objective import ObjectiveConfig
from minisora_jax.diffusion.time import TimeConfig
from minisora_jax.models.clip import CLIPConfig
from minisora_jax.models.clip_vision import CLIPVisionConfig
from minisora_jax.models.dit import DiTConfig
from minisora_jax.models.perceptual import LPIPSConfig
from minisora_jax.models.t5 import T5Config
from minisora_jax.models.vae import VAEConfig
from minisora_jax.weights import clip, clip_vision, dit, lpips, sd_vae, t5, wan_vae


@dataclasses.dataclass(frozen=True)
class CodecPreset:
    """A codec."""

    what: str  # a description for `minisora import --help`
    config: VAEConfig
    family: ModuleType  # a module of weights/ with `rules`, `name_map_of` and `IGNORED`
    latent_mean: tuple[float, ...]  # the statistics that normalise its latents
    latent_std: tuple[float, ...]
    within: tuple[str, ...] = ()  # prefixes of its tensors in the file of a whole pipeline


@dataclasses.dataclass(frozen=True)
class TextPreset:
    """A text encoder. The fields are those of `CodecPreset`."""

    what: str
    config: T5Config | CLIPConfig
    family: ModuleType
    within: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ImagePreset:
    """An image encoder. The fields are those of `CodecPreset`."""

    what: str
    config: CLIPVisionConfig
    family: ModuleType
    within: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class TransformerPreset:
    """A diffusion transformer. The first fields are those of `CodecPreset`."""

    what: str
    config: DiTConfig
    family: ModuleType
    objective: ObjectiveConfig
    times: TimeConfig
    codec: str  # preset of the codec that it was trained with
    text_encoder: str | None  # preset of its text encoder; None: it reads classes
    low_noise_below: float | None = None  # of a pair of experts: the time under which the second takes over
    window: int = 21  # latent frames that it makes at once
    conditioning: tuple[str, ...] = ()  # kinds of conditioning mask that it was trained with
    within: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class LossPreset:
    """A network that a codec's loss looks through. The fields are those of `CodecPreset`."""

    what: str
    config: LPIPSConfig
    family: ModuleType
    within: tuple[str, ...] = ()


Preset = CodecPreset | TextPreset | ImagePreset | TransformerPreset | LossPreset


CODECS = {
    "wan2.1-vae": CodecPreset(
        "video, 4x8x8, 127 M parameters: vae/ of Wan2.1-T2V-1.3B-Diffusers, or Wan2.1_VAE.pth",
        wan_vae.WAN_21,
        wan_vae,
        wan_vae.WAN_21_MEAN,
        wan_vae.WAN_21_STD,
    ),
    "wan2.2-vae": CodecPreset(
        "video, 4x16x16, 705 M parameters: vae/ of Wan2.2-TI2V-5B-Diffusers, or Wan2.2_VAE.pth",
        wan_vae.WAN_22,
        wan_vae,
        wan_vae.WAN_22_MEAN,
        wan_vae.WAN_22_STD,
    ),
    "sd-vae": CodecPreset(
        "images, 8x8, 84 M parameters: sd-vae-ft-mse, vae/ of Stable Diffusion 1 or 2, or its whole file",
        sd_vae.CONFIG,
        sd_vae,
        sd_vae.MEAN,
        sd_vae.SD_STD,
        sd_vae.WITHIN,
    ),
    "sdxl-vae": CodecPreset(
        "images, 8x8, 84 M parameters: sdxl-vae, or vae/ of stable-diffusion-xl-base-1.0, or its whole file",
        sd_vae.CONFIG,
        sd_vae,
        sd_vae.MEAN,
        sd_vae.SDXL_STD,
        sd_vae.WITHIN,
    ),
}

TEXT_ENCODERS = {
    **{name: TextPreset(t5.ABOUT[name.split("-")[0]], config, t5) for name, config in t5.CONFIGS.items()},
    **{name: TextPreset(clip.ABOUT[name], config, clip, clip.WITHIN[name]) for name, config in clip.CONFIGS.items()},
}

IMAGE_ENCODERS = {
    name: ImagePreset(clip_vision.ABOUT[name], config, clip_vision) for name, config in clip_vision.CONFIGS.items()
}

TRANSFORMERS = {
    name: TransformerPreset(
        dit.ABOUT[kind],
        config,
        dit,
        dit.OBJECTIVES[name],
        dit.TIMES[name],
        *dit.PAIRS[kind],
        low_noise_below=dit.LOW_NOISE_BELOW.get(name),
        window=dit.WINDOWS.get(name, 21),
        conditioning=dit.CONDITIONING.get(name, ()),
    )
    for name, config in dit.CONFIGS.items()
    for kind in [name if name in dit.PAIRS else name.split("-")[0]]
}

LOSSES = {"lpips": LossPreset(lpips.ABOUT, lpips.CONFIG, lpips)}


def presets() -> dict[str, Preset]:
    """All presets by name."""
    return {**CODECS, **TRANSFORMERS, **TEXT_ENCODERS, **IMAGE_ENCODERS, **LOSSES}

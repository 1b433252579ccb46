"""The video VAEs of Wan 2.1 and Wan 2.2 (Wan Team 2025, arXiv:2503.20314).

The layouts are diffusers' `AutoencoderKLWan` and Wan's own files (Wan2.1_VAE.pth, Wan2.2_VAE.pth). Wan 2.2's codec,
`is_residual=True`, groups its blocks by stage. Wan 2.1's codec numbers its blocks through all stages.
"""

from __future__ import annotations

from minisora_jax.models.vae import VAEConfig
from minisora_jax.weights.rules import Rule
from minisora_jax.weights.vae import vae_rules

WAN_21 = VAEConfig()  # 96 channels, (1, 2, 4, 4), 4x8x8 into 16
WAN_22 = VAEConfig(base=160, decoder_base=256, latent_channels=48, patch=2, shortcuts=True, halve_up=False)  # 4x16x16

# Statistics of the latents of the published weights (`latents_mean`, `latents_std` of their configs).
WAN_21_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_21_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
WAN_22_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
WAN_22_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip

_COMMON = {
    "attention_norm": "norm",
    "qkv": "to_qkv",
    "attention_out": "proj",
    "matrix": "o i 1 1",
    "space": "resample.1",
}
_DIFFUSERS = _COMMON | {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "shortcut": "conv_shortcut",
    "residual1": "mid_block.resnets.0",
    "attention": "mid_block.attentions.0",
    "residual2": "mid_block.resnets.1",
    "conv_in": "conv_in",
    "norm_out": "norm_out",
    "conv_out": "conv_out",
    "moments": "quant_conv",
    "latents": "post_quant_conv",
}
_WAN = _COMMON | {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "shortcut": "shortcut",
    "residual1": "middle.0",
    "attention": "middle.1",
    "residual2": "middle.2",
    "conv_in": "conv1",
    "norm_out": "head.0",
    "conv_out": "head.2",
    "moments": "conv1",
    "latents": "conv2",
}
# Names of the blocks of the stages, by (layout, whether they are grouped by stage).
_BLOCKS = {
    ("diffusers", False): {
        "down": "down_blocks.{n}",
        "downsampler": "down_blocks.{n}",
        "up": "up_blocks.{i}.resnets.{j}",
        "upsampler": "up_blocks.{i}.upsamplers.0",
    },
    ("diffusers", True): {
        "down": "down_blocks.{i}.resnets.{j}",
        "downsampler": "down_blocks.{i}.downsampler",
        "up": "up_blocks.{i}.resnets.{j}",
        "upsampler": "up_blocks.{i}.upsampler",
    },
    ("wan", False): {
        "down": "downsamples.{n}",
        "downsampler": "downsamples.{n}",
        "up": "upsamples.{n}",
        "upsampler": "upsamples.{n}",
    },
    ("wan", True): {
        "down": "downsamples.{i}.downsamples.{j}",
        "downsampler": "downsamples.{i}.downsamples.{j}",
        "up": "upsamples.{i}.upsamples.{j}",
        "upsampler": "upsamples.{i}.upsamples.{j}",
    },
}
NAME_MAPS = {"diffusers": _DIFFUSERS, "wan": _WAN}
IGNORED = ()


def rules(cfg: VAEConfig, name_map: str = "diffusers") -> list[Rule]:
    """The rules of a codec of any width, for a key of NAME_MAPS.

    Raises:
        ValueError: The config has another architecture than Wan's.
    """
    if cfg.images or not cfg.attention or cfg.multipliers[0] != 1 or cfg.shortcuts == cfg.halve_up:
        raise ValueError(
            f"images={cfg.images}, attention={cfg.attention}, multipliers={cfg.multipliers}, "
            f"shortcuts={cfg.shortcuts}, halve_up={cfg.halve_up}: Wan's layouts have images=False, attention=True, "
            f"a first multiplier of 1, and either halve_up (Wan 2.1) or shortcuts (Wan 2.2)"
        )
    return vae_rules(cfg, NAME_MAPS[name_map] | _BLOCKS[name_map, cfg.shortcuts])


def name_map_of(tensor_names: list[str]) -> str:
    """The key of NAME_MAPS for a checkpoint, by the name of its first convolution."""
    return "wan" if "encoder.conv1.weight" in tensor_names else "diffusers"


def published_config(cfg: VAEConfig, latent_mean: list[float], latent_std: list[float]) -> dict:
    """The config.json of diffusers' AutoencoderKLWan."""
    return {
        "_class_name": "AutoencoderKLWan",
        "base_dim": cfg.base,
        "decoder_base_dim": cfg.decoder_base,
        "z_dim": cfg.latent_channels,
        "dim_mult": list(cfg.multipliers),
        "num_res_blocks": cfg.residual_blocks,
        "attn_scales": [],
        "temperal_downsample": list(cfg.time_down),
        "is_residual": cfg.shortcuts,
        "patch_size": cfg.patch if cfg.patch > 1 else None,
        "in_channels": 3 * cfg.patch**2,
        "out_channels": 3 * cfg.patch**2,
        "scale_factor_temporal": cfg.time_factor,
        "scale_factor_spatial": cfg.space_factor,
        "latents_mean": list(latent_mean),
        "latents_std": list(latent_std),
    }

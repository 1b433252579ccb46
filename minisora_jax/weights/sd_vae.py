"""The image VAEs of Stable Diffusion 1 and 2, and of SDXL (Rombach et al. 2022, arXiv:2112.10752).

The layouts are diffusers' `AutoencoderKL`, its older files ("diffusers-old", which most published files are), and
CompVis' own, alone or in the file of a whole model.
"""

from __future__ import annotations

from minisora_jax.models.vae import VAEConfig
from minisora_jax.weights.rules import Rule
from minisora_jax.weights.vae import vae_rules

CONFIG = VAEConfig(  # 1x8x8 into 4
    base=128, time_down=(False, False, False), latent_channels=4, halve_up=False, images=True
)
# The published scaling factors are 0.18215 (SD) and 0.13025 (SDXL). No mean is subtracted.
MEAN = (0.0,) * 4
SD_STD = (1 / 0.18215,) * 4
SDXL_STD = (1 / 0.13025,) * 4
# The prefix of the codec's tensors in the file of a whole model, and tensors that only its training needs.
WITHIN = ("first_stage_model.",)
IGNORED = ("loss.", "model_ema.")

_COMMON = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_in": "conv_in",
    "conv_out": "conv_out",
    "moments": "quant_conv",
    "latents": "post_quant_conv",
    "space": "conv",
}
_DIFFUSERS = _COMMON | {
    "shortcut": "conv_shortcut",
    "down": "down_blocks.{i}.resnets.{j}",
    "downsampler": "down_blocks.{i}.downsamplers.0",
    "up": "up_blocks.{i}.resnets.{j}",
    "upsampler": "up_blocks.{i}.upsamplers.0",
    "residual1": "mid_block.resnets.0",
    "attention": "mid_block.attentions.0",
    "residual2": "mid_block.resnets.1",
    "norm_out": "conv_norm_out",
    "attention_norm": "group_norm",
    "qkv": ("to_q", "to_k", "to_v"),
    "attention_out": "to_out.0",
    "matrix": "o i",
}
NAME_MAPS = {
    "diffusers": _DIFFUSERS,
    "diffusers-old": _DIFFUSERS | {"qkv": ("query", "key", "value"), "attention_out": "proj_attn"},
    "compvis": _COMMON
    | {
        "shortcut": "nin_shortcut",
        "down": "down.{i}.block.{j}",
        "downsampler": "down.{i}.downsample",
        "up": "up.{k}.block.{j}",
        "upsampler": "up.{k}.upsample",
        "residual1": "mid.block_1",
        "attention": "mid.attn_1",
        "residual2": "mid.block_2",
        "norm_out": "norm_out",
        "attention_norm": "norm",
        "qkv": ("q", "k", "v"),
        "attention_out": "proj_out",
        "matrix": "o i 1 1",
    },
}


def rules(cfg: VAEConfig, name_map: str = "diffusers") -> list[Rule]:
    """The rules of a codec of any width, for a key of NAME_MAPS.

    Raises:
        ValueError: The config has another architecture.
    """
    if not cfg.images or not cfg.attention or cfg.multipliers[0] != 1 or cfg.shortcuts or cfg.halve_up or cfg.patch > 1:
        raise ValueError(
            f"images={cfg.images}, attention={cfg.attention}, multipliers={cfg.multipliers}, patch={cfg.patch}, "
            f"shortcuts={cfg.shortcuts}, halve_up={cfg.halve_up}: Stable Diffusion's layouts have images=True, "
            f"attention=True, a first multiplier of 1, patch=1, and neither shortcuts nor halve_up"
        )
    return vae_rules(cfg, NAME_MAPS[name_map])


def name_map_of(tensor_names: list[str]) -> str:
    """The key of NAME_MAPS for a checkpoint, by the names of its attention."""
    if "encoder.mid.attn_1.q.weight" in tensor_names:
        return "compvis"
    return "diffusers-old" if "encoder.mid_block.attentions.0.query.weight" in tensor_names else "diffusers"


def published_config(cfg: VAEConfig, latent_mean: list[float], latent_std: list[float]) -> dict:
    """The config.json of diffusers' AutoencoderKL.

    If all channels have one scale and no mean, it is written as `scaling_factor`.
    """
    one_scale = not any(latent_mean) and len(set(latent_std)) == 1
    scale = {"scaling_factor": round(1 / latent_std[0], 6)}
    each = {"scaling_factor": 1.0, "latents_mean": list(latent_mean), "latents_std": list(latent_std)}
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * len(cfg.multipliers),
        "up_block_types": ["UpDecoderBlock2D"] * len(cfg.multipliers),
        "block_out_channels": [cfg.base * m for m in cfg.multipliers],
        "layers_per_block": cfg.residual_blocks,
        "act_fn": "silu",
        "latent_channels": cfg.latent_channels,
        "norm_num_groups": 32,
        **(scale if one_scale else each),
    }

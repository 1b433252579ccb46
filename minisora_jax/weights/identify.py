"""What a file of weights is, where it is not the preset that was asked for: by names, types, shapes and config.json."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import numpy as np

from minisora_jax.weights.checkpoint import Checkpoint
from minisora_jax.weights.errors import shown
from minisora_jax.weights.presets import TRANSFORMERS, CodecPreset, TransformerPreset, presets

# Files that hold something else than a model's weights: a pattern of their names, and what they are.
_STRANGERS = (
    (
        r"lora_(embedding_)?[AB]\b|lora[._](up|down|mid)\b|^lora_(unet|te|transformer)|\.(hada|lokr)_w|dora_scale|lora_magnitude|"
        r"\.diff(_b|_m)?$",
        "a LoRA (low-rank changes to a model), not a model: import its base model, and then give it by `minisora "
        "generate --lora FILE` or `minisora import lora FILE --base=MODEL`",
    ),
    (
        r"scaled_fp8|\.(scale_weight|weight_scale|scale_input|input_scale)$",
        "quantised to 8-bit floats with scales: take the original weights in float32, float16 or bfloat16",
    ),
    (
        r"\.(absmax|quant_map|nested_absmax|quant_state\..*)$|bitsandbytes__",
        "quantised to 4 bits by bitsandbytes: take the original weights",
    ),
    (r"\.(SCB|weight_format)$", "quantised to 8 bits by bitsandbytes: take the original weights"),
    (
        r"\.(qweight|qzeros|g_idx|wscales|smooth_factor)$",
        "quantised (GPTQ, AWQ or SVDQuant): take the original weights",
    ),
    (r"\.weight\._(data|scale|zero_point)$", "quantised by quanto or torchao: take the original weights"),
    (r"^(control_model|controlnet)[._]|controlnet_blocks", "a ControlNet, not a model of its own"),
    (r"^(ip_adapter|image_proj)\.", "an IP-Adapter, not a model of its own"),
    (r"^(exp_avg|exp_avg_sq)\b|^state\.\d+\.", "the state of an optimiser, not a model"),
)

# Models that no preset is for: a pattern of their names, and what they are.
_INSIDE = r"^(model\.diffusion_model\.|diffusion_model\.|transformer\.|unet\.)?"
_ARCHITECTURES = (
    (_INSIDE + r"(double_blocks|single_blocks|single_transformer_blocks)\.", "a Flux or HunyuanVideo transformer"),
    (_INSIDE + r"joint_blocks\.", "a Stable Diffusion 3 transformer"),
    (_INSIDE + r"transformer_blocks\.\d+\.attn\.add_q_proj\.", "a Stable Diffusion 3 or Qwen-Image transformer"),
    (_INSIDE + r"(t5_y_embedder|blocks\.\d+\.attn\.qkv_x)\.", "a Mochi transformer"),
    (_INSIDE + r"(spatial|temporal)_blocks\.\d+\.", "an Open-Sora transformer"),
    (_INSIDE + r"vace_", "a Wan VACE transformer"),
    (_INSIDE + r"(input_blocks|down_blocks)\.\d+\.", "a U-Net, as of Stable Diffusion"),
    (_INSIDE + r"patchify_proj\.", "an LTX-Video transformer"),
    (_INSIDE + r"patch_embed\.text_proj\.", "a CogVideoX transformer"),
    (r"(^|\.)text_model\.encoder\.layers\.", "a CLIP text encoder"),
    (r"(^|\.)vision_model\.encoder\.", "an image encoder, of CLIP or SigLIP"),
    (r"(^|\.)layers\.\d+\.self_attn\.q_proj\.", "a language model, as of the family of Llama"),
    (r"(^|\.)encoder\.block\.\d+\.layer\.\d+\.SelfAttention\.", "a T5 text encoder"),
)


def stranger(checkpoint: Checkpoint) -> str | None:
    """What a file is that holds no plain weights, as the end of "FILE is ..."; None for a file of weights."""
    if what := _told_by_a_name(checkpoint, _STRANGERS):
        return what
    whole = [n for n in checkpoint.names if n.endswith("weight") and np.issubdtype(checkpoint.dtype(n), np.integer)]
    if whole:
        return f"quantised: {shown(whole[0])} is of {checkpoint.dtype(whole[0])}: take the original weights"
    return None


def architecture(checkpoint: Checkpoint) -> str | None:
    """The model that a file which fits no preset is of, as the end of "FILE is ..."; None if its names do not say."""
    return _told_by_a_name(checkpoint, _ARCHITECTURES)


def _told_by_a_name(checkpoint: Checkpoint, patterns: Iterable[tuple[str, str]]) -> str | None:
    for pattern, what in patterns:
        if name := next((n for n in checkpoint.names if re.search(pattern, n)), None):
            return f"{what} (it has {shown(name)})"
    return None


def declared(checkpoint: Checkpoint, name: str) -> str | None:
    """The preset that a file of the same names and shapes as `name` is for, by its position table or its config.json.

    None if that is `name`, or if the file does not say.
    """
    preset, family = presets()[name], name.split("-")[0]
    if isinstance(preset, TransformerPreset) and preset.config.positions == "fixed":
        side = _side(checkpoint)
        sides = {other: _expected_side(p) for other, p in TRANSFORMERS.items() if other.split("-")[0] == family}
        if side is None or side == sides[name]:
            return None
        return next((other for other, of_other in sides.items() if of_other == side), None)
    if isinstance(preset, CodecPreset) and name in ("sd-vae", "sdxl-vae"):
        scale = checkpoint.config.get("scaling_factor")
        other = {0.18215: "sd-vae", 0.13025: "sdxl-vae"}.get(scale) if isinstance(scale, float) else None
        return None if other == name else other
    return None


def _side(checkpoint: Checkpoint) -> int | None:
    """Tokens along a side of the images that a DiT, PixArt or Latte was trained on; None if the file does not say."""
    table = next((n for n in checkpoint.names if re.search(r"(^|\.)pos_embed(\.pos_embed)?$", n)), None)
    if table is not None and len(shape := checkpoint.shape(table)) == 3:
        return math.isqrt(shape[1])
    size, patch = (checkpoint.config.get(key) for key in ("sample_size", "patch_size"))
    return size // patch if isinstance(size, int) and isinstance(patch, int) and patch > 0 else None


def _expected_side(preset: TransformerPreset) -> int:
    return preset.config.base_grid * (2 if preset.config.size_pixels else 1)

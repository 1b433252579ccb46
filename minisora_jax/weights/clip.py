"""CLIP text encoders in the layouts of `transformers` and OpenCLIP, alone or in the file of a whole model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from minisora_jax.models.clip import CLIPConfig
from minisora_jax.weights.rules import Rule

CONFIGS = {
    "clip-l": CLIPConfig(),
    "clip-h": CLIPConfig(49_408, 1024, 16, 4096, 24, activation="gelu", projection=1024),
    "clip-h-sd2": CLIPConfig(49_408, 1024, 16, 4096, 23, activation="gelu", projection=1024),
    "clip-bigg": CLIPConfig(49_408, 1280, 20, 5120, 32, activation="gelu", projection=1280),
}
ABOUT = {
    "clip-l": "OpenAI's ViT-L/14: of Stable Diffusion 1, and text_encoder/ of SDXL",
    "clip-h": "OpenCLIP's ViT-H/14",
    "clip-h-sd2": "OpenCLIP's ViT-H/14 without its last layer: text_encoder/ of Stable Diffusion 2",
    "clip-bigg": "OpenCLIP's ViT-bigG/14: text_encoder_2/ of SDXL",
}
# Prefixes of an encoder's tensors in the whole files of Stable Diffusion 1, 2 and SDXL.
WITHIN = {
    "clip-l": ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer."),
    "clip-h": ("cond_stage_model.model.",),
    "clip-h-sd2": (),
    "clip-bigg": ("conditioner.embedders.1.model.",),
}
# Tensors of a whole CLIP that the text encoder does not need.
IGNORED = (
    "vision_model.",
    "visual_projection.",
    "visual.",
    "logit_scale",
    "attn_mask",
    "text_model.embeddings.position_ids",
    "embeddings.position_ids",
)

_TRANSFORMERS = {
    "embedding": "text_model.embeddings.token_embedding.weight",
    "positions": "text_model.embeddings.position_embedding.weight",
    "attention_norm": "text_model.encoder.layers.{i}.layer_norm1",
    "qkv": "text_model.encoder.layers.{i}.self_attn.{fused}_proj.",
    "out": "text_model.encoder.layers.{i}.self_attn.out_proj",
    "mlp_norm": "text_model.encoder.layers.{i}.layer_norm2",
    "up": "text_model.encoder.layers.{i}.mlp.fc1",
    "down": "text_model.encoder.layers.{i}.mlp.fc2",
    "norm": "text_model.final_layer_norm",
    "projection": "text_projection.weight",
}
_OPENCLIP = {
    "embedding": "token_embedding.weight",
    "positions": "positional_embedding",
    "attention_norm": "transformer.resblocks.{i}.ln_1",
    "qkv": "transformer.resblocks.{i}.attn.in_proj_",
    "out": "transformer.resblocks.{i}.attn.out_proj",
    "mlp_norm": "transformer.resblocks.{i}.ln_2",
    "up": "transformer.resblocks.{i}.mlp.c_fc",
    "down": "transformer.resblocks.{i}.mlp.c_proj",
    "norm": "ln_final",
    "projection": "text_projection",
}
NAME_MAPS = {
    "transformers": _TRANSFORMERS,
    "bare": {k: v.removeprefix("text_model.") for k, v in _TRANSFORMERS.items()},  # as transformers 5 may save it
    "openclip": _OPENCLIP,
}


def rules(cfg: CLIPConfig, name_map: str = "transformers") -> list[Rule]:
    """The rules of an encoder of any size, for a key of NAME_MAPS."""
    names, openclip = NAME_MAPS[name_map], name_map == "openclip"
    heads = (("n", cfg.heads),)
    qkv: dict[str, Any] = dict(sizes=(*heads, ("p", 3)), layers=cfg.depth, fuses=() if openclip else ("q", "k", "v"))
    joined = lambda rest: f"(p n k){rest}" if openclip else f"p (n k){rest}"

    def layer(ours: str, kernel: str, pattern: str, sizes: tuple[tuple[str, int], ...] = ()) -> list[Rule]:
        """The rules of a layer of every block: for its matrix or scale, and for its bias."""
        return [
            Rule(f"params/blocks/{ours}/{kernel}", f"{names[ours]}.weight", pattern, sizes, cfg.depth),
            Rule(f"params/blocks/{ours}/bias", f"{names[ours]}.bias", layers=cfg.depth),
        ]

    result = [
        Rule("params/embedding", names["embedding"]),
        Rule("params/positions", names["positions"]),
        *layer("attention_norm", "scale", ""),
        Rule("params/blocks/qkv/kernel", names["qkv"] + "weight", f"{joined(' d')} -> d p n k", **qkv),
        Rule("params/blocks/qkv/bias", names["qkv"] + "bias", f"{joined('')} -> p n k", **qkv),
        *layer("out", "kernel", "d (n k) -> n k d", heads),
        *layer("mlp_norm", "scale", ""),
        *layer("up", "kernel", "o i -> i o"),
        *layer("down", "kernel", "o i -> i o"),
        Rule("params/norm/scale", f"{names['norm']}.weight"),
        Rule("params/norm/bias", f"{names['norm']}.bias"),
    ]
    if cfg.projection is not None:
        # OpenCLIP's projection multiplies from the right, like ours.
        result.append(Rule("params/projection/kernel", names["projection"], "" if openclip else "e d -> d e"))
    return result


def name_map_of(tensor_names: Iterable[str]) -> str:
    """The key of NAME_MAPS for a checkpoint, by the name of its embedding."""
    return next((k for k, names in NAME_MAPS.items() if names["embedding"] in tensor_names), "transformers")


def fit(cfg: CLIPConfig, tensor_names: Iterable[str]) -> CLIPConfig:
    """The config without its projection if the file has none, as in Stable Diffusion 1 and 2."""
    has_projection = NAME_MAPS[name_map_of(tensor_names)]["projection"] in tensor_names
    return cfg if has_projection else dataclasses.replace(cfg, projection=None)


def published_config(cfg: CLIPConfig) -> dict:
    """The config.json of transformers' CLIPTextModel or CLIPTextModelWithProjection."""
    return {
        "architectures": ["CLIPTextModel" if cfg.projection is None else "CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "vocab_size": cfg.vocabulary,
        "hidden_size": cfg.width,
        "intermediate_size": cfg.mlp,
        "num_hidden_layers": cfg.depth,
        "num_attention_heads": cfg.heads,
        "max_position_embeddings": cfg.positions,
        "hidden_act": cfg.activation,
        "layer_norm_eps": 1e-5,
        "projection_dim": cfg.projection or cfg.width,
        "eos_token_id": 2 if cfg.end is None else cfg.end,  # 2: the highest id ends a caption
    }

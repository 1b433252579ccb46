"""CLIP vision encoders in the layouts of `transformers` and of Wan's authors, alone or in the file of a whole CLIP."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from minisora_jax.models.clip_vision import CLIPVisionConfig
from minisora_jax.weights.rules import Rule

CONFIGS = {"clip-vision-h": CLIPVisionConfig()}
ABOUT = {
    "clip-vision-h": "OpenCLIP's ViT-H/14: image_encoder/ of Wan2.1-I2V-*-Diffusers, or Wan's own models_clip_*.pth"
}
# Tensors of a whole CLIP, or beside the encoder, that it does not need.
IGNORED = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "head", "log_scale", "textual.")
IGNORED += ("vision_model.embeddings.position_ids", "embeddings.position_ids")

_TRANSFORMERS = {
    "class": "vision_model.embeddings.class_embedding",
    "positions": "vision_model.embeddings.position_embedding.weight",
    "patch_in": "vision_model.embeddings.patch_embedding.weight",
    "norm_in": "vision_model.pre_layrnorm",
    "attention_norm": "vision_model.encoder.layers.{i}.layer_norm1",
    "qkv": "vision_model.encoder.layers.{i}.self_attn.{fused}_proj.",
    "out": "vision_model.encoder.layers.{i}.self_attn.out_proj",
    "mlp_norm": "vision_model.encoder.layers.{i}.layer_norm2",
    "up": "vision_model.encoder.layers.{i}.mlp.fc1",
    "down": "vision_model.encoder.layers.{i}.mlp.fc2",
    "norm": "vision_model.post_layernorm",
}
_WAN_OWN = {
    "class": "cls_embedding",
    "positions": "pos_embedding",
    "patch_in": "patch_embedding.weight",
    "norm_in": "pre_norm",
    "attention_norm": "transformer.{i}.norm1",
    "qkv": "transformer.{i}.attn.to_qkv.",
    "out": "transformer.{i}.attn.proj",
    "mlp_norm": "transformer.{i}.norm2",
    "up": "transformer.{i}.mlp.0",
    "down": "transformer.{i}.mlp.2",
    "norm": "post_norm",
}
NAME_MAPS = {
    "transformers": _TRANSFORMERS,
    "bare": {k: v.removeprefix("vision_model.") for k, v in _TRANSFORMERS.items()},  # as transformers 5 saves it
    "wan-own": _WAN_OWN,
}


def rules(cfg: CLIPVisionConfig, name_map: str = "transformers") -> list[Rule]:
    """The rules of an encoder of any size, for a key of NAME_MAPS."""
    names, own = NAME_MAPS[name_map], name_map == "wan-own"
    patch = (("p", cfg.patch), ("q", cfg.patch))
    return [
        Rule("params/class", names["class"], "1 1 d -> d" if own else ""),
        Rule("params/positions", names["positions"], "1 i d -> i d" if own else ""),
        Rule("params/patch_in/kernel", names["patch_in"], "d c p q -> (p q c) d", patch),
        *_norm("params/norm_in", names["norm_in"]),
        *_block(cfg, "params/blocks", names, cfg.depth - 1, own),
        *_block(cfg, "params/last", {k: v.replace("{i}", str(cfg.depth - 1)) for k, v in names.items()}, 0, own),
        *_norm("params/norm", names["norm"]),
    ]


def _norm(ours: str, theirs: str, layers: int = 0) -> list[Rule]:
    return [
        Rule(f"{ours}/scale", f"{theirs}.weight", layers=layers),
        Rule(f"{ours}/bias", f"{theirs}.bias", layers=layers),
    ]


def _block(cfg: CLIPVisionConfig, ours: str, names: dict[str, str], layers: int, joined: bool) -> list[Rule]:
    """The rules of `layers` blocks, or of one for 0. joined: queries, keys and values are one tensor of theirs."""
    heads = (("n", cfg.heads),)
    qkv: dict[str, Any] = dict(sizes=(*heads, ("p", 3)), layers=layers, fuses=() if joined else ("q", "k", "v"))
    parts = "(p n k)" if joined else "p (n k)"

    def layer(name: str, pattern: str, sizes: tuple[tuple[str, int], ...] = ()) -> list[Rule]:
        return [
            Rule(f"{ours}/{name}/kernel", f"{names[name]}.weight", pattern, sizes, layers),
            Rule(f"{ours}/{name}/bias", f"{names[name]}.bias", layers=layers),
        ]

    return [
        *_norm(f"{ours}/attention_norm", names["attention_norm"], layers),
        Rule(f"{ours}/qkv/kernel", names["qkv"] + "weight", f"{parts} d -> d p n k", **qkv),
        Rule(f"{ours}/qkv/bias", names["qkv"] + "bias", f"{parts} -> p n k", **qkv),
        *layer("out", "d (n k) -> n k d", heads),
        *_norm(f"{ours}/mlp_norm", names["mlp_norm"], layers),
        *layer("up", "o i -> i o"),
        *layer("down", "o i -> i o"),
    ]


def name_map_of(tensor_names: Iterable[str]) -> str:
    """The key of NAME_MAPS for a checkpoint, by the name of its class token."""
    return next((k for k, names in NAME_MAPS.items() if names["class"] in tensor_names), "transformers")


def published_config(cfg: CLIPVisionConfig) -> dict:
    """The config.json of transformers' CLIPVisionModel."""
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": cfg.width,
        "intermediate_size": cfg.mlp,
        "num_hidden_layers": cfg.depth,
        "num_attention_heads": cfg.heads,
        "image_size": cfg.side,
        "patch_size": cfg.patch,
        "hidden_act": cfg.activation,
        "layer_norm_eps": 1e-5,
    }

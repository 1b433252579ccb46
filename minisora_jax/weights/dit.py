"""Diffusion transformers in diffusers' layout and in their authors' own: DiT, SiT, PixArt-alpha, Latte and Wan 2.1.

weights/dit_names.py has a table of names for each layout. `rules` reads it for any size of the family.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from minisora_jax.diffusion.objective import ObjectiveConfig
from minisora_jax.diffusion.time import TimeConfig
from minisora_jax.models.dit import DiTConfig
from minisora_jax.weights.dit_names import NAME_MAPS
from minisora_jax.weights.rules import Rule

_XL: dict[str, Any] = dict(
    latent_channels=4, out_channels=8, width=1152, depth=28, heads=16, qk_norm="none", rope=False
)
_XL |= dict(positions="fixed", cross_norm=False, micro_conditioning=False)
_CLASSES: dict[str, Any] = _XL | dict(modulation="block", caption="label", classes=1001)
_CAPTIONS: dict[str, Any] = _XL | dict(modulation="single", caption="projected", text_features=4096)
_WAN: dict[str, Any] = dict(
    modulation="single",
    qk_norm="all",
    positions="none",
    caption="projected",
    micro_conditioning=False,
    text_features=4096,
)
_WAN |= dict(caption_tokens=512)
_WAN_14B: dict[str, Any] = _WAN | dict(width=5120, depth=40, heads=40, mlp_ratio=13_824 / 5120)

CONFIGS = {
    "dit-xl-2-256": DiTConfig(**_CLASSES),
    "dit-xl-2-512": DiTConfig(**_CLASSES, base_grid=32),
    "sit-xl-2-256": DiTConfig(**_CLASSES, time_input="1 - t"),
    "pixart-alpha-256": DiTConfig(**_CAPTIONS),
    "pixart-alpha-512": DiTConfig(**_CAPTIONS, base_grid=32),
    "pixart-alpha-1024": DiTConfig(**_CAPTIONS, base_grid=32, size_pixels=16),
    "latte-1": DiTConfig(**_CAPTIONS, base_grid=32, attention_pattern=("spatial", "temporal")),
    "wan2.1-t2v-1.3b": DiTConfig(**_WAN, width=1536, depth=30, heads=12, mlp_ratio=8960 / 1536),
    "wan2.1-t2v-14b": DiTConfig(**_WAN_14B),
    "wan2.1-i2v-14b": DiTConfig(**_WAN_14B, given_channels=20, image_features=1280),
    "wan2.1-flf2v-14b": DiTConfig(**_WAN_14B, given_channels=20, image_features=1280, image_positions=514),
    "wan2.2-t2v-a14b": DiTConfig(**_WAN_14B),
    "wan2.2-i2v-a14b": DiTConfig(**_WAN_14B, given_channels=20),
    "wan2.2-ti2v-5b": DiTConfig(**_WAN, latent_channels=48, width=3072, depth=30, heads=24, mlp_ratio=14_336 / 3072),
}

# DiT, PixArt and Latte predict DDPM's noise at whole timesteps. SiT and Wan predict the velocity of a flow, and Wan is
# told whole timesteps. Times are not shifted in training. Wan's authors shift those of sampling by 5 (by 3 for image to
# video at 480x832), by 16 for first and last frame, and by 12 for two experts from words.
_TOLD_WHOLE = ObjectiveConfig(whole_timesteps=True)
_OBJECTIVES = {"sit": ObjectiveConfig(), "wan2.1": _TOLD_WHOLE, "wan2.2": _TOLD_WHOLE}
_NOISE = ObjectiveConfig(path="ddpm", prediction="noise")
OBJECTIVES = {name: _OBJECTIVES.get(name.split("-")[0], _NOISE) for name in CONFIGS}
_TIMES: dict[str, dict[str, Any]] = {
    "sit": dict(distribution="uniform"),
    "wan2.1": dict(distribution="logit-normal", sampling_shift=5.0),
    "wan2.2": dict(distribution="logit-normal", sampling_shift=5.0),
}
TIMES = {
    name: TimeConfig(base_tokens=0, per_frame=0.0, **_TIMES.get(name.split("-")[0], dict(distribution="timesteps")))
    for name in CONFIGS
}
for _name, _shift in (("wan2.1-flf2v-14b", 16.0), ("wan2.2-t2v-a14b", 12.0)):
    TIMES[_name] = dataclasses.replace(TIMES[_name], sampling_shift=_shift)
# Pairs of experts: the time under which the second takes over, and the folders of the two in diffusers' layout and in
# their authors' own.
LOW_NOISE_BELOW = {"wan2.2-t2v-a14b": 0.875, "wan2.2-i2v-a14b": 0.9}
EXPERTS = (("transformer", "transformer_2"), ("high_noise_model", "low_noise_model"))
WINDOWS = {"wan2.2-ti2v-5b": 31}  # latent frames that a model makes at once, where these are not 21
CONDITIONING = {"wan2.2-ti2v-5b": ("first",)}  # kinds of conditioning mask that a model was trained with
# The presets (codec, text encoder) that each model or family was trained with.
PAIRS = {
    "dit": ("sd-vae", None),
    "sit": ("sd-vae", None),
    "pixart": ("sd-vae", "t5-v1.1-xxl"),
    "latte": ("sd-vae", "t5-v1.1-xxl"),
    "wan2.1": ("wan2.1-vae", "umt5-xxl"),
    "wan2.2-ti2v-5b": ("wan2.2-vae", "umt5-xxl"),
    "wan2.2-t2v-a14b": ("wan2.1-vae", "umt5-xxl"),
    "wan2.2-i2v-a14b": ("wan2.1-vae", "umt5-xxl"),
}
ABOUT = {
    "dit": "images of ImageNet classes, 675 M parameters: transformer/ of DiT-XL-2-*, or DiT-XL-2-*.pt",
    "sit": "images of ImageNet classes, 675 M parameters: SiT-XL-2-256x256.pt",
    "pixart": "text to image, 0.6 B parameters: transformer/ of PixArt-alpha/PixArt-XL-2-*",
    "latte": "text to video, 1.1 B parameters: transformer/ of maxin-cn/Latte-1",
    "wan2.1": "video: transformer/ of Wan2.1-*-Diffusers, or Wan's own diffusion_pytorch_model*.safetensors",
    "wan2.2-ti2v-5b": "video from words or a picture: transformer/ of Wan2.2-TI2V-5B-Diffusers, or Wan's own files",
    "wan2.2-t2v-a14b": "video by two experts: the folder Wan2.2-T2V-A14B-Diffusers, or Wan's own Wan2.2-T2V-A14B",
    "wan2.2-i2v-a14b": "video from a picture by two experts: Wan2.2-I2V-A14B-Diffusers, or Wan's own Wan2.2-I2V-A14B",
}

# Fixed tables that some files store. Our model computes them.
# The features of "no caption" too: ours are those of the empty caption, as in diffusers' pipelines.
IGNORED = ("pos_embed", "temp_pos_embed", "freqs", "caption_projection.y_embedding", "y_embedder.y_embedding")


def name_map_of(tensor_names: list[str]) -> str:
    """The key of NAME_MAPS for a checkpoint, by the names of its first and last layers."""
    name_maps = {
        "t_block.1.weight": "pixart-own",
        "x_embedder.proj.weight": "dit-own",
        "head.head.weight": "wan-own",
        "proj_out_1.weight": "dit",
        "patch_embedding.weight": "wan",
    }
    return next((name_map for name, name_map in name_maps.items() if name in tensor_names), "pixart")


def published_name_map(cfg: DiTConfig) -> str:
    """The key of NAME_MAPS that a model is exported with: diffusers' layout, or SiT's own (diffusers has none)."""
    if cfg.caption == "label":
        return "dit-own" if cfg.time_input == "1 - t" else "dit"
    return "wan" if cfg.rope else "pixart"


def rules(cfg: DiTConfig, name_map: str | None = None) -> list[Rule]:
    """The rules of a model of any size of these families.

    Files of DiT and SiT have the same names. Only the config tells them apart.

    Args:
        cfg: The model.
        name_map: A key of NAME_MAPS; None: the layout of `published_name_map`.

    Raises:
        ValueError: No published layout has this architecture.
    """
    if cfg.motion_modules:
        raise ValueError("motion_modules=True: no published layout has motion modules between the blocks of a DiT")
    if cfg.caption == "refined" or cfg.positions == "learned" or cfg.modulation == "shared":
        raise ValueError(
            f"caption={cfg.caption!r}, positions={cfg.positions!r}, modulation={cfg.modulation!r}: no published layout "
            f"has this architecture, which is the project's own"
        )
    name_map = name_map or published_name_map(cfg)
    names, wan = NAME_MAPS[name_map], cfg.rope
    patch = (("p", cfg.patch[1]), ("q", cfg.patch[2]))

    def linear(ours: str, theirs: str, kernel: str = "o i -> i o", bias: str = "", **options: Any) -> list[Rule]:
        return [
            Rule(f"params/{ours}/kernel", f"{theirs}.weight", kernel, **options),
            Rule(f"params/{ours}/bias", f"{theirs}.bias", bias, **options),
        ]

    copies = cfg.depth if name_map == "dit" else 0  # diffusers' DiT stores the embedders in every block
    result = linear(
        "patch_in", names["patch_in"], "d c 1 p q -> (p q c) d" if wan else "d c p q -> (p q c) d", sizes=patch
    )
    result += linear("time1", names["time1"], copies=copies) + linear("time2", names["time2"], copies=copies)
    if cfg.caption == "label":
        result.append(Rule("params/labels/embedding", names["labels"], copies=copies))
    else:
        result += linear("text/up", names["text/up"]) + linear("text/down", names["text/down"])
    if cfg.size_pixels:
        for part in ("clip/sides/up", "clip/sides/down", "clip/aspect/up", "clip/aspect/down"):
            result += linear(part, names[part])
    if cfg.image_features:
        for part in ("image/up", "image/down"):
            result += linear(part, names[part])
        for part in ("image/norm_in", "image/norm_out"):
            result += _norm(f"params/{part}", names[part])
    if cfg.image_positions:
        result.append(Rule("params/image/positions", names["image/positions"], "1 i e -> i e"))
    if cfg.modulation == "single":
        result += linear("modulation", names["modulation"])
        result.append(Rule("params/modulation_out", names["modulation_out"], "1 s d -> s d" if wan else ""))
    else:
        result += linear("modulation_out", names["modulation_out"])
    # SiT's velocity points from noise to data, ours from data to noise.
    result += linear("patch_out", names["patch_out"], negate=cfg.time_input == "1 - t")
    for kind in cfg.attention_pattern:
        result += _block(cfg, kind, names)
    return result


def _norm(ours: str, theirs: str, layers: int = 0) -> list[Rule]:
    return [
        Rule(f"{ours}/scale", f"{theirs}.weight", layers=layers),
        Rule(f"{ours}/bias", f"{theirs}.bias", layers=layers),
    ]


def _block(cfg: DiTConfig, kind: str, names: dict[str, str]) -> list[Rule]:
    """The rules of the blocks of one kind: "joint", "spatial" or "temporal"."""
    ours, theirs, heads = f"params/blocks/{kind}", names[kind], (("n", cfg.heads),)

    def rule(module: str, suffix: str, key: str, pattern: str = "", **options: Any) -> Rule:
        name = theirs + names[key] + (f".{suffix}" if suffix else "")
        sizes = heads if "(n k)" in pattern else (("s", 6),) if "(s d)" in pattern else ()
        return Rule(f"{ours}/{module}", name, pattern, sizes, cfg.depth, **options)

    def attention(name: str, image: bool) -> list[Rule]:
        attention_rules = []
        for part in ("q", "k", "v", *(("image_k", "image_v") if image else ())):
            fused = next((f for f in ("qkv", "kv") if part in f and f"{name}/{f}" in names), "")
            options = {"part": (fused.index(part), len(fused))} if fused else {}
            key = f"{name}/{fused or part}"
            attention_rules.append(rule(f"{name}/{part}/kernel", "weight", key, "(n k) d -> d n k", **options))
            attention_rules.append(rule(f"{name}/{part}/bias", "bias", key, "(n k) -> n k", **options))
        attention_rules.append(rule(f"{name}/out/kernel", "weight", f"{name}/out", "d (n k) -> n k d"))
        attention_rules.append(rule(f"{name}/out/bias", "bias", f"{name}/out"))
        if cfg.qk_norm == "all":
            for part in ("q_norm", "k_norm", *(("image_k_norm",) if image else ())):
                attention_rules.append(rule(f"{name}/{part}/scale", "weight", f"{name}/{part}", "(n k) -> n k"))
        return attention_rules

    if cfg.modulation == "block":
        result = [rule("modulation/kernel", "weight", "block modulation", "o i -> i o")]
        result.append(rule("modulation/bias", "bias", "block modulation"))
    else:
        result = [rule("modulation", "", "block modulation", "1 s d -> (s d)" if cfg.rope else "s d -> (s d)")]
    result += attention("self_attention", False)
    if cfg.caption != "label" and kind != "temporal":
        result += attention("cross_attention", cfg.image_features > 0)
        if cfg.cross_norm:
            result += _norm(f"{ours}/cross_norm", theirs + names["cross_norm"], cfg.depth)
    for part in ("up", "down"):
        result.append(rule(f"mlp/{part}/kernel", "weight", f"mlp/{part}", "o i -> i o"))
        result.append(rule(f"mlp/{part}/bias", "bias", f"mlp/{part}"))
    return result


def published_config(cfg: DiTConfig) -> dict:
    """The config.json of diffusers' class for this family; for SiT, the arguments of its authors' class."""
    shape = {
        "num_attention_heads": cfg.heads,
        "attention_head_dim": cfg.width // cfg.heads,
        "in_channels": cfg.latent_channels + cfg.given_channels,
        "out_channels": cfg.out_channels or cfg.latent_channels,
        "num_layers": cfg.depth,
    }
    if cfg.rope:
        return {
            "_class_name": "WanTransformer3DModel",
            **shape,
            "patch_size": list(cfg.patch),
            "text_dim": cfg.text_features,
            "freq_dim": 256,
            "ffn_dim": round(cfg.width * cfg.mlp_ratio),
            "cross_attn_norm": cfg.cross_norm,
            "qk_norm": "rms_norm_across_heads",
            "eps": 1e-6,
            "image_dim": cfg.image_features or None,
            "added_kv_proj_dim": cfg.width if cfg.image_features else None,
            "pos_embed_seq_len": cfg.image_positions or None,
        }
    if cfg.time_input == "1 - t":
        side = {"input_size": cfg.base_grid * cfg.patch[1], "patch_size": cfg.patch[1]}
        shape = {"in_channels": cfg.latent_channels, "hidden_size": cfg.width, "depth": cfg.depth}
        return side | shape | {"num_heads": cfg.heads, "num_classes": cfg.classes - 1, "learn_sigma": True}
    stretch = 2 if cfg.size_pixels else 1  # the positions of PixArt's 1024 pixel model are those of half the grid
    images = {
        **shape,
        "sample_size": cfg.base_grid * cfg.patch[1] * stretch,
        "patch_size": cfg.patch[1],
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    }
    if cfg.caption == "label":
        norm = {"norm_type": "ada_norm_zero", "num_embeds_ada_norm": cfg.classes - 1}
        return {"_class_name": "DiTTransformer2DModel", **images, **norm}
    norm = {"norm_type": "ada_norm_single", "num_embeds_ada_norm": 1000, "cross_attention_dim": cfg.width}
    norm["caption_channels"] = cfg.text_features
    if "temporal" in cfg.attention_pattern:
        return {"_class_name": "LatteTransformer3DModel", **images, **norm, "video_length": 16}
    size = {"interpolation_scale": stretch, "use_additional_conditions": cfg.size_pixels > 0}
    return {"_class_name": "PixArtTransformer2DModel", **images, **norm, **size}

"""T5 v1.1, ByT5 and umT5 encoders in the layouts of `transformers` and of Wan's own repository."""

from __future__ import annotations

from minisora_jax.models.t5 import T5Config
from minisora_jax.weights.rules import Rule

# vocabulary, width, heads, head width, mlp, depth
CONFIGS = {
    "t5-v1.1-small": T5Config(32_128, 512, 6, 64, 1024, 8),
    "t5-v1.1-base": T5Config(32_128, 768, 12, 64, 2048, 12),
    "t5-v1.1-large": T5Config(32_128, 1024, 16, 64, 2816, 24),
    "t5-v1.1-xl": T5Config(32_128, 2048, 32, 64, 5120, 24),
    "t5-v1.1-xxl": T5Config(32_128, 4096, 64, 64, 10_240, 24),
    "byt5-small": T5Config(384, 1472, 6, 64, 3584, 12),
    "byt5-base": T5Config(384, 1536, 12, 64, 3968, 18),
    "byt5-large": T5Config(384, 1536, 16, 64, 3840, 36),
    "byt5-xl": T5Config(384, 2560, 32, 64, 6720, 36),
    "byt5-xxl": T5Config(384, 4672, 64, 64, 12_352, 36),
    "umt5-small": T5Config(256_384, 512, 6, 64, 1024, 8, shared_bias=False),
    "umt5-base": T5Config(256_384, 768, 12, 64, 2048, 12, shared_bias=False),
    "umt5-xl": T5Config(256_384, 2048, 32, 64, 5120, 24, shared_bias=False),
    "umt5-xxl": T5Config(256_384, 4096, 64, 64, 10_240, 24, shared_bias=False),
}
ABOUT = {
    "t5": "Raffel et al. 2020, in its v1.1 form",
    "byt5": "Xue et al. 2021: bytes, any language",
    "umt5": "Chung et al. 2023: 107 languages; Wan's text encoder is umt5-xxl",
}
# Tensors of whole encoder-decoder checkpoints that the encoder does not need.
IGNORED = ("decoder.", "lm_head.")

_TRANSFORMERS = {
    "embedding": "shared.weight",
    "norm": "encoder.final_layer_norm.weight",
    "shared distance": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "distance": "encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight",
    "attention_norm": "encoder.block.{i}.layer.0.layer_norm.weight",
    "q": "encoder.block.{i}.layer.0.SelfAttention.q.weight",
    "k": "encoder.block.{i}.layer.0.SelfAttention.k.weight",
    "v": "encoder.block.{i}.layer.0.SelfAttention.v.weight",
    "out": "encoder.block.{i}.layer.0.SelfAttention.o.weight",
    "mlp_norm": "encoder.block.{i}.layer.1.layer_norm.weight",
    "gate": "encoder.block.{i}.layer.1.DenseReluDense.wi_0.weight",
    "up": "encoder.block.{i}.layer.1.DenseReluDense.wi_1.weight",
    "down": "encoder.block.{i}.layer.1.DenseReluDense.wo.weight",
}
_WAN = {
    "embedding": "token_embedding.weight",
    "norm": "norm.weight",
    "shared distance": "pos_embedding.embedding.weight",
    "distance": "blocks.{i}.pos_embedding.embedding.weight",
    "attention_norm": "blocks.{i}.norm1.weight",
    "q": "blocks.{i}.attn.q.weight",
    "k": "blocks.{i}.attn.k.weight",
    "v": "blocks.{i}.attn.v.weight",
    "out": "blocks.{i}.attn.o.weight",
    "mlp_norm": "blocks.{i}.norm2.weight",
    "gate": "blocks.{i}.ffn.gate.0.weight",
    "up": "blocks.{i}.ffn.fc1.weight",
    "down": "blocks.{i}.ffn.fc2.weight",
}
NAME_MAPS = {"transformers": _TRANSFORMERS, "wan": _WAN}


def rules(cfg: T5Config, name_map: str = "transformers") -> list[Rule]:
    """The rules of an encoder of any size, for a key of NAME_MAPS."""
    names = NAME_MAPS[name_map]
    heads = (("n", cfg.heads),)
    block = lambda ours, name, pattern="", sizes=(): Rule(
        f"params/blocks/{ours}", names[name], pattern, sizes, cfg.depth
    )
    distance = (
        [Rule("params/distance", names["shared distance"])] if cfg.shared_bias else [block("distance", "distance")]
    )
    return [
        Rule("params/embedding", names["embedding"], aliases=("encoder.embed_tokens.weight",)),
        *distance,
        block("attention_norm/scale", "attention_norm"),
        *(block(f"{x}/kernel", x, "(n k) d -> d n k", heads) for x in ("q", "k", "v")),
        block("out/kernel", "out", "d (n k) -> n k d", heads),
        block("mlp_norm/scale", "mlp_norm"),
        *(block(f"{x}/kernel", x, "o i -> i o") for x in ("gate", "up", "down")),
        Rule("params/norm/scale", names["norm"]),
    ]


def name_map_of(tensor_names: list[str]) -> str:
    """The key of NAME_MAPS for a checkpoint, by the name of its embedding."""
    return "wan" if _WAN["embedding"] in tensor_names else "transformers"


def published_config(cfg: T5Config) -> dict:
    """The config.json of transformers' T5EncoderModel (T5 v1.1, ByT5) or UMT5EncoderModel."""
    family = "T5" if cfg.shared_bias else "UMT5"
    return {
        "architectures": [f"{family}EncoderModel"],
        "model_type": family.lower(),
        "vocab_size": cfg.vocabulary,
        "d_model": cfg.width,
        "d_kv": cfg.head_width,
        "d_ff": cfg.mlp,
        "num_layers": cfg.depth,
        "num_heads": cfg.heads,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": cfg.buckets,
        "relative_attention_max_distance": cfg.max_distance,
        "layer_norm_epsilon": 1e-6,
    }

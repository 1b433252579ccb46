"""Reference results of transformers' text encoders, for tests/test_parity_{t5,clip}.py; made by make.py."""

import torch
from random_weights import draw_ids
from reference import fill, gradients, names_and_shapes, save, weigh
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

GATED = dict(feed_forward_proj="gated-gelu")
CLIP = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3)
CLIP |= dict(max_position_embeddings=20, projection_dim=12, bos_token_id=0, pad_token_id=1)
CLIP_VARIANTS = {
    "quick": dict(hidden_act="quick_gelu", eos_token_id=2),  # 2: the old rule, the highest id ends the caption
    "exact": dict(hidden_act="gelu", eos_token_id=7),
}


def t5() -> None:
    small = dict(vocab_size=50, d_model=24, d_kv=8, d_ff=40, num_layers=3, num_heads=3, feed_forward_proj="gated-gelu")
    full = {
        "t5-v1.1-xxl": T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, **GATED),
        "byt5-xxl": T5Config(vocab_size=384, d_model=4672, d_kv=64, d_ff=12352, num_layers=36, num_heads=64, **GATED),
        "umt5-xxl": UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64),
    }
    results, published = {}, {}
    for family, model_class, config_class in (("t5", T5EncoderModel, T5Config), ("umt5", UMT5EncoderModel, UMT5Config)):
        model = fill(model_class(config_class(**small)))
        for length, kept in ((7, 7), (300, 300), (12, 5)):  # 300: beyond the last distance bucket
            ids = torch.from_numpy(draw_ids(f"ids {length}", (2, length), 50))
            mask = torch.zeros_like(ids)
            mask[:, :kept] = 1
            out = model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :kept]
            results[f"{family} {length} {kept}"] = out.detach().numpy()
        ids = torch.from_numpy(draw_ids("ids 7", (2, 7), 50))
        names = ["shared.weight"]
        for part in ("SelfAttention.q.weight", "SelfAttention.relative_attention_bias.weight", "layer_norm.weight"):
            names.append(f"encoder.block.0.layer.0.{part}")
        names.append("encoder.block.1.layer.1.DenseReluDense.wi_0.weight")
        loss = (model(input_ids=ids).last_hidden_state ** 2 * weigh((2, 7, 24))).mean()
        results |= {f"{family} {k}": v for k, v in gradients(model, loss, names).items()}
    for name, config in full.items():
        model_class = UMT5EncoderModel if name.startswith("umt5") else T5EncoderModel
        published[name] = names_and_shapes(lambda model_class=model_class, config=config: model_class(config))
    save("t5", results, published=published)


def captions(length: int) -> torch.Tensor:
    """Ids with an end token (7, and 49, the highest) twice, of which the first counts."""
    ids = draw_ids(f"ids {length}", (2, length), 49)
    ids[ids == 7] = 8
    ids[:, length // 2] = ids[:, -1] = 49
    ids[:, length // 2 + 1] = ids[:, -2] = 7
    return torch.from_numpy(ids)


def clip() -> None:
    results = {}
    for name, variant in CLIP_VARIANTS.items():
        model = fill(CLIPTextModelWithProjection(CLIPTextConfig(**CLIP, **variant)))
        for length, kept in ((20, 20), (7, 7), (13, 9)):
            ids = captions(length)
            mask = (torch.arange(length) < kept).long().expand(2, -1)
            out = model(input_ids=ids, attention_mask=mask)
            results[f"{name} {length} {kept}"] = out.last_hidden_state[:, :kept].detach().numpy()
            results[f"{name} {length} {kept} pooled"] = out.text_embeds.detach().numpy()
        out = model(input_ids=captions(7))
        loss = (out.last_hidden_state**2 * weigh((2, 7, 24))).mean() + (out.text_embeds**2).mean()
        layer = "text_model.encoder.layers.1"
        names = ["text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight"]
        names += [f"{layer}.self_attn.k_proj.weight", f"{layer}.self_attn.v_proj.bias", f"{layer}.layer_norm2.weight"]
        names += [f"{layer}.mlp.fc1.weight", "text_projection.weight"]
        results |= {f"{name} {k}": v for k, v in gradients(model, loss, names).items()}

    def full(width, mlp, depth, heads, model_class=CLIPTextModelWithProjection):
        config = dict(hidden_size=width, intermediate_size=mlp, num_hidden_layers=depth, num_attention_heads=heads)
        return names_and_shapes(lambda: model_class(CLIPTextConfig(**config, projection_dim=width)))

    published = {"clip-l": full(768, 3072, 12, 12), "clip-bigg": full(1280, 5120, 32, 20)}
    published["bare clip-l"] = full(768, 3072, 12, 12, CLIPTextModel)
    save("clip", results, published=published)

"""Reference results of CLIP's text encoders from `transformers`; run as make.py is: python tests/parity/make_clip.py"""

import torch
from make import fill, gradients, names_and_shapes, save, weigh
from random_weights import draw_ids
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

SMALL = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3)
SMALL |= dict(max_position_embeddings=20, projection_dim=12, bos_token_id=0, pad_token_id=1)
VARIANTS = {
    "quick": dict(hidden_act="quick_gelu", eos_token_id=2),  # 2: the old rule, the highest id ends the caption
    "exact": dict(hidden_act="gelu", eos_token_id=7),
}


def captions(length: int) -> torch.Tensor:
    """Ids with an end token (7, and 49, the highest) twice, of which the first counts."""
    ids = draw_ids(f"ids {length}", (2, length), 49)
    ids[ids == 7] = 8
    ids[:, length // 2] = ids[:, -1] = 49
    ids[:, length // 2 + 1] = ids[:, -2] = 7
    return torch.from_numpy(ids)


def clip() -> None:
    results = {}
    for name, variant in VARIANTS.items():
        model = fill(CLIPTextModelWithProjection(CLIPTextConfig(**SMALL, **variant)))
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    clip()

"""Reference results of the diffusion transformers, for tests/test_parity_dit.py; made by make.py."""

import re

import torch
from random_weights import draw_ids, draw_input
from reference import fill, gradients, names_and_shapes, save

SMALL = dict(num_attention_heads=2, attention_head_dim=12, num_layers=2, norm_eps=1e-6)
IMAGE = dict(in_channels=4, out_channels=8, sample_size=16, patch_size=2, activation_fn="gelu-approximate")


def collapsed(names: dict[str, list[int]]) -> dict[str, list]:
    """name with {i} for its block -> [shape, number of blocks]; the blocks are alike."""
    found: dict[str, list] = {}
    for name, shape in names.items():
        key = re.sub(r"(blocks|layers)\.\d+\.", r"\1.{i}.", name)
        if key in found and found[key][0] != shape:
            raise ValueError(f"{name} is {shape}, in another block {found[key][0]}")
        found[key] = [shape, found.get(key, [shape, 0])[1] + 1]
    return found


def tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(draw_input(name, shape))


def weighted(out: torch.Tensor) -> torch.Tensor:
    return (out * tensor("weights of the loss", tuple(out.shape))).mean()


def wan() -> None:
    from diffusers import WanTransformer3DModel

    small = dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2)
    small |= dict(text_dim=10, ffn_dim=40)
    model, results = fill(WanTransformer3DModel(**small)), {}
    for (t, h, w), length, time in (((3, 4, 6), 7, 437.0), ((1, 2, 10), 12, 3.0), ((5, 6, 2), 1, 1000.0)):
        x, text = tensor(f"latents {t}x{h}x{w}", (2, 4, t, h, w)), tensor(f"text {length}", (2, length, 10))
        with torch.no_grad():
            out = model(x, torch.tensor([time, time]), text).sample
            results[f"t2v {t}x{h}x{w} {length} {time}"] = out.numpy()
            # A noise level for each token, as Wan 2.2's TI2V has it.
            tokens = t * h * w // 4
            times = torch.linspace(0, 1000, 2 * tokens).reshape(2, tokens)
            results[f"each {t}x{h}x{w} {length}"] = model(x, times, text).sample.numpy()
    out = model(tensor("latents 3x4x6", (2, 4, 3, 4, 6)), torch.tensor([437.0, 437.0]), tensor("text 7", (2, 7, 10)))
    names = ["patch_embedding.weight", "condition_embedder.time_proj.weight", "blocks.0.scale_shift_table"]
    names += ["blocks.1.attn1.norm_q.weight", "blocks.0.attn2.to_v.weight", "blocks.1.norm2.bias", "scale_shift_table"]
    results |= gradients(model, weighted(out.sample), names)

    model = fill(WanTransformer3DModel(**small | dict(in_channels=9, image_dim=6, added_kv_proj_dim=32)))
    x, text, image = tensor("i2v 3x4x6", (1, 9, 3, 4, 6)), tensor("text 512", (1, 512, 10)), tensor("image", (1, 5, 6))
    with torch.no_grad():
        results["i2v 3x4x6"] = model(x, torch.tensor([437.0]), text, image).sample.numpy()
    sizes = {
        "wan2.1-t2v-1.3b": dict(num_attention_heads=12, num_layers=30, ffn_dim=8960),
        "wan2.1-t2v-14b": {},
        "wan2.1-i2v-14b": dict(in_channels=36, image_dim=1280, added_kv_proj_dim=5120),
        "wan2.1-flf2v-14b": dict(in_channels=36, image_dim=1280, added_kv_proj_dim=5120, pos_embed_seq_len=514),
        "wan2.2-i2v-a14b": dict(in_channels=36),
        "wan2.2-ti2v-5b": dict(in_channels=48, out_channels=48, num_attention_heads=24, num_layers=30, ffn_dim=14_336),
    }
    make = lambda size: lambda: WanTransformer3DModel(**dict(text_dim=4096, out_channels=16) | size)
    save("wan", results, published={k: collapsed(names_and_shapes(make(v))) for k, v in sizes.items()})


def dit() -> None:
    """DiT with its authors' frequencies, counted to half; diffusers counts them to half - 1."""
    from diffusers import DiTTransformer2DModel

    model, results = fill(DiTTransformer2DModel(**SMALL, **IMAGE, num_embeds_ada_norm=10)), {}
    first = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks:
        block.norm1.emb = first  # in the published weights the embedders of all blocks are one
        first.time_proj.downscale_freq_shift = 0
    labels = torch.from_numpy(draw_ids("labels", (3,), 11))
    for side, time in ((16, 437.0), (12, 3.0), (16, 0.3)):
        x = tensor(f"latents {side}", (3, 4, side, side))
        with torch.no_grad():
            results[f"{side} {time}"] = model(x, torch.full((3,), time), labels).sample.numpy()
    out = model(tensor("latents 16", (3, 4, 16, 16)), torch.full((3,), 437.0), labels).sample
    names = ["pos_embed.proj.weight", "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight"]
    names += ["transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight", "proj_out_1.weight"]
    names += ["transformer_blocks.1.norm1.linear.weight", "transformer_blocks.1.attn1.to_k.weight"]
    results |= gradients(model, weighted(out), names)
    full = dict(num_attention_heads=16, attention_head_dim=72, num_layers=28, **IMAGE | dict(sample_size=32))
    save("dit", results, published={"dit-xl-2-256": collapsed(names_and_shapes(lambda: DiTTransformer2DModel(**full)))})


def pixart() -> None:
    from diffusers import PixArtTransformer2DModel

    results, published = {}, {}
    for family, sizes in (("plain", False), ("sized", True)):
        small = dict(cross_attention_dim=24, caption_channels=10, use_additional_conditions=sizes)
        model = fill(PixArtTransformer2DModel(**SMALL, **IMAGE, **small))
        for (h, w), length, time in (((16, 16), 7, 437.0), ((12, 20), 3, 3.0)):
            added = dict(resolution=torch.tensor([[8.0 * h, 8.0 * w]] * 2), aspect_ratio=torch.tensor([[h / w]] * 2))
            mask = torch.ones(2, length + 4)
            mask[:, length:] = 0  # padding, which the mask hides
            text = tensor(f"text {length}", (2, length, 10))
            text = torch.cat([text, torch.full((2, 4, 10), 9.0)], dim=1)
            x = tensor(f"latents {h}x{w}", (2, 4, h, w))
            out = model(x, text, torch.full((2,), time), added, encoder_attention_mask=mask).sample
            results[f"{family} {h}x{w} {length} {time}"] = out.detach().numpy()
        names = [
            "adaln_single.linear.weight",
            "caption_projection.linear_2.weight",
            "transformer_blocks.1.attn2.to_q.bias",
        ]
        names += ["adaln_single.emb.resolution_embedder.linear_2.weight"] if sizes else []
        results |= {f"{family} {k}": v for k, v in gradients(model, weighted(out), names).items()}
    full = dict(num_layers=28, caption_channels=4096)
    for name, side in (("pixart-alpha-256", 32), ("pixart-alpha-512", 64), ("pixart-alpha-1024", 128)):
        make = lambda side=side: PixArtTransformer2DModel(**full, sample_size=side)
        published[name] = collapsed(names_and_shapes(make))
    save("pixart", results, published=published)


def latte() -> None:
    from diffusers import LatteTransformer3DModel

    norms = dict(norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, num_embeds_ada_norm=1000)
    both = IMAGE | norms | dict(attention_bias=True)
    small = dict(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, cross_attention_dim=24, caption_channels=10
    )
    results = {}
    for (t, h, w), length, time in (((3, 16, 16), 7, 437.0), ((1, 12, 20), 3, 3.0), ((5, 4, 8), 2, 999.0)):
        model = fill(LatteTransformer3DModel(**both, **small, video_length=t))
        x, text = tensor(f"latents {t}x{h}x{w}", (2, 4, t, h, w)), tensor(f"text {length}", (2, length, 10))
        out = model(x, torch.full((2,), time), text).sample
        results[f"{t}x{h}x{w} {length} {time}"] = out.detach().numpy()
    names = ["transformer_blocks.0.attn2.to_k.weight", "temporal_transformer_blocks.1.attn1.to_v.weight"]
    names += ["temporal_transformer_blocks.0.scale_shift_table", "proj_out.weight"]
    results |= gradients(model, weighted(out), names)
    full = both | dict(num_attention_heads=16, attention_head_dim=72, num_layers=28, cross_attention_dim=1152)
    full |= dict(sample_size=64, caption_channels=4096)
    save("latte", results, published={"latte-1": collapsed(names_and_shapes(lambda: LatteTransformer3DModel(**full)))})

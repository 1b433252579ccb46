"""Reference results of the codecs, for tests/test_parity_{wan,sd}_vae.py; made by make.py."""

import importlib.util
import sys
from pathlib import Path

import torch
from random_weights import draw_input
from reference import fill, gradients, names_and_shapes, save


def pixels(size, channels=3):
    name = "x".join(map(str, size))
    return torch.from_numpy(draw_input(f"pixels {name}", (1, channels, *size))).clamp(-1, 1)


def latents(size, latent_size, channels):
    return torch.from_numpy(draw_input(f"latents {'x'.join(map(str, size))}", (1, channels, *latent_size)))


def wan_vae() -> None:
    from diffusers import AutoencoderKLWan

    small = dict(base_dim=4, z_dim=3, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True])
    model, results = fill(AutoencoderKLWan(**small)), {}
    for T, H, W in ((1, 16, 24), (5, 24, 16), (13, 16, 16)):
        x = torch.from_numpy(draw_input(f"pixels {T}x{H}x{W}", (2, 3, T, H, W))).clamp(-1, 1)
        with torch.no_grad():
            moments = model._encode(x)
            z = torch.from_numpy(draw_input(f"latents {T}x{H}x{W}", (2, 3, 1 + (T - 1) // 4, H // 8, W // 8)))
            results[f"moments {T}x{H}x{W}"] = moments.numpy()
            results[f"decoded {T}x{H}x{W}"] = model._decode(z).sample.numpy()
    # The loss takes each side's own path: encoder from pixels, decoder from latents.
    x = torch.from_numpy(draw_input("pixels 5x24x16", (2, 3, 5, 24, 16))).clamp(-1, 1)
    z = torch.from_numpy(draw_input("latents 5x24x16", (2, 3, 2, 3, 2)))
    loss = (model._encode(x) ** 2).mean()
    results |= gradients(
        model, loss, ["encoder.conv_in.weight", "encoder.down_blocks.5.time_conv.weight", "quant_conv.bias"]
    )
    loss = (model._decode(z).sample ** 2).mean()
    names = ["decoder.conv_in.weight", "decoder.mid_block.attentions.0.to_qkv.weight"]
    results |= gradients(model, loss, [*names, "decoder.up_blocks.0.upsamplers.0.time_conv.weight"])
    save("wan_vae", results, published=names_and_shapes(AutoencoderKLWan))


def wan22_vae() -> None:
    from diffusers import AutoencoderKLWan

    layout = dict(is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16)
    model = fill(AutoencoderKLWan(base_dim=4, decoder_base_dim=8, z_dim=3, **layout))
    results = {}
    for T, H, W in ((1, 16, 48), (5, 48, 16), (13, 16, 16)):
        x, z = pixels((T, H, W)), latents((T, H, W), (1 + (T - 1) // 4, H // 16, W // 16), 3)
        with torch.no_grad():
            results[f"moments {T}x{H}x{W}"] = model._encode(x).numpy()
            results[f"decoded {T}x{H}x{W}"] = model._decode(z).sample.numpy()
    loss = (model._encode(pixels((5, 48, 16))) ** 2).mean()
    names = ["encoder.conv_in.weight", "encoder.down_blocks.2.downsampler.time_conv.weight", "quant_conv.bias"]
    results |= gradients(model, loss, names)
    loss = (model._decode(latents((5, 48, 16), (2, 3, 1), 3)).sample ** 2).mean()
    names = ["decoder.conv_in.weight", "decoder.mid_block.attentions.0.proj.weight"]
    results |= gradients(model, loss, [*names, "decoder.up_blocks.3.resnets.0.conv_shortcut.weight"])
    full = lambda: AutoencoderKLWan(base_dim=160, decoder_base_dim=256, z_dim=48, **layout)
    save("wan22_vae", results, published=names_and_shapes(full))


def wan_original() -> None:
    """Both Wan VAEs in their own layout, as DiffSynth-Studio keeps it, with weights drawn by their own names."""
    found = [Path(p) / "diffsynth/models/wan_video_vae.py" for p in sys.path]
    spec = importlib.util.spec_from_file_location("wan_video_vae", next(p for p in found if p.exists()))
    wan = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wan)
    nothing = [torch.zeros(3), torch.ones(3)]
    results, published = {}, {}
    for family, make, small, (T, H, W), factor in (
        ("wan_vae", wan.VideoVAE_, dict(dim=4, z_dim=3), (5, 24, 16), 8),
        ("wan22_vae", wan.VideoVAE38_, dict(dim=4, dec_dim=8, z_dim=3), (5, 48, 16), 16),
    ):
        model = fill(make(**small))
        with torch.no_grad():
            results[f"{family} mean"] = model.encode(pixels((T, H, W)), nothing).numpy()
            z = latents((T, H, W), (2, H // factor, W // factor), 3)
            results[f"{family} decoded"] = model.decode(z, nothing).clamp(-1, 1).numpy()
        published[family] = names_and_shapes(make)
    save("wan_original", results, published=published)


def sd_vae() -> None:
    from diffusers import AutoencoderKL

    layout = dict(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, layers_per_block=2
    )
    model = fill(AutoencoderKL(block_out_channels=[32, 64, 64], latent_channels=3, **layout))
    moments = lambda x: model.quant_conv(model.encoder(x))
    decoded = lambda z: model.decoder(model.post_quant_conv(z))
    results = {}
    for H, W in ((16, 16), (20, 36), (12, 4)):
        x, z = pixels((H, W)), latents((H, W), (H // 4, W // 4), 3)
        with torch.no_grad():
            results |= {f"moments {H}x{W}": moments(x).numpy(), f"decoded {H}x{W}": decoded(z).numpy()}
    names = ["encoder.conv_in.weight", "encoder.mid_block.attentions.0.to_k.weight", "quant_conv.bias"]
    names.append("encoder.mid_block.attentions.0.group_norm.weight")
    results |= gradients(model, (moments(pixels((20, 36))) ** 2).mean(), names)
    names = [
        "decoder.conv_in.weight",
        "decoder.conv_norm_out.bias",
        "decoder.up_blocks.2.resnets.0.conv_shortcut.weight",
    ]
    results |= gradients(model, (decoded(latents((20, 36), (5, 9), 3)) ** 2).mean(), names)
    four = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    full = names_and_shapes(lambda: AutoencoderKL(block_out_channels=[128, 256, 512, 512], layers_per_block=2, **four))
    save("sd_vae", results, published=full, compvis=compvis_names(set(full)))


def compvis_names(names: set[str]) -> dict[str, str]:
    """diffusers' names to CompVis', as diffusers' converter reads every name that CompVis' grammar allows."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    block = [f"{x}.{y}" for x in ("norm1", "conv1", "norm2", "conv2", "nin_shortcut") for y in ("weight", "bias")]
    places = [f"mid.block_{k}.{x}" for k in (1, 2) for x in block]
    places += [f"mid.attn_1.{x}.{y}" for x in ("norm", "q", "k", "v", "proj_out") for y in ("weight", "bias")]
    for i in range(4):
        places += [f"{way}.{i}.block.{j}.{x}" for way in ("down", "up") for j in range(3) for x in block]
        places += [f"{way}.{i}.{way}sample.conv.{y}" for way in ("down", "up") for y in ("weight", "bias")]
    places += [f"{x}.{y}" for x in ("conv_in", "norm_out", "conv_out") for y in ("weight", "bias")]
    theirs = [f"{side}.{p}" for side in ("encoder", "decoder") for p in places]
    theirs += [f"{x}.{y}" for x in ("quant_conv", "post_quant_conv") for y in ("weight", "bias")]
    numbered = {name: torch.full((1, 1, 1, 1), float(i)) for i, name in enumerate(theirs)}
    converted = convert_ldm_vae_checkpoint(numbered, {"down_block_types": [0] * 4, "up_block_types": [0] * 4})
    assert names <= set(converted)
    return {name: theirs[int(converted[name].flatten()[0])] for name in sorted(names)}

"""Reference results from PyTorch, for tests/test_parity_*.py. Run in an environment of its own (Python 3.11):

    pip install torch==2.13.0 diffusers transformers safetensors
    python tests/parity/make.py            # writes tests/parity/fixtures/*.safetensors

Weights and inputs are drawn by name (random_weights.py), so a fixture holds outputs and gradients only, and the names
and shapes of the published model at its full size.
"""

import json
from pathlib import Path

import numpy as np
import torch
from random_weights import draw, draw_ids, draw_input
from safetensors.numpy import save_file

FIXTURES = Path(__file__).with_name("fixtures")


def fill(model: torch.nn.Module) -> torch.nn.Module:
    drawn = set()  # a tied tensor has several names, of which the first counts
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.data_ptr() in drawn:
                continue
            drawn.add(tensor.data_ptr())
            tensor.copy_(torch.from_numpy(draw(name, tuple(tensor.shape))))
    return model.eval()


def names_and_shapes(make) -> dict[str, list[int]]:
    with torch.device("meta"):
        return {k: list(v.shape) for k, v in make().state_dict().items()}


def gradients(model: torch.nn.Module, loss: torch.Tensor, names: list[str]) -> dict[str, np.ndarray]:
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, [parameters[n] for n in names])
    return {f"grad/{n}": g.numpy() for n, g in zip(names, grads)}


def save(family: str, results: dict[str, np.ndarray], **facts) -> None:
    FIXTURES.mkdir(exist_ok=True)
    arrays = {k: np.asarray(v, np.float32, order="C") for k, v in results.items()}
    save_file(arrays, FIXTURES / f"{family}.safetensors", {k: json.dumps(v) for k, v in facts.items()})
    print(family, {k: v.shape for k, v in arrays.items()})


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


def t5() -> None:
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

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


GATED = dict(feed_forward_proj="gated-gelu")


def weigh(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(draw_input("weights of the loss", shape))


def torch_file() -> None:
    """A file of torch's own format, with what occurs in published ones: half precision, views, a nested dict."""
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tensors = {
        "whole": base,
        "transposed": base.T,
        "rows": base[1:],
        "half": (base / 7).half(),
        "brain": (base / 7).bfloat16(),
        "parameter": torch.nn.Parameter(base + 0.5),
        "long": torch.tensor(3),
    }
    torch.save({"epoch": 3, "state_dict": tensors}, FIXTURES / "nested.pth")
    save("nested", {k: v.detach().float().numpy() for k, v in tensors.items()})


if __name__ == "__main__":
    torch.set_num_threads(1)
    wan_vae()
    t5()
    torch_file()

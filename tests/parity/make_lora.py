"""Reference results of LoRA: peft on diffusers' Wan, for tests/test_parity_lora.py; made by make.py."""

import tempfile
from pathlib import Path

import torch
from make_dit import tensor, weighted
from random_weights import draw
from reference import fill, gradients, save
from safetensors import safe_open

RANK, ALPHA = 3, 1.5
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "time_proj", "linear_1", "linear_2", "proj_out"]
TARGETS += ["patch_embedding"]


def lora() -> None:
    from diffusers import WanTransformer3DModel
    from peft import LoraConfig

    small = dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2)
    model = fill(WanTransformer3DModel(**small, text_dim=10, ffn_dim=40))
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    names = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # drawn by the names that a saved adapter has
                saved = name.replace(".default", "")
                parameter.copy_(torch.from_numpy(draw(saved, tuple(parameter.shape))))
                names.append(name)
    results = {}
    for (t, h, w), length, time in (((3, 4, 6), 7, 437.0), ((1, 2, 10), 12, 3.0)):
        x, text = tensor(f"latents {t}x{h}x{w}", (2, 4, t, h, w)), tensor(f"text {length}", (2, length, 10))
        out = model(x, torch.tensor([time, time]), text).sample
        results[f"t2v {t}x{h}x{w} {length} {time}"] = out.detach().numpy()
        if t == 3:
            results |= {k.replace(".default", ""): v for k, v in gradients(model, weighted(out), names).items()}
    with tempfile.TemporaryDirectory() as folder:
        model.save_lora_adapter(folder)
        with safe_open(Path(folder) / "pytorch_lora_weights.safetensors", "np") as file:
            keys = {key: file.get_slice(key).get_shape() for key in file.keys()}
    save("lora", results, keys=keys, rank=RANK, alpha=ALPHA)

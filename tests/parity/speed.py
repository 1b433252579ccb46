"""Seconds on this CPU, ours and PyTorch's, side by side: the parent runs each side in turn in processes of their own.

    python tests/parity/speed.py --torch PYTHON_WITH_TORCH     # prints a table, and JSON with --json FILE

Both sides run the same architectures with random float32 weights on all cores. A round is warm-up, then the least of
five calls; of three rounds, in turn, the least counts.
"""

import argparse
import json
import math
import subprocess
import sys
import time

# Shapes are small enough for a laptop and large enough that arithmetic decides.
DIT = dict(width=512, heads=8, depth=4, tokens=(5, 16, 16), text=64, text_width=512)  # tokens (t, h, w)
VIDEO, IMAGE = (5, 128, 128), (1, 256, 256)  # frames, height, width
WAN_VAE = dict(base=32, multipliers=(1, 2, 4, 4), residual_blocks=2, time_down=(False, True, True), latent_channels=16)
SD_VAE = dict(base=64, multipliers=(1, 2, 4, 4), residual_blocks=2, latent_channels=4)
T5 = dict(vocabulary=1000, width=512, heads=8, head_width=64, mlp=1024, depth=6, length=128, batch=4)
CLIP = dict(vocabulary=1000, width=512, heads=8, mlp=2048, depth=6, length=77, batch=8)


def best(call, repeats: int = 5) -> float:
    call()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


# ---- PyTorch


def torch_side(only: str) -> dict[str, float]:
    import torch

    found = {}

    def measure(name, model, *inputs, train=True):
        if not name.startswith(only):
            return
        call = lambda: model.eval()(*inputs, return_dict=False)[0]

        def forward():
            with torch.no_grad():
                call()

        found[f"{name} forward"] = best(forward)
        if train:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

            def step():
                optimizer.zero_grad()
                (call() ** 2).mean().backward()
                optimizer.step()

            found[f"{name} train step"] = best(step)

    (t, h, w), heads, width = DIT["tokens"], DIT["heads"], DIT["width"]
    shape = dict(num_attention_heads=heads, attention_head_dim=width // heads, num_layers=DIT["depth"])
    text = torch.randn(1, DIT["text"], DIT["text_width"])
    from diffusers import (
        AutoencoderKL,
        AutoencoderKLWan,
        DiTTransformer2DModel,
        LatteTransformer3DModel,
        PixArtTransformer2DModel,
        WanTransformer3DModel,
    )

    if "Wan DiT".startswith(only):
        wan = dict(in_channels=16, out_channels=16, text_dim=DIT["text_width"], ffn_dim=4 * width)
        video = torch.randn(1, 16, t, 2 * h, 2 * w)
        measure("Wan DiT", WanTransformer3DModel(**shape, **wan), video, torch.tensor([500.0]), text)
    image = dict(in_channels=4, out_channels=8, patch_size=2, activation_fn="gelu-approximate", norm_eps=1e-6)
    if "DiT".startswith(only):
        x, labels = torch.randn(4, 4, 2 * h, 2 * w), torch.zeros(4, dtype=torch.long)
        model = DiTTransformer2DModel(**shape, **image, sample_size=2 * h, num_embeds_ada_norm=10)
        measure("DiT", model, x, torch.full((4,), 500.0), labels)
    if "PixArt".startswith(only):
        known = dict(cross_attention_dim=width, caption_channels=DIT["text_width"], use_additional_conditions=False)
        model = PixArtTransformer2DModel(**shape, **image, **known, sample_size=2 * h)
        measure("PixArt", model, torch.randn(4, 4, 2 * h, 2 * w), text.repeat(4, 1, 1), torch.full((4,), 500.0))
    if "Latte".startswith(only):
        known = dict(cross_attention_dim=width, caption_channels=DIT["text_width"], attention_bias=True, video_length=t)
        known |= dict(norm_type="ada_norm_single", norm_elementwise_affine=False, num_embeds_ada_norm=1000)
        model = LatteTransformer3DModel(**shape, **image, **known, sample_size=2 * h)
        measure("Latte", model, torch.randn(1, 4, t, 2 * h, 2 * w), torch.tensor([500.0]), text)

    def codec(name, model, size, latents):
        if name.startswith(only):
            x, z = torch.randn(1, 3, *size), torch.randn(latents)
            with torch.no_grad():
                found[f"{name} encode"] = best(lambda: model.encode(x))
                found[f"{name} decode"] = best(lambda: model.decode(z))

    v, (T, H, W) = WAN_VAE, VIDEO
    small = dict(base_dim=v["base"], z_dim=16, dim_mult=list(v["multipliers"]), num_res_blocks=2)
    codec("Wan 2.1 VAE", AutoencoderKLWan(**small).eval(), VIDEO, (1, 16, 1 + (T - 1) // 4, H // 8, W // 8))
    residual = dict(is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16)
    model = AutoencoderKLWan(**small, **residual).eval()
    codec("Wan 2.2 VAE", model, VIDEO, (1, 16, 1 + (T - 1) // 4, H // 16, W // 16))
    channels = tuple(SD_VAE["base"] * m for m in SD_VAE["multipliers"])
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    model = AutoencoderKL(block_out_channels=channels, layers_per_block=2, latent_channels=4, **blocks).eval()
    codec("SD VAE", model, IMAGE[1:], (1, 4, IMAGE[1] // 8, IMAGE[2] // 8))

    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    c = T5
    cfg = T5Config(vocab_size=c["vocabulary"], d_model=c["width"], d_kv=c["head_width"], d_ff=c["mlp"])
    cfg.num_layers, cfg.num_heads, cfg.feed_forward_proj = c["depth"], c["heads"], "gated-gelu"
    cfg = T5Config(**cfg.to_dict() | dict(is_gated_act=True, dense_act_fn="gelu_new"))
    measure("T5", T5EncoderModel(cfg), torch.ones(c["batch"], c["length"], dtype=torch.long), train=False)
    c = CLIP
    cfg = CLIPTextConfig(vocab_size=c["vocabulary"], hidden_size=c["width"], intermediate_size=c["mlp"])
    cfg.num_hidden_layers, cfg.num_attention_heads = c["depth"], c["heads"]
    measure("CLIP", CLIPTextModel(cfg), torch.ones(c["batch"], c["length"], dtype=torch.long), train=False)
    return found


# ---- Ours


def jax_side(only: str) -> dict[str, float]:
    import dataclasses

    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from minisora_jax.data.packing import PackConfig
    from minisora_jax.data.rows import Segment, pack_segments
    from minisora_jax.models.clip import CLIPConfig, CLIPEncoder
    from minisora_jax.models.dit import DiT, abstract_params
    from minisora_jax.models.t5 import T5Config, T5Encoder
    from minisora_jax.models.vae import VAE, VAEConfig
    from minisora_jax.weights.dit import CONFIGS

    found = {}

    def weights(abstract):
        rng = np.random.default_rng(0)
        return jax.tree.map(lambda x: jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32)), abstract)

    def measure(name, apply, params, train=True):
        forward = jax.jit(apply)
        found[f"{name} forward"] = best(lambda: jax.block_until_ready(forward(params)))
        if not train:
            return
        optimizer = optax.adamw(1e-4)

        def step(params, state):
            grads = jax.grad(lambda p: jnp.mean(apply(p) ** 2))(params)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        step = jax.jit(step, donate_argnums=(0, 1))
        carry = [params, optimizer.init(params)]

        def run():
            carry[:] = jax.block_until_ready(step(*carry))

        found[f"{name} train step"] = best(run)

    (t, h, w), width = DIT["tokens"], DIT["width"]

    def transformer(name, preset, size, rows, **changes):
        if not name.startswith(only):
            return
        shape = dict(width=width, depth=DIT["depth"], heads=DIT["heads"], mlp_ratio=4.0, dtype="float32")
        cfg = dataclasses.replace(CONFIGS[preset], **shape | changes)
        text = np.zeros((1, 1), np.int32) if cfg.classes else np.zeros((DIT["text"], cfg.text_features), np.float32)
        n = math.prod(size)
        clip = Segment(np.zeros((n, cfg.token_width), np.float32), np.zeros(n, bool), size, text, 8.0)
        pack = PackConfig(tokens=n, text_tokens=max(4, len(text)), slots=1, rows=rows)
        batch = jax.tree.map(jnp.asarray, pack_segments([[clip]] * rows, pack))
        times = jnp.full((rows, n), 0.5)
        measure(name, lambda p: DiT(cfg).apply(p, batch.tokens_BSP, times, batch), weights(abstract_params(cfg)))

    captions = dict(text_features=DIT["text_width"])
    transformer("Wan DiT", "wan2.1-t2v-1.3b", (t, h, w), 1, **captions)
    transformer("DiT", "dit-xl-2-256", (1, h, w), 4, classes=11)
    transformer("PixArt", "pixart-alpha-256", (1, h, w), 4, **captions)
    transformer("Latte", "latte-1", (t, h, w), 1, **captions)

    def codec(name, cfg, size):
        if name.startswith(only):
            x = jnp.zeros((1, *size, 3))
            params = weights(jax.eval_shape(VAE(cfg).init, jax.random.key(0), x))
            z = jnp.zeros((1, *cfg.latent_size(size), cfg.latent_channels))
            encode = jax.jit(lambda p, x: VAE(cfg).apply(p, x, method="encode")[0])
            decode = jax.jit(lambda p, z: VAE(cfg).apply(p, z, method="decode")[0])
            found[f"{name} encode"] = best(lambda: jax.block_until_ready(encode(params, x)))
            found[f"{name} decode"] = best(lambda: jax.block_until_ready(decode(params, z)))

    codec("Wan 2.1 VAE", VAEConfig(**WAN_VAE), VIDEO)
    codec("Wan 2.2 VAE", VAEConfig(**WAN_VAE, patch=2, shortcuts=True, halve_up=False), VIDEO)
    codec("SD VAE", VAEConfig(**SD_VAE, time_down=(False,) * 3, halve_up=False, images=True), IMAGE)

    def encoder(name, module, batch, length):
        if name.startswith(only):
            ids = jnp.ones((batch, length), jnp.int32)
            params = weights(jax.eval_shape(module.init, jax.random.key(0), ids, ids))
            measure(name, lambda p: module.apply(p, ids, ids), params, train=False)

    c = T5
    cfg = T5Config(c["vocabulary"], c["width"], c["heads"], c["head_width"], c["mlp"], c["depth"], dtype="float32")
    encoder("T5", T5Encoder(cfg), c["batch"], c["length"])
    c = CLIP
    encoder("CLIP", CLIPEncoder(CLIPConfig(c["vocabulary"], c["width"], c["heads"], c["mlp"], c["depth"], 77)), 8, 77)
    return found


def side_by_side(torch_python: str, only: str = "", rounds: int = 3) -> dict[str, tuple[float, float]]:
    """{what: (ours, torch's)}, seconds."""
    least: dict[str, list[float]] = {}
    for _ in range(rounds):
        for i, python in enumerate((sys.executable, torch_python)):
            command = [python, __file__, "--side", ("jax", "torch")[i], "--only", only]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            for what, seconds in json.loads(out.splitlines()[-1]).items():
                pair = least.setdefault(what, [math.inf, math.inf])
                pair[i] = min(pair[i], seconds)
    return {what: tuple(pair) for what, pair in least.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", help="a Python with torch, diffusers and transformers")
    parser.add_argument("--only", default="", help="systems whose name begins so")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="a file to write the seconds to")
    parser.add_argument("--side", choices=("jax", "torch"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps((jax_side if args.side == "jax" else torch_side)(args.only)))
        sys.exit()
    table = side_by_side(args.torch, args.only, args.rounds)
    for what, (ours, theirs) in table.items():
        print(f"{what:<24} ours {ours:8.3f} s   torch {theirs:8.3f} s   ratio {ours / theirs:5.2f}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(table, file)

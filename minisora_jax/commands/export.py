"""Write a model of this project as safetensors in the published layout (diffusers' names), the inverse of import.

examples:
  minisora export models/wan-vae exported/vae

The tensors of an imported model come back bit for bit. A codec is written as diffusers' AutoencoderKLWan.
"""

from __future__ import annotations


def add_arguments(parser):
    parser.add_argument("model", help="a codec that `minisora import` or `minisora train-vae` wrote")
    parser.add_argument("out", help="the directory to write to")
    parser.add_argument("--shard-gb", type=float, default=4.0, help="size of a file at most, GiB (default 4)")


def run(args, _):
    from minisora_jax.models.codec import Codec
    from minisora_jax.weights import wan_vae
    from minisora_jax.weights.rules import export_params, save_sharded

    codec = Codec.load(args.model)
    tensors = export_params(codec.params, wan_vae.rules(codec.config))
    save_sharded(args.out, tensors, "diffusion_pytorch_model", shard_bytes=int(args.shard_gb * 2**30))
    print(f"{args.model} written to {args.out}")

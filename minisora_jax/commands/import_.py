"""Turn a published model's weights into a model of this project.

examples:
  minisora import wan2.1-vae Wan2.1-T2V-1.3B-Diffusers/vae --out=models/wan-vae
  minisora eval codec --codec=models/wan-vae --data=data/clips

PATH is a file (safetensors, or torch's pth, pt, bin), a directory with one, or the index of a sharded one. Nothing is
downloaded. A tensor that is missing, extra or misshapen is named.
"""

from __future__ import annotations


def add_arguments(parser):
    from minisora_jax.weights.presets import CODECS

    parser.add_argument("preset", choices=CODECS, help="; ".join(f"{k}: {p.what}" for k, p in CODECS.items()))
    parser.add_argument("path", help="the published file or directory")
    parser.add_argument("--out", required=True, help="the directory to write the model to")


def run(args, _):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from minisora_jax.models.codec import Codec
    from minisora_jax.models.vae import VAE
    from minisora_jax.weights.checkpoint import Checkpoint
    from minisora_jax.weights.presets import CODECS
    from minisora_jax.weights.rules import import_params

    preset = CODECS[args.preset]
    side = preset.config.space_factor
    frames = jax.ShapeDtypeStruct((1, 1, side, side, 3), jnp.float32)
    abstract = jax.eval_shape(VAE(preset.config).init, jax.random.key(0), frames)
    params = import_params(Checkpoint(args.path), preset.rules(preset.config), abstract)
    statistics = (np.asarray(s, np.float32) for s in (preset.latent_mean, preset.latent_std))
    codec = Codec(preset.config, params, *statistics)
    print(f"codec {codec.export(args.out, {'imported': args.preset})} written to {args.out}")

"""Write a model of this project as safetensors in the published layout, the inverse of import.

examples:
  minisora export models/wan-vae exported/vae
  minisora export models/umt5 exported/text_encoder
  minisora export models/wan exported/transformer
  minisora export runs/adapter/export my_lora.safetensors --as comfyui      # an adapter: peft (default), comfyui, kohya

The tensors of an imported model come back bit for bit: codecs and transformers by diffusers' names, encoders of text
and images by transformers' (T5EncoderModel, UMT5EncoderModel, CLIPTextModel, CLIPVisionModel), with the config.json of
each, so that their `from_pretrained` reads the directory. SiT, which diffusers has no class for, keeps its authors'
names. A model card, README.md, says what the model is and how to load it; one that is there already is kept.
"""

from __future__ import annotations


def add_arguments(parser):
    parser.add_argument("model", help="a model that `minisora import`, `train-vae` or `train` wrote")
    parser.add_argument("out", help="the directory to write to")
    parser.add_argument(
        "--as",
        dest="style",
        choices=("peft", "comfyui", "kohya"),
        default=None,
        help="whose names an adapter gets (default peft, which are diffusers' too)",
    )
    parser.add_argument("--shard-gb", type=float, default=4.0, help="size of a file at most, GiB (default 4)")


def run(args, _):
    import json
    import math
    from pathlib import Path

    import jax

    from minisora_jax.io import checksum, model_card
    from minisora_jax.io.model_dir import open_model, require_new_place
    from minisora_jax.weights.rules import export_lazily, save_sharded

    require_new_place(args.out, args.model)
    leaves, config = open_model(args.model)
    if config.get("kind") == "lora":
        return export_adapter(args.model, args.out, args.style or "peft")
    if args.style:
        raise ValueError(f"--as {args.style} is for adapters, and {args.model} is a whole model: leave it out")
    rules, theirs, stem = published(config, args.model)
    save_sharded(args.out, export_lazily(leaves, rules), stem, shard_bytes=int(args.shard_gb * 2**30))
    (Path(args.out) / "config.json").write_text(json.dumps(theirs, indent=2) + "\n", encoding="utf-8")
    checksum.write_checksums(Path(args.out), without=[model_card.NAME])
    model_card.write_card(
        Path(args.out), config, sum(math.prod(x.shape) for x in jax.tree.leaves(leaves)), loader_of(theirs)
    )
    print(f"{args.model} written to {args.out}")


def export_adapter(model: str, out: str, style: str) -> None:
    """Write an adapter as one safetensors file: `out`, or pytorch_lora_weights.safetensors in it."""
    from pathlib import Path

    from minisora_jax.io.model_dir import in_memory
    from minisora_jax.io.safetensors import write_tensors
    from minisora_jax.weights.adapters import adapter_settings
    from minisora_jax.weights.lora_names import published_adapter

    stored, lora, dit, _ = adapter_settings(model)
    tensors = published_adapter(in_memory(stored, model, None), dit, style, lora.scale)
    path = Path(out) if out.endswith(".safetensors") else Path(out) / "pytorch_lora_weights.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, "exporting")
    print(f"{model} written to {path}, {len(tensors)} tensors with the names of {style}")


def loader_of(theirs: dict) -> str:
    """The class whose `from_pretrained` reads a published config, such as "diffusers.WanTransformer3DModel"."""
    if name := theirs.get("_class_name"):
        return f"diffusers.{name}"
    return next((f"transformers.{name}" for name in theirs.get("architectures", ())), "")


def published(config: dict, model: str):
    """(rules, their config, stem of the weight files) of a saved model's config."""
    from minisora_jax.io.model_dir import saved_settings
    from minisora_jax.models.clip import CLIPConfig
    from minisora_jax.models.clip_vision import CLIPVisionConfig
    from minisora_jax.models.codec import saved_statistics
    from minisora_jax.models.dit import DiTConfig
    from minisora_jax.models.t5 import T5Config
    from minisora_jax.models.vae import VAEConfig
    from minisora_jax.weights import clip, clip_vision, dit, sd_vae, t5, wan_vae

    kind = config.get("kind")
    if kind == "vae":
        cfg = saved_settings(VAEConfig, config, "vae", model)
        family = sd_vae if cfg.images else wan_vae
        for key in ("latent_mean", "latent_std"):
            saved_statistics(config, key, cfg.latent_channels, model)  # raises for what are no statistics
        statistics = config["latent_mean"], config["latent_std"]
        return family.rules(cfg), family.published_config(cfg, *statistics), "diffusion_pytorch_model"
    encoders = {"t5": (t5, T5Config), "clip": (clip, CLIPConfig), "clip_vision": (clip_vision, CLIPVisionConfig)}
    if kind in encoders:
        family, config_class = encoders[kind]
        cfg = saved_settings(config_class, config, kind, model)
        return family.rules(cfg), family.published_config(cfg), "model"
    if kind == "dit":
        cfg = saved_settings(DiTConfig, config, "dit", model)
        return dit.rules(cfg), dit.published_config(cfg), "diffusion_pytorch_model"
    raise ValueError(f"{model} holds a {kind!r} model: vae, dit, t5, clip and clip_vision have a published layout")

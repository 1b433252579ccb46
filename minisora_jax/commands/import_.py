"""Turn a published model's weights into a model of this project.

examples:
  minisora import wan2.1-vae Wan2.1-T2V-1.3B-Diffusers/vae --out=models/wan-vae
  minisora import umt5-xxl models_t5_umt5-xxl-enc-bf16.pth --tokenizer=google/umt5-xxl --out=models/umt5
  minisora import wan2.1-t2v-1.3b Wan2.1-T2V-1.3B-Diffusers/transformer --out=models/wan
  minisora import wan2.2-t2v-a14b Wan2.2-T2V-A14B-Diffusers --out=models/a14b     both experts
  minisora import clip-vision-h Wan2.1-I2V-14B-480P-Diffusers/image_encoder --out=models/clip-vision
  minisora import lpips my_lpips/ --out=models/lpips          vgg16-397923af.pth and the lpips package's vgg.pth
  minisora import lora fast_4steps.safetensors --base=models/wan --out=adapters/fast
  minisora eval codec --codec=models/wan-vae --data=data/clips

PATH is a file (safetensors, or torch's pth, pt, bin), a directory with one, or the index of a sharded one, in the
layout of diffusers or transformers or in the authors' own. Nothing is downloaded. A tensor that is missing, extra or
misshapen is named.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

logger = logging.getLogger("minisora")

TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "vocab.json", "merges.txt", "tokenizer_config.json")
TOKENIZER_FILES += ("special_tokens_map.json", "added_tokens.json")


def add_arguments(parser):
    from minisora_jax.weights.presets import CODECS, IMAGE_ENCODERS, LOSSES, TEXT_ENCODERS, TRANSFORMERS, presets

    choices = [*presets(), LORA]
    parser.add_argument("preset", metavar="PRESET", choices=choices, help="one of those listed below")
    parser.add_argument("path", metavar="PATH", help="the published file or directory")
    parser.add_argument("--out", required=True, help="the directory to write the model to")
    parser.add_argument(
        "--tokenizer", help="of a text encoder: the directory of its tokenizer (default: beside the weights, if there)"
    )
    parser.add_argument("--base", help="of an adapter (lora): the imported model that it changes")
    parser.add_argument("--dtype", choices=DTYPES, help="precision to keep the weights in (default: the published)")
    table = lambda presets: "".join(f"  {name:<18}{preset.what}\n" for name, preset in presets.items())
    parser.epilog = f"codecs:\n{table(CODECS)}\ndiffusion transformers:\n{table(TRANSFORMERS)}"
    parser.epilog += f"\ntext encoders:\n{table(TEXT_ENCODERS)}\nimage encoders:\n{table(IMAGE_ENCODERS)}"
    parser.epilog += f"\nlosses of a codec:\n{table(LOSSES)}"
    parser.epilog += f"\nadapters:\n  {LORA:<18}of --base, with the keys of PEFT, diffusers, ComfyUI or kohya\n"


DTYPES = ("float32", "bfloat16", "float16")
LORA = "lora"


def run(args, _):
    from minisora_jax.models.captions import TOKENIZER
    from minisora_jax.weights.presets import CODECS, IMAGE_ENCODERS, LOSSES, TEXT_ENCODERS, TRANSFORMERS

    if (args.preset == LORA) != bool(args.base):
        raise ValueError(
            "--base=MODEL is for an adapter, and names the model that it changes: import lora FILE --base=MODEL"
        )
    if args.preset == LORA:
        print(f"adapter {import_lora(args.path, args.base, args.out, args.dtype)} written to {args.out}")
        return
    export = import_text_encoder
    others = ((CODECS, import_codec), (TRANSFORMERS, import_transformer), (LOSSES, import_lpips))
    for presets, what in (*others, (IMAGE_ENCODERS, import_image_encoder)):
        export = what if args.preset in presets else export
    tokenizer = tokenizer_files(args.tokenizer, args.path) if args.preset in TEXT_ENCODERS else []
    what, digest = export(args.preset, args.path, args.out, args.dtype)
    for file in tokenizer:
        (Path(args.out) / TOKENIZER).mkdir(exist_ok=True)
        shutil.copyfile(file, Path(args.out) / TOKENIZER / file.name)
    if tokenizer:
        logger.info("tokenizer copied from %s", tokenizer[0].parent)
    print(f"{what} {digest} written to {args.out}")


def import_codec(name: str, path: str, out: str, dtype: str | None) -> tuple[str, str]:
    import numpy as np

    from minisora_jax.models.codec import Codec
    from minisora_jax.weights.presets import CODECS
    from minisora_jax.weights.reading import read_preset

    config, params = read_preset(name, path)
    mean, std = (np.asarray(s, np.float32) for s in (CODECS[name].latent_mean, CODECS[name].latent_std))
    return "codec", Codec(config, params, mean, std).export(out, {"imported": name}, dtype, "importing")


def import_transformer(name: str, path: str, out: str, dtype: str | None) -> tuple[str, str]:
    import dataclasses

    from minisora_jax.io.model_dir import LOW_NOISE, export_model
    from minisora_jax.weights.presets import TRANSFORMERS
    from minisora_jax.weights.reading import read_preset

    preset = TRANSFORMERS[name]
    config = {"kind": "dit"} | {k: dataclasses.asdict(getattr(preset, k)) for k in ("times", "objective")}
    config |= {
        "latent_size": [preset.window],
        "conditioning": list(preset.conditioning),
        "training": {"imported": name},
    }

    def export(path, out, times=None, **more):
        dit, params = read_preset(name, path)
        entries = config | {"dit": dataclasses.asdict(dit)} | more
        if times:  # those that an expert is trained on
            entries["times"] = config["times"] | times
        return export_model(out, params, entries, dtype=dtype, progress="importing")

    if preset.low_noise_below is None:
        return "transformer", export(path, out)
    (high, low), border = experts(path), preset.low_noise_below
    second = export(low, Path(out) / LOW_NOISE, times={"high": border})
    first = export(high, out, times={"low": border}, low_noise_below=border)
    return "pair of transformers", f"{first}+{second}"


def experts(path: str) -> tuple[Path, Path]:
    """The folders of the experts for high and for low noise in that of a pair."""
    from minisora_jax.weights.dit import EXPERTS

    for names in EXPERTS:
        if all((Path(path) / name).is_dir() for name in names):
            return Path(path) / names[0], Path(path) / names[1]
    either = " or ".join(f"{high}/ and {low}/" for high, low in EXPERTS)
    raise FileNotFoundError(f"{path} has not the folders of two experts: {either}")


def import_lora(path: str, base: str, out: str, dtype: str | None) -> str:
    import dataclasses

    from flax import traverse_util

    from minisora_jax.io.hub import local_folder
    from minisora_jax.io.model_dir import (
        export_model,
        load_config,
        model_hash,
        require_kind,
        require_new_place,
        saved_settings,
    )
    from minisora_jax.models.dit import DiTConfig
    from minisora_jax.models.lora import LoraConfig
    from minisora_jax.weights.adapters import read_adapter

    model = local_folder(base)
    require_new_place(out, model)
    config = load_config(model)
    require_kind(config, "dit", f"--base={base}")
    dit = saved_settings(DiTConfig, config, "dit", model)
    adapter = read_adapter(path, dit, model)
    flat: dict[str, Any] = traverse_util.flatten_dict(adapter.lora, sep="/")
    ranks = [x.shape[-1] for name, x in flat.items() if name.endswith("/a")]
    kept = {k: config[k] for k in ("times", "objective") if k in config} | {"dit": dataclasses.asdict(dit)}
    settings = dataclasses.asdict(LoraConfig(max(ranks, default=1), targets="all"))
    config = {"kind": "lora", "lora": settings, "training": {"imported": LORA, "base": model_hash(model)}} | kept
    tree = {name: part for name, part in (("lora", adapter.lora), ("diff", adapter.diff)) if part}
    return export_model(out, tree, config, dtype=dtype or "float32")


def import_text_encoder(name: str, path: str, out: str, dtype: str | None) -> tuple[str, str]:
    from minisora_jax.models.encoder import TextEncoder
    from minisora_jax.weights.reading import read_preset

    config, params = read_preset(name, path)
    return "text encoder", TextEncoder(config, params).export(out, {"imported": name}, dtype, "importing")


def import_image_encoder(name: str, path: str, out: str, dtype: str | None) -> tuple[str, str]:
    from minisora_jax.models.clip_vision import ImageEncoder
    from minisora_jax.weights.reading import read_preset

    config, params = read_preset(name, path)
    return "image encoder", ImageEncoder(config, params).export(out, {"imported": name}, dtype, "importing")


def import_lpips(name: str, path: str, out: str, dtype: str | None) -> tuple[str, str]:
    from minisora_jax.models.perceptual import LPIPS
    from minisora_jax.weights.reading import read_preset

    config, params = read_preset(name, path)
    return "LPIPS", LPIPS(config, params).export(out, {"imported": name}, dtype, "importing")


def tokenizer_files(given: str | None, path: str) -> list[Path]:
    """The tokenizer's files: in the directory `given`, or in one where published encoders have them, if any has."""
    weights = Path(path) if Path(path).is_dir() else Path(path).parent
    # text_encoder_2/ of a pipeline has its own tokenizer_2/.
    beside = weights.parent / weights.name.replace("text_encoder", "tokenizer")
    for directory in [Path(given)] if given else [weights, beside]:
        if any((directory / name).is_file() for name in ("tokenizer.json", "spiece.model", "vocab.json")):
            return [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    if given:
        raise FileNotFoundError(f"--tokenizer={given} has no tokenizer: no tokenizer.json, spiece.model or vocab.json")
    return []

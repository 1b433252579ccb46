"""Fold adapters into their model: a model like any other, that needs no `--lora`.

examples:
  minisora merge models/wan runs/adapter/export --out=models/wan-mine
  minisora merge models/wan fast.safetensors:0.8 runs/adapter/export --out=models/wan-fast

The result has the model's own precision. A model in bfloat16 loses what its 8 bits cannot hold: small changes. Where
that shows, give `generate --lora` the adapter itself, which is exact.
"""

from __future__ import annotations


def add_arguments(parser):
    parser.add_argument("model", help="a model that `minisora import` or `train` wrote")
    parser.add_argument("loras", nargs="+", metavar="LORA", help="an adapter: PATH or PATH:WEIGHT")
    parser.add_argument("--out", required=True, help="the directory to write the model to")


def run(args, _):
    from minisora_jax.generate.loading import trained_masks
    from minisora_jax.io.hub import local_folder
    from minisora_jax.io.model_dir import (
        check_shapes,
        export_model,
        open_model,
        require_kind,
        require_new_place,
        saved_settings,
    )
    from minisora_jax.models.dit import DiTConfig, abstract_params
    from minisora_jax.weights.adapters import merged, read_adapter

    model = local_folder(args.model)
    require_new_place(args.out, model)
    stored, config = open_model(model)
    require_kind(config, "dit", model)
    dit = saved_settings(DiTConfig, config, "dit", model)
    check_shapes(stored, abstract_params(dit), model)
    adapters = [read_adapter(text, dit, model) for text in args.loras]
    training = config.get("training")
    before = training if isinstance(training, dict) else {}
    if (masks := trained_masks(config, model, adapters)) is not None:
        config["conditioning"] = sorted(masks)
    config |= {"training": before | {"merged": [adapter.hash for adapter in adapters]}}
    digest = export_model(args.out, merged(stored, adapters), config, dtype=None, progress="merging")
    print(f"transformer {digest} written to {args.out}")

"""Score a codec (PSNR and SSIM of reconstructions) or a model (does each video show what its caption says?).

examples:
  minisora eval codec --data shapes:heldout:256
  minisora eval codec --codec=runs/codec/export --data data/clips
  minisora eval model --count 256 --out eval
  minisora eval model --model=runs/model/export --codec=runs/codec/export --count 64

The model is asked for held-out captions, whose (colour, shape, motion) never occurred in training, at the sizes of the
true clips; an independent checker reads colour, shape, motion and permanence off the pixels.
"""

from __future__ import annotations

import json
from pathlib import Path

from minisora_jax.commands.generate import add_sampling, sampling


def add_arguments(parser):
    parser.add_argument("what", choices=("codec", "model"))
    parser.add_argument("--data", default="shapes:heldout:256", help="clips for `codec` (default shapes:heldout:256)")
    parser.add_argument("--codec", default=None, help="an exported codec (default: the bundled one)")
    parser.add_argument("--model", default=None, help="an exported model (default: the bundled one)")
    parser.add_argument("--count", type=int, default=206, help="videos made by `model` (default 206)")
    parser.add_argument("--split", default="heldout", choices=("train", "heldout"), help="of the captions for `model`")
    add_sampling(parser)
    parser.add_argument("--out", default="eval", help="directory for scores.json and the contact sheets (default eval)")


def run(args, _):
    from minisora_jax.bundled import CODEC, MODEL
    from minisora_jax.data.contact_sheet import contact_sheet
    from minisora_jax.evaluate import evaluate_codec, evaluate_model
    from minisora_jax.generate import Generator
    from minisora_jax.models.codec import Codec

    if args.what == "codec":
        from minisora_jax.data.clips import open_clips

        scores, rows = evaluate_codec(Codec.load(args.codec or CODEC), open_clips(args.data))
    else:
        options = sampling(args)
        generator = Generator.load(args.model or MODEL, args.codec, args.guide_model, args.text_encoder)
        scores, rows = evaluate_model(generator, args.split, args.count, **options)
        scores["guide_model"] = args.guide_model
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{args.what}.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    contact_sheet(out / f"{args.what}.png", rows[:32])
    print(json.dumps(scores, indent=2))
    print(out / f"{args.what}.png")

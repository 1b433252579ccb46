"""Encode a data set with a trained codec, and a text encoder, into a latent cache, which `minisora train` reads.

examples:
  minisora encode data/clips data/latents --codec=runs/codec/export
  minisora encode data/clips data/latents --codec=models/wan-vae --text-encoder=models/umt5
  minisora encode data/clips data/latents --codec=models/wan-vae --mesh data=2,ring=4
  minisora encode data/clips data/latents --codec=models/wan-vae --text-encoder=models/umt5 --given=first \
      --image-encoder=models/clip-vision
  minisora encode data/imagenet data/latents --codec=models/sd-vae --classes=LOC_synset_mapping.txt
  minisora encode shapes:train:20000 data/shapes-latents

Interrupted, the same command goes on after the last finished part. On several processes (a pod, or
`launch/local_cpu.py -n 4 -- minisora encode ...`) each writes its share, with a mesh of its own devices; the bytes
are the same. A clip whose record is damaged is left out and named in manifest.json.
"""

from __future__ import annotations

from minisora_jax.commands.options import add_mesh, mesh_in_use

ON_SEVERAL_PROCESSES = True


def add_arguments(parser):
    parser.add_argument("data", help="a directory written by `minisora prepare`, or shapes[:SPLIT[:COUNT]]")
    parser.add_argument("out", help="the directory to write the cache to")
    parser.add_argument("--codec", default=None, help="an exported codec (default: the bundled one)")
    parser.add_argument(
        "--text-encoder", default=None, help="a text encoder that `minisora import` wrote (default: captions as bytes)"
    )
    parser.add_argument(
        "--classes",
        nargs="?",
        const=True,
        default=False,
        metavar="FILE",
        help="captions are classes, for models that read labels: the data set's own in the order of their letters, or "
        "--classes=FILE of one name a line, or of a latent cache, so that several caches have the same ones",
    )
    parser.add_argument(
        "--given",
        default="",
        metavar="FRAMES",
        help="keep given frames of each clip too, for models that make videos from images and read them as channels "
        "(Wan 2.1 I2V, Wan 2.2 I2V-A14B): first; or ends, the first and the last one (Wan 2.1 FLF2V)",
    )
    parser.add_argument(
        "--image-encoder", default=None, help="the image encoder whose tokens of the given frames the model attends to"
    )
    parser.add_argument(
        "--long-captions",
        type=float,
        default=0.95,
        metavar="SHARE",
        help="of a data set with new captions: share of clips that get their long one, the others their original or "
        "short one (default 0.95, as DALL-E 3)",
    )
    add_mesh(parser)
    parser.add_argument("--strict", action="store_true", help="stop at the first damaged clip")
    parser.add_argument(
        "--clips-per-part", type=int, default=1024, metavar="N", help="what is done again at most after an interruption"
    )
    parser.add_argument("--shard-mb", type=int, default=256, help="size of a shard in MiB (default 256)")


def run(args, _):
    from pathlib import Path

    from minisora_jax.api.encoding import encode
    from minisora_jax.io.json_files import read_json
    from minisora_jax.models.captions import CLASSES, in_words
    from minisora_jax.parallel.processes import is_main

    with mesh_in_use(args.mesh):
        encode(
            args.data,
            args.out,
            codec=args.codec,
            text_encoder=args.text_encoder,
            classes=args.classes,
            given=args.given,
            image_encoder=args.image_encoder,
            long_captions=args.long_captions,
            strict=args.strict,
            shard_mb=args.shard_mb,
            clips_per_part=args.clips_per_part,
        )
    if is_main():
        manifest = read_json(Path(args.out) / "manifest.json")
        left_out = f", {len(names)} left out" if isinstance(names := manifest.get("left_out"), list) and names else ""
        shards = f"{manifest['records']} clips in {len(manifest['shards'])} shards"
        classes = f", {in_words(text)}" if (text := manifest["settings"]["text"])["encoder"] == CLASSES else ""
        print(f"{shards} of latents of codec {manifest['settings']['codec_hash']}{classes}{left_out}: {args.out}")

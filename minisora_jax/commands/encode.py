"""Encode a data set with a trained codec, and a text encoder, into a latent cache, which `minisora train` reads.

examples:
  minisora encode data/clips data/latents --codec=runs/codec/export
  minisora encode data/clips data/latents --codec=models/wan-vae --text-encoder=models/umt5
  minisora encode data/clips data/latents --codec=models/wan-vae --mesh data=2,ring=4
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
    from tqdm import tqdm

    from minisora_jax.bundled import CODEC
    from minisora_jax.data.encode import encode_clips
    from minisora_jax.data.latents import my_parts, write_latents
    from minisora_jax.io.retry import DataError
    from minisora_jax.models.captions import BYTES, encoder_captions
    from minisora_jax.models.codec import Codec
    from minisora_jax.parallel.processes import is_main
    from minisora_jax.sources.clips import open_clips

    codec = Codec.load(args.codec or CODEC)
    captions = encoder_captions(args.text_encoder) if args.text_encoder else BYTES
    clips = open_clips(args.data, long_captions=args.long_captions)

    if args.clips_per_part < 1:
        raise ValueError(f"--clips-per-part={args.clips_per_part} must be at least 1")
    mine = my_parts(len(clips), args.clips_per_part)
    with mesh_in_use(args.mesh), tqdm(desc="encoding", unit="clip", total=sum(map(len, mine.values()))) as bar:

        def latents(numbers):
            for clip in encode_clips(codec, captions, clips, numbers):
                if args.strict and isinstance(clip, DataError):
                    raise clip
                bar.update()
                yield clip

        manifest = write_latents(
            args.out,
            latents,
            count=len(clips),
            codec_hash=codec.latents,
            text=captions.record,
            empty_text_LE=captions.encode([""])[0],
            source=getattr(clips, "identity", args.data),
            shard_bytes=args.shard_mb * 2**20,
            clips_per_part=args.clips_per_part,
        )
    if is_main():
        left_out = f", {len(manifest['left_out'])} left out" if manifest["left_out"] else ""
        shards = f"{manifest['records']} clips in {len(manifest['shards'])} shards"
        print(f"{shards} of latents of codec {codec.latents}{left_out}: {args.out}")

"""Check a folder of captioned clips and write the good ones as one data set; every file left out is named.

examples:
  minisora prepare my_clips/ data/clips
  minisora prepare shapes data/shapes --count 2000 --split heldout

A folder holds videos (mp4, avi, webm, mov, mkv, gif) and images, each captioned by NAME.txt beside it or by a line of
captions.jsonl ({"file": ..., "caption": ...}) or captions.csv (file,caption). Clips keep their size and rate; they are
cut to 1 + 4k frames and to whole cells of pixels. A table of what was skipped is written to OUT/skipped.jsonl.
"""

from __future__ import annotations

from pathlib import Path


def add_arguments(parser):
    parser.add_argument(
        "source", help="a folder, *.tar, *.parquet, tfds:NAME:SPLIT, gs://... (docs/sources.md), or shapes"
    )
    parser.add_argument("out", help="the directory to write the data set to")
    parser.add_argument("--cell", type=int, default=16, help="pixels that heights and widths become multiples of")
    parser.add_argument(
        "--max-frames", type=int, default=121, help="longer clips give their first frames (default 121)"
    )
    parser.add_argument("--no-captions", action="store_true", help="keep clips without captions (enough for a codec)")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad file instead of skipping it")
    parser.add_argument("--count", type=int, default=1024, help="of procedural clips (default 1024)")
    parser.add_argument("--split", default="train", choices=("train", "heldout"), help="of the procedural clips")


def run(args, _):
    from minisora_jax.data.prepare import prepare

    report = prepare(
        args.source,
        args.out,
        count=args.count,
        split=args.split,
        cell=args.cell,
        max_frames=args.max_frames,
        need_caption=not args.no_captions,
        strict=args.strict,
    )
    report.write(Path(args.out) / "skipped.jsonl")
    print(report.summary())
    print(f"data set written to {args.out}")

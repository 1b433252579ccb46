"""Check, cut, filter and caption clips, and write the good ones as one data set; every clip left out is named.

examples:
  minisora prepare my_clips/ data/clips                       only what cannot be decoded or has no caption is left out
  minisora prepare my_films/ data/clips --no-captions --curate --held-out 0.02
  minisora prepare my_films/ data/clips --max-side 480 --fps 16 --crf 18       a small data set
  minisora prepare my_films/ data/clips --shots --min-motion 1 --max-text 0.02 --duplicates 11
  minisora prepare my_films/ data/clips --curate --captioner Qwen/Qwen2.5-VL-3B-Instruct
  minisora prepare my_films/ data/clips --curate --captioner http://localhost:8000/v1#Qwen/Qwen2.5-VL-72B-Instruct
  minisora prepare /nfs/films /nfs/clips --curate --beam='--runner=FlinkRunner --flink_master=localhost:8081'
  minisora prepare shapes data/shapes --count 2000 --split heldout

A folder holds videos (mp4, mov, webm, mkv, avi, gif, mpg, ts, wmv, ...) and images, each captioned by NAME.txt beside
it or by a line of captions.jsonl ({"file": ..., "caption": ...}) or captions.csv (file,caption). Clips keep their
size and rate, unless --max-side or --fps are given; they are cut to 1 + 4k frames and to whole cells of pixels.

OUT/report.html shows what was left out and why, the measurements, and pictures; OUT/skipped.jsonl names each.
Interrupted, the same command goes on after the last finished part. A file whose decoder crashes or hangs is left out.
The exit code is 0 if any clip is good, and 2 if none is; the last lines say how many were left out.
Shots, motion, text and duplicates need `uv sync --extra curate`, --beam needs `--extra beam`.
"""

from __future__ import annotations

import os

LARGER = 3  # times the size of the files: a word is said from there on
LIMITS = {  # field of Filters -> (type, what it asks)
    "min_seconds": (float, "shortest clip"),
    "min_side": (int, "fewest pixels of the shorter side"),
    "min_brightness": (float, "least mean luma, 0 to 1: black frames have less"),
    "min_change": (float, "least mean change of luma between frames, 0 to 1: static clips have less"),
    "min_sharpness": (float, "least variance of the Laplacian: blurred clips have less"),
    "min_motion": (float, "least optical flow, in per cent of the diagonal per second"),
    "max_text": (float, "largest share of the frame, 0 to 1, that text may cover"),
    "duplicates": (int, "clips whose hashes differ in at most so many of 192 bits are one"),
}


def add_arguments(parser):
    parser.add_argument(
        "source", help="a folder, *.tar, *.parquet, tfds:NAME:SPLIT, gs://... (docs/sources.md), or shapes"
    )
    parser.add_argument("out", help="the directory to write the data set to")
    parser.add_argument("--cell", type=int, default=16, help="pixels that heights and widths become multiples of")
    parser.add_argument(
        "--max-frames",
        type=int,
        default=121,
        help="longer clips give their first frames, or with --shots several clips (default 121)",
    )
    parser.add_argument(
        "--max-side", type=int, metavar="PIXELS", help="make larger clips smaller: pixels of their longer side"
    )
    parser.add_argument("--fps", type=float, metavar="N", help="thin clips of more frames per second to N")
    parser.add_argument(
        "--crf",
        type=int,
        metavar="N",
        help="store H.264 instead of lossless pixels: 0 (best) to 51; 18 looks as the original",
    )
    parser.add_argument("--no-captions", action="store_true", help="keep clips without captions (enough for a codec)")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad file instead of skipping it")
    parser.add_argument(
        "--held-out", type=float, default=0.0, metavar="SHARE", help="share of files whose clips go to OUT/heldout"
    )
    parser.add_argument("--count", type=int, default=1024, help="of procedural clips (default 1024)")
    parser.add_argument("--split", default="train", choices=("train", "heldout"), help="of the procedural clips")
    _add_curation(parser.add_argument_group("curation (off unless asked for; what is measured is always reported)"))
    work = parser.add_argument_group("the work")
    work.add_argument("--workers", type=int, default=None, help="local processes (default: one a core; 0: this one)")
    work.add_argument(
        "--timeout", type=float, default=120.0, help="seconds without a frame after which a file is left out (120)"
    )
    work.add_argument(
        "--files-per-part", type=int, default=None, help="unit of work, and of restarts (default: 1 to 64)"
    )
    work.add_argument("--shard-mb", type=int, default=256, help="size of a shard in MiB, at most (default 256)")
    work.add_argument(
        "--beam",
        nargs="?",
        const="",
        default=None,
        metavar="OPTIONS",
        help="run on Apache Beam, with its own options: --beam='--runner=DataflowRunner --project=...'; on one machine "
        "without any",
    )


def _add_curation(group):
    from minisora_jax.curation.filters import CURATED

    group.add_argument("--curate", action="store_true", help="--shots and all limits below, at the values in brackets")
    group.add_argument("--shots", action="store_true", default=None, help="cut files where their shots end")
    for name, (kind, what) in LIMITS.items():
        value = f"{what} [{getattr(CURATED, name):g}]"
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, default=None, metavar="N", help=value)
    group.add_argument("--min-aesthetic", type=float, metavar="N", help="least score by the function of --aesthetic")
    group.add_argument(
        "--aesthetic",
        metavar="FILE.py:FUNCTION",
        help="function(frames uint8 (n, H, W, 3)) -> a number, such as your aesthetic model's score",
    )
    group.add_argument(
        "--captioner",
        default="",
        metavar="MODEL",
        help="describe clips anew: a vision-language model by name or path, http://HOST/v1#MODEL (OpenAI-compatible), "
        "or FILE.py:FUNCTION",
    )


def run(args, _):
    import dataclasses
    import shlex

    from minisora_jax.curation.filters import CURATED, Filters
    from minisora_jax.curation.prepare import prepare

    limits = {name: getattr(args, name) for name in (*LIMITS, "min_aesthetic", "aesthetic")}
    limits = {name: value for name, value in limits.items() if value is not None}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    report = prepare(
        args.source,
        args.out,
        count=args.count,
        split=args.split,
        cell=args.cell,
        max_frames=args.max_frames,
        max_side=args.max_side,
        fps=args.fps,
        crf=args.crf,
        need_caption=not args.no_captions,
        strict=args.strict,
        shots=bool(args.shots or args.curate),
        filters=dataclasses.replace(CURATED if args.curate else Filters(), **limits),
        captioner=args.captioner,
        held_out=args.held_out,
        shard_bytes=args.shard_mb * 2**20,
        files_per_part=args.files_per_part,
        workers=cores if args.workers is None else args.workers,
        timeout=args.timeout,
        beam=None if args.beam is None else shlex.split(args.beam),
    )
    print(report.summary())
    if report.bytes > LARGER * report.source_bytes and args.crf is None:
        print(
            f"the data set has {report.bytes / 1e6:,.1f} MB and its files have {report.source_bytes / 1e6:,.1f} MB, "
            "since pixels are stored losslessly at their own size and rate: --max-side, --fps and --crf make it smaller"
        )
    print(f"data set written to {args.out}; {args.out}/report.html shows what was left out and why")

"""Decode, check, filter and caption every clip once (`minisora prepare`), so that training reads good clips only.

    source -> parts: probe, shots, decode, filters, split -> duplicates -> captions
           -> clips-00000-of-0000N.array_record, sizes.npy, skipped.jsonl, report.html, manifest.json

A part of the source is a range of files, and the work on it is a task (curation/parts.py) for local processes or for
Apache Beam. Between two rounds of tasks, the hashes of all clips are compared to find duplicates. Pixels are stored
losslessly (zstd), or as H.264 with `crf`. The bytes depend on the source and the settings, not on the number of workers
or on interruptions.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minisora_jax.curation.beam import run_on_beam
from minisora_jax.curation.captioners import Captioner, open_captioner
from minisora_jax.curation.duplicates import repeated
from minisora_jax.curation.filters import Filters
from minisora_jax.curation.parts import SPLITS, Plan, finish_safely, gather_safely, read_notes
from minisora_jax.curation.report import Summary, write_report
from minisora_jax.curation.stages import Curation, Sizes
from minisora_jax.curation.workers import Inline, Worker, run_here
from minisora_jax.io import record_writer
from minisora_jax.io.json_files import read_json_lines
from minisora_jax.io.lock import only_writer
from minisora_jax.io.progress import Progress
from minisora_jax.io.records import sha256
from minisora_jax.io.retry import DataError
from minisora_jax.sources.base import PREPROCESSING_VERSION
from minisora_jax.sources.skips import SkipReport
from minisora_jax.sources.spec import open_source

log = logging.getLogger("minisora")

SKIPPED = "skipped.jsonl"


def prepare(
    source: str | os.PathLike,
    out_dir: str | os.PathLike,
    *,
    count: int = 1024,
    split: str = "train",
    cell: int = 8,
    max_frames: int = 121,
    max_pixels: int = 4096 * 4096,
    max_side: int | None = None,
    fps: float | None = None,
    crf: int | None = None,
    need_caption: bool = True,
    strict: bool = False,
    shots: bool = False,
    filters: Filters | None = None,
    captioner: str = "",
    held_out: float = 0.0,
    shard_bytes: int = 256 * 2**20,
    files_per_part: int | None = None,
    workers: int = 0,
    timeout: float | None = 120.0,
    beam: list[str] | None = None,
) -> SkipReport:
    """Write the good clips of `source` to `out_dir`, and return the report of kept and skipped clips.

    A run that starts again after an interruption keeps its finished parts.

    Args:
        source: the name of a source, such as a folder, see `open_source`; "shapes" is `count` procedural clips of
            `split`.
        cell: heights and widths are cropped to multiples of so many pixels.
        max_frames: the frames of the longest clip, 1 + 4k; longer files are cut.
        max_pixels: files with more pixels a frame are skipped.
        max_side: larger clips are made smaller, until their longer side has so many pixels; None keeps their size.
        fps: clips of more frames per second are thinned to so many; None keeps their rate.
        crf: store clips as H.264 of this rate factor (18 looks as the original); None stores all pixels losslessly.
        need_caption: skip clips without a caption.
        strict: raise BadClip instead of skipping a clip.
        shots: cut files at the ends of their shots.
        filters: limits that clips must meet.
        captioner: the name of a model that writes new captions, see `open_captioner`; "" for none.
        held_out: the share of source files that go to `out_dir`/heldout instead.
        shard_bytes: a shard ends when it reaches this size.
        files_per_part: the unit of work and of restarts; a shard holds clips of one part only. None chooses 1 to 64,
            so that there are at least 64 parts if there are as many files.
        workers: the number of processes; 0 works in this process. A process that crashes costs one clip.
        timeout: seconds of silence after which a process is killed, at the cost of one clip; None for no limit.
        beam: options of Apache Beam, which then runs the tasks; None for local processes.

    Raises:
        DataError: `out_dir` holds another data set, or no clip is good.
        ImportError: a package is missing that the settings need.
        ValueError: a setting is out of range.

    Example:
        >>> import tempfile
        >>> import minisora_jax as ms
        >>> out = tempfile.mkdtemp() + "/clips"
        >>> report = ms.prepare("shapes", out, count=4)
        >>> len(ms.open_clips(out))
        4
    """
    if not 0 <= held_out < 1 or workers < 0 or (files_per_part is not None and files_per_part < 1):
        raise ValueError(
            f"held_out={held_out} must be at least 0 and below 1, workers={workers} at least 0, and "
            f"files_per_part={files_per_part} at least 1"
        )
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout={timeout:g} must be above 0 seconds")
    if crf is not None and (not 0 <= crf <= 51 or cell % 2):
        raise ValueError(f"crf={crf} must be 0 to 51, and cell={cell} even with it: H.264 stores colour at half size")
    curation = Curation(Sizes(cell, max_frames, max_pixels, max_side, fps), shots, filters or Filters())
    curation.check()
    model = open_captioner(captioner) if captioner else None
    spec = f"shapes:{split}:{count}" if str(source) == "shapes" else source
    clips = open_source(spec, need_caption=need_caption and not captioner, strict=strict)
    files_per_part = files_per_part or min(64, max(1, len(clips) // 64))
    settings = {
        "preprocessing_version": PREPROCESSING_VERSION,
        "source": clips.identity,
        "need_caption": need_caption,
        **dataclasses.asdict(curation.sizes),
        "shots": shots,
        "filters": dataclasses.asdict(curation.filters),
        "captioner": model.identity if model else "",
        "crf": crf,
        "held_out": held_out,
        "files_per_part": files_per_part,
    }
    settings |= {"actions": list(clips.actions)} if clips.actions else {}
    out_dir = Path(out_dir).absolute()
    opening = record_writer.opening_of("clips", settings, shard_bytes, "group_size:1,zstd:1")
    plan = Plan(clips, str(out_dir), curation, opening, files_per_part, held_out, captioner, strict, crf)
    with only_writer(out_dir, "minisora prepare"):
        if manifest := record_writer.finished(out_dir, opening):
            return _stored_report(out_dir, manifest)
        record_writer.begin(out_dir, opening)
        plan.folder.mkdir(exist_ok=True)
        _work(plan, model, workers, timeout, beam)
        return _close(plan, clips.report)


def _work(plan: Plan, model: Captioner | None, workers: int, timeout: float | None, beam: list[str] | None) -> None:
    """Gather the clips of all parts, then caption them and leave out duplicates. Finished parts are kept."""
    if beam is None:
        execute = _run_locally
    else:
        execute = lambda job, tasks, title, total, workers, timeout: run_on_beam(job, tasks, beam, timeout, title)
    parts = range(plan.parts)
    gather = functools.partial(gather_safely, plan)
    execute(gather, [(part,) for part in parts], "clips", len(plan.source), workers, timeout)
    repeats = _repeats(plan)
    second_round = [(part, repeats.get(part, {})) for part in parts if model or part in repeats]
    if model and not all(plan.finished(part).exists() for part in parts):
        model.check()
        timeout, workers = None, min(workers, model.processes or workers)  # captioners have time limits of their own
    total = sum(len(read_notes(plan.gathered(part))["clips"]) for part, _ in second_round)
    finish = functools.partial(finish_safely, plan)
    execute(finish, second_round, "captions" if model else "duplicates", total, workers, timeout)


def _run_locally(
    job: Callable[..., None], tasks: list[tuple], title: str, total: int, workers: int, timeout: float | None
) -> None:
    """Run the tasks in local processes, with a progress bar of files (or clips)."""
    with Progress(total=total, desc=title, unit="file" if title == "clips" else "clip") as bar:
        seen: dict[int, set[int]] = {}

        def run_task(worker: Worker | Inline, task: tuple) -> None:
            counted = seen.setdefault(task[0], set())

            def on_item(i: int) -> None:
                if i not in counted:
                    counted.add(i)
                    bar.update()

            job(worker, *task, on_item=on_item)
            del seen[task[0]]

        run_here(run_task, tasks, workers, timeout)


def _repeats(plan: Plan) -> dict[int, dict[int, str]]:
    """{part: {number of a clip in it: name of the earlier clip that it repeats}}, from the hashes of all parts."""
    distance = plan.curation.filters.duplicates
    if distance is None:
        return {}
    hashes, names, at = [], [], []
    for part in range(plan.parts):
        for n, clip in enumerate(read_notes(plan.gathered(part))["clips"]):
            hashes.append(clip["hash"])
            names.append(clip["name"])
            at.append((part, n))
    repeats: dict[int, dict[int, str]] = {}
    for number, first in repeated(hashes, distance).items():
        part, n = at[number]
        repeats.setdefault(part, {})[n] = names[first]
    return repeats


def _close(plan: Plan, report: SkipReport) -> SkipReport:
    """Write the reports, rename the shards, and write the manifests last."""
    out_dir, summary = Path(plan.out), Summary(plan.curation.filters, report.skipped)
    shards: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for part in range(plan.parts):
        gathered = read_notes(plan.gathered(part))
        done = read_notes(plan.finished(part)) if plan.finished(part).exists() else None
        summary.add(gathered, done)
        for split, entries in (done or gathered)["shards"].items():
            shards[split] += [{**entry, "file": f"{record_writer.PARTS}/{entry['file']}"} for entry in entries]
    report.skipped, report.shortened, report.kept = summary.skipped, summary.shortened, summary.kept
    report.remarks, report.source_bytes = summary.remarks, summary.source_bytes
    report.bytes = sum(entry["bytes"] for entries in shards.values() for entry in entries)
    if not shards["train"]:
        held = sum(len(s["sizes"]) for s in shards["heldout"])
        shutil.rmtree(plan.folder)
        (out_dir / "progress.jsonl").unlink()
        raise DataError(f"no good clip{f' except {held} held-out ones' if held else ''}: {report.summary()}")
    report.write(out_dir / SKIPPED)
    write_report(out_dir / "report.html", summary, plan.opening)
    if shards["heldout"]:
        (out_dir / "heldout").mkdir(exist_ok=True)
        moved = [{**entry, "file": f"../{entry['file']}"} for entry in shards["heldout"]]
        record_writer.finish(out_dir / "heldout", plan.opening, moved, {}, {})
    elif plan.held_out:
        log.warning(
            "none of %d clips is held out: a file's hash decides, and %g of few may be none. Try a larger --held-out",
            *(summary.kept, plan.held_out),
        )
    closing = {
        "skipped": {"file": SKIPPED, "sha256": sha256(out_dir / SKIPPED), "counts": report.counts},
        "shortened": report.shortened,
        "remarks": report.remarks,
        "bytes": [report.source_bytes, report.bytes],
        "heldout": sum(len(entry["sizes"]) for entry in shards["heldout"]),
    }
    record_writer.finish(out_dir, plan.opening, shards["train"], {}, closing)
    shutil.rmtree(plan.folder)
    return report


def _stored_report(out_dir: Path, manifest: dict[str, Any]) -> SkipReport:
    """The report of the run that wrote a data set; DataError if its files are damaged."""
    report = SkipReport()
    rows = lambda value, *names: [row for row in value if all(isinstance(row[name], str) for name in names)]
    try:
        report.kept, report.shortened = manifest["records"] + manifest["heldout"], int(manifest["shortened"])
        report.source_bytes, report.bytes = map(int, manifest["bytes"])
        report.remarks = rows(manifest["remarks"], "name", "remark")
        report.skipped = rows(read_json_lines(out_dir / SKIPPED), "name", "reason")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"the report of {out_dir} is damaged ({type(error).__name__}: {error}): delete the folder and run the "
            "command again"
        ) from error
    return report

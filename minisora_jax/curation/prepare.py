"""`minisora prepare`: every clip decoded, checked, filtered and captioned once, so that trainings meet only good ones.

    source -> parts: probe, shots, decode, filters, split -> duplicates -> captions
           -> clips-00000-of-0000N.array_record, sizes.npy, skipped.jsonl, report.html, manifest.json

A source is cut into parts of some files, which are tasks (parts.py here) for local processes or for Apache Beam; only
duplicates are looked for over all parts, between two rounds of tasks, by the clips' hashes. Pixels are kept exactly
(zstd). The bytes written depend on the source and the settings, not on how many workers there were or interruptions.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minisora_jax.curation.beam import run_on_beam
from minisora_jax.curation.captioners import open_captioner
from minisora_jax.curation.duplicates import repeated
from minisora_jax.curation.filters import Filters
from minisora_jax.curation.parts import SPLITS, Plan, finish_safely, gather_safely, read_notes
from minisora_jax.curation.report import Summary, write_report
from minisora_jax.curation.stages import Curation, Sizes
from minisora_jax.curation.workers import run_here
from minisora_jax.io import record_writer
from minisora_jax.io.records import sha256
from minisora_jax.io.retry import DataError
from minisora_jax.sources.base import PREPROCESSING_VERSION, SkipReport
from minisora_jax.sources.spec import open_source

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
    """Write the good clips of `source` to `out_dir`, and say what was skipped.

    source: what `open_source` knows, such as a folder; "shapes" is `count` procedural clips of `split`.
    shots: cut files where their shots end.   filters: limits that clips must meet.   captioner: what describes the
    clips anew, as `open_captioner` spells it.   held_out: share of source files that go to `out_dir`/heldout instead.
    files_per_part: the unit of work, of restarts, and (beside `shard_bytes`) of shards; by default 1 to 64, so that
    there are 64 parts or more where there are as many files.
    workers: processes, each of which may crash or hang for `timeout` seconds at the cost of one clip; 0 works here.
    beam: options of Apache Beam, which then does the work.

    An interrupted run, started again, keeps its finished parts. DataError if `out_dir` holds another data set, or no
    clip is good; ImportError if a package is missing that these settings need.
    """
    if not 0 <= held_out < 1 or workers < 0 or (files_per_part is not None and files_per_part < 1):
        raise ValueError(
            f"held_out={held_out} must be at least 0 and below 1, workers={workers} at least 0, and "
            f"files_per_part={files_per_part} at least 1"
        )
    curation = Curation(Sizes(cell, max_frames, max_pixels), shots, filters or Filters())
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
        "held_out": held_out,
        "files_per_part": files_per_part,
    }
    out_dir = Path(out_dir).absolute()
    opening = record_writer.opening_of("clips", settings, shard_bytes, "group_size:1,zstd:1")
    plan = Plan(clips, str(out_dir), curation, opening, files_per_part, held_out, captioner, strict)
    if manifest := record_writer.finished(out_dir, opening):
        return _report_of(out_dir, manifest)
    record_writer.begin(out_dir, opening)
    plan.folder.mkdir(exist_ok=True)
    if beam is None:
        execute = _here
    else:
        execute = lambda job, tasks, title, total, workers, timeout: run_on_beam(job, tasks, beam, timeout, title)
    parts = range(plan.parts)
    gather = functools.partial(gather_safely, plan)
    execute(gather, [(part,) for part in parts], "clips", len(clips), workers, timeout)
    repeats = _repeats(plan)
    again = [(part, repeats.get(part, {})) for part in parts if model or part in repeats]
    if model and not all(plan.finished(part).exists() for part in parts):
        model.check()
        timeout, workers = None, min(workers, model.processes or workers)  # captioners mind their own time
    total = sum(len(read_notes(plan.gathered(part))["clips"]) for part, _ in again)
    finish = functools.partial(finish_safely, plan)
    execute(finish, again, "captions" if model else "duplicates", total, workers, timeout)
    return _close(plan, clips.report)


def _here(job: Callable, tasks: list[tuple], title: str, total: int, workers: int, timeout: float | None) -> None:
    """The tasks in local processes, with a bar of files (or clips) done, their rate, and the time that is left."""
    with tqdm(total=total, desc=title, unit="file" if title == "clips" else "clip", disable=None) as bar:
        seen: dict[int, set[int]] = {}

        def one(worker, task):
            known = seen.setdefault(task[0], set())

            def on_item(i):
                if i not in known:
                    known.add(i)
                    bar.update()

            job(worker, *task, on_item=on_item)
            del seen[task[0]]

        run_here(one, tasks, workers, timeout)


def _repeats(plan: Plan) -> dict[int, dict[int, str]]:
    """{part: {number of a clip in it: name of the earlier clip that it repeats}}, by the hashes of all parts."""
    distance = plan.curation.filters.duplicates
    if distance is None:
        return {}
    hashes, names, at = [], [], []
    for part in range(plan.parts):
        for n, clip in enumerate(read_notes(plan.gathered(part))["clips"]):
            hashes.append(clip["hash"])
            names.append(clip["name"])
            at.append((part, n))
    found: dict[int, dict[int, str]] = {}
    for number, first in repeated(hashes, distance).items():
        part, n = at[number]
        found.setdefault(part, {})[n] = names[first]
    return found


def _close(plan: Plan, report: SkipReport) -> SkipReport:
    """Shards under their final names, the reports, and the manifests last."""
    out_dir, summary = Path(plan.out), Summary(plan.curation.filters, report.skipped)
    shards: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for part in range(plan.parts):
        gathered = read_notes(plan.gathered(part))
        done = read_notes(plan.finished(part)) if plan.finished(part).exists() else None
        summary.add(gathered, done)
        for split, entries in (done or gathered)["shards"].items():
            shards[split] += [{**entry, "file": f"{record_writer.PARTS}/{entry['file']}"} for entry in entries]
    report.skipped, report.shortened, report.kept = summary.skipped, summary.shortened, summary.kept
    if not shards["train"]:
        held = sum(len(s["sizes"]) for s in shards["heldout"])
        shutil.rmtree(plan.folder)
        (out_dir / "progress.jsonl").unlink()
        raise DataError(f"no good clip{f' but the {held} held out' if held else ''}: {report.summary()}")
    report.write(out_dir / SKIPPED)
    write_report(out_dir / "report.html", summary, plan.opening)
    if shards["heldout"]:
        (out_dir / "heldout").mkdir(exist_ok=True)
        moved = [{**entry, "file": f"../{entry['file']}"} for entry in shards["heldout"]]
        record_writer.finish(out_dir / "heldout", plan.opening, moved, {}, {})
    closing = {
        "skipped": {"file": SKIPPED, "sha256": sha256(out_dir / SKIPPED), "counts": report.counts},
        "shortened": report.shortened,
        "heldout": sum(len(entry["sizes"]) for entry in shards["heldout"]),
    }
    record_writer.finish(out_dir, plan.opening, shards["train"], {}, closing)
    shutil.rmtree(plan.folder)
    return report


def _report_of(out_dir: Path, manifest: dict[str, Any]) -> SkipReport:
    """What the run said that wrote a data set."""
    report = SkipReport()
    report.kept, report.shortened = manifest["records"] + manifest["heldout"], manifest["shortened"]
    report.skipped = [json.loads(line) for line in (out_dir / SKIPPED).read_text(encoding="utf-8").splitlines()]
    return report

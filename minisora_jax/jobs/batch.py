"""Many jobs: in groups that are packed together, each result a file, a manifest line for each job that is done.

    prompts.jsonl   one job a line (job.py)      ->   OUT/00000-a-red-circle-0.mp4, ..., OUT/manifest.jsonl

A run that is started again leaves out the groups whose jobs are all in the manifest with their files in place. A job
that cannot be done, say since its video is damaged, has its reason in the manifest and holds nothing up.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from minisora_jax.generate.pipeline import VideoPipeline
from minisora_jax.generate.runner import run_tasks
from minisora_jax.io.filesystem import json_or_none
from minisora_jax.io.records import sha256
from minisora_jax.jobs.job import Job, exists, name_of, start
from minisora_jax.jobs.output import Output, batch_of, beside, record_of, sampling_of

log = logging.getLogger("minisora")

MANIFEST = "manifest.jsonl"


def run_jobs(
    pipeline: VideoPipeline,
    jobs: Sequence[Job],
    paths: Sequence[Path],
    *,
    model: dict,
    sampling: dict,
    upscale: int = 1,
    progress: bool = True,
    strict: bool = True,
    watch=None,
) -> list[dict | Exception]:
    """The record of each job, done in one group. Where not `strict`, a job that cannot be done is its exception.

    watch(share done, look) is that of `perform`, by number of job.
    """
    found: list[dict | Exception] = [RuntimeError("not done")] * len(jobs)
    started, outputs = [], {}
    for i, job in enumerate(jobs):
        try:
            exists(job)
            started.append((i, *start(pipeline, job)))
        except (ValueError, OSError) as error:
            if strict:
                raise
            found[i] = error
    batch_size = [jobs[i] for i, _, _ in started]
    by_job = lambda look: lambda: {started[k][0]: latents for k, latents in look().items()}
    seen = watch and (lambda share, look: watch(share, by_job(look)))

    def write(number: int, frames) -> None:
        i, _, fps = started[number]
        if i not in outputs:
            outputs[i] = Output(paths[i], fps, record_of(batch_size, number, model, sampling), upscale)
        outputs[i].write(frames)

    def failed(number: int, error: ValueError) -> None:
        i = started[number][0]
        found[i] = error
        if output := outputs.pop(i, None):
            output.abandon()

    doing = {"write": write, "watch": seen, "failed": None if strict else failed, "progress": progress}
    try:
        run_tasks(pipeline, [task for _, task, _ in started], **doing, **sampling)
    except BaseException:
        for output in outputs.values():
            output.abandon()
        raise
    for i, output in outputs.items():
        found[i] = output.close()
    return found


def read_jobs(path: Path) -> list[Job]:
    """The jobs of a batch file; ValueError names the line that is none."""
    jobs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            jobs.append(Job.from_dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not jobs:
        raise ValueError(f'{path} has no jobs: one a line, such as {{"prompt": "a red circle moves left"}}')
    return jobs


def run_batch(pipeline: VideoPipeline, jobs: Sequence[Job], out: Path, suffix: str, batch_size: int, **options) -> dict:
    """{"made": n, "failed": n, "before": n}: how many jobs were done, could not be, or were done by an earlier run."""
    out.mkdir(parents=True, exist_ok=True)
    done = _done(out, jobs)
    counts = {"made": 0, "failed": 0, "before": 0}
    for first in range(0, len(jobs), batch_size):
        numbers = range(first, min(first + batch_size, len(jobs)))
        if all(n in done for n in numbers):
            counts["before"] += len(numbers)
            continue
        paths = [out / f"{n:05d}-{name_of(jobs[n])}{suffix_of(jobs[n], suffix)}" for n in numbers]
        results = run_jobs(pipeline, [jobs[n] for n in numbers], paths, strict=False, **options)
        with (out / MANIFEST).open("a", encoding="utf-8") as manifest:
            for n, path, result in zip(numbers, paths, results):
                line = {"number": n, "job": jobs[n].to_dict()}
                if isinstance(result, Exception):
                    line["error"] = f"{type(result).__name__}: {result}"
                    log.warning("job %d could not be done: %s", n, result)
                else:
                    line |= {"file": path.name, "frames": result["frames"], "pixels": result["pixels"]}
                counts["failed" if "error" in line else "made"] += 1
                manifest.write(json.dumps(line) + "\n")
    return counts


def _done(out: Path, jobs: Sequence[Job]) -> set[int]:
    """Numbers of the jobs that an earlier run has done, or found that they cannot be."""
    done: set[int] = set()
    manifest = out / MANIFEST
    for text in manifest.read_text(encoding="utf-8").splitlines() if manifest.exists() else []:
        line = json_or_none(text)
        if not isinstance(line, dict) or line.get("number", -1) not in range(len(jobs)):
            continue  # a line half written, or of a longer batch
        same = line.get("job") == json.loads(json.dumps(jobs[line["number"]].to_dict()))
        if not same:
            raise ValueError(
                f"{manifest}: job {line['number']} was {line.get('job')} and is now {jobs[line['number']].to_dict()}: "
                f"use another --out for other jobs"
            )
        if "error" in line or (out / line["file"]).exists():
            done.add(line["number"])
    return done


def reproduce(pipeline: VideoPipeline, record: dict, path: Path, **doing) -> dict:
    """The record of `path`, made again from `record` with all that was made with it, on which rounding depends.

    ValueError where the model or a file that it was made of is another. What was made beside it is not kept. `doing` is
    what of `run_jobs` no record says: upscale, progress, watch.
    """
    said, index = record["model"], record["index"]
    for name, found in (("hash", pipeline.hash), ("codec_hash", pipeline.codec.hash)):
        if said[name] != found:
            raise ValueError(f"it was made with a model of {name} {said[name]}, and this one has {found}")
    for file, digest in record["inputs"].items():
        if sha256(Path(file)) != digest:
            raise ValueError(f"{file} has changed since")
    jobs = batch_of(record)
    kind = ".mp4" if path.suffix == ".png" else path.suffix
    paths = [path.with_name(f".beside-{i}-{path.stem}{suffix_of(job, kind)}") for i, job in enumerate(jobs)]
    paths[index] = path
    doing |= {"model": said, "sampling": sampling_of(record)}
    try:
        made = run_jobs(pipeline, jobs, paths, strict=False, **doing)  # what could not be done then cannot now
    finally:
        for beside_it in (p for p in paths if p != path):
            _remove(beside_it)
    if isinstance(made[index], Exception):
        raise made[index]
    return made[index]


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    for file in (path, beside(path)):
        if not file.is_dir():
            file.unlink(missing_ok=True)


def free_paths(out: Path, jobs: Sequence[Job], suffix: str) -> list[Path]:
    """A path for each job that no file has yet: what was made before may be what a job reads."""
    paths: list[Path] = []
    for job in jobs:
        name, kind = name_of(job), suffix_of(job, suffix)
        tries = (out / f"{name}{f'-{n}' if n > 1 else ''}{kind}" for n in itertools.count(1))
        paths.append(next(path for path in tries if path not in paths and not path.exists()))
    return paths


def suffix_of(job: Job, suffix: str) -> str:
    return ".png" if job.frames == 1 and job.task == "make" and not job.seconds else suffix

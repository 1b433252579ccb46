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

from minisora_jax.generate.native import Watch
from minisora_jax.generate.pipeline import VideoPipeline
from minisora_jax.generate.runner import Task, run_tasks
from minisora_jax.io.filesystem import json_or_none
from minisora_jax.io.records import sha256
from minisora_jax.jobs.job import Job
from minisora_jax.jobs.output import Output, batch_of, beside, record_of, sampling_of
from minisora_jax.jobs.sounds import sounds_of
from minisora_jax.jobs.starting import start

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
    watch: Watch | None = None,
) -> list[dict | Exception]:
    """Make jobs together and write their files.

    Args:
        pipeline: the model and codec.
        jobs: what to make.
        paths: a file for each job; its suffix chooses the format.
        model: the part of the records that names the model.
        sampling: the options of `NativePipeline.sample`.
        upscale: how many times each pixel is repeated in the files.
        progress: whether to show a progress bar.
        strict: raise if a job cannot be done, instead of returning its exception.
        watch: as in `NativePipeline.sample`, with latents by number of job.

    Returns:
        For each job its record, or the exception that says why it could not be done.
    """
    results: list[dict | Exception] = [RuntimeError("not done")] * len(jobs)
    started: list[tuple[int, Task, float]] = []
    outputs: dict[int, Output] = {}
    for i, job in enumerate(jobs):
        try:
            _require_inputs(job)
            started.append((i, *start(pipeline, job)))
        except (ValueError, OSError) as error:
            if strict:
                raise
            results[i] = error
    startable = [jobs[i] for i, _, _ in started]
    by_job = lambda look: lambda: {started[k][0]: latents for k, latents in look().items()}
    watch_jobs = None if watch is None else (lambda share, look: watch(share, by_job(look)))

    def write(number: int, frames) -> None:
        i, _, fps = started[number]
        if i not in outputs:
            record, sounds = record_of(startable, number, model, sampling), sounds_of(jobs[i], paths[i], fps)
            outputs[i] = Output(paths[i], fps, record, upscale, sounds)
        outputs[i].write(frames)

    notes: dict[int, dict] = {}

    def note(number: int, entries: dict) -> None:
        notes.setdefault(started[number][0], {}).update(entries)

    def failed(number: int, error: ValueError) -> None:
        i = started[number][0]
        results[i] = error
        if output := outputs.pop(i, None):
            output.abandon()

    callbacks = {"write": write, "note": note, "watch": watch_jobs, "failed": None if strict else failed}
    try:
        run_tasks(pipeline, [task for _, task, _ in started], progress=progress, **callbacks, **sampling)
    except BaseException:
        for output in outputs.values():
            output.abandon()
        raise
    for i, output in outputs.items():
        results[i] = output.close(notes.get(i, {}))
    return results


def read_jobs(path: Path) -> list[Job]:
    """The jobs of a batch file. Raises ValueError, which names the line that is no job."""
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
    """Make jobs in batches of `batch_size`, with a manifest; a run that was stopped goes on.

    Returns:
        {"made": n, "failed": n, "before": n}: jobs that were made, could not be, or were made by an earlier run.
    """
    out.mkdir(parents=True, exist_ok=True)
    done = _done(out, jobs)
    counts = {"made": 0, "failed": 0, "before": 0}
    for first in range(0, len(jobs), batch_size):
        numbers = range(first, min(first + batch_size, len(jobs)))
        if all(n in done for n in numbers):
            counts["before"] += len(numbers)
            continue
        paths = [out / f"{n:05d}-{_name_of(jobs[n])}{suffix_of(jobs[n], suffix)}" for n in numbers]
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
        if _job_of(line) != jobs[line["number"]]:
            raise ValueError(
                f"{manifest}: job {line['number']} was {line.get('job')} and is now {jobs[line['number']].to_dict()}: "
                f"use another --out for other jobs"
            )
        if "error" in line or (out / line["file"]).exists():
            done.add(line["number"])
    return done


def _job_of(line: dict) -> Job | None:
    """The job of a manifest line, also of one that an older version wrote; None if it is no job."""
    try:
        return Job.from_dict(line.get("job"))
    except (ValueError, TypeError):
        return None


def reproduce(pipeline: VideoPipeline, record: dict, path: Path, **options) -> dict:
    """Make a file again from its record, with all jobs of its batch, on which rounding depends. Only `path` is kept.

    Args:
        pipeline: the model that the record names.
        record: as `read_record` returns it.
        path: the file to write.
        **options: upscale, progress and watch of `run_jobs`, which no record holds.

    Returns:
        The new record.

    Raises:
        ValueError: if the model or an input file is not the recorded one.
    """
    model, index = record["model"], record["index"]
    for name, digest in (("hash", pipeline.hash), ("codec_hash", pipeline.codec.hash)):
        if model[name] != digest:
            raise ValueError(f"it was made with a model of {name} {model[name]}, and this one has {digest}")
    for file, digest in record["inputs"].items():
        if sha256(Path(file)) != digest:
            raise ValueError(f"{file} has changed since")
    jobs = batch_of(record)
    kind = ".mp4" if path.suffix == ".png" else path.suffix
    paths = [path.with_name(f".beside-{i}-{path.stem}{suffix_of(job, kind)}") for i, job in enumerate(jobs)]
    paths[index] = path
    options |= {"model": model, "sampling": sampling_of(record)}
    try:
        results = run_jobs(pipeline, jobs, paths, strict=False, **options)  # what could not be done then cannot now
    finally:
        for beside_it in (p for p in paths if p != path):
            _remove(beside_it)
    if isinstance(result := results[index], Exception):
        raise result
    return result


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    for file in (path, beside(path)):
        if not file.is_dir():
            file.unlink(missing_ok=True)


def free_paths(out: Path, jobs: Sequence[Job], suffix: str) -> list[Path]:
    """A new path for each job: an older file may be what a job reads."""
    paths: list[Path] = []
    for job in jobs:
        name, kind = _name_of(job), suffix_of(job, suffix)
        tries = (out / f"{name}{f'-{n}' if n > 1 else ''}{kind}" for n in itertools.count(1))
        paths.append(next(path for path in tries if path not in paths and not path.exists()))
    return paths


def suffix_of(job: Job, suffix: str) -> str:
    """The suffix of a job's file: .png for an image."""
    return ".png" if job.frames == 1 and job.task == "text_to_video" and not job.seconds else suffix


def _name_of(job: Job) -> str:
    """A file's name without its suffix: the first words of the prompt, and the seed."""
    words = "-".join("".join(c if c.isalnum() else " " for c in job.prompt).split())[:60]
    return f"{words}-{job.seed}"


def _require_inputs(job: Job) -> None:
    for path in job.inputs:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist")

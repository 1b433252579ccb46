"""Many jobs: in groups that are packed together, each result a file, a manifest line for each job that is done.

    prompts.jsonl   one job a line (job.py)      ->   OUT/00000-a-red-circle-0.mp4, ..., OUT/manifest.jsonl

A run that is started again leaves out the jobs that are in the manifest with their files as they were written. A job
that cannot be done, say since its video is damaged or its line is no job, has its reason in the manifest and holds
nothing up; the next run tries it again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minisora_jax.generate.native import Watch
from minisora_jax.generate.pipeline import VideoPipeline
from minisora_jax.generate.runner import Task, run_tasks
from minisora_jax.io.atomic import append_line
from minisora_jax.io.checksum import crc32
from minisora_jax.io.filesystem import open_regular, text_of
from minisora_jax.io.json_files import read_json_lines
from minisora_jax.io.lock import only_writer
from minisora_jax.io.records import sha256
from minisora_jax.jobs.job import Job
from minisora_jax.jobs.output import Output, batch_of, beside, own_folder, record_of, sampling_of
from minisora_jax.jobs.sounds import sounds_of
from minisora_jax.jobs.starting import start
from minisora_jax.media.video_writer import check_rate
from minisora_jax.parallel.processes import barrier, is_main

log = logging.getLogger("minisora")

MANIFEST = "manifest.jsonl"
NAME_BYTES = 120  # file systems allow names of 255 bytes, with all that is added to them


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
            task, fps = start(pipeline, job)
            check_rate(paths[i], fps)
            started.append((i, task, fps))
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


def read_jobs(path: Path) -> list[Job | ValueError]:
    """The jobs of a batch file in order, and for a line that is no job the error that says why.

    Raises:
        ValueError: no line is a job.
    """
    jobs: list[Job | ValueError] = []
    with open_regular(path) as file:
        text = text_of(file.read())
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            jobs.append(Job.from_dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            jobs.append(ValueError(f"{path}, line {number}: {str(error)[:500]}"))
    if all(isinstance(job, ValueError) for job in jobs):
        example = 'one a line, such as {"prompt": "a red circle moves left"}'
        raise ValueError(f"{path} has no jobs: {example}" + (f". {jobs[0]}" if jobs else ""))
    return jobs


def run_batch(
    pipeline: VideoPipeline, jobs: Sequence[Job | ValueError], out: Path, suffix: str, batch_size: int, **options
) -> dict[str, int]:
    """Make jobs in batches of `batch_size`, with a manifest; a run that was stopped goes on.

    Args:
        jobs: as `read_jobs` returns them.
        out: the folder; no other process may write it meanwhile.
        suffix: of the files, such as ".mp4".
        **options: those of `run_jobs`.

    Returns:
        {"made": n, "failed": n, "before": n}: jobs that were made, could not be, or were made by an earlier run.

    Raises:
        ValueError: the manifest is of other jobs.
    """
    with only_writer(out, "minisora generate --batch"), own_folder(out) as folder:
        made, failed, said = _earlier(out, jobs)
        barrier("what earlier runs did")  # before the main process adds to it
        counts = {"made": 0, "failed": 0, "before": len(made)}
        if failed:
            log.info("%d jobs failed before and are tried again", len(failed))
        for n, job in enumerate(jobs):
            if isinstance(job, ValueError):
                counts["failed"] += 1
                if (n, str(job)) not in said:
                    _note(out, {"number": n, "error": str(job)})
                log.warning("job %d is left out: %s", n, job)
        for first in range(0, len(jobs), batch_size):
            numbers = [n for n in range(first, min(first + batch_size, len(jobs))) if isinstance(jobs[n], Job)]
            if (made | failed).issuperset(numbers):
                numbers = [n for n in numbers if n in failed]
            # Else all of them: a job's rounding depends on those that it is packed with.
            counts["before"] -= len(made.intersection(numbers))
            group = [job for n in numbers if isinstance(job := jobs[n], Job)]
            paths = [folder / f"{n:05d}-{_name_of(job)}{suffix_of(job, suffix)}" for n, job in zip(numbers, group)]
            results = run_jobs(pipeline, group, paths, strict=False, **options) if group else []
            for n, job, path, result in zip(numbers, group, paths, results):
                line: dict[str, Any] = {"number": n, "job": job.to_dict()}
                if isinstance(result, Exception):
                    line["error"] = f"{type(result).__name__}: {result}"
                    log.warning("job %d could not be done: %s", n, result)
                else:
                    line |= {"file": path.name, "frames": result["frames"], "pixels": result["pixels"]}
                    line |= {"crc32": crc32(path)} if path.is_file() else {}
                counts["failed" if "error" in line else "made"] += 1
                _note(out, line)
    return counts


def _note(out: Path, line: dict[str, Any]) -> None:
    if is_main():
        append_line(out / MANIFEST, json.dumps(line))


def _earlier(out: Path, jobs: Sequence[Job | ValueError]) -> tuple[set[int], set[int], set[tuple[int, str]]]:
    """What earlier runs did: (numbers of jobs made, of those that failed, what was said of lines that are no jobs)."""
    made, failed, said = set[int](), set[int](), set[tuple[int, str]]()
    manifest = out / MANIFEST
    for line in read_json_lines(manifest):
        number = line.get("number")
        if type(number) is not int or not 0 <= number < len(jobs):
            continue  # of a longer batch
        if "job" not in line:  # it was no job
            said.add((number, str(line.get("error"))))
            continue
        if (earlier := _job_of(line)) is None:
            continue  # a damaged line: the job is made again
        if isinstance(job := jobs[number], Job) and earlier != job:
            raise ValueError(
                f"{manifest}: job {number} was {line['job']} and is now {job.to_dict()}: "
                f"use another --out for other jobs"
            )
        made.discard(number)
        failed.discard(number)
        if "error" in line:
            failed.add(number)
        elif _is_whole(out, line):
            made.add(number)
    return made, failed, said


def _is_whole(out: Path, line: dict[str, Any]) -> bool:
    """Whether the file of a manifest line is there, as it was written."""
    name = line.get("file")
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        return False
    path = out / name
    if path.is_file() and "crc32" in line and crc32(path) != line["crc32"]:
        log.warning("%s is not as it was written, and is made again", path)
        return False
    return path.exists()


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
    """A new path for each job: an older file may be what a job reads.

    Each is reserved by an empty record beside it, so that two runs at once do not choose the same.
    """
    out.mkdir(parents=True, exist_ok=True)
    return [_reserved(out, _name_of(job), suffix_of(job, suffix)) for job in jobs]


def _reserved(out: Path, name: str, suffix: str) -> Path:
    for n in itertools.count(1):
        path = out / f"{name}{f'-{n}' if n > 1 else ''}{suffix}"
        if not path.exists():
            with contextlib.suppress(FileExistsError):
                beside(path).open("x").close()
                return path
    raise AssertionError("unreachable")


def release(paths: Sequence[Path]) -> None:
    """Remove the reservations of files that were not made."""
    for path in paths:
        if not path.exists() and beside(path).is_file() and not beside(path).stat().st_size:
            beside(path).unlink()


def suffix_of(job: Job, suffix: str) -> str:
    """The suffix of a job's file: .png for an image."""
    return ".png" if job.frames == 1 and job.task == "text_to_video" and not job.seconds else suffix


def _name_of(job: Job) -> str:
    """A file's name without its suffix: the first words of the prompt, at most `NAME_BYTES`, and the seed."""
    words = "-".join("".join(c if c.isalnum() else " " for c in job.prompt[:200]).split())[:60]
    words = words.encode("utf-8")[:NAME_BYTES].decode("utf-8", "ignore").strip("-")
    return f"{words or 'video'}-{job.seed}"


def _require_inputs(job: Job) -> None:
    for path in job.inputs:
        try:
            open_regular(path).close()
        except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # a ValueError for a NUL in the name
            raise FileNotFoundError(f"{path} does not exist") from error

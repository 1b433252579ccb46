"""Result files: a video, with the record that reproduces it beside it and within it.

    minisora-out/a-red-circle-0.mp4         its own comment is the same record
    minisora-out/a-red-circle-0.mp4.json    the job, the sampling, what it was packed with, hashes of model and inputs

Rounding depends on what goes through the model together, so a record names all jobs of its batch, and `reproduce` makes
the whole batch again: bit for bit on the same kind of machine and versions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from minisora_jax import __version__
from minisora_jax.config import build, with_current_names
from minisora_jax.diffusion.guidance import GuidanceConfig
from minisora_jax.diffusion.sampler import SamplerConfig
from minisora_jax.io.atomic import write_text
from minisora_jax.io.filesystem import json_or_none, open_regular
from minisora_jax.io.records import sha256
from minisora_jax.jobs.job import Job
from minisora_jax.media.as_made import MOST_RECORD
from minisora_jax.media.sound import Sound
from minisora_jax.media.video import VideoError, read_note
from minisora_jax.media.video_writer import VideoWriter
from minisora_jax.parallel.processes import is_main

NOISE = "threefry"  # how a seed becomes noise; older records have no such entry


@dataclasses.dataclass
class Digest:
    """sha256 of the pixels of a video, as they come; upscaling and compression come after."""

    frames: int = 0

    def __post_init__(self):
        self._hash = hashlib.sha256()

    def add(self, frames_THWC: np.ndarray) -> None:
        self.frames += len(frames_THWC)
        self._hash.update(np.ascontiguousarray(frames_THWC).tobytes())

    @property
    def text(self) -> str:
        return self._hash.hexdigest()


def record_of(jobs: Sequence[Job], index: int, model: dict, sampling: dict) -> dict:
    """The record that reproduces job `index` of a batch. model: {"model": path, "hash": ..., "codec": ..., ...}."""
    return {
        "minisora": __version__,
        "job": jobs[index].to_dict(),
        "batch": [job.to_dict() for job in jobs] if len(jobs) > 1 else [],
        "index": index,
        "sampling": {
            name: dataclasses.asdict(value) if isinstance(value, SamplerConfig | GuidanceConfig) else value
            for name, value in sampling.items()
        },
        "model": model,
        "inputs": {path: sha256(Path(path)) for path in jobs[index].inputs},
        "machine": machine(),
        "noise": NOISE,
    }


def machine() -> dict[str, str]:
    """The versions and hardware that rounding depends on."""
    return {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "processor": platform.machine()}


def sampling_of(record: dict) -> dict:
    """The options of `NativePipeline.sample` that a record was made with; ValueError for others."""
    kinds, options = {"sampler": SamplerConfig, "guidance": GuidanceConfig}, record["sampling"]
    if options.keys() != kinds.keys():
        raise ValueError(f"its 'sampling' has {sorted(options)} in place of {sorted(kinds)}")
    return {name: build(kind, with_current_names(options[name]), name) for name, kind in kinds.items()}


def batch_of(record: dict) -> list[Job]:
    """All jobs that were made together with the record's own job, on which its rounding depends."""
    values = record.get("batch", record.get("together"))  # "together" before 0.2
    return [Job.from_dict(job) for job in values or [record["job"]]]


class Output:
    """One result's file, written as frames come; the record goes within it and, with the pixels' hash, beside it."""

    def __init__(self, path: Path, fps: float, record: dict, upscale: int = 1, sounds: Sequence[Sound] = ()):
        self.path, self.record, self.digest = path, record | {"fps": fps, "upscale": upscale}, Digest()
        self._writer = VideoWriter(path, fps, upscale=upscale, sounds=sounds)
        self._writer.__enter__()

    def write(self, frames_THWC: np.ndarray) -> None:
        if not self.digest.frames:
            self.record["size"] = list(frames_THWC.shape[1:3])  # as made: `media/as_made.py` reads it at that
            # Within a file the record has no hash of what has not been written yet.
            self._writer.note = json.dumps(self.record)
        self.digest.add(frames_THWC)
        self._writer.write(frames_THWC)

    def close(self, notes: dict) -> dict:
        """The whole record, with what the task noted about its result, such as that it fades."""
        self._writer.__exit__(None, None, None)
        whole = self.record | notes | {"frames": self.digest.frames, "pixels": self.digest.text}
        write_text(beside(self.path), json.dumps(whole, indent=1) + "\n")
        return whole

    def abandon(self) -> None:
        """Leave no file."""
        error = RuntimeError("abandoned")
        self._writer.__exit__(type(error), error, None)


@contextlib.contextmanager
def own_folder(out: str | os.PathLike) -> Iterator[Path]:
    """The folder in which this process writes: `out` on the main process, elsewhere one that is removed.

    Each process of a pod makes every video, for each has a part of every array, and one of them keeps the files.
    """
    if is_main():
        yield Path(out)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def beside(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def read_record(path: str | os.PathLike) -> dict:
    """The record of a video, from the file beside it or from within.

    Raises:
        ValueError: there is none, or it is not as this project writes it.
    """
    path = Path(path)
    aside = path if path.suffix == ".json" else beside(path)
    content = b""
    if aside.exists():
        with open_regular(aside) as file:
            content = file.read(MOST_RECORD + 1)
    text = content.decode("utf-8", "replace")
    if not text and path.is_file():
        try:
            text = read_note(path)
        except VideoError as error:
            raise ValueError(f"{path} has no record of how it was made: {error}") from error
    record = json_or_none(text)
    if not isinstance(record, dict) or "job" not in record:
        raise ValueError(f"{path} has no record of how it was made: neither it nor {aside.name} has a record")
    if problem := record_problem(record):
        raise ValueError(f"the record of {path} is damaged: {problem}")
    return record


def record_problem(record: Any) -> str:
    """What is wrong with a record of how a file was made, in words; "" for a good one. It may come from a stranger."""
    kinds = {"job": dict, "sampling": dict, "model": dict, "inputs": dict, "index": int}
    try:
        for name, kind in kinds.items():
            if not isinstance(record[name], kind) or isinstance(record[name], bool):
                return f"its {name!r} is {record[name]!r:.100}"
        Job.from_dict(record["job"])
        count = len(batch_of(record))
        if not 0 <= record["index"] < count:
            return f"its 'index' is {record['index']!r:.100}, of {count} jobs"
        sampling_of(record)
        words = {f"model.{name}": value for name, value in record["model"].items() if name not in ("window", "lora")}
        for name, value in (words | record["inputs"]).items():
            if not isinstance(value, str | None):
                return f"its {name!r} is {value!r:.100}, and no text"
        loras = record["model"].get("lora") or []
        if not (isinstance(loras, list) and all(isinstance(text, str) for text in loras)):
            return f"its 'model.lora' is {loras!r:.100}, and no list of texts"
        if any(not isinstance(record["model"].get(name), str) for name in ("hash", "codec_hash")):
            return "its model has no hashes"
        if not isinstance(window := record["model"].get("window"), int | None) or isinstance(window, bool):
            return f"its 'model.window' is {window!r:.100}"
        if not isinstance(machine := record.get("machine", {}), dict):
            return f"its 'machine' is {machine!r:.100}"
    except KeyError as error:
        return f"it has no {error}"
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        return f"{error}"[:300]
    return ""


def different_machine(record: dict) -> str:
    """A sentence if versions or hardware differ from the record's, so that pixels may; otherwise ""."""
    if record.get("noise") != NOISE:
        return "made by a version that drew other noise from a seed: the video will be another one"
    then, now = record.get("machine", {}), machine()
    changed = [f"{k} {then.get(k)} then, {now[k]} now" for k in now if then.get(k) != now[k]]
    return f"made elsewhere ({'; '.join(changed)}): pixels may differ in rounding" if changed else ""

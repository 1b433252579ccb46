"""Where the sound of a job's videos is heard in its result: with the frames that are kept."""

from __future__ import annotations

import logging
from pathlib import Path

from minisora_jax.jobs.job import Job
from minisora_jax.media.sound import ENCODERS, Sound
from minisora_jax.media.video import open_video

log = logging.getLogger("minisora")


def sounds_of(job: Job, path: Path, fps: float) -> list[Sound]:
    """The sounds of the result `path`, which has `fps` frames per second; a format without sound is said.

    New frames before a video delay its sound, new frames after it and between two videos are silent.
    """
    files = [file for file in (job.video, job.transition) if file]
    seconds = {file: length for file in files if (length := _heard_seconds(file, fps))}
    if seconds and path.suffix.lower() not in ENCODERS:
        log.info("%s has sound, which is lost: %s holds none; use .mp4", next(iter(seconds)), path.name)
        return []
    before = 0.0
    if job.task == "extend" and job.extend != "forward":
        before = max(1, round((job.seconds or 1.0) * fps)) / fps
    sounds = [Sound(job.video, before, seconds[job.video])] if job.video in seconds else []
    if job.transition and not job.loop and job.transition in seconds:
        sounds.append(Sound(job.transition, None, seconds[job.transition]))
    return sounds


def _heard_seconds(file: str, fps: float) -> float:
    """How long a file's frames are shown at a rate; 0 for one without sound."""
    with open_video(file) as video:
        return video.count(fps) / fps if video.info.sound else 0.0

"""The queue of jobs, and the one thread that runs them.

Waiting jobs with the same sampling options and about the same size run as one group through jobs/batch.py. Otherwise
jobs run one after another, in turns between visitors: no visitor's second job runs before another's first. A failing
job does not affect the others of its group. If a group fails as a whole, its jobs run again one by one.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from minisora_jax.generate.pipeline import VideoPipeline
from minisora_jax.jobs.batch import reproduce, run_jobs, suffix_of
from minisora_jax.jobs.job import Job
from minisora_jax.jobs.output import sampling_of
from minisora_jax.media.video import STILL_FPS
from minisora_jax.ui.forms import JobSpec, upscaled, without_paths
from minisora_jax.ui.gallery import Gallery
from minisora_jax.ui.uploads import InvalidInput, animated_webp

log = logging.getLogger("minisora")

MOST_WAITING = 64  # jobs of all visitors
MOST_EACH = 4  # waiting jobs of one visitor
GROUP_JOBS = 16  # jobs of a group
GROUP_VOLUME = 2**24  # pixels of all results of a group of several jobs
GROUP_RATIO = 4  # the results of a group differ in pixels by at most this factor, so a picture waits for no long video
PREVIEW_EVERY = 1.5  # seconds; previews take at most a fifth of the time
PREVIEW_CELLS = 144  # larger latent frames are shrunk to at most so many latents for a preview
PREVIEW_FRAMES = 5  # latent frames of a preview


@dataclasses.dataclass(eq=False)
class Ticket:
    """The progress of one job. `state` is waiting, running, finished, failed or stopped."""

    spec: JobSpec
    user: str
    name: str
    state: str = "waiting"
    file: str = ""  # of the result
    message: str = ""  # of a failure, or beside a result
    share: float = 0.0  # of the sampler's steps in this round
    round: int = 0
    preview: bytes = b""  # webp
    started: float = 0.0  # seconds of time.monotonic()
    first_step: float = 0.0  # the time of the first finished step; before it, programs are compiled
    group_size: int = 1
    record: dict | None = None

    @property
    def over(self) -> bool:
        """Whether the job is finished, failed or stopped."""
        return self.state in ("finished", "failed", "stopped")

    @property
    def progress(self) -> float:
        """The share of the whole job that is done, 0 to 1."""
        return min((self.round + self.share) / max(self.spec.rounds, self.round + 1), 1.0)

    def seconds_left(self) -> float | None:
        """The estimated time, from the pace since the first step; None before the second step."""
        if not self.first_step or self.progress >= 1:
            return None
        first = 1 / (self.spec.sampling["sampler"].steps * self.spec.rounds)
        if self.progress <= first:
            return None
        return (time.monotonic() - self.first_step) / (self.progress - first) * (1 - self.progress)

    def fail(self, message: str) -> None:
        """Mark the job as failed."""
        self.state, self.message = "failed", message


class _Stopped(Exception):
    """All jobs of the group are stopped."""


class JobQueue:
    """The queue of a page.

    Args:
        pipeline: generates the videos.
        gallery: stores the results.
        model: the model's entry of the records, see jobs/output.py.
    """

    def __init__(self, pipeline: VideoPipeline, gallery: Gallery, model: dict):
        self.pipeline, self.gallery, self.model = pipeline, gallery, model
        self._waiting: list[Ticket] = []
        self._running: list[Ticket] = []
        self._changed = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._serve, name="job queue", daemon=True)
        self._thread.start()

    def submit(self, spec: JobSpec, user: str) -> Ticket:
        """Add a job to the queue; InvalidInput if the queue is full, or has too many jobs of this visitor."""
        with self._changed:
            if len(self._waiting) >= MOST_WAITING:
                raise InvalidInput(f"{MOST_WAITING} jobs are waiting: try again in a few minutes")
            if sum(t.user == user for t in self._waiting) >= MOST_EACH:
                raise InvalidInput(f"{MOST_EACH} of your jobs are waiting: try again when one of them is finished")
            ticket = Ticket(spec, user, self.gallery.new_name())
            self._waiting.append(ticket)
            self._changed.notify()
            return ticket

    def stop(self, ticket: Ticket) -> None:
        """Stop a job. If its group is running, the other jobs go on."""
        with self._changed:
            if not ticket.over:
                ticket.state = "stopped"
            if ticket in self._waiting:
                self._waiting.remove(ticket)

    def stop_named(self, name: str | None) -> None:
        """Stop the job with this name."""
        for ticket in [t for t in self._waiting + self._running if t.name == name]:
            self.stop(ticket)

    def reproduction(self, file: str) -> JobSpec:
        """The job that reproduces a result from its record; InvalidInput if the result is deleted."""
        if not (item := self.gallery.item(file)):
            raise InvalidInput("this result is deleted")
        job = Job.from_dict(item.record["job"])
        if job.size is None:
            raise InvalidInput("this result was not made by the page: use minisora generate --reproduce")
        return JobSpec(job, sampling_of(item.record), GROUP_VOLUME, upscaled(job.size), reproduce=item.record)

    def leave(self, user: str) -> None:
        """Stop the waiting jobs of a visitor who has closed the page."""
        for ticket in [t for t in self._waiting if t.user == user]:
            self.stop(ticket)

    def jobs_ahead(self, ticket: Ticket) -> int:
        """The number of jobs before this one, including running jobs."""
        with self._changed:
            order = self._in_turn()
            return len(self._running) + order.index(ticket) if ticket in order else 0

    def close(self) -> None:
        """Stop all jobs, and end the thread."""
        with self._changed:
            self._open = False
            for ticket in self._waiting + self._running:
                ticket.state = "stopped"
            self._waiting.clear()
            self._changed.notify()
        self._thread.join(timeout=60)

    def _in_turn(self) -> list[Ticket]:
        """The waiting jobs in order: first every visitor's first job, then every second job, ..., each by arrival."""
        seen: dict[str, int] = {}
        turns = []
        for ticket in self._waiting:
            turns.append(seen.setdefault(ticket.user, 0))
            seen[ticket.user] += 1
        return [self._waiting[i] for i in sorted(range(len(turns)), key=lambda i: (turns[i], i))]

    def _next_group(self) -> list[Ticket]:
        """The first job in order, and all jobs that can run with it."""
        first, *others = self._in_turn()
        group, volume = [first], first.spec.volume
        for ticket in others:
            a, b = first.spec, ticket.spec
            alike = a.sampling == b.sampling and a.upscale == b.upscale and (a.rounds, b.rounds) == (1, 1)
            alike = alike and not (a.reproduce or b.reproduce)
            near = max(a.volume, b.volume) <= GROUP_RATIO * min(a.volume, b.volume)
            if alike and near and len(group) < GROUP_JOBS and volume + b.volume <= GROUP_VOLUME:
                group.append(ticket)
                volume += b.volume
        return group

    # ---- Running jobs

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or not self._open)
                if not self._open:
                    return
                self._running = self._next_group()
                for ticket in self._running:
                    self._waiting.remove(ticket)
            try:
                self._run(self._running)
                self.gallery.prune()
            except Exception:
                log.exception("a group of jobs failed; the queue goes on")
            finally:
                for ticket in (t for t in self._running if not t.over):
                    ticket.fail("the server had an error, which is in its log: try again")
                with self._changed:
                    self._running = []

    def _run(self, group: list[Ticket]) -> None:
        group = [t for t in group if not t.over]
        if not group:
            return
        for ticket in group:
            ticket.state, ticket.started, ticket.group_size = "running", time.monotonic(), len(group)
            ticket.share, ticket.round, ticket.first_step = 0.0, 0, 0.0
        jobs, spec = [t.spec.job for t in group], group[0].spec
        paths = [self.gallery.out / f"{t.name}{suffix_of(t.spec.job, '.mp4')}" for t in group]
        numbers = {spec.reproduce["index"]: group[0]} if spec.reproduce else dict(enumerate(group))
        options: dict[str, Any] = {"upscale": spec.upscale, "watch": _Watch(self.pipeline, numbers), "progress": False}
        try:
            if spec.reproduce:
                results = [reproduce(self.pipeline, spec.reproduce, paths[0], **options)]
            else:
                options |= {"model": self.model, "sampling": spec.sampling, "strict": False}
                results = run_jobs(self.pipeline, jobs, paths, **options)
        except _Stopped:
            return
        except Exception as error:
            if len(group) > 1:
                log.warning("a group of %d jobs failed (%s); they run one by one", len(group), error)
                for ticket in group:
                    self._run([ticket])
            else:
                group[0].fail(self._message(group[0], error))
            return
        for ticket, path, result in zip(group, paths, results):
            if isinstance(result, Exception):
                ticket.fail(self._message(ticket, result))
            elif ticket.over:  # stopped while it ran
                self.gallery.drop(ticket.name)
            else:
                ticket.file, ticket.record, ticket.preview = path.name, result, b""
                if spec.reproduce:
                    same = result["pixels"] == spec.reproduce.get("pixels")
                    ticket.message = "Reproduced: the pixels are identical" if same else "Reproduced: the pixels DIFFER"
                ticket.state = "finished"

    def _message(self, ticket: Ticket, error: Exception) -> str:
        """The sentence of a failure."""
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            return "the job needs more memory than the server has: choose fewer frames, or a smaller size"
        if isinstance(error, OSError):
            log.warning("%s: %s", ticket.name, error)
            return f"the server could not read or write a file ({error.strerror or type(error).__name__})"
        if isinstance(error, ValueError):
            return without_paths(error, ticket.spec.names)
        log.error("%s failed", ticket.name, exc_info=error)
        return f"the server had an error ({type(error).__name__}), which is in its log: try something smaller"


class _Watch:
    """Called after each step of a group: updates the progress of its tickets, and now and then their previews."""

    def __init__(self, pipeline: VideoPipeline, tickets: dict[int, Ticket]):
        self.pipeline, self.tickets, self.next = pipeline, tickets, time.monotonic() + PREVIEW_EVERY

    def __call__(self, share: float, look: Callable[[], dict[int, np.ndarray]]) -> None:
        if all(ticket.over for ticket in self.tickets.values()):
            raise _Stopped
        for ticket in self.tickets.values():
            ticket.round += share < ticket.share
            ticket.share, ticket.first_step = share, ticket.first_step or time.monotonic()
        since = time.monotonic()
        if since >= self.next:
            latents = {self.tickets[i]: _small(latents) for i, latents in look().items() if i in self.tickets}
            for ticket, frames in zip(latents, self.pipeline.decode(list(latents.values()))):
                upscale = max(1, 160 // max(frames.shape[1:3]))
                images = [Image.fromarray(f.repeat(upscale, 0).repeat(upscale, 1)) for f in frames]
                ticket.preview = animated_webp(images, ticket.spec.job.fps or STILL_FPS)
            now = time.monotonic()
            self.next = now + max(PREVIEW_EVERY, 4 * (now - since))


def _small(latents_thwc: np.ndarray) -> np.ndarray:
    """The first latent frames, shrunk by averaging."""
    z = latents_thwc[:PREVIEW_FRAMES]
    by = int(np.ceil(np.sqrt(z.shape[1] * z.shape[2] / PREVIEW_CELLS)))
    if by == 1:
        return z
    t, h, w, c = z.shape
    by = min(by, h, w)
    h, w = h // by, w // by
    return z[:, : h * by, : w * by].reshape(t, h, by, w, by, c).mean((2, 4))

"""The line of those who wait, and the one thread that serves it.

Whoever waits with the same sampling options, and about as much to make, is served together: one group through
jobs/batch.py. Otherwise it is one after another, in turns between visitors: nobody's second job goes before
somebody's first. A job that fails is alone in that; where a group fails as a whole each of it is done by itself.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time

import numpy as np
from PIL import Image

from minisora_jax.io.video import STILL_FPS
from minisora_jax.jobs.batch import reproduce, run_jobs, suffix_of
from minisora_jax.jobs.job import Job
from minisora_jax.jobs.output import sampling_of
from minisora_jax.ui.forms import JobSpec, plainly, upscaled
from minisora_jax.ui.gallery import Gallery
from minisora_jax.ui.uploads import InvalidInput, moving_picture

log = logging.getLogger("minisora")

MOST_WAITING = 64
MOST_EACH = 4  # jobs that one visitor may have waiting
TOGETHER = 16  # jobs of a group
GROUP_VOLUME = 2**24  # pixels of all its results, where it is more than one
LIKE = 4  # results of a group differ in pixels by at most this factor: a picture does not wait for a film
PREVIEW_EVERY = 1.5  # seconds; and previews take at most a fifth of the time
PREVIEW_CELLS = 144  # latents of a frame that are shown: larger ones are shrunk
PREVIEW_FRAMES = 5  # latent frames that are shown


@dataclasses.dataclass(eq=False)
class Ticket:
    """One job on its way. state: waiting, running, made, failed or stopped."""

    spec: JobSpec
    user: str
    name: str
    state: str = "waiting"
    file: str = ""
    words: str = ""  # of a failure, or beside a result
    share: float = 0.0
    round: int = 0
    preview: bytes = b""  # webp
    started: float = 0.0
    first_step: float = 0.0  # when the first step was done: before it, programs are compiled
    company: int = 1
    record: dict | None = None

    @property
    def over(self) -> bool:
        return self.state in ("made", "failed", "stopped")

    @property
    def done(self) -> float:
        """The share of all of it that is done."""
        return min((self.round + self.share) / max(self.spec.rounds, self.round + 1), 1.0)

    def seconds_left(self) -> float | None:
        """At the pace since its first step; None where that cannot be said yet."""
        if not self.first_step or self.done >= 1:
            return None
        first = 1 / (self.spec.sampling["sampler"].steps * self.spec.rounds)
        if self.done <= first:
            return None
        return (time.monotonic() - self.first_step) / (self.done - first) * (1 - self.done)

    def fail(self, words: str) -> None:
        self.state, self.words = "failed", words


class _Stopped(Exception):
    """Nobody waits for this group any longer."""


class JobQueue:
    def __init__(self, pipeline, gallery: Gallery, model: dict):
        self.pipeline, self.gallery, self.model = pipeline, gallery, model
        self._waiting: list[Ticket] = []
        self._running: list[Ticket] = []
        self._changed = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._serve, name="line", daemon=True)
        self._thread.start()

    def join(self, spec: JobSpec, user: str) -> Ticket:
        with self._changed:
            if len(self._waiting) >= MOST_WAITING:
                raise InvalidInput("too many wait already: try again in a few minutes")
            if sum(t.user == user for t in self._waiting) >= MOST_EACH:
                raise InvalidInput(f"{MOST_EACH} of yours wait already: let one of them be made first")
            ticket = Ticket(spec, user, self.gallery.new_name())
            self._waiting.append(ticket)
            self._changed.notify()
            return ticket

    def stop(self, ticket: Ticket) -> None:
        """Of a group that is at work the others go on."""
        with self._changed:
            if not ticket.over:
                ticket.state = "stopped"
            if ticket in self._waiting:
                self._waiting.remove(ticket)

    def stop_named(self, name: str | None) -> None:
        for ticket in [t for t in self._waiting + self._running if t.name == name]:
            self.stop(ticket)

    def spec_again(self, file: str) -> JobSpec:
        """A result, to be made again from its record."""
        if not (item := self.gallery.item(file)):
            raise InvalidInput("it is no longer here")
        sampling = sampling_of(item.record)
        return JobSpec(
            Job.from_dict(item.record["job"]),
            sampling,
            GROUP_VOLUME,
            upscaled(item.record["job"]["size"]),
            again=item.record,
        )

    def leave(self, user: str) -> None:
        """A visitor has closed the page: what still waits is not made."""
        for ticket in [t for t in self._waiting if t.user == user]:
            self.stop(ticket)

    def before(self, ticket: Ticket) -> int:
        """How many are served before this one, those at work counted."""
        with self._changed:
            order = self._in_turn()
            return len(self._running) + order.index(ticket) if ticket in order else 0

    def close(self) -> None:
        with self._changed:
            self._open = False
            for ticket in self._waiting + self._running:
                ticket.state = "stopped"
            self._waiting.clear()
            self._changed.notify()
        self._thread.join(timeout=60)

    def _in_turn(self) -> list[Ticket]:
        """Everybody's first, then everybody's second, ..., each by arrival."""
        seen: dict[str, int] = {}
        turns = []
        for ticket in self._waiting:
            turns.append(seen.setdefault(ticket.user, 0))
            seen[ticket.user] += 1
        return [self._waiting[i] for i in sorted(range(len(turns)), key=lambda i: (turns[i], i))]

    def _next_group(self) -> list[Ticket]:
        """Whose turn it is, and all that go with it."""
        first, *others = self._in_turn()
        group, volume = [first], first.spec.volume
        for ticket in others:
            a, b = first.spec, ticket.spec
            alike = a.sampling == b.sampling and a.upscale == b.upscale and (a.rounds, b.rounds) == (1, 1)
            alike = alike and not (a.again or b.again)
            near = max(a.volume, b.volume) <= LIKE * min(a.volume, b.volume)
            if alike and near and len(group) < TOGETHER and volume + b.volume <= GROUP_VOLUME:
                group.append(ticket)
                volume += b.volume
        return group

    # ---- At work

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
                self._do(self._running)
                self.gallery.prune()
            except Exception:
                log.exception("the line goes on after")
            finally:
                for ticket in (t for t in self._running if not t.over):
                    ticket.fail("something went wrong here, and has been noted: try again")
                with self._changed:
                    self._running = []

    def _do(self, group: list[Ticket]) -> None:
        group = [t for t in group if not t.over]
        if not group:
            return
        for ticket in group:
            ticket.state, ticket.started, ticket.company = "running", time.monotonic(), len(group)
            ticket.share, ticket.round, ticket.first_step = 0.0, 0, 0.0
        jobs, once = [t.spec.job for t in group], group[0].spec
        paths = [self.gallery.out / f"{t.name}{suffix_of(t.spec.job, '.mp4')}" for t in group]
        numbers = {once.again["index"]: group[0]} if once.again else dict(enumerate(group))
        options = {"upscale": once.upscale, "watch": _Watch(self.pipeline, numbers), "progress": False}
        try:
            if once.again:
                results = [reproduce(self.pipeline, once.again, paths[0], **options)]
            else:
                options |= {"model": self.model, "sampling": once.sampling, "strict": False}
                results = run_jobs(self.pipeline, jobs, paths, **options)
        except _Stopped:
            return
        except Exception as error:
            if len(group) > 1:
                log.warning("a group of %d could not be done (%s); each is done alone", len(group), error)
                for ticket in group:
                    self._do([ticket])
            else:
                group[0].fail(self._words(group[0], error))
            return
        for ticket, path, result in zip(group, paths, results):
            if isinstance(result, Exception):
                ticket.fail(self._words(ticket, result))
            elif ticket.over:  # stopped meanwhile
                self.gallery.drop(ticket.name)
            else:
                ticket.file, ticket.record, ticket.preview = path.name, result, b""
                if once.again:
                    same = result["pixels"] == once.again.get("pixels")
                    ticket.words = "Made again: the same to the bit" if same else "Made again: NOT the same"
                ticket.state = "made"

    def _words(self, ticket: Ticket, error: Exception) -> str:
        """A failure in a sentence."""
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            return "this needs more memory than there is: ask for fewer frames, or a smaller size"
        if isinstance(error, OSError):
            log.warning("%s: %s", ticket.name, error)
            return f"a file could not be read or written here ({error.strerror or type(error).__name__})"
        if isinstance(error, ValueError):
            return plainly(error, ticket.spec.names)
        log.error("%s failed", ticket.name, exc_info=error)
        return f"something went wrong here ({type(error).__name__}), and has been noted: try something smaller"


class _Watch:
    """Called after each step of a group: how far it is, and now and then how it looks."""

    def __init__(self, pipeline, tickets: dict[int, Ticket]):
        self.pipeline, self.tickets, self.next = pipeline, tickets, time.monotonic() + PREVIEW_EVERY

    def __call__(self, share: float, look) -> None:
        if all(ticket.over for ticket in self.tickets.values()):
            raise _Stopped
        for ticket in self.tickets.values():
            ticket.round += share < ticket.share
            ticket.share, ticket.first_step = share, ticket.first_step or time.monotonic()
        since = time.monotonic()
        if since >= self.next:
            looks = {self.tickets[i]: _small(latents) for i, latents in look().items() if i in self.tickets}
            for ticket, frames in zip(looks, self.pipeline.decode(list(looks.values()))):
                upscale = max(1, 160 // max(frames.shape[1:3]))
                images = [Image.fromarray(f.repeat(upscale, 0).repeat(upscale, 1)) for f in frames]
                ticket.preview = moving_picture(images, ticket.spec.job.fps or STILL_FPS)
            now = time.monotonic()
            self.next = now + max(PREVIEW_EVERY, 4 * (now - since))


def _small(latents_thwc: np.ndarray) -> np.ndarray:
    """The first frames, shrunk by averaging."""
    z = latents_thwc[:PREVIEW_FRAMES]
    by = int(np.ceil(np.sqrt(z.shape[1] * z.shape[2] / PREVIEW_CELLS)))
    if by == 1:
        return z
    t, h, w, c = z.shape
    by = min(by, h, w)
    h, w = h // by, w // by
    return z[:, : h * by, : w * by].reshape(t, h, by, w, by, c).mean((2, 4))

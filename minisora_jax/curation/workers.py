"""Work in other processes, of which one may crash or hang without harm to the others.

A `Worker` is one spawned process that calls functions for us. They say `alive(i)` as they come to item i of their task;
a process that dies (a decoder's segmentation fault, the kernel's out-of-memory killer) or says nothing for `timeout`
seconds is reported as `Died` with the item it was at, and the next call starts a new one. `run_here` has several of
them work through a list of tasks; curation/beam.py has Apache Beam's workers each own one.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

BEAT = 0.5  # seconds between two messages about the same item


class Died(RuntimeError):
    """A worker's process ended, or was ended for its silence. `at` is the item it was at; None before the first."""

    def __init__(self, at: int | None, how: str):
        super().__init__(f"a worker {how} at item {at}")
        self.at, self.how = at, how

    def __reduce__(self):
        return Died, (self.at, self.how)


class Stopped(RuntimeError):
    """The run ends, by an error elsewhere or by Ctrl-C: nothing is wrong with the item."""


class Worker:
    """One process. `call` runs function(*arguments, alive) there and returns what it returns, or raises what it raises.

    timeout: seconds of silence after which the process is ended; None: never."""

    def __init__(self, timeout: float | None = None):
        self.timeout = timeout
        self._process = self._pipe = None
        self._stopped = False

    def call(self, function: Callable, *arguments: Any, on_item: Callable[[int], None] = lambda i: None) -> Any:
        if self._stopped:
            raise Stopped
        if self._process is None:
            self._start()
            if self._stopped:  # meanwhile
                self.close()
                raise Stopped
        at = None
        try:
            self._pipe.send((function, arguments))
            while True:
                # Starting up, a process imports packages: that is no silence of an item's.
                if not self._pipe.poll(self.timeout if at is not None else None):
                    self.close()
                    raise Died(at, f"said nothing for {self.timeout:g} s")
                kind, value = self._pipe.recv()
                if kind == "at":
                    if value != at:
                        on_item(value)
                    at = value
                elif kind == "result":
                    return value
                else:
                    raise value
        except (EOFError, ConnectionError):
            process, self._process = self._process, None
            process.join()
            if self._stopped:
                raise Stopped from None
            code = process.exitcode
            raise Died(at, f"was killed by {_signal(-code)}" if code < 0 else f"ended with code {code}") from None

    def stop(self) -> None:
        """From another thread: the call under way, and any further one, raises Stopped."""
        self._stopped = True
        if (process := self._process) is not None:
            process.kill()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, os.getpid()), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Inline:
    """A `Worker` that is no process: everything happens here, and a crash is a crash."""

    def call(self, function: Callable, *arguments: Any, on_item: Callable[[int], None] = lambda i: None) -> Any:
        return function(*arguments, on_item)

    def close(self) -> None:
        pass


def run_here(
    job: Callable[[Worker | Inline, Any], None], tasks: Iterable[Any], processes: int, timeout: float | None
) -> None:
    """job(worker, task) for all tasks, by `processes` workers at a time; 0: here, without another process.

    The first error ends them all and is raised."""
    tasks = list(tasks)
    if processes == 0:
        for task in tasks:
            job(Inline(), task)
        return
    workers = [Worker(timeout) for _ in range(min(processes, len(tasks)))]
    idle, stopping = list(workers), threading.Event()

    def one(task):
        if not stopping.is_set():
            worker = idle.pop()
            try:
                job(worker, task)
            finally:
                idle.append(worker)

    pool = ThreadPoolExecutor(max(1, len(workers)))
    try:
        done, _ = wait([pool.submit(one, task) for task in tasks], return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    finally:
        stopping.set()
        for worker in workers:
            worker.stop()
        pool.shutdown()
        for worker in workers:
            worker.close()


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# ---- In the worker's process


def _serve(pipe, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    last: tuple[int | None, float] = (None, 0.0)

    def alive(i: int) -> None:
        nonlocal last
        now = time.monotonic()
        if i != last[0] or now - last[1] > BEAT:
            last = (i, now)
            try:
                pipe.send(("at", i))
            except ConnectionError:  # nobody is left to work for
                os._exit(1)

    while True:
        try:
            function, arguments = pipe.recv()
        except (EOFError, ConnectionError):
            return
        last = (None, 0.0)
        try:
            answer = ("result", function(*arguments, alive))
        except Exception as error:
            answer = ("error", _that_pickles(error))
        pipe.send(answer)


def _that_pickles(error: Exception) -> Exception:
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _end_with(parent: int) -> None:
    """End this process when its parent has ended, by kill -9 for example."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)

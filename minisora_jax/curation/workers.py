"""Run functions in other processes. One process may crash or hang without harm to the others.

A `Worker` is one spawned process that calls functions. They call `alive(i)` when they reach item i of their task. A
process may die (a decoder's segmentation fault, the kernel's out-of-memory killer) or be silent for `timeout` seconds.
Then the call raises `Died` with the current item, and the next call starts a new process. `run_here` shares a list of
tasks among several workers; with curation/beam.py each of Apache Beam's workers owns one.
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
from multiprocessing.connection import _ConnectionBase as Connection
from multiprocessing.process import BaseProcess
from typing import Any

BEAT = 0.5  # seconds between two messages about the same item


class Died(RuntimeError):
    """A worker's process died, or was killed for its silence. `at` is its current item; None before the first item."""

    def __init__(self, at: int | None, how: str):
        super().__init__(f"a worker {how} at item {at}")
        self.at, self.how = at, how

    def __reduce__(self):
        return Died, (self.at, self.how)


class Stopped(RuntimeError):
    """The run ends by an error of another task or by Ctrl-C. Nothing is wrong with the item."""


class Worker:
    """One process that calls functions.

    Args:
        timeout: seconds of silence after which the process is killed; None for no limit.
    """

    def __init__(self, timeout: float | None = None):
        self.timeout = timeout
        self._running: tuple[BaseProcess, Connection] | None = None
        self._stopped = False

    def call(self, function: Callable, *arguments: Any, on_item: Callable[[int], None] = lambda i: None) -> Any:
        """The result of function(*arguments, alive) in the process, which is started if need be.

        Args:
            on_item: called here with each new item that the function reports by alive(item).

        Raises:
            Died: the process died or was silent for too long. An error of the function itself is raised as it is.
            Stopped: `stop` was called.
        """
        if self._stopped:
            raise Stopped
        process, pipe = self._running or self._start()
        if self._stopped:  # while it started
            self.close()
            raise Stopped
        at = None
        try:
            pipe.send((function, arguments))
            while True:
                # No limit before the first item: the process imports packages.
                if not pipe.poll(self.timeout if at is not None else None):
                    self.close()
                    raise Died(at, f"was silent for {self.timeout:g} s")
                kind, value = pipe.recv()
                if kind == "at":
                    if value != at:
                        on_item(value)
                    at = value
                elif kind == "result":
                    return value
                else:
                    raise value
        except (EOFError, ConnectionError):
            self._running = None
            process.join()
            if self._stopped:
                raise Stopped from None
            code = process.exitcode or 0
            raise Died(at, f"was killed by {_signal(-code)}" if code < 0 else f"ended with code {code}") from None

    def stop(self) -> None:
        """Make the current call and any further one raise Stopped. Called from another thread."""
        self._stopped = True
        if (running := self._running) is not None:
            running[0].kill()

    def close(self) -> None:
        """Kill the process."""
        if self._running is not None:
            process, pipe = self._running
            process.kill()
            process.join()
            pipe.close()
            self._running = None

    def _start(self) -> tuple[BaseProcess, Connection]:
        context = multiprocessing.get_context("spawn")
        pipe, child_pipe = context.Pipe()
        process = context.Process(target=_serve, args=(child_pipe, os.getpid()), daemon=True)
        process.start()
        child_pipe.close()
        self._running = process, pipe
        return process, pipe

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Inline:
    """A `Worker` without a process: a crash ends the whole run."""

    def call(self, function: Callable, *arguments: Any, on_item: Callable[[int], None] = lambda i: None) -> Any:
        """The result of function(*arguments, on_item)."""
        return function(*arguments, on_item)

    def close(self) -> None:
        """Do nothing."""


def run_here(
    job: Callable[[Worker | Inline, Any], None], tasks: Iterable[Any], processes: int, timeout: float | None
) -> None:
    """Call job(worker, task) for all tasks. The first error ends all workers and is raised.

    Args:
        processes: the number of workers; 0 runs the tasks in this process.
        timeout: seconds of silence after which a worker's process is killed; None for no limit.
    """
    tasks = list(tasks)
    if processes == 0:
        for task in tasks:
            job(Inline(), task)
        return
    workers = [Worker(timeout) for _ in range(min(processes, len(tasks)))]
    idle, stopping = list(workers), threading.Event()

    def run_task(task: Any) -> None:
        if not stopping.is_set():
            worker = idle.pop()
            try:
                job(worker, task)
            finally:
                idle.append(worker)

    pool = ThreadPoolExecutor(max(1, len(workers)))
    try:
        done, _ = wait([pool.submit(run_task, task) for task in tasks], return_when=FIRST_EXCEPTION)
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


def _serve(pipe: Connection, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    last: tuple[int | None, float] = (None, 0.0)

    def alive(i: int) -> None:
        nonlocal last
        now = time.monotonic()
        if i != last[0] or now - last[1] > BEAT:
            last = (i, now)
            try:
                pipe.send(("at", i))
            except ConnectionError:  # the parent is gone
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
            answer = ("error", _picklable(error))
        pipe.send(answer)


def _picklable(error: Exception) -> Exception:
    """The error, or a RuntimeError with its text if it does not pickle."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _end_with(parent: int) -> None:
    """End this process when its parent ends, for example by kill -9."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)

#!/usr/bin/env python3
"""Run a command as several JAX processes on this host, each with some fake CPU devices: a pod to try things on.

examples:
  python launch/local_cpu.py -n 4 -- minisora train --config=dit_tiny:data=data/latents --workdir=runs/four
  python launch/local_cpu.py -n 2 --devices 2 -- python my_script.py

The processes find each other by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, which `minisora train`,
`train-vae`, `encode` and `generate` read (a script of yours: `with minisora_jax.parallel.processes.started():` before
any other use of JAX). Each line they print is prefixed with the number of its process. When one fails, the others are
ended, and its exit code is this command's. SIGINT and SIGTERM are passed on to all of them; on SIGTERM a training saves
and ends with exit code 0, and if all do so does this command.

Run by us: yes, with 1, 2 and 4 processes, on Linux; tests/test_processes.py does it in CI. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

GRACE = 5.0  # seconds for the others to end, once one has failed
FAREWELL = 60.0  # seconds for all to save and end, once asked to


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="local_cpu.py",
        usage="local_cpu.py [-n PROCESSES] [--devices K] [--timeout SECONDS] -- COMMAND ...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-n", "--processes", type=int, default=2, help="how many processes (default: 2)")
    parser.add_argument("--devices", type=int, default=None, help="CPU devices of each (default: 8 // PROCESSES)")
    parser.add_argument("--timeout", type=float, default=0, help="end all after so many seconds; exit code 124")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --: the command that each process runs")
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    devices = max(1, 8 // max(args.processes, 1)) if args.devices is None else args.devices
    if not command:
        parser.error("no command: write it after --, as in `local_cpu.py -n 4 -- minisora train ...`")
    if args.processes < 1 or devices < 1:
        parser.error(f"-n {args.processes} and --devices {devices} must be at least 1")
    if shutil.which(command[0]) is None:
        parser.error(f"there is no program {command[0]!r}")
    return Group(command, args.processes, devices).run(args.timeout)


class Group:
    """The processes of one run."""

    def __init__(self, command: list[str], processes: int, devices: int):
        self.printing = threading.Lock()
        self.preempted = 0  # the signal that was passed on
        self.processes = []
        # Before they start: a signal that this process was started to ignore, as shells do with SIGINT behind an `&`,
        # they would ignore too.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._pass_on)
        address = f"127.0.0.1:{free_port()}"
        self.processes = [
            subprocess.Popen(
                command,
                env=environment(address, processes, i, devices),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that a signal reaches it, and what it started, once: through us
            )
            for i in range(processes)
        ]
        self.readers = [threading.Thread(target=self._print, args=(i,), daemon=True) for i in range(processes)]

    def run(self, timeout: float) -> int:
        """Waits for all; the exit code to return."""
        for reader in self.readers:
            reader.start()
        end_at = time.monotonic() + (timeout or float("inf"))
        kill_at, result, running = float("inf"), 0, set(range(len(self.processes)))
        while running:
            time.sleep(0.05)
            now = time.monotonic()
            ending = result or self.preempted
            for i in sorted(running):
                code = self.processes[i].poll()
                if code is None:
                    continue
                running.discard(i)
                self.readers[i].join(timeout=1)  # what it started may hold its output open
                if code and not result:
                    result = code if code > 0 else 128 - code
                    if not self.preempted:
                        say(f"process {i} {told(code)}" + (f": ending the other {len(running)}" if running else ""))
            if now > end_at and not ending:
                say(f"not done after {timeout:g} s: ending all")
                result = 124
            if (result or self.preempted) and kill_at == float("inf"):
                kill_at = now + (FAREWELL if self.preempted else GRACE)
                if not self.preempted:
                    self._signal(signal.SIGTERM)
            if running and now > kill_at:
                say(f"killing the {len(running)} that are still there")
                self._signal(signal.SIGKILL)
                kill_at = now + GRACE
        return result or (128 + signal.SIGINT if self.preempted == signal.SIGINT else 0)

    def _print(self, i: int) -> None:
        for line in self.processes[i].stdout:
            # A progress bar writes over its line: show what it was in the end.
            text = line.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2]
            with self.printing:
                sys.stdout.write(f"[{i}] {text}\n")
                sys.stdout.flush()

    def _pass_on(self, number: int, _) -> None:
        self.preempted = number
        self._signal(number)

    def _signal(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)


def environment(address: str, processes: int, i: int, devices: int) -> dict[str, str]:
    """What process i of `processes` is started with."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", "")).strip()
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(i),
        "PYTHONUNBUFFERED": "1",
        "XLA_FLAGS": flags,
    }


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def told(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"


def say(text: str) -> None:
    print(f"local_cpu: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Progress in a file is plain lines, a few; on a terminal it moves."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

from minisora_jax.cli import out_of_memory

SCRIPT = """
import time
from minisora_jax.io import progress
progress.EVERY, progress.BRIEF = 0.4, 0.1
for _ in progress.Progress(range(60), desc="sampling", unit="step"):
    time.sleep(0.02)
progress.Progress(desc="brief", total=3).close()
with progress.Progress(desc="hidden", total=9, disable=None) as bar:
    time.sleep(0.5)
    bar.update(9)
"""


def test_a_log_gets_a_line_now_and_then():
    text = subprocess.run([sys.executable, "-c", SCRIPT], stderr=subprocess.PIPE, text=True, check=True).stderr
    lines = text.splitlines()
    assert "\r" not in text and 2 <= len(lines) <= 5
    assert all(line.startswith("sampling: ") and "step/s" in line and " left" in line for line in lines)
    assert lines[-1].startswith("sampling: 60 of 60 (100 %)")


def test_the_rate_is_that_of_the_whole_task():
    """Also where a first step compiles, after which all others are quick."""
    slow_first = SCRIPT.replace("time.sleep(0.02)", "time.sleep(1.5 if _ == 0 else 0.002)")
    text = subprocess.run([sys.executable, "-c", slow_first], stderr=subprocess.PIPE, text=True, check=True).stderr
    rate = float(re.search(r"60 of 60 .*?([\d.]+)step/s", text)[1])
    assert 60 / 3.5 < rate < 60 / 1.5


def test_a_terminal_gets_a_bar():
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    subprocess.run([sys.executable, "-c", SCRIPT], stderr=theirs, check=True)
    os.close(theirs)
    text = os.read(ours, 100_000).decode()
    os.close(ours)
    assert text.count("\rsampling:") > 3 and "hidden" in text


def test_an_error_of_memory_is_a_sentence_with_what_to_do():
    raw = RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12884901888 bytes.")
    assert "which asked for 12884901888 bytes" in out_of_memory(raw) and "--frames" in out_of_memory(raw)
    assert "RESOURCE" not in out_of_memory(raw)
    assert out_of_memory(RuntimeError("else")) == "" and out_of_memory(MemoryError()).startswith("out of memory.")

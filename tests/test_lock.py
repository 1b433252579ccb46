"""One folder, one writer."""

import json
import subprocess
import sys
import time

import pytest

from minisora_jax.io.lock import NAME, Busy, only_writer

HOLD = """
import sys, time
from minisora_jax.io.lock import only_writer
with only_writer(sys.argv[1], "minisora encode"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_told_who_holds_the_folder_and_a_killed_one_lets_go(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    (tmp_path / ".x.1-0123abcd.tmp.mp4").write_bytes(b"half")
    with pytest.raises(Busy, match=rf"being written by `minisora encode` \(process {holder.pid} on .*, since 20.*wait"):
        with only_writer(tmp_path, "minisora train"):
            pass
    assert (tmp_path / ".x.1-0123abcd.tmp.mp4").exists()  # it may be the other run's
    holder.kill()
    holder.wait()
    with only_writer(tmp_path, "minisora train"):
        assert json.loads((tmp_path / NAME).read_text())["what"] == "minisora train"
        assert not (tmp_path / ".x.1-0123abcd.tmp.mp4").exists()
        with pytest.raises(Busy, match="`minisora train`"):
            with only_writer(tmp_path, "again"):
                pass
    assert (tmp_path / NAME).read_text() == ""


def test_what_is_not_a_leftover_stays(tmp_path):
    names = [".tmp.mp4", "a.tmp", ".cat.tmp.mp4", ".x.12-0123abcd.tmpfile"]
    for name in names:
        (tmp_path / name).write_bytes(b"mine")
    with only_writer(tmp_path, "minisora train"):
        pass
    assert {p.name for p in tmp_path.iterdir()} == {*names, NAME}


def test_it_costs_nothing(tmp_path):
    begin = time.perf_counter()
    for _ in range(100):
        with only_writer(tmp_path, "x"):
            pass
    assert time.perf_counter() - begin < 1

"""A run of `prepare`: the same bytes by any workers and after any interruption, and bad files cost themselves only."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from needs import needs

from minisora_jax.cli import main
from minisora_jax.curation.filters import Filters
from minisora_jax.curation.parts import is_held_out
from minisora_jax.curation.prepare import prepare
from minisora_jax.curation.workers import Died, Worker, run_here
from minisora_jax.io.retry import DataError
from minisora_jax.media.video_writer import write_video
from minisora_jax.sources.clips import Records

FPS = 8


def shot(seed, T=9, H=48, W=64):
    """A bright square wandering over a plain colour, both by the seed."""
    rng = np.random.default_rng(seed)
    frames = np.empty((T, H, W, 3), np.uint8)
    frames[:] = rng.integers(0, 255, 3)
    checks = (np.arange(H)[:, None] // 8 + np.arange(W) // 8) % int(rng.integers(2, 5)) == 0
    frames[:, checks] = rng.integers(0, 255, 3)
    for t, (y, x) in enumerate(np.linspace(rng.integers(0, 30, 2), rng.integers(0, 30, 2), T).astype(int)):
        frames[t, y : y + 16, x : x + 20] = rng.integers(0, 255, 3)
    return frames


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Ten files of one or two shots, of which two repeat others, one is none, and one has a nasty name and caption."""
    folder = tmp_path_factory.mktemp("films")
    for i in range(8):
        write_video(folder / f"film{i}.mp4", np.concatenate([shot(i), shot(100 + i)]) if i % 2 else shot(i), FPS)
    (folder / "film2.mp4").write_bytes((folder / "film1.mp4").read_bytes())
    (folder / "film5.mp4").write_bytes(b"no film")
    write_video(folder / "<b onload=alert(1)>.mp4", shot(50), FPS)
    for path in list(folder.glob("*.mp4")):
        path.with_suffix(".txt").write_text(f"<script>alert('{path.stem}')</script>")
    return folder


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


OPTIONS = dict(cell=16, shots=True, filters=Filters(duplicates=12), held_out=0.5, files_per_part=3, shard_bytes=50_000)


@pytest.fixture(scope="module")
def whole(films, tmp_path_factory):
    """What one process makes of them without an interruption."""
    out = tmp_path_factory.mktemp("whole")
    prepare(films, out, **OPTIONS)
    return out


def test_what_a_run_writes(films, whole):
    train, heldout = Records(whole), Records(whole / "heldout")
    train.shards.verify()
    heldout.shards.verify()
    skipped = [json.loads(line) for line in (whole / "skipped.jsonl").read_text().splitlines()]
    assert [(row["name"], row["stage"], row["reason"]) for row in skipped] == [
        ("film2.mp4#0-9", "duplicates", "duplicate"),
        ("film2.mp4#9-18", "duplicates", "duplicate"),
        ("film5.mp4", "probe", "not a video"),
    ]
    assert skipped[0]["detail"] == "shows what film1.mp4#0-9 shows"
    names = [[clip.name for clip in split] for split in (train, heldout)]
    wanted = ["<b onload=alert(1)>.mp4", "film0.mp4", "film4.mp4", "film6.mp4"]
    wanted += [f"film{i}.mp4#{span}" for i in (1, 3, 7) for span in ("0-9", "9-18")]
    assert sorted(names[0] + names[1]) == sorted(wanted) and min(len(n) for n in names) > 1
    files = [{name.split("#")[0] for name in split} for split in names]
    assert not files[0] & files[1], "two shots of a film are never on both sides"
    manifest = train.shards.manifest
    assert manifest["skipped"]["counts"] == {"duplicate": 2, "not a video": 1} and manifest["heldout"] == len(names[1])
    _, metadata = train.shards.read(0)
    assert set(metadata) == {"caption", "fps", "name", "source", "scores"} and metadata["scores"]["seconds"] == 9 / 8
    assert not (whole / "parts").exists() and not (whole / "progress.jsonl").exists()
    again = prepare(films, whole, **OPTIONS)
    assert again.summary().startswith("10 clips kept, 3 skipped: 2 duplicate (film2.mp4#0-9, film2.mp4#9-18); 1 not a")


def test_the_split_is_a_function_of_the_files_content():
    hashes = [f"{n * 0x9E3779B97F4A7C15 % 2**64:016x}".ljust(64, "0") for n in range(4000)]
    share = np.mean([is_held_out(h, 0.1) for h in hashes])
    assert abs(share - 0.1) < 0.01 and not any(is_held_out(h, 0.0) for h in hashes)
    assert all(is_held_out(h, 0.2) for h in hashes if is_held_out(h, 0.1)), "a larger share keeps what was held out"


def test_the_report_is_one_safe_page_with_pictures_and_histograms(whole):
    page = (whole / "report.html").read_text()
    assert "<script" not in page and "<b onload" not in page and "http" not in page
    assert "&lt;script&gt;alert(&#x27;film0&#x27;)" in page and "&lt;b onload=alert(1)&gt;.mp4" in page
    assert page.count("data:image/jpeg;base64,") >= 8 and page.count("<svg") == 5
    assert "<td>duplicates<td>duplicate<td class=number>2" in page and "<b>10</b> clips kept" in page


def test_workers_do_without_jax():
    """Each of them would pay seconds and 150 MB for it."""
    script = "import sys; from minisora_jax.curation import beam, parts, captioners as c\n"
    script += "c.open_captioner('http://x/v1#m'); c.open_captioner('x'); print('jax' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"


def test_two_processes_write_the_same_bytes(films, whole, tmp_path):
    prepare(films, tmp_path / "out", workers=2, **OPTIONS)
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.slow
def test_apache_beam_writes_the_same_bytes(films, whole, tmp_path, monkeypatch):
    needs("apache_beam")
    prepare(films, tmp_path / "out", beam=["--runner=DirectRunner"], **OPTIONS)
    assert contents(tmp_path / "out") == contents(whole)
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(ImportError, match=r"uv sync --extra beam"):
        prepare(films, tmp_path / "other", beam=[], **OPTIONS)


def test_a_run_killed_outright_goes_on_to_the_same_bytes(films, tmp_path):
    """kill -9 of the run and its worker in the midst of the third part; the parts before are not done again."""
    seen, hold = tmp_path / "seen", tmp_path / "hold"
    slow = tmp_path / "slow.py"
    slow.write_text(f"""
import os, time
def score(frames):
    with open({str(seen)!r}, "a") as file:
        file.write(".")
    while os.path.exists({str(hold)!r}) and os.path.getsize({str(seen)!r}) > 9:
        time.sleep(0.05)
    return 1.0
""")
    options = dict(shots=True, files_per_part=3, filters=Filters(duplicates=12, aesthetic=f"{slow}:score"))
    prepare(films, tmp_path / "whole", **options)
    calls = seen.stat().st_size
    seen.unlink()
    hold.touch()
    script = tmp_path / "run.py"
    script.write_text(f"""
if __name__ == "__main__":
    from minisora_jax.curation.filters import Filters
    from minisora_jax.curation.prepare import prepare
    prepare({str(films)!r}, {str(tmp_path / "out")!r}, workers=1, **{options!r})
""")
    run = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
    deadline = time.monotonic() + 120
    while not (seen.exists() and seen.stat().st_size > 9) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    done = len(list((tmp_path / "out/parts").glob("0000?.json")))
    assert done == 2 and not (tmp_path / "out/manifest.json").exists()
    orphans = lambda: subprocess.run(["pgrep", "-g", str(run.pid)], capture_output=True).stdout
    while orphans() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not orphans(), "a worker ends with its parent"
    before = seen.stat().st_size
    hold.unlink()
    prepare(films, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert seen.stat().st_size - before == calls - 9, "the two finished parts, of nine clips, are kept"


def test_a_crash_and_a_hang_cost_their_own_clips_only(tmp_path):
    """A segmentation fault and an endless loop, in the worker's own process, as a decoder's would be."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i, grey in enumerate((50, 100, 150, 200)):
        write_video(folder / f"{i}.mp4", np.full((5, 32, 32, 3), grey, np.uint8), FPS)
    (tmp_path / "bad.py").write_text("""
import ctypes
def score(frames):
    grey = frames.mean()
    if abs(grey - 100) < 9:
        ctypes.string_at(0)
    while abs(grey - 150) < 9:
        pass
    return grey
""")
    options = dict(need_caption=False, filters=Filters(aesthetic=f"{tmp_path}/bad.py:score"))
    report = prepare(folder, tmp_path / "out", workers=1, timeout=1.5, **options)
    assert [clip.name for clip in Records(tmp_path / "out")] == ["0.mp4", "3.mp4"]
    assert [(row["name"], row["stage"], row["reason"]) for row in report.skipped] == [
        ("1.mp4", "decode", "crashed or hung"),
        ("2.mp4", "decode", "crashed or hung"),
    ]
    assert report.skipped[0]["detail"] == "its decoder was killed by SIGSEGV, 2 times"
    assert report.skipped[1]["detail"] == "its decoder was silent for 1.5 s, 2 times"


def test_a_worker_answers_raises_and_starts_again(tmp_path, monkeypatch):
    (tmp_path / "tasks_of_a_test.py").write_text("""
import os

class BadLuck(Exception):
    def __init__(self, n, why):
        super().__init__(f"{n} {why}")  # it does not unpickle: that would take two arguments

def square(n, alive):
    alive(n)
    if n == 13:
        raise BadLuck(n, "because")
    return n * n

def exits(n, alive):
    alive(n)
    os._exit(3)
""")
    monkeypatch.syspath_prepend(tmp_path)
    from tasks_of_a_test import BadLuck, exits, square

    with Worker(timeout=30) as worker:
        at = []
        assert worker.call(square, 7, on_item=at.append) == 49 and at == [7]
        with pytest.raises(RuntimeError, match="BadLuck: 13 because"):
            worker.call(square, 13)
        with pytest.raises(Died, match="ended with code 3 at item 5") as died:
            worker.call(exits, 5)
        assert died.value.at == 5
        assert worker.call(square, 3) == 9
    with pytest.raises(BadLuck):
        run_here(lambda worker, n: worker.call(square, n), range(10, 16), 0, None)


def test_an_error_ends_the_other_workers(tmp_path):
    """One worker raises while the other never comes back: the run ends at once, and blames no file for its own end."""
    (tmp_path / "in").mkdir()
    for i, grey in enumerate((50, 200, 210)):
        write_video(tmp_path / f"in/{i}.mp4", np.full((1, 32, 32, 3), grey, np.uint8), FPS)
    (tmp_path / "bad.py").write_text(f"""
import os, time
def score(frames):
    if frames.mean() < 100:
        open({str(tmp_path / "waiting")!r}, "w").close()
        time.sleep(600)
    while not os.path.exists({str(tmp_path / "waiting")!r}):
        time.sleep(0.01)
    raise RuntimeError("the model is not there")
""")
    options = dict(need_caption=False, files_per_part=1, filters=Filters(aesthetic=f"{tmp_path}/bad.py:score"))
    since = time.monotonic()
    with pytest.raises(RuntimeError, match="the model is not there"):
        prepare(tmp_path / "in", tmp_path / "out", workers=2, timeout=None, **options)
    assert time.monotonic() - since < 60 and not list((tmp_path / "out/parts").glob("*.bad.json"))
    assert not multiprocessing.active_children()


def test_nothing_good_leaves_the_way_free(tmp_path):
    (tmp_path / "in").mkdir()
    write_video(tmp_path / "in/a.mp4", shot(0), FPS)
    with pytest.raises(DataError, match="no good clip: 0 clips kept, 1 skipped: 1 low resolution"):
        prepare(tmp_path / "in", tmp_path / "out", need_caption=False, filters=Filters(min_side=64))
    assert prepare(tmp_path / "in", tmp_path / "out", need_caption=False).kept == 1


@pytest.mark.slow
def test_the_command_line_reaches_every_setting(films, tmp_path, capsys):
    argv = [
        "prepare",
        str(films),
        str(tmp_path / "out"),
        "--workers",
        "0",
        "--curate",
        "--min-side",
        "16",
        "--no-captions",
    ]
    argv += ["--held-out", "0.3", "--max-text", "1", "--min-seconds", "0.2", "--files-per-part", "5", "--shard-mb", "1"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "clips kept" in out and "report.html shows" in out
    settings = json.loads((tmp_path / "out/manifest.json").read_text())["settings"]
    assert settings["shots"] and not settings["need_caption"] and settings["held_out"] == 0.3
    filters = settings["filters"]
    assert filters["min_side"] == 16 and filters["min_seconds"] == 0.2 and filters["min_motion"] == 0.5
    assert settings["files_per_part"] == 5 and filters["duplicates"] == 11
    assert main(["prepare", str(films), str(tmp_path / "x"), "--held-out", "1.5"]) == 2
    assert "held_out=1.5 must be at least 0 and below 1" in capsys.readouterr().err
    assert main(["prepare", "shapes", str(tmp_path / "none"), "--timeout", "0"]) == 2
    assert "timeout=0 must be above 0 seconds" in capsys.readouterr().err

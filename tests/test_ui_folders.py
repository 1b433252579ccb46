"""The page's folders: what is kept of results and uploads, and the queue of conversions."""

import asyncio
import json
import os
import time

import numpy as np
import pytest
from PIL import Image

from minisora_jax.io.retry import DataError
from minisora_jax.jobs.output import read_record
from minisora_jax.media.video_writer import write_video
from minisora_jax.ui import conversions, gallery, incoming, show
from minisora_jax.ui.conversions import Conversions
from minisora_jax.ui.gallery import Gallery
from minisora_jax.ui.incoming import Incoming
from minisora_jax.ui.uploads import InvalidInput


def put(out, name):
    (out / f"{name}.png").write_bytes(b"a picture")
    (out / f"{name}.png.json").write_text(json.dumps(record(prompt=name)))
    return name


def record(**job):
    return {"job": job, "batch": [], "index": 0, "sampling": {"sampler": {}, "guidance": {}}, "inputs": {},
            "model": {"hash": "a", "codec_hash": "b"}}  # fmt: skip


@pytest.mark.parametrize("stamp", ["20991231-235959-00000", "20991231-235959-fffff", "99991231-235959-fffff"])
def test_results_dated_in_the_future_do_not_cost_the_newest(tmp_path, monkeypatch, stamp):
    monkeypatch.setattr(gallery, "KEPT", 3)
    shelf = Gallery(tmp_path)
    for i in range(5):
        put(tmp_path, f"{stamp}{i:03x}")
    made = []
    for _ in range(4):
        made.append(put(tmp_path, shelf.new_name()))
        shelf.prune()
        shown = [item.name for item in shelf.items()]
        assert len(shown) == 3 and shown[: len(made)] == made[::-1][:3]
        assert all(gallery.NAME.fullmatch(name) for name in shown)


def test_names_rise_also_when_the_clock_goes_backwards(tmp_path, monkeypatch):
    now = time.time_ns()
    clock = iter([now, now - 3600 * 10**9, now - 7200 * 10**9, now, now + 10**9])
    monkeypatch.setattr(gallery.time, "time_ns", lambda: next(clock))
    shelf = Gallery(tmp_path)
    names = [shelf.new_name() for _ in range(5)]  # waiting jobs have names, and no files yet
    assert names == sorted(names) and len({name[:-3] for name in names}) == 5
    assert names[-1].startswith(time.strftime("%Y%m%d-%H%M%S", time.gmtime(now // 10**9 + 1)))


def test_a_stamp_carries_into_its_seconds():
    assert gallery._next("20260102-030405-0a1b2") == "20260102-030405-0a1b3"
    assert gallery._next("20260102-030405-fffff") == "20260102-030406-00000"
    assert gallery._next("20260102-999999-fffff") == "20260103-000000-00000"
    assert gallery._next("99999999-999999-fffff") == "" == gallery._next("")


def test_uploads_have_a_limit_and_an_age(tmp_path, monkeypatch):
    monkeypatch.setattr(incoming, "MOST_STORED", 1000)
    monkeypatch.setattr(incoming, "MOST_FILES", 4)
    shelf = Gallery(tmp_path / "out")
    store = Incoming(tmp_path / "out/incoming", shelf)
    with store.room(1000):
        pass
    now = time.time()
    ages = {"incoming/a/1.png": 0, "incoming/b/2.png": 7200, "incoming/3": -7200, "uploads/4.png": 0}
    ages |= {"uploads/5.png": 7200, "uploads/6.png": 7200, "incoming/examples/7.png": 7200}
    for name, age in ages.items():
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(200))
        os.utime(path, (now - age, now - age))
    put(shelf.out, "20260102-030405-0a1b2c3d")
    named = record(prompt="a", video=str(shelf.uploads / "6.png"), strength=0.5)
    (shelf.out / "20260102-030405-0a1b2c3d.png.json").write_text(json.dumps(named))
    with pytest.raises(InvalidInput, match="keeps at most 4 uploads of 0 MiB in all.*try again later"), store.room(1):
        pass
    os.utime(store.folder / "b", (now - 7200, now - 7200))
    store.sweep()
    left = {p.relative_to(shelf.out).as_posix() for folder in ("incoming", "uploads")
            for p in (shelf.out / folder).rglob("*") if p.is_file()}  # fmt: skip
    assert left == {"incoming/a/1.png", "uploads/4.png", "uploads/6.png", "incoming/examples/7.png"}
    with store.room(300):  # 200 bytes of each of three files are there
        with pytest.raises(InvalidInput), store.room(100):
            pass  # bytes would do, but it is the fifth file
    with pytest.raises(InvalidInput), store.room(500):
        pass
    with store.room(400):
        pass


DAMAGED = ["", "{", "[]", "7", "null", "{}", "[" * 10**5, b"\xff"]
DAMAGED += [record(prompt="a") | change for change in (
    {"job": 7}, {"job": {}}, {"job": {"prompt": 7}}, {"job": {"prompt": "a", "x": 1}}, {"batch": 7}, {"batch": [7]},
    {"index": 1}, {"index": -1}, {"index": True}, {"index": "0"}, {"sampling": {}},
    {"sampling": {"sampler": 7, "guidance": {}}},
    {"sampling": {"sampler": {"steps": "x"}, "guidance": {}}}, {"sampling": {"sampler": {}, "guidance": {"scale": []}}},
    {"model": {}}, {"model": {"hash": 7, "codec_hash": "b"}}, {"inputs": {"a": 7}}, {"inputs": []}, {"machine": 7},
)]  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_record_is_left_out_and_holds_nothing_up(tmp_path, content):
    shelf = Gallery(tmp_path)
    whole, broken = put(tmp_path, shelf.new_name()), put(tmp_path, shelf.new_name())
    text = json.dumps(content) if isinstance(content, dict) else content
    (tmp_path / f"{broken}.png.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    shelf.prune()
    assert [item.name for item in shelf.items()] == [whole] and show.gallery(shelf.items())
    with pytest.raises(ValueError, match="record of"):
        read_record(tmp_path / f"{broken}.png.json")
    assert read_record(tmp_path / f"{whole}.png.json")["job"] == {"prompt": whole}


def test_one_conversion_serves_all_who_ask(tmp_path, monkeypatch):
    shelf, name = Gallery(tmp_path), "20260102-030405-0a1b2c3d"
    write_video(tmp_path / f"{name}.mp4", np.zeros((5, 32, 32, 3), np.uint8), 8)
    (tmp_path / f"{name}.mp4.json").write_text(json.dumps({"job": {"prompt": "a"}}))
    calls, convert = [], conversions.convert
    monkeypatch.setattr(conversions, "convert", lambda *paths: (calls.append(paths), time.sleep(0.1), convert(*paths)))

    async def ask_at_once():
        queue = Conversions()
        video, path = shelf.path(f"{name}.webm")
        waits = [asyncio.create_task(queue.converted(video, path)) for _ in range(45)]
        await asyncio.sleep(0.02)
        waits[0].cancel()  # who leaves does not end it for the others
        done = await asyncio.gather(*waits, return_exceptions=True)
        assert isinstance(done[0], asyncio.CancelledError) and done[1:] == [None] * 44 and path.is_file()
        others = [tmp_path / f"20260102-030405-0a1b2{i:03x}.gif" for i in range(17)]
        waits = [asyncio.create_task(queue.converted(video, path)) for path in others]
        done = await asyncio.gather(*waits, return_exceptions=True)
        assert done[:16] == [None] * 16 and "16 files are being converted" in str(done[16])
        (tmp_path / f"{name}.mp4.json").write_text("no record")
        with pytest.raises(DataError, match="damaged"):
            await queue.converted(video, tmp_path / "20260102-030405-0a1b2fff.gif")
        queue.close()

    asyncio.run(ask_at_once())
    assert len(calls) == 1 + 16 + 1


def test_the_gif_of_a_fast_video_keeps_its_speed(tmp_path):
    write_video(tmp_path / "a.mp4", np.zeros((60, 32, 32, 3), np.uint8), 120)
    (tmp_path / "a.mp4.json").write_text("{}")
    conversions.convert(tmp_path / "a.mp4", tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:  # equal frames may be one
        shown = [gif.seek(k) or gif.info["duration"] for k in range(gif.n_frames)]
    assert sum(shown) == 500 and min(shown) >= 20, "milliseconds"

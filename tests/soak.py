"""Long trials of what must survive, run by hand: their results are in docs/benchmarks.md.

python tests/soak.py kill --count 100      kill -9 at random moments of prepare, encode and train
python tests/soak.py fuzz --count 2000     broken files, so many a kind: no crash, no hang, each accounted for
python tests/soak.py elastic               an epoch on 4, then 2, then 4 processes: each clip exactly once
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parent.parent


# ---- Kills


def stages(at: Path, clips: Path, steps: int) -> dict[str, list[str]]:
    """The commands of a whole journey, from clips to a trained model, each with one output under `at`."""
    data, latents = at / "clips", at / "latents"
    config = f"--config=configs/dit_tiny.py:data={latents},steps={steps},rows=2,prompts=false"
    small = "width=32 depth=1 heads=2 text_width=64 text_depth=0".split()
    settings = [f"--config.dit.{word}" for word in small]
    settings += ["--config.pack.tokens=320", "--config.run.save_every=5", "--config.run.log_every=1"]
    return {
        "prepare": ["prepare", str(clips), str(data), "--files-per-part", "2", "--workers", "2"],
        "encode": ["encode", str(data), str(latents), "--clips-per-part", "4"],
        "train": ["train", config, *settings, f"--workdir={at / 'run'}"],
    }


def start(arguments: list[str], cache: Path) -> subprocess.Popen:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    command, quiet = [sys.executable, "-m", "minisora_jax.cli", *arguments], subprocess.DEVNULL
    options = {"cwd": REPOSITORY, "env": environment, "start_new_session": True}
    return subprocess.Popen(command, stdout=quiet, stderr=subprocess.PIPE, **options)


def outcome(at: Path) -> dict[str, str]:
    """A digest of every file that a journey leaves, and of the losses it went through."""
    found = {}
    for path in sorted(p for p in at.rglob("*") if p.is_file()):
        name = path.relative_to(at).as_posix()
        if name.startswith("run/") and not name.startswith("run/export/"):
            continue
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    rows = [json.loads(line) for line in (at / "run" / "metrics.jsonl").read_text().splitlines()]
    found["losses"] = repr([(r["step"], r["loss"], r["grad_norm"]) for r in rows])
    return found


def kill(count: int, seed: int, steps: int, at: Path) -> None:
    """Random kills over a journey, as many to a stage as it takes of the time; the end must be as if none had been."""
    rng = random.Random(seed)
    clips, here = at / "mp4", at / "journey"  # one folder for all: the exported config names it
    _write_clips(clips, 24)
    taken = {}
    for name, command in stages(here, clips, steps).items():
        for again in range(2):  # once to compile
            if again:
                shutil.rmtree(here / {"prepare": "clips", "encode": "latents", "train": "run"}[name])
            begin = time.monotonic()
            process = start(command, at / "cache")
            _, said = process.communicate()
            assert process.returncode == 0, said.decode()
            taken[name] = time.monotonic() - begin
    wanted = outcome(here)
    print("undisturbed:", {name: f"{s:.1f} s" for name, s in taken.items()}, flush=True)
    killed = dict.fromkeys(taken, 0)
    journeys = 0
    while sum(killed.values()) < count:
        journeys += 1
        shutil.rmtree(here)
        for name, command in stages(here, clips, steps).items():
            kills = 0
            while True:
                process = start(command, at / "cache")
                if kills < 4 and sum(killed.values()) < count:
                    try:
                        process.wait(timeout=rng.uniform(0.2, 1.1) * taken[name])
                    except subprocess.TimeoutExpired:
                        os.killpg(process.pid, 9)
                        process.communicate()
                        kills, killed[name] = kills + 1, killed[name] + 1
                        continue
                _, said = process.communicate()
                assert process.returncode == 0, f"{name} after {kills} kills: {said.decode()}"
                break
        found = outcome(here)
        different = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
        assert not different, f"after kills {killed}: {different} differ"
        print(f"journey {journeys}: kills so far {killed}, every byte as undisturbed", flush=True)
    print(
        f"{sum(killed.values())} kills {killed} in {journeys} journeys: {len(wanted) - 1} files and all losses the same"
    )


# ---- Other numbers of processes

LOADING = """
import json, sys
import jax
from minisora_jax.data.latents import Latents
from minisora_jax.data.packing import PackConfig, PackPlan, token_counts
from minisora_jax.parallel.mesh import MeshConfig, host_rows, make_mesh
from minisora_jax.parallel.processes import started
cache, out, first, last = sys.argv[1:]
with started():
    latents, pack = Latents(cache), PackConfig(tokens=32, text_tokens=512, slots=8, rows=4)
    plan = PackPlan(*token_counts(latents.sizes, (1, 2, 2)), pack, 0, per_step=4)
    jax.set_mesh(make_mesh(MeshConfig(data=2, ring=4)))
    steps = range(int(first), int(last) if int(last) else 10**6)
    read = {}
    for step in steps:
        if plan.epoch(step):
            break
        rows = plan.rows(step)
        read[step] = {int(r): [latents[int(i)].name for i in rows[r]] for r in host_rows(4)}
    with open(f"{out}-{jax.process_index()}.json", "w") as file:
        json.dump(read, file)
"""


def elastic(count: int, seed: int, steps: int, at: Path) -> None:
    """Which clips each process reads over an epoch: its first steps by 4 processes, the next by 2, the last by 4."""
    from train_tiny import make_cache

    make_cache(at / "cache")
    rows: dict[tuple[int, int], list[str]] = {}
    readers: dict[tuple[int, int], int] = {}
    for turn, (processes, first, last) in enumerate(((4, 0, 1), (2, 1, 3), (4, 3, 0))):
        command = [sys.executable, "launch/local_cpu.py", "-n", str(processes), "--devices", str(8 // processes), "--"]
        command += [sys.executable, "-c", LOADING, str(at / "cache"), str(at / f"turn{turn}"), str(first), str(last)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        found = sorted(at.glob(f"turn{turn}-*.json"))
        assert len(found) == processes
        for path in found:
            for step, of_step in json.loads(path.read_text()).items():
                for row, names in of_step.items():
                    at_row = int(step), int(row)
                    assert rows.setdefault(at_row, names) == names, "processes of one row read different clips"
                    readers[at_row] = readers.get(at_row, 0) + 1
    seen = [name for names in rows.values() for name in names]
    step_count = max(step for step, _ in rows) + 1
    assert len(rows) == 4 * step_count and len(seen) == len(set(seen)) and len(seen) >= 100 - 4 * 8
    print(
        f"{step_count} steps, {len(rows)} rows, {len(seen)} clips of 100, each once; rows read by "
        f"{min(readers.values())} to {max(readers.values())} processes"
    )


def _write_clips(folder: Path, count: int) -> None:
    from minisora_jax.media.video_writer import write_video
    from minisora_jax.toy.shapes import Shapes

    folder.mkdir(parents=True, exist_ok=True)
    for i, clip in enumerate(Shapes("train", count)[k] for k in range(count)):
        suffix = "png" if len(clip.frames_THWC) == 1 else "mp4"
        if suffix == "png":
            from PIL import Image

            Image.fromarray(clip.frames_THWC[0]).save(folder / f"{i:03d}.png")
        else:
            write_video(folder / f"{i:03d}.mp4", clip.frames_THWC, clip.fps)
        (folder / f"{i:03d}.txt").write_text(clip.caption)


# ---- Broken files


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """As a bad disk or a broken download leaves it: bytes changed, cut out, doubled, zeroed, or the end missing."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        kind, at = rng.integers(0, 6), int(rng.integers(0, max(len(data), 1)))
        length = int(min(rng.integers(1, 1 + len(data) // 4 + 1), len(data) - at))
        if kind == 0 and data:
            data[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            data[at : at + length] = rng.bytes(length)
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = data[at : at + length]
        elif kind == 4:
            data[at : at + length] = bytes(length)
        else:
            del data[at:]
    return bytes(data)


def fuzz(count: int, seed: int, steps: int, at: Path, kinds: str = "") -> None:
    """`count` files of each kind: media through `prepare`, records through `Shards`, the rest through their readers."""
    import soak_json
    import soak_models

    for kind in kinds.split(",") if kinds else [*MEDIA, "records", *soak_models.KINDS, *soak_json.KINDS]:
        rng = np.random.default_rng(seed)
        if kind in soak_models.KINDS:
            soak_models.fuzz_models(kind, count, rng)
            continue
        (at / kind).mkdir()
        if kind in soak_json.KINDS:
            soak_json.fuzz_json(kind, count, rng, at / kind)
            continue
        if kind == "records":
            _fuzz_records(count, rng, at / kind)
        else:
            _fuzz_media(kind, count, rng, at / kind)


def _pictures(folder: Path, suffix: str) -> None:
    """Still and animated pictures, with EXIF data that turn them where the format has some."""
    from PIL import Image

    turned = Image.Exif()
    turned[0x0112], turned[0x010E] = 6, "a description"
    rng = np.random.default_rng(0)
    for i in range(6):
        y, x = np.mgrid[0:48, 0:64]
        frames = [np.stack([4 * x, 5 * y, x * y * (i + t) % 256], -1).astype(np.uint8) for t in range(5)]
        frames[0][8:24, 8:24] = rng.integers(0, 256, (16, 16, 3))
        images = [Image.fromarray(frame) for frame in frames]
        if i == 2:
            images = [image.convert("RGBA") for image in images] if suffix != ".jpg" else images
        # Pillow 12.3 crashes when it saves an animated AVIF that is turned.
        options: dict = {} if suffix in (".gif", ".avif") else {"exif": turned.tobytes()}
        if i % 2 and suffix in (".png", ".webp", ".gif", ".avif"):
            options |= {"save_all": True, "append_images": images[1:], "duration": 100}
        images[0].save(folder / f"{i}{suffix}", **options)


def _videos(folder: Path, suffix: str) -> None:
    """Videos with sound, tags, a display matrix and a sample aspect, as far as the container has them."""
    import av

    codecs = {".webm": ("libvpx-vp9", "libopus")}.get(suffix, ("libx264", "aac"))
    for i in range(6):
        with av.open(str(folder / f"{i}{suffix}"), "w") as file:
            file.metadata.update({"title": "a title", "comment": "a comment", "creation_time": "2026-01-02T03:04:05"})
            video = file.add_stream(codecs[0], rate=(8, 25, 30)[i % 3])
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
            if suffix == ".mov" and i % 2:
                video.set_display_rotation(90)
            if i == 4:
                video.codec_context.sample_aspect_ratio = Fraction(4, 3)
            audio = file.add_stream(codecs[1], rate=48000) if i >= 3 else None
            for t in range(9):
                pixels = np.full((48, 64, 3), 20 * t, np.uint8)
                file.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            file.mux(video.encode())
            if audio:
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.int16), format="s16", layout="mono")
                frame.sample_rate = 48000
                file.mux(audio.encode(frame))
                file.mux(audio.encode())


def tags_mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Changes outside the packets only: in the boxes, elements and tags at the beginning and the end."""
    at = int(rng.integers(0, 600)) if rng.integers(0, 2) else max(0, len(content) - int(rng.integers(1, 1500)))
    length = int(rng.integers(4, 200))
    return content[:at] + mutated(content[at : at + length], rng) + content[at + length :]


def exif_mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Changes within the EXIF data only, whose length stays; a PNG's checksum is made right again."""
    at = content.find(b"eXIf") + 4 if b"eXIf" in content else content.find(b"MM\0*")
    if at < 4:
        at = max(0, content.find(b"EXIF") + 8)
    length = int.from_bytes(content[at - 8 : at - 4], "big") if content[at - 4 : at] == b"eXIf" else 60
    broken = bytearray(content)
    for _ in range(int(rng.integers(1, 6))):
        broken[min(at + int(rng.integers(0, max(length, 1))), len(broken) - 1)] = int(rng.integers(0, 256))
    if content[at - 4 : at] == b"eXIf":
        crc = zlib.crc32(bytes(broken[at - 4 : at + length])).to_bytes(4, "big")
        broken[at + length : at + length + 4] = crc
    return bytes(broken)


MEDIA = {  # kind -> (writes the whole files into a folder, breaks the bytes of one)
    "clips": (lambda folder: _write_clips(folder, 24), mutated),
    **{
        kind: (functools.partial(_pictures, suffix=f".{suffix}"), mutated)
        for kind, suffix in (("png", "png"), ("jpeg", "jpg"), ("webp", "webp"), ("gif", "gif"), ("avif", "avif"))
    },
    "exif": (lambda folder: [_pictures(folder, suffix) for suffix in (".png", ".jpg", ".webp")], exif_mutated),
    **{kind: (functools.partial(_videos, suffix=f".{kind}"), tags_mutated) for kind in ("mp4", "webm", "mkv", "mov")},
}


def _fuzz_media(kind: str, count: int, rng: np.random.Generator, at: Path) -> None:
    """Each broken file must be kept or named once; none may end, crash or hang its worker."""
    from minisora_jax.curation.prepare import prepare
    from minisora_jax.sources.clips import Records

    write, broken_of = MEDIA[kind]
    (at / "good").mkdir()
    write(at / "good")
    good = sorted(p for p in (at / "good").iterdir() if p.suffix != ".txt")
    broken = at / "broken"
    broken.mkdir()
    for i in range(count):
        source = good[int(rng.integers(len(good)))]
        (broken / f"{i:04d}{source.suffix}").write_bytes(broken_of(source.read_bytes(), rng))
        (broken / f"{i:04d}.txt").write_text(f"caption {i}")
    (broken / f"whole{good[0].suffix}").write_bytes(good[0].read_bytes())  # or no clip might be good
    (broken / "whole.txt").write_text("a whole file")
    begin = time.monotonic()
    report = prepare(broken, at / "prepared", workers=2, timeout=60.0)
    names = {row["name"] for row in report.skipped}
    records = Records(at / "prepared")
    kept = [records[i].name for i in range(len(records))]
    assert len(kept) == len(set(kept)) == report.kept and not names & set(kept)
    files = {p.name for p in broken.iterdir() if p.suffix != ".txt"}
    died = report.counts.get("crashed or hung", 0)
    print(
        f"{kind}: {count} broken files in {time.monotonic() - begin:.0f} s: {died} crashes or hangs, "
        f"{len(files - names - set(kept))} unaccounted for; {report.kept} still decode, {report.counts}",
        flush=True,
    )
    assert not died and names | set(kept) == files, [
        row for row in report.skipped if row["reason"] == "crashed or hung"
    ]


def _fuzz_records(count: int, rng: np.random.Generator, at: Path) -> None:
    """In processes of their own, 50 files each, for a crash to be seen as one."""
    from train_tiny import make_cache

    make_cache(at / "cache")
    counts = {"read whole": 0, "DataError": 0, "records read": 0, "records refused": 0}
    for first in range(0, count, 50):
        seeds = [int(s) for s in rng.integers(0, 2**31, min(50, count - first))]
        arguments = [sys.executable, __file__, "_read", str(at / "cache"), *map(str, seeds)]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"a reader died with {done.returncode}: {done.stderr[-2000:]}"
        for name, n in json.loads(done.stdout.splitlines()[-1]).items():
            counts[name] += n
    assert counts["read whole"] + counts["DataError"] == count
    print(f"{count} broken record files: {counts}")


def read_broken(cache: Path, seeds: list[int]) -> dict[str, int]:
    """What becomes of a cache with a broken shard whose size is as it should be: all is read, some of it, or nothing.

    A record that is given out must be the one that was written."""
    from minisora_jax.data.latents import Latents
    from minisora_jax.io.manifest import seal
    from minisora_jax.io.retry import DataError

    whole = Latents(cache)
    clips = [whole[i] for i in range(len(whole))]
    counts = {"read whole": 0, "DataError": 0, "records read": 0, "records refused": 0}
    (shard,) = cache.glob("latents-*.array_record")
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "copy"
            shutil.copytree(cache, copy)
            broken = mutated(shard.read_bytes(), np.random.default_rng(seed))
            (copy / shard.name).write_bytes(broken)
            manifest = json.loads((copy / "manifest.json").read_text())
            manifest["shards"][0]["bytes"] = len(broken)  # or the size alone would give it away
            (copy / "manifest.json").write_text(json.dumps(manifest | {"crc32": seal(manifest)}))
            refused = 0
            try:
                latents = Latents(copy)
                for i, clip in enumerate(clips):
                    try:
                        found = latents[i]
                    except DataError:
                        refused += 1
                        continue
                    assert found.name == clip.name and np.array_equal(found.mean_thwc, clip.mean_thwc)
                    counts["records read"] += 1
            except DataError:
                refused = len(clips)
            counts["records refused"] += refused
            counts["DataError" if refused else "read whole"] += 1
    return counts


if __name__ == "__main__":
    if sys.argv[1] == "_read":
        print(json.dumps(read_broken(Path(sys.argv[2]), [int(s) for s in sys.argv[3:]])))
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kill", "fuzz", "elastic"))
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default="", help="of the broken files, such as png,mkv,records; all by default")
    parser.add_argument("--steps", type=int, default=40, help="of the training that is killed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        fuzz_kinds = functools.partial(fuzz, kinds=args.kinds)
        trials = {"kill": kill, "fuzz": fuzz_kinds, "elastic": elastic}
        trials[args.what](args.count, args.seed, args.steps, Path(directory))

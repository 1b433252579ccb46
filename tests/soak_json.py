"""Broken text files for tests/soak.py: batch lines, manifests, runs and records of results, through their readers.

Each is read, or refused in a sentence (ValueError, DataError, OSError); none ends, hangs or fills a process.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from soak import mutated
from soak_models import changed

from minisora_jax.io.filesystem import printable
from minisora_jax.io.manifest import seal
from minisora_jax.io.retry import DataError

SECONDS = 20.0  # the most that one file may take
VERB_EVERY = 40  # of so many files, one goes through its verb too, which draws


def fuzz_json(kind: str, count: int, rng: np.random.Generator, at: Path) -> None:
    """`count` broken files of a kind, in this process: what is not refused in a sentence ends it."""
    break_one, read, verb = KINDS[kind](at)
    read()
    begin, counts, slowest = time.monotonic(), {"read": 0, "refused": 0}, 0.0
    for number in range(count):
        broken = break_one(rng)
        since = time.monotonic()
        try:
            read()
            if verb and number % VERB_EVERY == 0:
                _run(verb)
            counts["read"] += 1
        except (ValueError, DataError, OSError) as error:
            assert len(str(error)) < 4000, (broken, error)
            printable(str(error)).encode("utf-8")
            counts["refused"] += 1
        except BaseException:
            print(f"file {number} of {kind}: {broken!r:.2000}")
            raise
        slowest = max(slowest, time.monotonic() - since)
    unaccounted, seconds = count - sum(counts.values()), time.monotonic() - begin
    print(
        f"{kind}: {count} broken files in {seconds:.0f} s: 0 crashes or hangs, {unaccounted} unaccounted for; "
        f"{counts['read']} still read, {counts['refused']} refused in a sentence; slowest {slowest:.2f} s",
        flush=True,
    )
    assert not unaccounted and slowest < SECONDS


def _run(arguments: list[str]) -> None:
    """A verb as from the command line; what it cannot do is an exit code and a sentence."""
    from minisora_jax.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(arguments)
    assert code in (0, 1, 2) and "Traceback" not in said.getvalue(), said.getvalue()


Reading = tuple[Callable[[np.random.Generator], bytes], Callable[[], object], list[str] | None]


def _breaking(*paths: Path) -> Callable[[np.random.Generator], bytes]:
    """break_one: one of the files gets other bytes, or another value in its JSON (lines); the others are whole."""
    whole = {path: path.read_bytes() for path in paths}

    def break_one(rng: np.random.Generator) -> bytes:
        for path, content in whole.items():
            path.write_bytes(content)
        path = paths[int(rng.integers(len(paths)))]
        if rng.integers(0, 3) == 0:
            data = mutated(whole[path], rng)
        elif path.suffix == ".jsonl":
            lines = whole[path].decode().strip().split("\n")
            at = int(rng.integers(len(lines)))
            lines[at] = json.dumps(changed(json.loads(lines[at]), rng))
            data = "\n".join(lines).encode("utf-8", "surrogatepass")
        else:
            value = changed(json.loads(whole[path]), rng)
            if path.name == "manifest.json" and isinstance(value, dict):
                value["crc32"] = seal(value)  # as a stranger would, or its checksum would refuse all
            data = json.dumps(value).encode("utf-8", "surrogatepass")
        path.write_bytes(data)
        return data

    return break_one


def _batches(at: Path) -> Reading:
    """A batch file. Each line that is not empty must be a job or have its reason."""
    from minisora_jax.jobs.batch import read_jobs

    jobs = [
        {"prompt": "a red circle moves left", "seed": 3, "frames": 17, "size": [48, 64]},
        {"prompt": "a blue square grows", "size": "32x32", "seconds": 2.5, "fps": 8, "negative": "grey"},
        {"prompt": "a cat", "image": "a.png", "last": "b.png"},
        {"prompt": "a cat", "video": "a.mp4", "strength": 0.5},
        {"prompt": "a cat", "video": "a.mp4", "extend": "both", "seconds": 3},
        {"prompt": "a cat", "loop": True},
    ]
    path = at / "jobs.jsonl"
    path.write_text("\n".join(map(json.dumps, jobs)) + "\n")

    def read() -> None:
        lines = [line for line in path.read_bytes().decode("utf-8-sig", "surrogateescape").split("\n") if line.strip()]
        assert len(read_jobs(path)) == len(lines)

    return _breaking(path), read, None


def _manifests(at: Path) -> Reading:
    """The manifest of a latent cache and of a data set: what is opened gives records as they were written, or none."""
    from soak import _write_clips
    from train_tiny import make_cache

    from minisora_jax.curation.prepare import prepare
    from minisora_jax.data.latents import Latents
    from minisora_jax.inspection.datasets import facts_of
    from minisora_jax.sources.clips import Records

    make_cache(at / "latents")
    _write_clips(at / "mp4", 4)
    prepare(at / "mp4", at / "clips")
    whole = {"latents": Latents(at / "latents")[7].mean_thwc, "clips": Records(at / "clips")[1].frames_THWC}

    def read() -> None:
        errors = []
        for kind, opened, clip in (("latents", Latents, 7), ("clips", Records, 1)):
            try:
                data = opened(at / kind)
                facts_of(data.shards)
                found = data[clip]
                assert np.array_equal(found.mean_thwc if kind == "latents" else found.frames_THWC, whole[kind])
                _ = data.examples if kind == "latents" else data.identity
                if kind == "clips":
                    prepare(at / "mp4", at / "clips").summary()  # is done already, or says what differs
            except (ValueError, DataError, OSError) as error:
                errors.append(error)
        if errors:
            raise errors[0]

    verb = ["inspect", str(at / "latents"), "--verify", "--out", str(at / "a.png")]
    return _breaking(at / "latents/manifest.json", at / "clips/manifest.json"), read, verb


def _runs(at: Path) -> Reading:
    """The files of a run, as `inspect` shows them and as going on with it reads them."""
    from minisora_jax.inspection.models import metrics, run_facts
    from minisora_jax.training.loop import _skipped_batches
    from minisora_jax.training.metrics import Metrics
    from minisora_jax.training.same_config import require_same_config

    run = at / "run"
    (run / "checkpoints" / "20").mkdir(parents=True)
    config = {
        "run": {"steps": 40, "optim": {"learning_rate": 1e-3}, "mesh": {"data": 1}},
        "data": {"path": "data/latents"},
    }
    config |= {"dit": {"width": 64, "patch": [1, 2, 2]}, "pack": {"tokens": 256}, "prompts": []}
    (run / "config.json").write_text(json.dumps(config))
    row = {"loss": 1.5, "grad_norm": 0.3, "tokens_per_s": 9.0, "time_step": 2.0, "productive_s": 3.0, "began": 1e9}
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": i, **row}) + "\n" for i in range(1, 21)))
    (run / "left_out.json").write_text("[3, 7]")
    (run / "damaged_0.jsonl").write_text(json.dumps({"name": "a", "error": "corrupt"}) + "\n")

    def read() -> None:
        run_facts(run)
        assert all(isinstance(row["step"], int) for row in metrics(run))
        _skipped_batches(run)
        opened = Metrics(run, 10, 40, "fuzz")
        opened.close()
        shutil.rmtree(run / "tensorboard", ignore_errors=True)
        require_same_config(run, config)

    files = [run / name for name in ("config.json", "metrics.jsonl", "left_out.json", "damaged_0.jsonl")]
    return _breaking(*files), read, ["inspect", str(run), "--out", str(at / "a.png")]


def _results(at: Path) -> Reading:
    """The record of a result: what is read must do for making the file again, and for the page's gallery."""
    from minisora_jax.diffusion.guidance import GuidanceConfig
    from minisora_jax.diffusion.sampler import SamplerConfig
    from minisora_jax.jobs.job import Job
    from minisora_jax.jobs.output import batch_of, different_machine, read_record, record_of, sampling_of
    from minisora_jax.ui import show
    from minisora_jax.ui.gallery import Gallery

    (at / "a.png").write_bytes(b"a picture")
    jobs = [Job("a red circle", size=(32, 32)), Job("a cat", image=str(at / "a.png"))]
    sampling = {"sampler": SamplerConfig(), "guidance": GuidanceConfig()}
    model = {"model": None, "codec": "c", "hash": "0" * 16, "codec_hash": "1" * 16, "window": 17, "mesh": None}
    record = record_of(jobs, 1, model, sampling) | {
        "fps": 8,
        "size": [32, 32],
        "upscale": 4,
        "frames": 5,
        "pixels": "2",
    }
    path = at / "20260102-030405-0a1b2c3d.png"
    path.write_bytes(b"a picture")
    (at / f"{path.name}.json").write_text(json.dumps(record))
    shelf = Gallery(at)

    def read() -> None:
        show.gallery(shelf.items())
        shelf.prune()
        record = read_record(path)
        assert all(isinstance(name, str) for name in record["inputs"])
        assert isinstance(batch_of(record)[record["index"]], Job) and sampling_of(record).keys() == sampling.keys()
        different_machine(record)

    verb = ["generate", "--reproduce", str(path), "--out", str(at / "again")]
    return _breaking(at / f"{path.name}.json"), read, verb


KINDS: dict[str, Callable[[Path], Reading]] = {
    "batches": _batches,
    "manifests": _manifests,
    "runs": _runs,
    "results": _results,
}

"""Broken model files for tests/soak.py: each is read, or refused in a sentence; none ends, hangs or fills a process."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from soak import mutated

from minisora_jax.io.filesystem import printable

KINDS = ("safetensors", "torch", "config")
AT_ONCE = 100  # files of one process
SECONDS, MEMORY = 20.0, 2**30  # the most that one file may take, and the most that a process may grow


def fuzz_models(kind: str, count: int, rng: np.random.Generator) -> None:
    """`count` broken files of a kind, in processes of their own, for a crash to be seen as one."""
    begin, totals, slowest, grown = time.monotonic(), {"read": 0, "refused": 0}, 0.0, 0
    for first in range(0, count, AT_ONCE):
        seeds = [str(s) for s in rng.integers(0, 2**31, min(AT_ONCE, count - first))]
        done = subprocess.run(
            [sys.executable, __file__, kind, *seeds], capture_output=True, text=True, timeout=SECONDS * AT_ONCE
        )
        assert done.returncode == 0, f"a reader died with {done.returncode}: {done.stderr[-3000:]}"
        result = json.loads(done.stdout.splitlines()[-1])
        totals = {name: n + result[name] for name, n in totals.items()}
        slowest, grown = max(slowest, result["slowest"]), max(grown, result["grown"])
    unaccounted = count - sum(totals.values())
    seconds, read, refused = time.monotonic() - begin, totals["read"], totals["refused"]
    print(
        f"{kind}: {count} broken files in {seconds:.0f} s: 0 crashes or hangs, {unaccounted} unaccounted for; "
        f"{read} still read, {refused} refused in a sentence; slowest {slowest:.2f} s, "
        f"a process of {AT_ONCE} grew by {grown / 2**20:.0f} MiB at most",
        flush=True,
    )
    assert not unaccounted and slowest < SECONDS and grown < MEMORY


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_all(kind: str, seeds: list[int]) -> dict[str, Any]:
    """What becomes of the broken file of each seed. Anything but a ValueError ends the process."""
    with tempfile.TemporaryDirectory() as folder:
        break_one, read = {"safetensors": _weights, "torch": _weights, "config": _folders}[kind](kind, Path(folder))
        read()  # the whole file, once: what the code itself takes
        counts, slowest, before = {"read": 0, "refused": 0}, 0.0, _peak()
        for seed in seeds:
            break_one(np.random.default_rng(seed))
            begin = time.monotonic()
            try:
                read()
                counts["read"] += 1
            except ValueError as error:
                assert len(str(error)) < 4000 and printable(str(error)) == str(error), f"seed {seed}: {error!r}"
                counts["refused"] += 1
            except BaseException:
                print(f"seed {seed} of {kind}", file=sys.stderr)
                raise
            slowest = max(slowest, time.monotonic() - begin)
        return {**counts, "slowest": slowest, "grown": _peak() - before}


def _weights(kind: str, folder: Path) -> tuple[Callable, Callable]:
    """A small DiT as a published file: broken anywhere, or in the part that says where its tensors lie."""
    from test_parity_dit import SMALL, published_names
    from torch_files import save_torch

    from minisora_jax.weights import presets, reading

    config = SMALL["dit"]
    presets.TRANSFORMERS["dit-xl-2-256"] = dataclasses.replace(presets.TRANSFORMERS["dit-xl-2-256"], config=config)
    rng = np.random.default_rng(0)
    tensors = {k: rng.standard_normal(s).astype(np.float32) for k, s in published_names(config, "dit-own").items()}
    path = folder / f"model.{'safetensors' if kind == 'safetensors' else 'pt'}"
    if kind == "safetensors":
        from safetensors.numpy import save_file

        save_file(tensors, path)
    else:
        save_torch(path, tensors)
    content = path.read_bytes()
    head = 8 + int.from_bytes(content[:8], "little") if kind == "safetensors" else content.index(b"archive/data/0") - 30
    tail = content.index(b"PK\x01\x02") if kind == "torch" else len(content)  # the zip's directory

    def break_one(rng: np.random.Generator) -> None:
        where = rng.integers(0, 4)
        if where == 0:
            data = mutated(content, rng)
        elif where == 1 and tail < len(content):
            data = content[:tail] + mutated(content[tail:], rng)
        elif where == 2:  # another number in the same room, so that all else is as it was
            data = bytearray(content)
            digits = [i for i in range(8, head) if 48 <= data[i] < 58]
            places = digits if kind == "safetensors" else range(40, head)
            for i in rng.choice(places, 2):
                data[int(i)] = int(rng.integers(48, 58)) if kind == "safetensors" else int(rng.integers(0, 256))
        else:
            data = mutated(content[:head], rng) + content[head:]
        if kind == "torch":
            data = _with_checksums(bytes(data))
        path.write_bytes(data)

    def read() -> None:
        import jax

        _, params = reading.read_preset("dit-xl-2-256", path)
        for leaf in jax.tree.leaves(params):
            leaf.whole()

    return break_one, read


def _with_checksums(data: bytes) -> bytes:
    """A zip whose first member's checksum is right again, or the change of its pickle would end at the checksum."""
    import zlib

    at = data.find(b"PK\x01\x02")
    name, extra = (int.from_bytes(data[i : i + 2], "little") for i in (26, 28))
    size = int.from_bytes(data[at + 24 : at + 28], "little") if at > 0 else 0
    start = 30 + name + extra
    if at < 0 or start + size > len(data):
        return data
    crc = zlib.crc32(data[start : start + size]).to_bytes(4, "little")
    return data[:14] + crc + data[18 : at + 16] + crc + data[at + 20 :]


VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    7,
    10**9,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    0.5,
    "",
    "x",
    "\udcff",
    [],
    {},
)


def _folders(kind: str, folder: Path) -> tuple[Callable, Callable]:
    """The bundled model and codec with another config.json."""
    import minisora_jax as ms
    from minisora_jax.bundled import CODEC, MODEL

    whole = {}
    for name, source in (("model", MODEL), ("codec", CODEC)):
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("checksums.json"))
        (folder / name / "config.json").chmod(0o644)
        whole[name] = (folder / name / "config.json").read_bytes()

    def break_one(rng: np.random.Generator) -> None:
        for name, content in whole.items():
            (folder / name / "config.json").write_bytes(content)
        name = ("model", "codec")[int(rng.integers(0, 2))]
        if rng.integers(0, 2):
            data = mutated(whole[name], rng)
        else:
            data = json.dumps(changed(json.loads(whole[name]), rng)).encode("utf-8", "surrogatepass")
        (folder / name / "config.json").write_bytes(data)

    return break_one, lambda: ms.VideoPipeline.load(folder / "model", folder / "codec")


def changed(tree: Any, rng: np.random.Generator) -> Any:
    """A JSON tree with one value, at any depth, replaced, removed or put under another name."""
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.15:
        return VALUES[int(rng.integers(len(VALUES)))]
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    key = keys[int(rng.integers(len(keys)))]
    what = rng.random()
    if what < 0.1:
        del tree[key]
    elif what < 0.2 and isinstance(tree, dict):
        tree[f"{key}x"] = tree.pop(key)
    else:
        tree[key] = changed(tree[key], rng)
    return tree


if __name__ == "__main__":
    print(json.dumps(read_all(sys.argv[1], [int(s) for s in sys.argv[2:]])))

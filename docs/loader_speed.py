"""The loader by itself: packed tokens a second, against what a model needs, and memory over many steps.

    uv run python docs/loader_speed.py                       # speed, of small clips and of large ones
    uv run python docs/loader_speed.py --steps 20000         # and memory, over so many steps
    uv run python docs/loader_speed.py --torch PYTHON        # beside a torch DataLoader that pads the same clips

PYTHON has torch, numpy and array_record. Its DataLoader reads the same records, makes the same tokens and pads the
clips of each batch to the longest. CPU seconds are those of the process and its workers.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

WARM = 10  # steps before the clock starts
SETS = {
    # clips, (frames, rows, columns) of latents at least and at most, rows of a batch, tokens of a row
    "tiny": (2000, ((1, 4, 4), (5, 8, 8)), 8, 256),
    "480p": (24, ((1, 60, 104), (21, 60, 104)), 2, 32768),
}


def make_latents(directory: Path, name: str) -> None:
    from minisora_jax.data.latents import write_latents
    from minisora_jax.models.text import encode_bytes
    from minisora_jax.types import LatentClip

    count, (least, most), _, _ = SETS[name]
    rng = np.random.default_rng(0)

    def clips():
        for i in range(count):
            t, h, w = (int(rng.integers(a, b + 1)) for a, b in zip(least, most))
            size = (t, h // 2 * 2, w // 2 * 2, 16)
            mean, std = rng.standard_normal(size, np.float32), np.full(size, 0.1, np.float32)
            yield LatentClip(mean, std, encode_bytes(f"clip {i}"), f"clip {i}", 16.0, str(i))

    text = {"encoder": "bytes"}
    write_latents(directory, list(clips()), codec_hash="none", text=text, empty_text_LE=encode_bytes(""))


def cpu_seconds() -> float:
    return sum(resource.getrusage(who).ru_utime + resource.getrusage(who).ru_stime for who in (0, -1))


def packed(directory: Path, name: str, steps: int) -> dict[str, float]:
    import jax

    jax.config.update("jax_platforms", "cpu")
    from minisora_jax.data.conditioning import ConditioningConfig
    from minisora_jax.data.latents import Latents
    from minisora_jax.data.loader import packed_batches
    from minisora_jax.data.packing import PackConfig, PackPlan, token_counts

    _, _, rows, tokens = SETS[name]
    latents = Latents(directory)
    pack = PackConfig(tokens=tokens, text_tokens=1024, slots=64, rows=rows)
    plan = PackPlan(*token_counts(latents.sizes, (1, 2, 2)), pack, 0, rows)
    options = dict(patch=(1, 2, 2), conditioning=ConditioningConfig(), caption_dropout=0.1)
    stream = packed_batches(latents, plan, range(WARM + steps), **options)
    useful, memory = 0, []
    for step, (batch, _) in enumerate(stream):
        if step == WARM:
            begin, cpu = time.perf_counter(), cpu_seconds()
        if step >= WARM:
            useful += int((batch.segment_BS > 0).sum())
        if step % max(1, steps // 20) == 0:
            memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    seconds, cpu = time.perf_counter() - begin, cpu_seconds() - cpu
    slots = steps * rows * tokens
    return {"useful": useful, "slots": slots, "seconds": seconds, "cpu": cpu, "memory": memory}


def padded(directory: Path, name: str, steps: int) -> dict[str, float]:
    """The same clips by torch: a batch has the tokens of one packed step, about, and is padded to its longest clip."""
    import struct

    import torch
    from array_record.python.array_record_module import ArrayRecordReader

    shards = sorted(directory.glob("latents-*.array_record"))
    counts = [ArrayRecordReader(str(s), "").num_records() for s in shards]
    sizes = np.load(directory / "sizes.npy")

    class Clips(torch.utils.data.Dataset):
        def __init__(self):
            self.readers = {}

        def __len__(self):
            return sum(counts)

        def __getitem__(self, i):
            shard = int(np.searchsorted(np.cumsum(counts), i, side="right"))
            if shard not in self.readers:
                options = "readahead_buffer_size:0,max_parallelism:0"
                self.readers[shard] = ArrayRecordReader(str(shards[shard]), options)
            body = memoryview(self.readers[shard].read([i - sum(counts[:shard])])[0])[8:]
            (length,) = struct.unpack("<I", body[:4])
            at, arrays = 4 + length, {}
            for key, dtype, shape in json.loads(bytes(body[4:at]))["arrays"]:
                arrays[key] = np.frombuffer(body, dtype, int(np.prod(shape)), at).reshape(shape)
                at += arrays[key].nbytes
            mean, std = (torch.from_numpy(arrays[k].astype(np.float32)) for k in ("mean", "std"))
            x = mean + std * torch.randn_like(mean)
            t, h, w, c = x.shape
            x = x.reshape(t, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5)
            return x.reshape(t * h * w // 4, 4 * c), torch.from_numpy(arrays["text"].astype(np.int64))

    def collate(clips):
        tokens, text = zip(*clips)
        longest = max(map(len, tokens))
        x = torch.zeros(len(clips), longest, tokens[0].shape[1])
        mask = torch.zeros(len(clips), longest, dtype=torch.bool)
        for row, clip in enumerate(tokens):
            x[row, : len(clip)], mask[row, : len(clip)] = clip, True
        return x, mask, torch.nn.utils.rnn.pad_sequence(text, batch_first=True)

    torch.set_num_threads(1)
    mean = float((sizes[:, 0] * sizes[:, 1] * sizes[:, 2] / 4).mean())
    batch = max(1, round(SETS[name][2] * SETS[name][3] / mean))
    loader = torch.utils.data.DataLoader(
        Clips(),
        batch_size=batch,
        shuffle=True,
        num_workers=2,
        collate_fn=collate,
        drop_last=True,
        persistent_workers=True,
    )
    begin, useful, slots, done = None, 0, 0, 0
    while begin is None or done < steps:
        for _, mask, _ in loader:
            if begin is None:
                begin = time.perf_counter()
                continue
            useful, slots, done = useful + int(mask.sum()), slots + mask.numel(), done + 1
            if done == steps:
                break
    return {"useful": useful, "slots": slots, "seconds": time.perf_counter() - begin}


def told(how: str, name: str, found: dict[str, float]) -> None:
    rate, share = found["useful"] / found["seconds"], found["useful"] / found["slots"]
    each = f", {found['useful'] / found['cpu'] / 1e6:6.2f} M a core's second" if "cpu" in found else ""
    print(f"{name:<6}{how:<22}{rate / 1e6:8.2f} M useful tokens/s{each}, {share:6.1%} of slots useful", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["_padded"]:
        print(json.dumps(padded(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))))
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--torch", default="")
    args = parser.parse_args()
    for name, steps in (("tiny", 2000), ("480p", 60)):
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder) / "latents"
            make_latents(cache, name)
            for _ in range(2):
                told("packed (this project)", name, packed(cache, name, steps))
                if args.torch:
                    command = [args.torch, __file__, "_padded", str(cache), name, str(steps)]
                    done = subprocess.run(command, capture_output=True, text=True)
                    assert done.returncode == 0, done.stderr
                    told("padded (torch)", name, json.loads(done.stdout))
            if args.steps and name == "tiny":
                memory = packed(cache, name, args.steps)["memory"]
                print(
                    "memory over", args.steps, "steps, MiB:", " ".join(f"{m / 2**20:.0f}" for m in memory), flush=True
                )

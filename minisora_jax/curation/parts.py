"""A part of a source: the work of one task. A run is two rounds over all parts, with a look at all hashes between.

    gather   files of a range -> clips_of -> parts/00007.train-0.array_record ..., and then parts/00007.json
    finish   those records -> less duplicates, with new captions -> 00007.train.done-0.array_record ..., 00007.done.json

Both are functions of the plan and the part alone, so whoever runs them, in whatever order, and however often they are
interrupted, the same bytes come out. A part's JSON is written last: a part that has one is done, and never done again.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from minisora_jax.curation.stages import Candidate, Curation, Drop, clips_of
from minisora_jax.curation.workers import Died, Worker
from minisora_jax.io.atomic import write_text
from minisora_jax.io.record_writer import PARTS, ShardWriter
from minisora_jax.io.records import RANDOM_ACCESS, pack_record, unpack_record
from minisora_jax.io.retry import DataError
from minisora_jax.sources.base import BadClip, Source

SPLITS = ("train", "heldout")
SHOWN = 24  # pictures for the report, of each reason to drop and of the clips kept: over all parts, at least 4 each
THUMBNAIL = 160  # pixels of the longer side
TRIES = 2  # of a file that ends its worker's process


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a worker needs. It pickles, and into little."""

    source: Source
    out: str
    curation: Curation
    opening: dict[str, Any]  # of the manifest, with the size of a shard
    files_per_part: int = 64
    held_out: float = 0.0  # share of source files whose clips are kept apart
    captioner: str = ""  # as `open_captioner` spells it; "" for none
    strict: bool = False

    @property
    def parts(self) -> int:
        return -(-len(self.source) // self.files_per_part)

    def files(self, part: int) -> range:
        return range(part * self.files_per_part, min((part + 1) * self.files_per_part, len(self.source)))

    @property
    def folder(self) -> Path:
        return Path(self.out) / PARTS

    def gathered(self, part: int) -> Path:
        return self.folder / f"{part:05d}.json"

    def finished(self, part: int) -> Path:
        return self.folder / f"{part:05d}.done.json"


def is_held_out(source_hash: str, share: float) -> bool:
    """Does a file with that sha256 belong to the held-out split? All clips of a file share its fate."""
    return int(source_hash[:12], 16) < share * 16**12


# ---- The first round


def gather(plan: Plan, part: int, bad: dict[int, str], alive: Callable[[int], None]) -> None:
    """Write the clips of a part's files. bad: {number of a file: why it must not be touched}."""
    clips, drops, pictures, shortened = [], [], [], 0
    most = max(4, -(-SHOWN // plan.parts))
    shown: dict[str, int] = {}

    def show(reason: str, name: str, frame_HWC: np.ndarray | None, caption: str = "") -> None:
        shown[reason] = shown.get(reason, 0) + 1
        if shown[reason] <= most and frame_HWC is not None:
            pictures.append({"name": name, "reason": reason, "caption": caption, "jpeg": _thumbnail(frame_HWC)})

    stems = {split: plan.folder / f"{part:05d}.{split}" for split in SPLITS}
    with (
        ShardWriter(stems["train"], plan.opening) as train,
        ShardWriter(stems["heldout"], plan.opening) as heldout,
    ):
        for i in plan.files(part):
            alive(i)
            for clip in _clips(plan, i, bad, alive):
                if isinstance(clip, Drop):
                    if plan.strict:
                        raise BadClip(clip.name, clip.reason, clip.detail)
                    row = {"name": clip.name, "stage": clip.stage, "reason": clip.reason, "detail": clip.detail}
                    drops.append(row | {"scores": clip.scores})
                    show(clip.reason, clip.name, clip.frame_HWC, clip.detail)
                    continue
                split = "heldout" if is_held_out(clip.source, plan.held_out) else "train"
                (heldout if split == "heldout" else train).add(_record(clip), _size(clip))
                clips.append({"name": clip.name, "split": split, "hash": clip.hash, "scores": clip.scores})
                shortened += clip.shortened
                show("", clip.name, clip.frames_THWC[len(clip.frames_THWC) // 2], clip.caption)
    metadata = {"clips": clips, "drops": drops, "pictures": pictures, "shortened": shortened}
    _write(plan.gathered(part), metadata | {"shards": {"train": train.shards, "heldout": heldout.shards}})


def _clips(plan: Plan, i: int, bad: dict[int, str], alive: Callable[[int], None]) -> Iterator[Candidate | Drop]:
    media = plan.source[i]
    if i in bad:
        yield Drop(media.name, "decode", "crashed or hung", bad[i])
    else:
        yield from clips_of(media, plan.curation, lambda: alive(i))


def gather_safely(plan: Plan, worker: Worker, part: int, on_item: Callable[[int], None] = lambda i: None) -> None:
    """`gather` in a worker's process, and again without the file, where one has ended it twice. Nothing if it is done.

    Which files did is written down, so that no later run meets them again."""
    _see_the_output(plan)
    if plan.gathered(part).exists():
        return
    notes = plan.folder / f"{part:05d}.bad.json"
    bad = {int(i): how for i, how in json.loads(notes.read_text()).items()} if notes.exists() else {}
    deaths: dict[int, int] = {}
    while True:
        try:
            return worker.call(gather, plan, part, bad, on_item=on_item)
        except Died as died:
            if died.at is None or died.at in bad:
                raise RuntimeError(
                    f"a worker {died.how} before it came to a file: is there too little memory?"
                ) from died
            deaths[died.at] = deaths.get(died.at, 0) + 1
            if deaths[died.at] == TRIES:
                bad[died.at] = f"its decoder {died.how}, {TRIES} times"
                _write(notes, bad)


def _see_the_output(plan: Plan) -> None:
    if not plan.folder.is_dir():
        raise DataError(
            f"{plan.folder} is not there: workers on other machines need the output (and a folder that is the source) "
            "on a file system that all share, such as NFS, Filestore, or a bucket mounted by Cloud Storage FUSE"
        )


# ---- The second round


def finish(plan: Plan, part: int, repeats: dict[int, str], alive: Callable[[int], None]) -> None:
    """Write a part's records again: those that repeat no other clip, with new captions if a captioner is asked for.

    repeats: {number of a clip within the part: name of the earlier clip that it repeats}."""
    from minisora_jax.curation.captioners import CaptionRefused, describe, open_captioner

    captioner = open_captioner(plan.captioner) if plan.captioner else None
    metadata = read_notes(plan.gathered(part))
    numbers = {split: [n for n, clip in enumerate(metadata["clips"]) if clip["split"] == split] for split in SPLITS}
    drops, captions, shards = [], {}, {}
    for split in SPLITS:
        records = _records(plan, metadata["shards"][split])
        with ShardWriter(plan.folder / f"{part:05d}.{split}.done", plan.opening) as writer:
            for n, (where, record) in zip(numbers[split], records, strict=True):
                alive(n)
                name = metadata["clips"][n]["name"]
                if n in repeats:
                    detail = f"shows what {repeats[n]} shows"
                    drops.append(
                        {"name": name, "stage": "duplicates", "reason": "duplicate", "detail": detail, "clip": n}
                    )
                    continue
                arrays, said = unpack_record(record, where)
                if captioner:
                    try:
                        said["captions"] = captions[n] = describe(captioner, arrays["frames"])
                    except CaptionRefused as refused:
                        drops.append(
                            {
                                "name": name,
                                "stage": "caption",
                                "reason": refused.reason,
                                "detail": refused.detail,
                                "clip": n,
                            }
                        )
                        continue
                    record = pack_record(arrays, said)
                longest = max(len(c.encode("utf-8")) for c in (said["caption"], *said.get("captions", {}).values()))
                writer.add(record, (*arrays["frames"].shape[:3], longest))
        shards[split] = writer.shards
    _write(plan.finished(part), {"drops": drops, "captions": captions, "shards": shards})


def finish_safely(
    plan: Plan, worker: Worker, part: int, repeats: dict[int, str], on_item: Callable[[int], None] = lambda i: None
) -> None:
    """`finish` in a worker's process, if it is not done; what was gathered goes."""
    _see_the_output(plan)
    if not plan.finished(part).exists():
        try:
            worker.call(finish, plan, part, repeats, on_item=on_item)
        except Died as died:
            name = "any clip" if died.at is None else read_notes(plan.gathered(part))["clips"][died.at]["name"]
            raise RuntimeError(
                f"a worker {died.how} at {name} while captioning or dropping duplicates. Started again, the run goes "
                "on after the parts that are done; --workers 1 needs less memory"
            ) from died
    for shards in read_notes(plan.gathered(part))["shards"].values():
        for shard in shards:
            (plan.folder / shard["file"]).unlink(missing_ok=True)


# ---- Records, pictures and notes


def _record(clip: Candidate) -> bytes:
    metadata = {
        "caption": clip.caption,
        "fps": clip.fps,
        "name": clip.name,
        "source": clip.source,
        "scores": clip.scores,
    }
    return pack_record({"frames": clip.frames_THWC}, metadata)


def _size(clip: Candidate) -> tuple[int, ...]:
    return (*clip.frames_THWC.shape[:3], len(clip.caption.encode("utf-8")))


def _records(plan: Plan, shards: list[dict[str, Any]]) -> Iterator[tuple[str, bytes]]:
    for shard in shards:
        path = plan.folder / shard["file"]
        if not path.exists() or path.stat().st_size != shard["bytes"]:
            raise DataError(f"{path} is missing or damaged. Delete {plan.out} and write it again")
        reader = ArrayRecordReader(str(path), RANDOM_ACCESS)
        for i in range(reader.num_records()):
            yield f"record {i} of {path}", reader.read([i])[0]


def _thumbnail(frame_HWC: np.ndarray) -> str:
    image = Image.fromarray(frame_HWC)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=70)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _write(path: Path, metadata: Any) -> None:
    write_text(path, json.dumps(metadata))


def read_notes(path: Path) -> Any:
    """What a part's JSON says."""
    return json.loads(path.read_text(encoding="utf-8"))

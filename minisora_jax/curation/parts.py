"""The work on one part of a source, which is one task. A run has two rounds over all parts.

    gather   files of a range -> clips_of -> parts/00007.train-0.array_record ..., and then parts/00007.json
    finish   these records without duplicates, with new captions -> 00007.train.done-0.array_record ..., 00007.done.json

Between the rounds the hashes of all parts are compared. Both functions depend on the plan and the part only. So the
bytes are the same in any order, by any worker, and after any interruption. A part's JSON is written last: a part that
has one is done and is never repeated.
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
from minisora_jax.io.json_files import read_json
from minisora_jax.io.record_writer import PARTS, ShardWriter
from minisora_jax.io.records import RANDOM_ACCESS, pack_record, unpack_record
from minisora_jax.io.retry import DataError
from minisora_jax.media.video_writer import mp4_bytes
from minisora_jax.sources.base import Source, stored_frames
from minisora_jax.sources.skips import BadClip

SPLITS = ("train", "heldout")
SHOWN = 24  # the report's pictures of the kept clips, and of each reason to drop, over all parts; at least 4 a part
THUMBNAIL = 160  # pixels of the longer side
TRIES = 2  # a file that kills its worker's process so often is dropped


@dataclasses.dataclass(frozen=True)
class Plan:
    """The input of a worker. It pickles into few bytes."""

    source: Source
    out: str
    curation: Curation
    opening: dict[str, Any]  # the head of the manifest, with the size of a shard
    files_per_part: int = 64
    held_out: float = 0.0  # share of source files in the held-out split
    captioner: str = ""  # the name of a captioner, see `open_captioner`; "" for none
    strict: bool = False
    crf: int | None = None  # clips are stored as H.264 of this quality; None: as pixels

    @property
    def parts(self) -> int:
        """The number of parts."""
        return -(-len(self.source) // self.files_per_part)

    def files(self, part: int) -> range:
        """The numbers of a part's files."""
        return range(part * self.files_per_part, min((part + 1) * self.files_per_part, len(self.source)))

    @property
    def folder(self) -> Path:
        """The folder of all parts."""
        return Path(self.out) / PARTS

    def gathered(self, part: int) -> Path:
        """The JSON file of a part's first round."""
        return self.folder / f"{part:05d}.json"

    def finished(self, part: int) -> Path:
        """The JSON file of a part's second round."""
        return self.folder / f"{part:05d}.done.json"


def is_held_out(source_hash: str, share: float) -> bool:
    """Whether the file with this sha256 belongs to the held-out split, with all of its clips."""
    return int(source_hash[:12], 16) < share * 16**12


# ---- The first round


def gather(plan: Plan, part: int, bad: dict[int, str], alive: Callable[[int], None]) -> None:
    """Write the clips of a part's files.

    Args:
        bad: {number of a file: detail} of files that are dropped unread.
        alive: called with the number of the current file, at each frame and more often.

    Raises:
        BadClip: a clip is dropped and the plan is strict.
    """
    clips, drops, pictures, remarks, shortened, size = [], [], [], [], 0, 0
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
                (heldout if split == "heldout" else train).add(_record(clip, plan.crf), _size(clip))
                clips.append({"name": clip.name, "split": split, "hash": clip.hash, "scores": clip.scores})
                shortened += clip.shortened
                remarks += [{"name": clip.name, "remark": remark} for remark in clip.remarks]
                size += clip.source_bytes
                show("", clip.name, clip.frames_THWC[len(clip.frames_THWC) // 2], clip.caption)
    metadata = {"clips": clips, "drops": drops, "pictures": pictures, "shortened": shortened}
    metadata |= {"remarks": remarks, "source_bytes": size}
    _write(plan.gathered(part), metadata | {"shards": {"train": train.shards, "heldout": heldout.shards}})


def _clips(plan: Plan, i: int, bad: dict[int, str], alive: Callable[[int], None]) -> Iterator[Candidate | Drop]:
    media = plan.source[i]
    if i in bad:
        yield Drop(media.name, "decode", "crashed or hung", bad[i])
    else:
        yield from clips_of(media, plan.curation, lambda: alive(i))


def gather_safely(plan: Plan, worker: Worker, part: int, on_item: Callable[[int], None] = lambda i: None) -> None:
    """Run `gather` in a worker's process, unless the part is done. A file that kills the process twice is dropped.

    Such files are written to disk, so later runs drop them unread.

    Raises:
        RuntimeError: the process dies before it reaches a file.
    """
    _require_output(plan)
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
                    f"a worker {died.how} before its first file: use fewer workers if memory is short"
                ) from died
            deaths[died.at] = deaths.get(died.at, 0) + 1
            if deaths[died.at] == TRIES:
                bad[died.at] = f"its decoder {died.how}, {TRIES} times"
                _write(notes, bad)


def _require_output(plan: Plan) -> None:
    if not plan.folder.is_dir():
        raise DataError(
            f"{plan.folder} is missing: workers on other machines need the output, and a source folder, on a shared "
            "file system, such as NFS, Filestore, or a bucket mounted by Cloud Storage FUSE"
        )


# ---- The second round


def finish(plan: Plan, part: int, repeats: dict[int, str], alive: Callable[[int], None]) -> None:
    """Write a part's records again, without duplicates and, if the plan has a captioner, with new captions.

    Args:
        repeats: {number of a clip within the part: name of the earlier clip that it repeats}.
        alive: called with the number of the current clip.
    """
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
                arrays, facts = unpack_record(record, where)
                frames = stored_frames(arrays)
                if captioner:
                    try:
                        facts["captions"] = captions[n] = describe(captioner, frames)
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
                    record = pack_record(arrays, facts)
                longest = max(len(c.encode("utf-8")) for c in (facts["caption"], *facts.get("captions", {}).values()))
                writer.add(record, (*frames.shape[:3], longest))
        shards[split] = writer.shards
    _write(plan.finished(part), {"drops": drops, "captions": captions, "shards": shards})


def finish_safely(
    plan: Plan, worker: Worker, part: int, repeats: dict[int, str], on_item: Callable[[int], None] = lambda i: None
) -> None:
    """Run `finish` in a worker's process, unless the part is done, and delete the records of the first round.

    Raises:
        RuntimeError: the process dies.
    """
    _require_output(plan)
    if not plan.finished(part).exists():
        try:
            worker.call(finish, plan, part, repeats, on_item=on_item)
        except Died as died:
            name = "any clip" if died.at is None else read_notes(plan.gathered(part))["clips"][died.at]["name"]
            raise RuntimeError(
                f"a worker {died.how} at {name} while captioning or dropping duplicates. Run the same command again: "
                "it keeps the finished parts; --workers 1 needs less memory"
            ) from died
    for shards in read_notes(plan.gathered(part))["shards"].values():
        for shard in shards:
            (plan.folder / shard["file"]).unlink(missing_ok=True)


# ---- Records, pictures and notes


def _record(clip: Candidate, crf: int | None) -> bytes:
    metadata = {
        "caption": clip.caption,
        "fps": clip.fps,
        "name": clip.name,
        "source": clip.source,
        "scores": clip.scores,
    }
    actions = {} if clip.actions_TA is None else {"actions": clip.actions_TA}
    if crf is None:
        return pack_record({"frames": clip.frames_THWC} | actions, metadata)
    mp4 = np.frombuffer(mp4_bytes(clip.frames_THWC, clip.fps, crf), np.uint8)
    return pack_record({"mp4": mp4} | actions, metadata)


def _size(clip: Candidate) -> tuple[int, ...]:
    return (*clip.frames_THWC.shape[:3], len(clip.caption.encode("utf-8")))


def _records(plan: Plan, shards: list[dict[str, Any]]) -> Iterator[tuple[str, bytes]]:
    for shard in shards:
        path = plan.folder / shard["file"]
        if not path.exists() or path.stat().st_size != shard["bytes"]:
            raise DataError(f"{path} is missing or damaged. Delete {plan.out} and run the command again")
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
    """The value of a part's JSON file."""
    return read_json(path)

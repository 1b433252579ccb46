"""Prepared clips come back exactly; an interrupted write resumes to the same bytes; damage is never read over."""

import json
import pickle
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from minisora_jax.curation.prepare import prepare
from minisora_jax.io import record_writer
from minisora_jax.io.manifest import seal
from minisora_jax.io.object_store import Mirror
from minisora_jax.io.records import Shards, pack_record, sha256, unpack_record
from minisora_jax.io.retry import DataError
from minisora_jax.sources.clips import Records
from minisora_jax.toy.shapes import Shapes

COUNT = 10


def write_part(part, writer, stop=COUNT):
    for i in range(2 * part, 2 * part + 2):
        if i == stop:
            raise KeyboardInterrupt
        values = np.random.default_rng(i).integers(0, 255, (100 + 13 * i, 3), dtype=np.uint8)
        writer.add(pack_record({"values": values}, {"i": i}), (len(values), 1, 1, 0))
    return [part]


def write(out, write_part=write_part, parts=range(COUNT // 2), **settings):
    """As `latents.write_latents` does, `parts` being this process's share."""
    opening = record_writer.opening_of("things", {"codec": "abc", **settings}, 700, "group_size:1,uncompressed")
    if manifest := record_writer.finished(out, opening):
        return manifest
    record_writer.begin(out, opening)
    record_writer.write_parts(out, opening, parts, write_part)
    if len(parts) == COUNT // 2:
        return record_writer.finish_parts(
            out, opening, COUNT // 2, closing=lambda metadata: {"order": sum(metadata, [])}
        )


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_a_record_gives_its_arrays_and_facts_back():
    arrays = {
        "a": np.arange(6, dtype=np.float16).reshape(2, 3),
        "none": np.zeros((0, 4), np.int32),
        "x": np.array(7, np.uint8),
    }
    back, metadata = unpack_record(pack_record(arrays, {"caption": "größer 猫", "fps": 29.97}), "r")
    assert metadata == {"caption": "größer 猫", "fps": 29.97}
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)
        assert back[name].dtype == array.dtype


def test_any_flipped_bit_of_a_record_is_found():
    record = pack_record({"a": np.arange(20)}, {"n": 1})
    for at in range(0, len(record), 7):
        bad = bytearray(record)
        bad[at] ^= 4
        with pytest.raises(DataError, match="r is corrupt: expected"):
            unpack_record(bytes(bad), "r")


def test_every_record_of_every_shard_reads_back(tmp_path):
    manifest = write(tmp_path)
    assert len(manifest["shards"]) > 2 and manifest["records"] == COUNT
    assert not (tmp_path / "progress.jsonl").exists() and not (tmp_path / "parts").exists()
    assert manifest["order"] == list(range(COUNT // 2))
    shards = Shards(tmp_path, "things", {"codec": "abc"})
    shards.verify()
    shards = pickle.loads(pickle.dumps(shards))
    order = np.random.default_rng(0).integers(0, COUNT, 400)
    with ThreadPoolExecutor(8) as pool:
        for i, (arrays, metadata) in zip(order, pool.map(shards.read, map(int, order))):
            assert metadata == {"i": i} and len(arrays["values"]) == shards.sizes[i, 0] == 100 + 13 * i
    with pytest.raises(IndexError):
        shards.read(COUNT)


@pytest.mark.parametrize("stop", [0, 1, 4, 7, 9])
def test_an_interrupted_write_resumes_to_the_same_bytes(tmp_path, stop):
    write(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cut", lambda part, writer: write_part(part, writer, stop))
    with pytest.raises(DataError, match="did not finish"):
        Shards(tmp_path / "cut", "things", {})
    started = []
    write(tmp_path / "cut", lambda part, writer: started.append(part) or write_part(part, writer))
    assert started[0] == stop // 2, "finished parts are kept"
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_processes_share_the_parts(tmp_path):
    write(tmp_path / "whole")
    for share in (range(1, COUNT // 2, 3), range(2, COUNT // 2, 3), range(0, COUNT // 2, 3)):
        write(tmp_path / "shared", parts=share)
    write(tmp_path / "shared", lambda part, writer: pytest.fail("all parts are done"))
    assert contents(tmp_path / "shared") == contents(tmp_path / "whole")


def test_a_crash_while_finishing_is_resumed(tmp_path, monkeypatch):
    write(tmp_path / "whole")
    monkeypatch.setattr(record_writer.np, "save", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "cut")
    monkeypatch.undo()
    write(tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_other_settings_never_mix(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, lambda part, writer: write_part(part, writer, 7))
    with pytest.raises(DataError, match="codec='abc'; this one has codec='xyz'"):
        write(tmp_path, codec="xyz")
    first = write(tmp_path)
    assert write(tmp_path, lambda part, writer: pytest.fail("a finished data set is left alone")) == first
    with pytest.raises(DataError, match="codec='abc'; this one has codec='xyz'"):
        write(tmp_path, codec="xyz")


def test_nothing_to_write_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no record to write"):
        write(tmp_path, lambda part, writer: [])


def test_prepared_shapes_are_the_shapes(tmp_path):
    report = prepare("shapes", tmp_path / "out", count=5, split="heldout")
    assert report.summary() == "5 clips kept, 0 skipped"
    back, shapes = Records(tmp_path / "out"), Shapes("heldout", 5)
    assert len(back) == 5
    for i in range(5):
        np.testing.assert_array_equal(back[i].frames_THWC, shapes[i].frames_THWC)
        assert (back[i].caption, back[i].fps, back[i].name) == (shapes[i].caption, shapes[i].fps, shapes[i].name)
        assert tuple(back.sizes[i]) == (*shapes[i].size_THW, len(shapes[i].caption))
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["settings"]["preprocessing_version"] == 2 and manifest["skipped"]["counts"] == {}
    prepare("shapes", tmp_path / "again", count=5, split="heldout")
    prepare("shapes", tmp_path / "other", count=5, split="train")
    assert back.identity == Records(tmp_path / "again").identity != Records(tmp_path / "other").identity
    with pytest.raises(DataError, match="source=.shapes:heldout:5.; this one has source=.shapes:heldout:6."):
        prepare("shapes", tmp_path / "out", count=6, split="heldout")


# ---- What strangers and disks do to a data set


def altered(out, alter):
    """Rewrite a manifest, as a stranger would; `alter` changes it in place or returns another value."""
    path = out / "manifest.json"
    manifest = json.loads(path.read_text())
    changed = alter(manifest) or manifest
    path.write_text(json.dumps(changed | {"crc32": seal(changed)} if isinstance(changed, dict) else changed))


def test_every_flipped_bit_of_a_manifest_is_noticed_or_changes_nothing(tmp_path):
    write(tmp_path)
    path, rng = tmp_path / "manifest.json", np.random.default_rng(0)
    whole = path.read_bytes()
    noticed = 0
    for at in rng.integers(len(whole), size=300):
        broken = bytearray(whole)
        broken[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        try:
            assert Shards(tmp_path, "things", {}).manifest == json.loads(whole)  # a space between two entries
        except DataError:
            noticed += 1
    assert noticed > 200


OUTSIDE = ["/etc/passwd", "../../x", "..", "a/b", "a\\b", ".hidden", "", None, 3, "x\0y", "a\nb"]


@pytest.mark.parametrize("place", ["shards", "tables"])
def test_a_manifest_that_names_a_file_elsewhere_is_refused(tmp_path, place, monkeypatch):
    write(tmp_path / "out")
    for name in OUTSIDE:

        def alter(manifest, name=name):
            (manifest["shards"][0] if place == "shards" else manifest["tables"]["sizes"])["file"] = name

        before = (tmp_path / "out" / "manifest.json").read_text()
        altered(tmp_path / "out", alter)
        with pytest.raises(DataError, match="is not a file in its folder"):
            Shards(tmp_path / "out", "things", {})
        if name == OUTSIDE[0]:
            monkeypatch.setenv("MINISORA_CACHE", str(tmp_path / "cache"))
            with pytest.raises(DataError, match="is not a file in its folder"):
                Mirror(f"file://{tmp_path / 'out'}")
            assert not (tmp_path / "cache").exists()
        (tmp_path / "out" / "manifest.json").write_text(before)


@pytest.mark.parametrize(
    "alter",
    [
        lambda m: [1],
        lambda m: "text",
        lambda m: m.pop("shards") and None,
        lambda m: m.update(tables=[]),
        lambda m: m.update(settings=None),
        lambda m: m.update(records="10"),
        lambda m: m.update(records=-1),
        lambda m: m["shards"].append(7),
        lambda m: m["shards"][0].update(records=True),
        lambda m: m["shards"][0].pop("sha256") and None,
        lambda m: m["tables"].update(sizes="sizes.npy"),
    ],
)
def test_a_manifest_of_another_form_is_named_and_no_trace(tmp_path, alter):
    write(tmp_path)
    altered(tmp_path, alter)
    with pytest.raises(DataError, match="manifest.json is damaged"):
        Shards(tmp_path, "things", {})


def test_shards_that_changed_places_are_noticed(tmp_path):
    def same_size(part, writer):
        values = np.full((50, 3), part, np.uint8)
        writer.add(pack_record({"values": values}, {"i": part}), (50, 1, 1, 0))
        return [part]

    manifest = write(tmp_path, same_size)
    a, b = (tmp_path / shard["file"] for shard in manifest["shards"][:2])
    assert a.stat().st_size == b.stat().st_size
    a.rename(tmp_path / "aside"), b.rename(a), (tmp_path / "aside").rename(b)
    with pytest.raises(DataError, match="is another shard: its first record has crc32"):
        Shards(tmp_path, "things", {}).read(0)


def test_a_record_that_sizes_does_not_know_is_refused(tmp_path):
    out = prepare("shapes:train:4", tmp_path / "clips") and tmp_path / "clips"
    sizes = np.load(out / "sizes.npy")
    sizes[1, 0] += 4
    np.save(out / "sizes.npy", sizes)
    altered(out, lambda m: m["tables"]["sizes"].update(sha256=sha256(out / "sizes.npy")))
    Records(out)[0]
    with pytest.raises(DataError, match="is corrupt, or another record: its size is"):
        Records(out)[1]


@pytest.mark.parametrize(
    "header",
    [
        b"[]", b"{}", b"\xff", b"[" * 5000, b'{"arrays": [["a", "|O", [1]]], "facts": {}}',
        b'{"arrays": [["a", "<f4", [-1]]], "facts": {}}', b'{"arrays": [["a", "<f4", [9999999]]], "facts": {}}',
        b'{"arrays": [["a", "what", [1]]], "facts": {}}', b'{"arrays": [], "facts": 3}', b'{"arrays": 3, "facts": {}}',
    ],
)  # fmt: skip
def test_a_record_with_a_right_checksum_and_a_wrong_header_is_refused(header):
    body = struct.pack("<I", len(header)) + header + bytes(8)
    with pytest.raises(DataError, match="r is corrupt"):
        unpack_record(b"MSR1" + struct.pack("<I", zlib.crc32(body)) + body, "r")

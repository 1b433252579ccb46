"""Every kind of source gives the same clips, loses none without a word, and pickles into little."""

import csv
import io
import json
import pickle
import random
import sys
import tarfile
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from needs import needs
from PIL import Image

from minisora_jax.curation.prepare import prepare
from minisora_jax.io.filesystem import expand_braces, find
from minisora_jax.media.video import VideoError
from minisora_jax.media.video_writer import write_video
from minisora_jax.sources.base import Media, header
from minisora_jax.sources.clips import Records
from minisora_jax.sources.skips import BadClip, SkipReport
from minisora_jax.sources.spec import open_source, split_options
from minisora_jax.sources.webdataset import Tars, members

CAPTIONS = {"a.mp4": "noise moves", "b.gif": "more noise — 猫", "c.png": "a photo of noise", "d.webm": "noise in time"}


def noise(T, H, W, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (T, H, W, 3), dtype=np.uint8)


def put(tar, name, data, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data), kind
    tar.addfile(info, io.BytesIO(data))


def write_tar(path, files, format=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in files.items():
            put(tar, name, data)
    return path


def write_parquet(path, files, captions, **options):
    """As `datasets` 5.2 writes `Video` and `Value("string")`: the struct, and its note of the features."""
    features = {"video": {"_type": "Video"}, "caption": {"dtype": "string", "_type": "Value"}}
    rows = [{"bytes": data, "path": name} for name, data in files.items()]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({"video": pa.array(rows, kind), "caption": pa.array(captions, pa.string())})
    note = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(note), path, **options)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{name: bytes} of four clips."""
    folder = tmp_path_factory.mktemp("files")
    write_video(folder / "a.mp4", noise(9, 32, 48), 25)
    write_video(folder / "b.gif", noise(5, 24, 16), 10)
    Image.fromarray(noise(1, 16, 24)[0]).save(folder / "c.png")
    write_video(folder / "d.webm", noise(5, 16, 32), 30000 / 1001)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def samples(files):
    """Those with a caption file each, as in a folder or a webdataset."""
    texts = {name.rpartition(".")[0] + ".txt": text.encode() for name, text in CAPTIONS.items()}
    return dict(sorted({**files, **texts}.items()))


@pytest.fixture(scope="module")
def folder(samples, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    for name, data in samples.items():
        (folder / name).write_bytes(data)
    return folder


def bytes_of(out):
    return {p.name: p.read_bytes() for p in sorted(out.iterdir()) if p.name not in ("manifest.json", "report.html")}


@pytest.fixture(scope="module")
def wanted(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("wanted")
    prepare(folder, out)
    return bytes_of(out)


def media_of(source):
    return {m.name: m for m in (source[i] for i in range(len(source)))}


def skipped(source):
    return {row["name"]: row["reason"] for row in source.report.skipped}


# ---- The same clips through every kind


def tar(folder, files, samples, top):
    return write_tar(top / "clips.tar", samples)


def tar_with_json(folder, files, samples, top):
    """As video2dataset writes, with members far from their captions."""
    captions = {
        f"{name.split('.')[0]}.json": json.dumps({"caption": text, "key": "0"}) for name, text in CAPTIONS.items()
    }
    return write_tar(top / "clips.tar", {**files, **{n: t.encode() for n, t in captions.items()}}, tarfile.GNU_FORMAT)


def parquet(folder, files, samples, top):
    return write_parquet(top / "clips.parquet", files, list(CAPTIONS.values()), row_group_size=3)


def parquet_folder(folder, files, samples, top):
    (top / "data").mkdir()
    parquet(folder, files, samples, top / "data").rename(top / "data/train-00000-of-00001.parquet")
    (top / "README.md").write_text("---\nconfigs:\n")
    return top


def parquet_of_datasets(folder, files, samples, top):
    datasets = needs("datasets")

    rows = {"media": [{"bytes": d, "path": n} for n, d in files.items()], "text": list(CAPTIONS.values())}
    features = datasets.Features({"media": datasets.Video(decode=False), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(top / "0.parquet"))
    return top / "0.parquet"


def binary_parquet(folder, files, samples, top):
    columns = {"id": [*range(4)], "clip": pa.array(files.values(), pa.large_binary()), "title": [*CAPTIONS.values()]}
    pq.write_table(pa.table(columns | {"url": ["x"] * 4}), top / "x.parquet")
    return f"{top}/x.parquet?caption=title"


def videofolder(folder, files, samples, top):
    for name, data in files.items():
        (top / name).write_bytes(data)
    rows = [json.dumps({"file_name": name, "text": text, "n": 1}) for name, text in CAPTIONS.items()]
    (top / "metadata.jsonl").write_text("\n".join(rows))
    return top


def imagefolder_csv(folder, files, samples, top):
    for name, data in files.items():
        (top / name).write_bytes(data)
    with open(top / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file_name", "caption"), *CAPTIONS.items()])
    return top


def remote_folder(folder, files, samples, top):
    return put_remote(f"memory://{top.parent.name}", samples)


def remote_tar(folder, files, samples, top):
    path = write_tar(top / "clips.tar", samples)
    return put_remote(f"memory://{top.parent.name}", {"clips.tar": path.read_bytes()}) + "/*.tar"


def remote_parquet(folder, files, samples, top):
    path = parquet(folder, files, samples, top)
    return put_remote(f"memory://{top.parent.name}", {"data/train.parquet": path.read_bytes()})


def put_remote(url, files):
    import fsspec

    fs, path = fsspec.core.url_to_fs(url)
    for name, data in files.items():
        fs.pipe_file(f"{path}/{name}", data)
    return url


KINDS = [tar, tar_with_json, parquet, parquet_folder, parquet_of_datasets, binary_parquet, videofolder, imagefolder_csv]
KINDS += [remote_folder, remote_tar, remote_parquet]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_source_gives_the_same_prepared_bytes(kind, folder, files, samples, wanted, tmp_path):
    (tmp_path / "in").mkdir()
    spec = kind(folder, files, samples, tmp_path / "in")
    source = open_source(spec)
    if kind is binary_parquet:  # it has no names
        assert list(media_of(source)) == [f"{i:08d}" for i in range(4)]
        assert {m.caption: m.data for m in media_of(source).values()} == {CAPTIONS[n]: d for n, d in files.items()}
        return
    assert source.report.skipped == []
    report = prepare(spec, tmp_path / "out")
    assert report.kept == 4 and bytes_of(tmp_path / "out") == wanted
    again = pickle.loads(pickle.dumps(source))
    assert again.identity == source.identity == open_source(spec).identity
    for i in (3, 0, 2, 2, 1):  # in any order
        assert again[i] == source[i]
    assert len(pickle.dumps(source)) < 1500
    with pytest.raises(IndexError):
        source[4]


# ---- Several files


def test_shards_give_their_names_and_only_those_read_are_indexed_again(files, tmp_path, monkeypatch):
    for n in range(5):
        write_tar(tmp_path / f"train-{n:03d}.tar", {"a.mp4": files["a.mp4"], "a.txt": b"shard %d" % n})
    source = open_source(tmp_path / "train-{000..004}.tar")
    assert [source[i].name for i in range(5)] == [f"train-00{n}/a.mp4" for n in range(5)]
    assert [source[i].caption for i in range(5)] == [f"shard {n}" for n in range(5)]
    assert open_source(tmp_path / "train-*.tar").identity == source.identity
    assert open_source(tmp_path / "train-{000..003}.tar").identity != source.identity
    worker, indexed = pickle.loads(pickle.dumps(source)), []
    index = Tars.index
    monkeypatch.setattr(Tars, "index", lambda self, file, report: indexed.append(file.url) or index(self, file, report))
    assert worker[3].caption == worker[3].caption == "shard 3"
    assert indexed == [str(tmp_path / "train-003.tar")]
    with pytest.raises(FileNotFoundError, match=r"there is no file .*train-005.tar, .*train-007.tar, and 2 more"):
        open_source(tmp_path / "train-{003..009}.tar")


def test_a_shard_that_changes_is_noticed(files, tmp_path):
    write_tar(tmp_path / "x.tar", {"a.mp4": files["a.mp4"], "a.txt": b"one"})
    pickled = pickle.dumps(open_source(tmp_path / "x.tar"))
    write_tar(tmp_path / "x.tar", {"a.mp4": files["a.mp4"], "a.txt": b"two"})
    with pytest.raises(RuntimeError, match="x.tar has changed since this run began"):
        pickle.loads(pickled)[0]


def test_sources_together(folder, files, samples, tmp_path):
    spec = f"{folder} + {tar(folder, files, samples, tmp_path)} + shapes:train:3"
    source = open_source(spec)
    assert len(source) == 11 and len(media_of(source)) == 11
    assert source[0].name == f"{folder.name}/a.mp4" and source[4].name == "clips.tar/a.mp4"
    assert source[10].data.shape[-1] == 3 and source[10].fps
    assert pickle.loads(pickle.dumps(source))[5] == source[5]
    twice = open_source(f"{folder} + {folder}")
    assert [twice[i].name for i in (0, 4)] == [f"{folder.name}/a.mp4", f"{folder.name}-2/a.mp4"]


def test_what_prepare_wrote_is_a_source_again(folder, tmp_path):
    (tmp_path / "in").mkdir()
    prepare(folder, tmp_path / "first")
    source = open_source(tmp_path / "first")
    assert [source[i].caption for i in range(4)] == list(CAPTIONS.values())
    prepare(tmp_path / "first", tmp_path / "second", cell=16)
    for one, two in zip(Records(tmp_path / "first"), Records(tmp_path / "second"), strict=True):
        assert (one.name, one.caption, one.fps) == (two.name, two.caption, two.fps)
        assert two.frames_THWC.shape[1] % 16 == 0 and len(one.frames_THWC) == len(two.frames_THWC)
    assert pickle.loads(pickle.dumps(source))[1].name == "b.gif"
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/x.png").write_bytes((folder / "c.png").read_bytes())
    prepare(tmp_path / "bare", tmp_path / "third", need_caption=False)
    assert skipped(open_source(tmp_path / "third")) == {"record 0": "no caption"}
    assert len(open_source(tmp_path / "third", need_caption=False)) == 1


# ---- Bad tars


def test_bad_members_are_named_and_the_good_ones_kept(files, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        put(tar, "./good.mp4", files["a.mp4"])
        put(tar, "good.mp4", b"again")
        put(tar, "mute.mp4", files["a.mp4"])
        put(tar, "bad.png", b"not an image")
        put(tar, "latin.mp4", files["a.mp4"])
        put(tar, "link.mp4", b"", tarfile.SYMTYPE)
        put(tar, "._good.mp4", b"a Mac's")
        put(tar, "notes.md", b"?")
        put(tar, "orphan.txt", b"?")
        put(tar, "nokey.mp4", files["a.mp4"])
        put(tar, "empty.mp4", b"")
        put(tar, "sub/clip.front.mp4", files["a.mp4"])
        put(tar, "bytes-\udcff.mp4", b"?")
        for name, text in {"good.txt": b"yes", "bad.txt": b"yes", "latin.txt": "é".encode("latin-1")}.items():
            put(tar, name, text)
        put(tar, "nokey.json", b'{"title": "no"}')
        put(tar, "empty.json", b'{"text": "no bytes"}')
        put(tar, "sub/clip.txt", b"a sample's name ends at the first dot")
    source = open_source(tmp_path / "x.tar")
    assert {m.name: m.caption for m in media_of(source).values()} == {
        "good.mp4": "yes",
        "bad.png": "yes",
        "empty.mp4": "no bytes",
        "sub/clip.front.mp4": "a sample's name ends at the first dot",
    }
    assert skipped(source) == {
        "good.mp4": "duplicate name",
        "mute.mp4": "no caption",
        "latin.mp4": "caption not UTF-8",
        "link.mp4": "not a plain file",
        "notes.md": "unknown suffix",
        "orphan.txt": "caption without a clip",
        "nokey.mp4": "no caption",
        "bytes-\\udcff.mp4": "name not UTF-8",
    }
    assert "has none of caption, text" in next(r["detail"] for r in source.report.skipped if r["name"] == "nokey.mp4")
    with pytest.raises(BadClip, match="no caption|duplicate name|not a plain file"):
        open_source(tmp_path / "x.tar", strict=True)
    report = prepare(tmp_path / "x.tar", tmp_path / "out")
    assert report.kept == 2 and len(report.skipped) == 10
    assert len(open_source(tmp_path / "x.tar", need_caption=False)) == 6


def test_a_cut_tar_keeps_what_is_whole(files, samples, tmp_path):
    path = write_tar(tmp_path / "x.tar", samples)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        places = {m.name: (m.offset_data, m.size) for m in tar}
    for name, (start, size) in places.items():
        path.write_bytes(whole[: start + size // 2])
        source = open_source(path, need_caption=False)
        before = [n for n in CAPTIONS if places[n][0] < start]
        assert list(media_of(source)) == before
        assert all(media_of(source)[n].data == files[n] for n in before)
        assert skipped(source)[name] == "truncated"
    path.write_bytes(whole[: places["b.txt"][0] - 512])  # between two members
    assert skipped(open_source(path)) == {str(path): "damaged tar", "b.gif": "no caption"}
    damaged = bytearray(whole)
    damaged[places["c.png"][0] - 512 :][:512] = b"x" * 512  # no effect: a slice is a copy
    damaged[places["c.png"][0] - 512 : places["c.png"][0]] = b"x" * 512
    path.write_bytes(damaged)
    source = open_source(path)
    assert list(media_of(source)) == ["a.mp4", "b.gif"] and skipped(source) == {str(path): "damaged tar"}
    detail = source.report.skipped[0]["detail"]
    assert f"up to byte {places['c.png'][0] - 512}; {len(whole) - places['c.png'][0] + 512} bytes are left" in detail


@pytest.mark.parametrize(
    "data, reason", [(b"", "damaged tar"), (b"text\n" * 999, "damaged tar"), (b"\x1f\x8b123", "compressed tar")]
)
def test_what_is_no_tar_is_reported(data, reason, tmp_path):
    (tmp_path / "x.tar").write_bytes(data)
    source = open_source(tmp_path / "x.tar")
    assert len(source) == 0 and skipped(source) == {str(tmp_path / "x.tar"): reason}


NAMES = st.text(st.sampled_from("ab./ -é"), min_size=1, max_size=6).map(
    lambda s: str(PurePosixPath(s.strip("/ ") or "a"))
)  # a//b is a/b
MEMBER = st.tuples(NAMES, st.sampled_from([".mp4", ".jpg", ".txt", ".json", ".front.mp4", "", ".MP4"]))


@given(st.lists(MEMBER, max_size=8), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_grouping_finds_every_caption_in_any_order_and_accounts_for_every_member(names, random):
    """Against webdataset's rule, written out: key up to the first dot of the base name, with the own stem first."""
    files = {a + b: (b'{"caption": "%d"}' if b == ".json" else b"%d") % i for i, (a, b) in enumerate(names)}
    order = list(files)
    random.shuffle(order)
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name in order:
            put(tar, name, files[name])
    found, report = scan_bytes(data.getvalue())
    shown = {n.removeprefix("./"): d for n, d in files.items()}
    shown = {n: d for n, d in shown.items() if not any(p.startswith(".") and p.strip(".") for p in n.split("/"))}
    reported = {row["name"] for row in report.skipped}
    used = set()
    for name in shown:
        if name.lower().endswith((".mp4", ".jpg")):
            base = name.rpartition("/")[0] + "/" * ("/" in name) + name.rpartition("/")[2].split(".")[0]
            beside = [stem + suffix for suffix in (".txt", ".json") for stem in (name.rpartition(".")[0], base)]
            beside = [other for other in beside if other in shown]
            used |= set(beside)
            if beside:
                text = shown[beside[0]]
                assert found[name] == (json.loads(text)["caption"] if beside[0].endswith("json") else text.decode())
            else:
                assert name in reported and name not in found
    assert set(found) | reported | used >= set(shown)


def scan_bytes(data):
    """({name: caption}, report) of a tar in memory."""
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        file.write(data)
        file.flush()
        report = SkipReport()
        [found] = find(file.name)
        tars = Tars.__new__(Tars)
        tars.need_caption = True
        return {name: caption for name, caption, *_ in tars.index(found, report)}, report


@given(st.integers(0, 2**32), st.integers(1, 30), st.booleans())
@settings(max_examples=150, deadline=None)
@example(seed=0, count=1, cut=True)
def test_a_fuzzed_tar_gives_members_within_the_file_and_no_error(seed, count, cut):
    random_ = random.Random(seed)
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=random_.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])) as tar:
        for n in range(3):
            put(tar, f"{'long/' * random_.choice([1, 40])}é{n}.mp4", bytes(random_.randrange(2000)))
            put(tar, f"{n}.txt", b"words")
    data = bytearray(data.getvalue())
    for _ in range(count):
        data[random_.randrange(len(data))] = random_.randrange(256)
    if cut:
        del data[random_.randrange(len(data)) :]
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        file.write(data)
        file.flush()
        [found] = find(file.name)
        with found.open() as opened:
            places = members(opened, found, SkipReport())
        assert all(0 <= start and start + size <= len(data) for start, size in places.values())
        open_source(file.name)


# ---- Bad parquet


def test_bad_rows_are_named_and_the_good_ones_kept(files, tmp_path):
    rows = {"a.mp4": files["a.mp4"], "b.gif": None, "c.png": files["c.png"], "d.webm": b"no video"}
    path = write_parquet(tmp_path / "x.parquet", rows, ["one", "two", None, "four"], row_group_size=2)
    source = open_source(path)
    assert list(media_of(source)) == ["a.mp4", "b.gif", "d.webm"] and skipped(source) == {"c.png": "no caption"}
    assert isinstance(source[1].data, VideoError) and source[1].data.reason == "no bytes"
    report = prepare(path, tmp_path / "out")
    assert report.kept == 1
    assert report.counts == {"no caption": 1, "no bytes": 1, "not a video": 1}


def test_names_that_come_twice_get_their_row(files, tmp_path):
    table = pq.read_table(write_parquet(tmp_path / "x.parquet", {"v/a.mp4": files["a.mp4"]}, ["one"]))
    pq.write_table(pa.concat_tables([table, table]), tmp_path / "x.parquet")
    assert list(media_of(open_source(tmp_path / "x.parquet"))) == ["a.mp4", "a.mp4#1"]


def test_damaged_parquet_is_named(files, tmp_path):
    good = write_parquet(tmp_path / "a.parquet", files, list(CAPTIONS.values()), row_group_size=2)
    whole = good.read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    place = pq.ParquetFile(good).metadata.row_group(1).column(0).data_page_offset  # of the second group's bytes
    broken = bytearray(whole)
    broken[place : place + 40] = b"\xff" * 40
    (tmp_path / "c.parquet").write_bytes(broken)
    source = open_source(tmp_path / "*.parquet")
    assert skipped(source) == {str(tmp_path / "b.parquet"): "unreadable file"}
    reasons = {m.name: m.data.reason for m in media_of(source).values() if isinstance(m.data, VideoError)}
    assert reasons == {"c/c.png": "corrupt row group", "c/d.webm": "corrupt row group"}
    assert source[0].data == files["a.mp4"], "what comes after damage is read as ever"
    (tmp_path / "c.parquet").unlink()
    assert prepare(tmp_path / "*.parquet", tmp_path / "out").kept == 4


def test_a_row_group_is_read_as_a_stream(tmp_path):
    big = {f"{i}.mp4": np.random.default_rng(i).bytes(2**20) for i in range(24)}
    write_parquet(tmp_path / "x.parquet", big, ["words"] * 24, write_batch_size=1)  # a page a row
    assert pq.ParquetFile(tmp_path / "x.parquet").num_row_groups == 1
    source = open_source(tmp_path / "x.parquet")
    pool = pa.default_memory_pool()
    before, most = pool.bytes_allocated(), 0
    for i in range(24):
        assert source[i].data == big[f"{i}.mp4"]
        most = max(most, pool.bytes_allocated() - before)
    assert most < 2**23, f"{most} bytes of a group of 24 MiB"


@pytest.mark.parametrize(
    "columns, spec, message",
    [
        ({"n": [1]}, "", "has no columns that may be its media; name it by '?media=COLUMN'"),
        ({"one": [b"1"], "two": [b"2"], "text": ["t"]}, "", "has 2 columns that may be its media: one, two"),
        ({"clip": [b"1"], "x": ["t"], "y": ["t"]}, "", "has 2 columns that may be its caption: x, y; name it"),
        ({"clip": [b"1"], "x": ["t"]}, "?caption=z", "has no column 'z' for .*its columns are clip, x"),
        ({"clip": [b"1"], "x": ["t"]}, "?color=z", "color is no option of a source; those are media, caption"),
    ],
)
def test_columns_that_leave_a_choice_are_asked_for(columns, spec, message, tmp_path):
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        open_source(f"{tmp_path}/x.parquet{spec}")


def test_classes_are_the_names_of_folders(files, tmp_path):
    """In a folder and in a tar, whatever lies beside the clips; a pickle keeps it, and its identity is its own."""
    inside = {"cats/a.mp4": files["a.mp4"], "dogs/deep/c.png": files["c.png"], "d.webm": files["d.webm"]}
    inside["cats/a.txt"] = b"a caption that is no class"
    for name, data in inside.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(data)
    write_tar(tmp_path / "x.tar", inside)
    for spec in (tmp_path / "folder", tmp_path / "x.tar"):
        source = open_source(f"{spec}?caption=folder")
        captions = {name: media.caption for name, media in media_of(pickle.loads(pickle.dumps(source))).items()}
        assert captions == {"cats/a.mp4": "cats", "dogs/deep/c.png": "dogs"}
        assert skipped(source) == {"d.webm": "no class"}
        assert source.identity != open_source(spec).identity
        with pytest.raises(ValueError, match=r"'\?caption=title' must be '\?caption=folder'"):
            open_source(f"{spec}?caption=title")


def test_classes_of_datasets_are_named(files, tmp_path):
    """The ClassLabel of `datasets` is a number, whose name is in the metadata. Plain numbers are their own names."""
    rows = [{"bytes": files["c.png"], "path": f"{i}.png"} for i in range(3)]
    table = pa.table({"image": rows, "label": pa.array([1, 0, 7]), "n": pa.array([1, 0, 7])})
    label = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    note = {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": label}}})}
    pq.write_table(table.replace_schema_metadata(note), tmp_path / "x.parquet")
    source = open_source(tmp_path / "x.parquet")
    assert [source[i].caption for i in range(len(source))] == ["dog", "cat"]
    assert skipped(source) == {"2.png": "no caption"}
    source = open_source(f"{tmp_path / 'x.parquet'}?caption=n")
    assert [source[i].caption for i in range(3)] == ["1", "0", "7"]


def test_splits_of_a_directory_must_be_chosen(files, tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}-00000-of-00001.parquet", files, list(CAPTIONS.values()))
    with pytest.raises(ValueError, match="has the splits test, train: name the files of one"):
        open_source(tmp_path)
    assert len(open_source(tmp_path / "train-*.parquet")) == 4


# ---- Spellings


def test_braces_and_options():
    assert list(expand_braces("a-{08..10}{x,y}.tar"))[1:3] == ["a-08y.tar", "a-09x.tar"]
    assert list(expand_braces("{9..11}")) == ["9", "10", "11"] and list(expand_braces("a{b}c{}")) == ["a{b}c{}"]
    assert split_options("gs://b/*.tar") == ("gs://b/*.tar", {})
    assert split_options("x?.parquet?caption=long text&media=v") == (
        "x?.parquet",
        {"caption": "long text", "media": "v"},
    )


def test_paths_may_be_relative_odd_and_links(folder, samples, tmp_path, monkeypatch):
    (tmp_path / "a::b [1]").mkdir()
    write_tar(tmp_path / "a::b [1]/x{y}.tar", samples)
    (tmp_path / "link.tar").symlink_to(tmp_path / "a::b [1]/x{y}.tar")
    (tmp_path / "folder").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    for spec in ("a::b [1]/x{y}.tar", "link.tar", "lin?.tar", "folder", "./folder/"):
        again = pickle.loads(pickle.dumps(open_source(spec)))
        monkeypatch.chdir("/")
        assert [media.caption for media in media_of(again).values()] == list(CAPTIONS.values())
        monkeypatch.chdir(tmp_path)


def test_what_cannot_be_opened_says_why(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="is not a folder of clips, nor one of the other sources"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="there is no file .*x.tar"):
        open_source(tmp_path / "x.tar")
    with pytest.raises(ValueError, match="gs://, s3://, hf:// and https:// are known"):
        open_source("ftpx://host/x.tar")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ImportError, match=r"uv sync --extra cloud"):
        open_source("gs://bucket/x.tar")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"uv sync --extra tfds"):
        open_source("tfds:x:train")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "x.parquet").touch()
    with pytest.raises(ImportError, match=r"uv sync --extra hf"):
        open_source(tmp_path / "x.parquet")


def test_a_clip_that_could_not_be_read_says_why_at_its_first_stage():
    with pytest.raises(VideoError, match="no bytes: row 3"):
        header(Media("a", "b", VideoError("no bytes", "row 3")))

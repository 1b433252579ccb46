"""Model files that are damaged or made to harm: each is refused with a sentence, before anything is allocated."""

import json
import pickle
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from torch_files import call, dict_of, name_of, number, save_torch, storage, tensor, text, tuple_of, write_torch

from minisora_jax.io.safetensors import read_tensors
from minisora_jax.weights.checkpoint import Checkpoint, WeightsFileError
from minisora_jax.weights.torch_pickle import Placeholder, read_pickle

FOUR = {"0": np.arange(4, dtype=np.float32).tobytes()}
ONE = dict_of({"w": tensor("0", 4, [4])})


def refused(path, words):
    with pytest.raises(WeightsFileError, match=words):
        Checkpoint(path)


def test_what_torch_writes_is_read(tmp_path):
    """The writer of these tests agrees with torch's own file, which tests/test_checkpoint.py reads."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    file = Checkpoint(save_torch(tmp_path / "m.pt", {"w": array, "none": np.zeros((0, 3))}))
    np.testing.assert_array_equal(file.read("w"), array)
    assert file.read("none").shape == (0, 3)


@pytest.mark.parametrize(
    "place, words",
    [
        (dict(shape=[5]), "leaves its storage of 4 numbers"),
        (dict(shape=[4], offset=1), "leaves its storage"),
        (dict(shape=[2, 2], stride=[3, 1]), "leaves its storage"),
        (dict(shape=[2], stride=[2**40]), "leaves its storage"),
        (dict(shape=[4], offset=2**61), "leaves its storage"),
        (dict(shape=[2**40], stride=[0]), "leaves its storage"),
        (dict(shape=[3, 3], stride=[1, 0]), "leaves its storage"),
        (dict(shape=[2], stride=[-1], offset=1), "negative or no number"),
        (dict(shape=[4], offset=-1), "negative or no number"),
        (dict(shape=[-4]), "negative or no number"),
        (dict(shape=[4], stride=[1, 1]), "place in its storage"),
        (dict(shape=[0], offset=9), "leaves its storage"),
        (dict(shape=[2**70]), "negative or no number"),
        (dict(shape=[8], length=8), "has 16 bytes, not those of 8 numbers"),
        (dict(shape=[4], key="1"), "the storage 1 of w is missing"),
        (dict(shape=[2], length=2, kind="ComplexDoubleStorage"), "ComplexDoubleStorage, which is not read"),
    ],
)
def test_a_tensor_that_leaves_its_storage(place, words, tmp_path):
    tree = dict_of({"w": tensor(**dict(key="0", length=4) | place)})
    refused(write_torch(tmp_path / "m.pt", tree, FOUR), words)


UNKNOWN = {
    "a namespace": call("argparse", "Namespace") + dict_of({"lr": number(1)}) + b"b",
    "a class": name_of("pytorch_lightning.callbacks", "ModelCheckpoint")
    + b")\x81"
    + dict_of({"best": number(1)})
    + b"b",
    "a call": call("posix", "system", text("exit 3")),
    "a call of a call": call("posix", "system", call("builtins", "eval", text("1/0"))),
    "numbers of numpy": pickle.dumps(np.float64(3), 2)[2:-1],
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_unknown_objects_are_inert(what, tmp_path, capfd):
    array = np.arange(4, dtype=np.float32)
    around = lambda tree: b"}(" + text("args") + UNKNOWN[what] + text("model") + tree + b"u"
    np.testing.assert_array_equal(Checkpoint(save_torch(tmp_path / "m.pt", {"w": array}, around)).read("w"), array)
    assert capfd.readouterr() == ("", "")


def test_a_build_alters_nothing(tmp_path):
    """BUILD sets attributes of what lies on the stack: here of functions, of a tensor, of a storage."""
    state = tuple_of(b"N", dict_of({"shape": tuple_of(number(99)), "__call__": number(1), "length": number(99)})) + b"b"
    builds = b"".join(
        piece + state + b"0"  # and off the stack
        for piece in (
            name_of("torch._utils", "_rebuild_tensor_v2"),
            name_of("collections", "OrderedDict"),
            name_of("torch", "FloatStorage"),
            storage("0", 4),
            tensor("0", 4, [4]),
        )
    )
    tree = builds + dict_of({"w": tensor("0", 4, [4]) + state})
    assert Checkpoint(write_torch(tmp_path / "m.pt", tree, FOUR)).read("w").shape == (4,)
    array = np.ones(3, np.float32)
    assert Checkpoint(save_torch(tmp_path / "n.pt", {"w": array})).shape("w") == (3,)
    assert not hasattr(Placeholder, "shape")


def test_a_tree_that_contains_itself_ends(tmp_path):
    for key in ("model", "state_dict"):  # {"model": itself}, and through a second dictionary
        itself = b"}q\x00" + text(key) + b"h\x00s"
        refused(write_torch(tmp_path / "m.pt", itself, {}), "holds no tensors by name")
    both = b"}q\x00" + text("model") + b"}q\x01" + text("ema") + b"h\x00ss"
    refused(write_torch(tmp_path / "m.pt", both, {}), "holds no tensors by name")
    found = b"}q\x00(" + text("model") + b"h\x00" + text("w") + tensor("0", 4, [4]) + b"u"
    assert Checkpoint(write_torch(tmp_path / "m.pt", found, FOUR)).names == ["w"]


DAMAGED = {
    "no end": b"}" * 3,
    "a step of no pickle": b"\xff",
    "text beyond the end": b"X\xff\xff\xff\x7fx",
    "bytes beyond the end": b"\x8e" + b"\xff" * 7 + b"\x7f",
    "an empty stack": b"u",
    "a memo never put": b"h\x07",
    "a key without a value": b"}(" + text("w") + b"u",
    "an unknown storage": tuple_of(text("module"), text("x")) + b"Q",
    "no storage": call("torch._utils", "_rebuild_tensor_v2", number(1), number(0), tuple_of(), tuple_of()),
    "a call within calls": b"".join(
        name_of("torch._tensor", "_rebuild_from_type_v2")
        + b"("
        + name_of("torch._tensor", "_rebuild_from_type_v2")
        + b"N"
        for _ in range(3000)
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_pickle(what, tmp_path):
    refused(write_torch(tmp_path / "m.pt", DAMAGED[what], {}), "damaged|holds no tensors")


def old_torch(tree=ONE, version=1001, facts=None, keys=None, storages=((4, FOUR["0"]),), tail=b""):
    """A file of torch before 1.6, whose storages have a length each."""
    facts = {"little_endian": True} if facts is None else facts
    plain = (pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, version, facts))
    data = b"".join(count.to_bytes(8, "little") + numbers for count, numbers in storages)
    return b"".join(plain) + b"\x80\x02" + tree + b"." + pickle.dumps(["0"] if keys is None else keys, 2) + data + tail


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(version=1002), "unknown torch"),
        (dict(facts={"little_endian": False}), "big-endian machine"),
        (dict(facts=[]), "big-endian machine"),
        (dict(keys={"0": 1}), "no list of its storages"),
        (dict(keys=[0]), "no list of its storages"),
        (dict(keys=["0", "0"]), "no tensor has the storage 0"),
        (dict(keys=["1"]), "no tensor has the storage 1"),
        (dict(keys=[]), "bytes follow its last storage"),
        (dict(storages=[(2**61, FOUR["0"])]), "cut short or damaged: the storage 0 of 9,223,372,036,854,775,808 bytes"),
        (dict(storages=[(5, FOUR["0"])]), "cut short or damaged"),
        (dict(storages=[(3, FOUR["0"][:12])]), "has 12 bytes, not those of 4 numbers"),
        (dict(storages=[]), "cut short or damaged|missing"),
        (dict(tail=b"x"), "1 bytes follow its last storage"),
        (dict(tree=dict_of({"w": tensor("0", 4, [5])})), "leaves its storage of 4 numbers"),
        (dict(tree=dict_of({"v": tensor("0", 4, [4]), "w": tensor("0", 9, [9])})), "has two types or lengths"),
        (dict(tree=b"}("), "a pickle in it is damaged"),
    ],
)
def test_an_old_torch_file_that_lies(change, words, tmp_path):
    (tmp_path / "m.pth").write_bytes(old_torch())
    np.testing.assert_array_equal(Checkpoint(tmp_path / "m.pth").read("w"), np.arange(4))
    (tmp_path / "m.pth").write_bytes(old_torch(**change))
    refused(tmp_path / "m.pth", words)


def test_a_deep_tree_takes_no_stack(monkeypatch):
    deep = b"(" * 100_000 + b"t" * 100_000
    read_pickle(b"\x80\x02" + deep + b".")
    monkeypatch.setattr("minisora_jax.weights.torch_pickle.MOST_STEPS", 100)
    with pytest.raises(ValueError, match="more than 100 steps"):
        read_pickle(b"]0" * 60 + b".")


def test_a_memo_of_a_far_place_takes_no_memory():
    code = (
        "import resource; from minisora_jax.weights.torch_pickle import read_pickle;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "read_pickle(b'}r' + b'\\xff\\xff\\xff\\x7f' + b'.');"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) < 50_000  # KiB; the index is 2^31


def test_a_file_that_inflates(tmp_path):
    tree = dict_of({"w": tensor("0", 2**26, [2**26])})
    path = write_torch(tmp_path / "m.pt", tree, {"0": bytes(2**28)}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**19
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path, "is compressed, which torch never does")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_members_that_overlap(tmp_path):
    """One storage of 1 MB that a thousand members share: 1 GB in a file of 1 MB."""
    path = write_torch(tmp_path / "m.pt", ONE, {"0": bytes(2**20)})
    data = path.read_bytes()
    directory = data.index(b"PK\x01\x02")
    end = data.index(b"PK\x05\x06")
    last = data.index(b"PK\x01\x02", directory + 4)  # that of the storage
    entries = data[directory:end] + data[last:end] * 1000
    count = (1002).to_bytes(2, "little")
    tail = data[end : end + 8] + count * 2 + len(entries).to_bytes(4, "little") + data[end + 16 :]
    path.write_bytes(data[:directory] + entries + tail)
    refused(path, "two members have one name|overlap")


def test_a_shared_storage_is_fine(tmp_path):
    """Tied weights, and views of one storage, are torch's own."""
    tree = dict_of({"w": tensor("0", 4, [4]), "tied": tensor("0", 4, [4]), "t": tensor("0", 4, [2, 2], [1, 2])})
    file = Checkpoint(write_torch(tmp_path / "m.pt", tree, FOUR))
    np.testing.assert_array_equal(file.read("t"), [[0, 2], [1, 3]])


@pytest.mark.parametrize("at", range(0, 200, 7))
def test_a_flipped_bit_in_a_storage_is_seen(at, tmp_path):
    path = save_torch(tmp_path / "m.pt", {"w": np.zeros(64)})
    data = bytearray(path.read_bytes())
    data[data.index(bytes(256)) + at] ^= 4
    path.write_bytes(data)
    with pytest.raises(WeightsFileError, match="damaged"):
        Checkpoint(path).read("w")


# ---- safetensors


def write_safetensors(path: Path, header: dict | str, data: bytes) -> Path:
    front = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(front).to_bytes(8, "little") + front + data)
    return path


def entry(*place, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(place)}


@pytest.mark.parametrize(
    "header, words",
    [
        ({"a": entry(-4, 0), "b": entry(0, 8, shape=(2,))}, "not made of counts"),
        ({"a": entry(0, 4), "b": entry(2, 6), "c": entry(6, 8, shape=(2,), dtype="U8")}, "overlaps the one before"),
        ({"a": entry(0, 8, shape=(2,)), "b": entry(0, 8, shape=(2,))}, "overlaps the one before"),
        ({"a": entry(4, 8)}, "leaves a hole before it"),
        ({"a": entry(0, 4)}, "it has 77 bytes, its header states 73"),
        ({"a": entry(0, 2**50, shape=(2**48,))}, "its header states"),
        ({"a": entry(0, 8, shape=(-2, -1))}, "not made of counts"),
        ({"a": entry(8, 0, shape=(2,))}, "has -8 bytes"),
        ({"a": entry(0, 8, shape=(2.0,))}, "not made of counts"),
        ({"a": entry(0, 8, shape=(True, 2))}, "not made of counts"),
        ({"a": entry(0, 8, shape=(2**59, 2**59, 0))}, "has 8 bytes"),
        ({"a": entry(0, 8, 8, shape=(2,))}, "not made of counts"),
        ({"a": entry(0, 8, dtype="F4", shape=(16,))}, "a type that is not read"),
        ({"a": entry(0, 8, dtype=["F32"], shape=(2,))}, "whole safetensors"),
        ({"a": [1, 2]}, "whole safetensors"),
        ({"a": {"dtype": "F32"}}, "whole safetensors"),
        ("[1]", "its header is list, not an object of tensors"),
        ("[" * 100_000, "whole safetensors"),
        ('{"a": ' + "9" * 5000 + "}", "whole safetensors"),
        (f'{{"a": {json.dumps(entry(0, 4))}, "a": {json.dumps(entry(4, 8))}}}', "'a' is in the header twice"),
        ('{"\\ud800": 1}', "whole safetensors"),
    ],
)
def test_a_header_that_cannot_be(header, words, tmp_path):
    path = write_safetensors(tmp_path / "m.safetensors", header, bytes(8))
    with pytest.raises(ValueError, match=words):
        read_tensors(path)
    refused(path, "whole safetensors")


def test_a_header_larger_than_any(tmp_path):
    path = tmp_path / "m.safetensors"
    with open(path, "wb") as file:
        file.write((2**30).to_bytes(8, "little") + b"{")
        file.truncate(2**31)
    refused(path, "at most 33554432 are read")


# ---- A sharded checkpoint


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "models--x--y/snapshots/0123"
    folder.mkdir(parents=True)
    save_file({"a": np.ones(2, np.float32)}, folder / "one.safetensors")
    save_file({"b": np.ones(3, np.float32)}, folder / "two.safetensors")

    def write(*names, **more):
        index = {"weight_map": dict(zip("abcdef", names))} | more
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return write


def test_shards_are_read(sharded):
    assert Checkpoint(sharded("one.safetensors", "two.safetensors")).names == ["a", "b"]


@pytest.mark.parametrize(
    "name", ["../one.safetensors", "/etc/hostname", "x/../one.safetensors", "..", "", "a\\b", "\0"]
)
def test_a_shard_outside_the_directory(name, sharded):
    refused(sharded("one.safetensors", name), "not a plain name in its directory")


def test_links_of_the_hubs_cache_are_followed_and_no_others(sharded, tmp_path):
    folder = sharded("one.safetensors", "two.safetensors")
    blobs = folder.parents[1] / "blobs"
    blobs.mkdir()
    (folder / "two.safetensors").rename(blobs / "abc")
    (folder / "two.safetensors").symlink_to("../../blobs/abc")
    assert Checkpoint(folder).names == ["a", "b"]
    (blobs / "abc").rename(tmp_path / "secret")
    (folder / "two.safetensors").unlink()
    (folder / "two.safetensors").symlink_to(tmp_path / "secret")
    refused(folder, "is a link to")


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": 1}', "x", "[" * 99_999]
)
def test_an_index_of_wrong_types(content, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content)
    refused(path, "is no index of a sharded checkpoint")


def test_two_files_of_one_name_are_not_mixed(tmp_path):
    for name in ("model.fp16.safetensors", "model.safetensors"):
        save_file({"a": np.ones(2, np.float32)}, tmp_path / name)
    refused(tmp_path, "a is both in model.fp16.safetensors and in model.safetensors")


def test_a_name_is_shown_on_one_plain_line(tmp_path):
    path = tmp_path / "m.pt"
    write_torch(path, dict_of({"w\x1b[31m\n": tensor("0", 4, [9])}), FOUR)
    with pytest.raises(WeightsFileError) as error:
        Checkpoint(path)
    assert "\x1b" not in str(error.value) and "\n" not in str(error.value)


def test_a_pipe_is_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "is no regular file")


def test_the_fixture_of_torch_is_read_as_before():
    fixtures = Path(__file__).parent / "parity/fixtures"
    file = Checkpoint(fixtures / "nested.pth")
    for name, array in load_file(fixtures / "nested.safetensors").items():
        np.testing.assert_array_equal(file.read(name).astype(np.float32), array)

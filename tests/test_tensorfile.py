"""Safetensors a piece at a time: the library's bytes, whole files or none, and memory of one layer."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from published import import_params
from safetensors import safe_open
from safetensors.numpy import save_file

from minisora_jax.cli import main
from minisora_jax.io.safetensors import DTYPES, LazyArray, read_tensors, write_tensors
from minisora_jax.models.t5 import T5Config, T5Encoder
from minisora_jax.weights import t5
from minisora_jax.weights.checkpoint import Checkpoint
from minisora_jax.weights.presets import TEXT_ENCODERS, TextPreset

RNG = np.random.default_rng(0)


def lazy(array: np.ndarray) -> LazyArray:
    return LazyArray(array.shape, array.dtype, lambda: [array])


def test_the_bytes_are_the_librarys(tmp_path):
    types = [dtype for name, dtype in DTYPES.items() if not name.startswith("F8")]  # which its NumPy side lacks
    arrays = {f"{i} ü/{d.name}": (100 * RNG.standard_normal((3, 1 + i, 2))).astype(d) for i, d in enumerate(types)}
    arrays |= {"scalar": np.array(3, np.float32), "none": np.zeros((0, 4), np.float16)}
    save_file(arrays, tmp_path / "theirs.safetensors")
    # Transposed as they are: parts need not lie in memory as they do in the file.
    ours = {k: LazyArray(a.shape, a.dtype, lambda a=a: [np.asfortranarray(a)]) for k, a in arrays.items()}
    write_tensors(tmp_path / "ours.safetensors", ours)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    stored = read_tensors(tmp_path / "theirs.safetensors")
    with safe_open(tmp_path / "ours.safetensors", framework="numpy") as file:
        assert set(file.keys()) == set(stored) == set(arrays)
        for name, array in arrays.items():
            for read in (file.get_tensor(name), stored[name][...]):
                assert read.dtype == array.dtype and read.shape == array.shape and read.tobytes() == array.tobytes()
            if array.size > 1:
                assert stored[name][-1].tobytes() == array[-1].tobytes()
                assert stored[name][:, 1:].tobytes() == array[:, 1:].tobytes()
                with pytest.raises(IndexError):
                    stored[name][3]


def test_eight_bit_floats_come_back(tmp_path):
    array = RNG.standard_normal((4, 3)).astype(ml_dtypes.float8_e4m3fn)
    write_tensors(tmp_path / "x.safetensors", {"x": lazy(array), "wide": lazy(array).astype("float32")})
    stored = read_tensors(tmp_path / "x.safetensors")
    assert stored["x"][...].tobytes() == array.tobytes() and stored["x"].dtype == array.dtype
    np.testing.assert_array_equal(stored["wide"][...], array.astype(np.float32))


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"x": lazy(np.ones(4))})
    before = path.read_bytes()

    def breaks():
        yield np.ones(2)
        raise OSError("the disk")

    with pytest.raises(OSError, match="the disk"):
        write_tensors(path, {"x": LazyArray((4,), np.dtype(float), breaks)})
    with pytest.raises(ValueError, match=r"x of shape \(4,\) is 32 bytes, its parts are 16"):
        write_tensors(path, {"x": LazyArray((4,), np.dtype(float), lambda: [np.ones(2)])})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "broken", [b"", b"\0" * 7, b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]", b"\x02" + b"\0" * 7 + b"{}x"]
)
def test_other_files_are_refused(broken, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(broken)
    with pytest.raises(ValueError, match="x.safetensors is not a whole safetensors file"):
        read_tensors(tmp_path / "x.safetensors")


def test_an_import_is_what_it_would_be_in_memory(tmp_path, monkeypatch):
    config = T5Config(50, 24, 3, 8, 40, 3, shared_bias=False, dtype="float32")
    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    abstract = jax.eval_shape(T5Encoder(config).init, jax.random.key(0), ids, ids)
    flat = traverse_util.flatten_dict(abstract, sep="/")
    shape = lambda rule: rule.to_theirs(np.zeros(flat[rule.ours].shape[bool(rule.layers) :])).shape
    theirs = {n: RNG.standard_normal(shape(r)).astype(np.float32) for r in t5.rules(config) for n in r.names}
    save_file(theirs, tmp_path / "theirs.safetensors")
    monkeypatch.setitem(TEXT_ENCODERS, "umt5-small", TextPreset("small", config, t5))
    assert main(["import", "umt5-small", str(tmp_path / "theirs.safetensors"), f"--out={tmp_path / 'ours'}"]) == 0
    params = import_params(Checkpoint(tmp_path / "theirs.safetensors"), t5.rules(config), abstract)
    save_file(traverse_util.flatten_dict(params, sep="/"), tmp_path / "in_memory.safetensors")
    assert (tmp_path / "ours/model.safetensors").read_bytes() == (tmp_path / "in_memory.safetensors").read_bytes()


MEASURE = """
import resource, sys
import jax
import numpy as np
from flax import traverse_util
from minisora_jax.cli import main
from minisora_jax.models.t5 import T5Config, T5Encoder
from minisora_jax.io.safetensors import LazyArray, write_tensors
from minisora_jax.weights import t5
from minisora_jax.weights.presets import TEXT_ENCODERS, TextPreset

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def through(depth, directory):
    config = T5Config(50, 512, 8, 64, 1536, depth, shared_bias=False)
    TEXT_ENCODERS["umt5-small"] = TextPreset("small", config, t5)
    ids = jax.ShapeDtypeStruct((1, 4), "int32")
    abstract = jax.eval_shape(T5Encoder(config).init, jax.random.key(0), ids, ids)
    flat = traverse_util.flatten_dict(abstract, sep="/")
    size = lambda rule: rule.to_theirs(np.zeros(flat[rule.ours].shape[bool(rule.layers) :], bool)).shape
    zeros = lambda shape: LazyArray(shape, np.dtype(np.float32), lambda: [np.zeros(shape, np.float32)])
    names = {name: zeros(size(rule)) for rule in t5.rules(config) for name in rule.names}
    write_tensors(f"{directory}/theirs{depth}/model.safetensors", names)
    assert main(["import", "umt5-small", f"{directory}/theirs{depth}", f"--out={directory}/ours{depth}"]) == 0
    assert main(["export", f"{directory}/ours{depth}", f"{directory}/again{depth}"]) == 0
    return sum(t.nbytes for t in names.values()), max(t.nbytes for t in names.values())

through(1, sys.argv[1])  # what the code itself takes
before = peak()
total, largest = through(16, sys.argv[1])
print(total, largest, peak() - before)
"""


@pytest.mark.slow
def test_import_and_export_hold_a_tensor_and_not_the_model(tmp_path):
    out = subprocess.run([sys.executable, "-c", MEASURE, tmp_path], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    total, largest, grown = map(int, out.stdout.split()[-3:])
    print(f"{total / 2**20:.0f} MiB of tensors of up to {largest / 2**20:.1f}: memory grew by {grown / 2**20:.1f}")
    # A stacked leaf is 16 of the largest; a tensor, its transpose and the 16 MiB that are hashed at once are a few.
    assert total > 200 * 2**20 and grown < 12 * largest

"""Torch's own files are read without torch, and run nothing."""

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from minisora_jax.weights.checkpoint import Checkpoint, WeightsFileError

FIXTURES = Path(__file__).parent / "parity/fixtures"
# The same tensors, by torch.save(..., _use_new_zipfile_serialization=False): the format of torchvision's old files
OLD = Path(__file__).parent / "checkpoints/nested_old.pth"


@pytest.mark.parametrize("path", [FIXTURES / "nested.pth", OLD], ids=["torch", "torch before 1.6"])
def test_a_torch_file_is_what_torch_wrote(path):
    file, expected = Checkpoint(path), load_file(FIXTURES / "nested.safetensors")
    assert set(file.names) == set(expected)
    for name, tensor in expected.items():
        read = file.read(name)
        assert read.shape == file.shape(name) == tensor.shape
        np.testing.assert_array_equal(read.astype(np.float32), tensor)
    assert file.read("half").dtype == np.float16 and file.read("brain").dtype.name == "bfloat16"


class Harm:
    def __reduce__(self):
        return os.system, ("echo harm",)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/data.pkl", pickle.dumps({"weight": Harm()}))
    with pytest.raises(WeightsFileError, match="asks for posix.system: only tensors by name are read"):
        Checkpoint(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes((FIXTURES / "nested.pth").read_bytes()[:-200])
    with pytest.raises(WeightsFileError, match="cut short"):
        Checkpoint(path)
    with pytest.raises(WeightsFileError, match="has no checkpoint"):
        Checkpoint(tmp_path / "..")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/data.pkl", pickle.dumps({"epoch": 3}))
    with pytest.raises(WeightsFileError, match="holds no tensors by name: its keys are .'epoch'."):
        Checkpoint(path)

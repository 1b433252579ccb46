"""Planning at full size: a published checkpoint's header gives the parameters that a pod compiles for."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "parity"))
from headers import published, write_header  # noqa: E402
from published import export_params, import_params  # noqa: E402

from minisora_jax.parallel.mesh import MeshConfig, make_mesh  # noqa: E402
from minisora_jax.plan.forward import lower_forward, parameters_on  # noqa: E402
from minisora_jax.weights.checkpoint import Checkpoint, WeightsFileError  # noqa: E402
from minisora_jax.weights.dit import CONFIGS, rules  # noqa: E402

FULL_SIZE = {
    "wan2.1-t2v-1.3b": ("wan", 1_418_996_800),
    "wan2.1-t2v-14b": ("wan", 14_288_491_584),
    "wan2.1-i2v-14b": ("wan", 16_394_878_784),
    "dit-xl-2-256": ("dit", None),
    "pixart-alpha-1024": ("pixart", None),
    "latte-1": ("latte", None),
}
SMALL = dataclasses.replace(
    CONFIGS["wan2.1-t2v-1.3b"], latent_channels=4, width=32, depth=2, heads=2, mlp_ratio=1.25, text_features=16
)


def header(name: str, directory: Path, **changes) -> Checkpoint:
    shapes = published(FULL_SIZE[name][0], name)
    write_header(directory / "full.safetensors", shapes | changes)
    return Checkpoint(directory / "full.safetensors")


def same_leaves(a, b) -> None:
    described = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)
    assert described(a) == described(b)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_header_gives_what_the_plan_compiles(name, tmp_path):
    checkpoint, mesh = header(name, tmp_path), make_mesh(MeshConfig(data=2, fsdp=4))
    planned = parameters_on(CONFIGS[name], mesh, checkpoint)
    same_leaves(planned, parameters_on(CONFIGS[name], mesh))
    leaves = jax.tree.leaves(planned)
    assert all(x.sharding.mesh == mesh and x.dtype == np.float32 for x in leaves)
    total, each = sum(x.size for x in leaves), sum(math.prod(x.sharding.shard_shape(x.shape)) for x in leaves)
    assert total == (FULL_SIZE[name][1] or total)
    assert total / 4 <= each < 1.02 * total / 4  # all but biases and norms is cut
    assert os.stat(tmp_path / "full.safetensors").st_blocks * 512 < 2e6  # nothing but the header is there


def test_the_compiler_gets_the_leaves_of_the_header(tmp_path):
    """The forward pass of Wan 1.3B, compiled for 8 devices from the header, takes every leaf as it is planned."""
    config, mesh = CONFIGS["wan2.1-t2v-1.3b"], make_mesh(MeshConfig(data=1, fsdp=8))
    params, lowered = lower_forward(config, (1, 4, 4), 8, mesh, header("wan2.1-t2v-1.3b", tmp_path))
    taken = jax.tree.map(lambda x: (x.shape, x.dtype), lowered.args_info[0][0])
    assert taken == jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert lowered.compile().input_shardings[0][0] == jax.tree.map(lambda x: x.sharding, params)


def test_importing_onto_the_mesh_gives_the_planned_leaves(tmp_path):
    from safetensors.numpy import save_file

    mesh, rng = make_mesh(MeshConfig(data=2, fsdp=4)), np.random.default_rng(0)
    target = parameters_on(SMALL, mesh)
    ours = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), target)
    save_file(export_params(ours, rules(SMALL)), tmp_path / "small.safetensors")
    checkpoint = Checkpoint(tmp_path / "small.safetensors")
    placed = import_params(checkpoint, rules(SMALL), target)
    same_leaves(placed, parameters_on(SMALL, mesh, checkpoint))
    jax.tree.map(np.testing.assert_array_equal, placed, ours)


def test_a_header_that_does_not_fit_is_refused(tmp_path):
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    wrong = {"blocks.17.ffn.net.2.weight": (1536, 8961)}
    with pytest.raises(WeightsFileError, match=r"blocks.17.ffn.net.2.weight of shape \(1536, 8961\)"):
        parameters_on(CONFIGS["wan2.1-t2v-1.3b"], mesh, header("wan2.1-t2v-1.3b", tmp_path, **wrong))
    with pytest.raises(WeightsFileError, match="missing"):
        parameters_on(CONFIGS["wan2.1-t2v-14b"], mesh, header("wan2.1-t2v-1.3b", tmp_path))


ON_A_TOPOLOGY = """
import json, sys
import jax
from jax.experimental import topologies
from minisora_jax.parallel.mesh import MeshConfig, make_mesh
from minisora_jax.plan.forward import lower_forward, parameters_on
from minisora_jax.weights.checkpoint import Checkpoint
from minisora_jax.weights.dit import CONFIGS
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
mesh, config = make_mesh(MeshConfig(data=1, fsdp=-1), devices), CONFIGS["wan2.1-t2v-1.3b"]
params, lowered = lower_forward(config, (1, 8, 8), 128, mesh, Checkpoint(sys.argv[1]))
leaf = lambda x: (x.shape, x.dtype, x.sharding)
assert jax.tree.map(leaf, params) == jax.tree.map(leaf, parameters_on(config, mesh))
assert lowered.compile().input_shardings[0][0] == jax.tree.map(lambda x: x.sharding, params)
print(json.dumps([len(jax.tree.leaves(params)), mesh.size]))
"""


@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu, the TPU compiler")
def test_a_header_gives_what_is_compiled_for_a_topology(tmp_path):
    header("wan2.1-t2v-1.3b", tmp_path)
    command = [sys.executable, "-c", ON_A_TOPOLOGY, str(tmp_path / "full.safetensors")]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "XLA_FLAGS": "",
    }
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    leaves, chips = json.loads(run.stdout.splitlines()[-1])
    assert leaves > 30 and chips == 4

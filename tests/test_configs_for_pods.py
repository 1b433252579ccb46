"""The configs for pods, built abstractly: they have the sizes they say, and their meshes divide what they train."""

import jax
import numpy as np
import pytest

from minisora_jax.config import load, names
from minisora_jax.models.dit import abstract_params
from minisora_jax.models.vae import VAE
from minisora_jax.parallel.mesh import MeshConfig
from minisora_jax.plan.codec import codec_of
from minisora_jax.plan.hardware import Topology
from minisora_jax.plan.workload import configured_task, parameter_count
from minisora_jax.training.diffusion_task import DiffusionTask

SIZES = {"1b": ("v5e:8x8", 1.07e9), "3b": ("v5p:4x4x4", 2.81e9), "14b": ("v5p:8x8x8", 13.9e9)}
PAPER = {"S": 33e6, "B": 130e6, "L": 458e6, "XL": 675e6}  # of table 1 of the DiT paper, with a modulation per block


def task_of(config: str) -> DiffusionTask:
    return configured_task([f"--config={config}"])


def of_blocks(task: DiffusionTask) -> int:
    """Parameters of the blocks by hand: attention, cross-attention, mlp, their biases, norms, the table of adaLN."""
    D, E, K = task.dit.width, task.dit.text_width, task.dit.width // task.dit.heads
    F = round(D * task.dit.mlp_ratio)
    attention, cross = 4 * (D * D + D) + 2 * K, 2 * (D * D + D) + 2 * (E * D + D) + 2 * K
    return task.dit.depth * (attention + cross + 2 * D * F + F + D + 2 * D + 6 * D)


@pytest.mark.parametrize("stage", ["256px", "480p", "60s"])
@pytest.mark.parametrize("size", SIZES)
def test_t2v(size, stage):
    topology, parameters = SIZES[size]
    task = task_of(f"t2v:size={size},stage={stage},data=data")
    assert abs(parameter_count(task) / parameters - 1) < 0.02
    blocks = sum(x.size for x in jax.tree.leaves(abstract_params(task.dit)["params"]["blocks"]))
    assert blocks == of_blocks(task)
    divides(task, Topology.parse(topology).chips)


@pytest.mark.parametrize("size", PAPER)
def test_dit_256(size):
    task = task_of(f"dit_256:size={size},data=data")
    blocks = sum(x.size for x in jax.tree.leaves(abstract_params(task.dit)["params"]["blocks"]))
    assert blocks == of_blocks(task)
    D = task.dit.width
    own = PAPER[size] - task.dit.depth * 6 * D * D  # one modulation for all blocks here, where the paper has one each
    cross = task.dit.depth * (2 * D * D + 2 * task.dit.text_width * D)  # for captions, where the paper has classes
    assert abs(blocks / (own + cross) - 1) < 0.06
    divides(task, 16)


@pytest.mark.parametrize("size", PAPER)
def test_dit_256_of_classes(size):
    """As the paper's, but for one modulation of all blocks: no cross-attention, and a table of classes."""
    dit = task_of(f"dit_256:size={size},classes=1000,data=data").dit
    params, D, K = abstract_params(dit)["params"], dit.width, dit.width // dit.heads
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert count(params["labels"]) == 1001 * D
    assert count(params["blocks"]) == dit.depth * (12 * D * D + 9 * D + 2 * K + 6 * D)  # qk norms, table of adaLN
    assert abs(count(params) / (PAPER[size] - dit.depth * 6 * D * D) - 1) < 0.09


def test_the_codec_for_pods():
    task = codec_of(None, ["--config=vae_4x8x8:lpips=models/lpips"])
    frames = jax.ShapeDtypeStruct((1, *task.crop_THW, 3), np.float32)
    params = jax.eval_shape(VAE(task.vae).init, jax.eval_shape(lambda: jax.random.key(0)), frames)
    assert sum(x.size for x in jax.tree.leaves(params)) == pytest.approx(100.8e6, rel=1e-3)
    assert task.batch % task.run.mesh.sizes(16)[0] == 0
    assert (task.vae.time_factor, task.vae.space_factor, task.vae.latent_channels) == (4, 8, 16)


def divides(task: DiffusionTask, chips: int) -> None:
    mesh = MeshConfig(*task.run.mesh.sizes(chips))
    assert task.pack.rows % (mesh.data * mesh.fsdp) == 0
    assert task.pack.tokens % (128 * mesh.ring * mesh.ulysses) == 0  # the tiles of splash attention
    assert task.dit.heads % (mesh.ulysses * mesh.tensor) == 0
    assert np.prod([mesh.data, mesh.fsdp, mesh.ring, mesh.ulysses, mesh.tensor]) == chips


def test_what_is_missing_is_named():
    for config, word in (("t2v:data=d,size=2b", "14b"), ("t2v:size=1b", "data=DIR"), ("dit_256:data=d,size=M", "XL")):
        with pytest.raises(ValueError, match=word):
            load(config)


def test_a_config_is_one_short_file():
    import minisora_jax.config as config

    for name in names():
        text = (config._shipped() / f"{name}.py").read_text()
        assert len(text.splitlines()) <= 60, name
        assert "minisora train" in text, name


def test_the_plan_takes_rows_clips_and_mesh_from_the_config(monkeypatch):
    from minisora_jax.cli import main
    from minisora_jax.plan import report

    seen = []
    monkeypatch.setattr(report, "compile_and_print", lambda work, mesh, topology: seen.append((work, mesh)))
    assert main(["plan", "--topology=v5e:8x8", "--config=t2v:data=d,stage=480p", "--clip=16k"]) == 0
    assert (
        main(
            [
                "plan",
                "--topology=v5e:8x8",
                "--config=t2v:data=d,stage=480p",
                "--clip=16k",
                "--rows=4",
                "--mesh=ring=16,fsdp=4",
            ]
        )
        == 0
    )
    (own, mesh), (given, other) = seen
    assert (own.rows, own.clips, mesh.fsdp) == (64, 2, 64) and (given.rows, other.ring, other.fsdp) == (4, 16, 4)

"""`minisora plan` of a codec: its arithmetic against hand counts, and the trainer's own step for a mesh."""

import dataclasses
import math

import jax
import pytest

from minisora_jax.cli import main
from minisora_jax.models.vae import VAEConfig
from minisora_jax.parallel.mesh import MeshConfig, make_mesh
from minisora_jax.plan.codec import codec_of, frame_flops, lower_decoding, lower_training, stages, step_flops
from minisora_jax.plan.compiled import bytes_held
from minisora_jax.training.codec_losses import AdversarialConfig, PerceptualConfig
from minisora_jax.training.codec_task import CodecTask

PLAIN = VAEConfig(base=64, multipliers=(1,), time_down=(), residual_blocks=1, latent_channels=4, attention=False)
TASK = CodecTask(vae=PLAIN, crop_THW=(5, 32, 32), batch=8, l2=0.0)


def by_hand(size_THW: tuple[int, int, int], kernels: list[tuple[int, int, int]]) -> float:
    """FLOPs of convolutions (taps along a side, channels in, channels out), one a pixel, whose edges see no zeros."""
    T, H, W = size_THW
    positions = lambda n, taps: n if taps == 1 else 3 * n - 2
    return sum(2 * T * taps * positions(H, taps) * positions(W, taps) * i * o for taps, i, o in kernels)


def test_the_flops_of_a_frame_are_those_of_its_convolutions():
    c, z = 64, 4
    encoder = [(3, 3, c), *[(3, c, c)] * 2, *[(3, c, c)] * 4, (3, c, 2 * z), (1, 2 * z, 2 * z)]
    decoder = [(1, z, z), (3, z, c), *[(3, c, c)] * 4, *[(3, c, c)] * 4, (3, c, 3)]
    encode, decode = frame_flops(PLAIN, TASK.crop_THW)
    # The rest is norms and activations, at most 20 operations for each of 1728 of a convolution.
    assert 1 <= 5 * encode / by_hand(TASK.crop_THW, encoder) < 1.02
    assert 1 <= 5 * decode / by_hand(TASK.crop_THW, decoder) < 1.02


def test_attention_is_counted_whole():
    """4 C n^2 for n positions of a frame, and its four linear layers, in the middle of encoder and decoder."""
    task = dataclasses.replace(PLAIN, attention=True)
    more = [
        with_it - without for with_it, without in zip(frame_flops(task, (1, 32, 32)), frame_flops(PLAIN, (1, 32, 32)))
    ]
    n, c = 32 * 32, 64
    for flops in more:
        assert 1 <= flops / (4 * c * n * n + 8 * n * c * c) < 1.05


@pytest.mark.slow
def test_a_step_is_three_passes_and_grows_by_stages():
    staged = dataclasses.replace(
        TASK, lpips=PerceptualConfig(path="models/lpips", start=10), gan=AdversarialConfig(weight=0.1, start=20, base=8)
    )
    found = stages(staged)
    assert {name: start for name, (start, _) in found.items()} == {"error": 0, "+ LPIPS": 10, "+ discriminator": 20}
    error, lpips, gan = (step_flops(task) for _, task in found.values())
    forward = sum(frame_flops(PLAIN, TASK.crop_THW)) * 5 * TASK.batch
    assert error / forward == pytest.approx(3, abs=0.06)  # the first layer needs no gradient by its input
    vgg = 2 * 9 * sum(
        n * i * o
        for n, i, o in [(1024, 3, 64), (1024, 64, 64), (256, 64, 128), (256, 128, 128), (64, 128, 256)]
        + [(64, 256, 256)] * 2 + [(16, 256, 512), (16, 512, 512), (16, 512, 512), *[(4, 512, 512)] * 3]
    )  # fmt: skip
    # Both pictures there and back; at the edges of small pictures a good part of the taps are zeros.
    assert 0.7 < (lpips - error) / (4 * vgg * 5 * TASK.batch) < 1.05
    assert gan > lpips
    assert step_flops(dataclasses.replace(TASK, batch=16)) == 2 * error
    assert [*stages(TASK)] == ["error"]


def test_the_states_are_those_of_the_trainer():
    """Every chip has all parameters, and its own crops."""
    mesh = make_mesh(MeshConfig(data=4, ring=2))
    kinds, lowered = lower_training(dataclasses.replace(TASK, gan=AdversarialConfig(weight=0.1, base=8)), mesh)
    parameters = sum(4 * math.prod(x.shape) for x in jax.tree.leaves(kinds["parameters"]))
    assert bytes_held(kinds["parameters"]) == bytes_held(kinds["average"]) == parameters
    assert 2 * parameters <= bytes_held(kinds["optimiser"]) < 2 * parameters + 64
    assert bytes_held(kinds["batch"]) == 8 // 4 * (5 * 32 * 32 * 3 + 4)
    args = jax.tree.leaves(lowered.args_info)
    assert (
        sum(x.size * x.dtype.itemsize for x in map(lambda a: a._aval, args) if "key" not in str(x.dtype))
        > 4 * parameters
    )
    with pytest.raises(ValueError, match=r"=8 cannot be divided over mesh\.data=3|cannot be divided"):
        lower_training(dataclasses.replace(TASK, batch=6), mesh)


@pytest.mark.slow
def test_a_step_of_the_decoder_is_lowered_for_a_mesh():
    mesh = make_mesh(MeshConfig(data=1, ring=8))
    vae = VAEConfig(base=8, multipliers=(1, 2), time_down=(True,), residual_blocks=1)
    kinds, lowered = lower_decoding(vae, (16 * vae.space_factor, 32), mesh)
    memory = lowered.compile().memory_analysis()
    assert memory.argument_size_in_bytes >= sum(map(bytes_held, kinds.values())) > 0
    assert all(x.sharding.shard_shape(x.shape)[2] * 8 == x.shape[2] for x in jax.tree.leaves(kinds["states"]))


def test_codecs_are_told_from_transformers():
    assert codec_of(None, ["--config=vae_tiny"]).batch == 8
    assert codec_of(None, ["--config=vae_4x8x8", "--config.batch=64"]).batch == 64
    assert codec_of(None, ["--config=dit_tiny:data=d"]) is None and codec_of("dit-xl-2-256", []) is None
    assert codec_of("wan2.1-vae", []).vae.dtype == "bfloat16"


@pytest.mark.parametrize(
    "flags, problem",
    [
        (["--config=vae_tiny", "--clip=8k"], "a codec is planned by --config=FILE.py alone"),
        (["--preset=wan2.1-vae"], "a published codec (--preset) has the latter only"),
        (["--config=vae_tiny", "--largest"], "--largest is of transformers, and this is a codec"),
        (["--preset=wan2.1-vae", "--sample", "--clip=8k"], "--clip=8k must look like 60s@1080p"),
        (["--config=dit_tiny:data=d"], "--clip is missing"),
    ],
)
def test_what_is_no_plan_of_a_codec_is_said(flags, problem, capsys):
    assert main(["plan", "--topology=v5p:2x2x1", *flags]) == 2
    assert problem in capsys.readouterr().err


def test_on_gpus_the_arithmetic_is_printed(capsys):
    assert main(["plan", "--topology=h100:8", "--config=vae_tiny"]) == 0
    said = capsys.readouterr().out
    assert "codec: 2.9 M parameters; a crop: 17 frames of 32x32, 5 x 4 x 4 latents" in said
    assert "from step         0: error" in said and "nothing is compiled for GPUs" in said

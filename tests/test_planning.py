"""`minisora plan`: what it reads from a compiled schedule, its cost model, and its arguments."""

import dataclasses
import math

import jax
import pytest
from flax import traverse_util

from minisora_jax.diffusion.grpo import GrpoConfig
from minisora_jax.models.dit import DiTConfig, abstract_params
from minisora_jax.models.lora import LoraConfig, kernels
from minisora_jax.parallel.mesh import MeshConfig, make_mesh
from minisora_jax.plan.compiled import Workload, _needed_bytes, lower
from minisora_jax.plan.cost_model import arithmetic, estimate, largest, meshes, search, seconds_of
from minisora_jax.plan.hardware import Topology
from minisora_jax.plan.schedule import read_traffic
from minisora_jax.plan.workload import clip_tokens, mesh_of, parameter_count, task_of, token_count
from minisora_jax.training.diffusion_task import DiffusionTask

TINY = DiffusionTask(
    DiTConfig(latent_channels=4, width=64, depth=2, heads=4, text_features=8, text_width=64, text_depth=0, remat="full")
)
# What XLA:TPU prints, cut down: a loop of 5 - 1 turns with a hidden permute, an exposed one, a branch, a gather.
PROGRAM = """
HloModule jit_step, is_scheduled=true

%condition (p: (s32[], bf16[4,8])) -> pred[] {
  %limit = s32[] constant(5)
  %p = (s32[], bf16[4,8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[], bf16[4,8]) parameter(0)
  %x = bf16[4,8]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %send.1 = (bf16[4,8], bf16[4,8], u32[], u32[]) collective-permute-start(%x), source_target_pairs=PAIRS
  %work = bf16[4,8]{1,0} fusion(%x), kind=kLoop, calls=%fused
  %arrived.1 = bf16[4,8]{1,0} collective-permute-done(%send.1)
  %send.2 = (bf16[4,8], bf16[4,8], u32[], u32[]) collective-permute-start(%x), source_target_pairs=PAIRS
  %arrived.2 = bf16[4,8]{1,0} collective-permute-done(%send.2)
  ROOT %t = (s32[], bf16[4,8]) tuple(%i, %work)
}

%branch.1 (p: bf16[4,8]) -> bf16[4,8] {
  %p = bf16[4,8] parameter(0)
  ROOT %a2a = bf16[2,2,8]{2,1,0} all-to-all(%p), replica_groups=mesh['ring'=2,'ulysses'=2] {'ulysses'}, dimensions={0}
}

%branch.2 (p: bf16[4,8]) -> bf16[4,8] {
  ROOT %p = bf16[4,8] parameter(0)
}

ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {
  %a = bf16[4,8] parameter(0)
  %one = s32[] constant(1)
  %start = (s32[], bf16[4,8]) tuple(%one, %a)
  %loop = (s32[], bf16[4,8]) while(%start), condition=%condition, body=%body
  %choice = bf16[4,8] conditional(%i, %a, %a), branch_computations={%branch.1, %branch.2}
  ROOT %all = f32[16,8]{1,0} all-gather(%a), replica_groups={{0,1,2,3}}, dimensions={0}
}
""".replace("PAIRS", "{{0,2},{2,0},{1,3},{3,1}}")

# Between slices: two sums of gradients, one given to the network with a fusion still to come, one without.
SLICES = """
ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {
  %a = bf16[4,8] parameter(0)
  %send.1 = (bf16[4,8]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) send(%a, %token.1), is_host_transfer=true, ATTRIBUTES(1)
  %send-done.1 = token[] send-done(%send.1)
  %work = bf16[4,8]{1,0} fusion(%a), kind=kLoop, calls=%fused
  %send.2 = (f32[2,8]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) send(%a, %token.2), is_host_transfer=true, ATTRIBUTES(2)
  %recv.1 = (bf16[4,8]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) recv(%token.1), is_host_transfer=true, ATTRIBUTES(1)
  %recv.2 = (f32[2,8]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) recv(%token.2), is_host_transfer=true, ATTRIBUTES(2)
  ROOT %end = bf16[4,8]{1,0} fusion(%recv.1, %recv.2), kind=kLoop, calls=%fused
}
"""
for number in "12":
    attributes = f'_xla_host_transfer_rendezvous="all-reduce.{number}_0",_xla_megascale_target="{{1,2,3,4}}x{{0:3}}",'
    attributes += '_xla_megascale_transfer_type="ALL_REDUCE"'
    SLICES = SLICES.replace(f"ATTRIBUTES({number})", f"frontend_attributes={{{attributes}}}")


def test_what_goes_between_slices_is_read():
    hidden, exposed = read_traffic(SLICES, {"data": 8, "ring": 2})
    assert [t.kind for t in (hidden, exposed)] == ["all-reduce"] * 2
    assert hidden.hidden and hidden.sent == 2 * 64 * 3 / 4 and hidden.network and hidden.axes == ("data",)
    assert not exposed.hidden and exposed.asynchronous and exposed.sent == 2 * 64 * 3 / 4


def test_a_schedule_is_read():
    traffic = {(t.kind, t.hidden): t for t in read_traffic(PROGRAM, {"ring": 2, "ulysses": 2})}
    assert len(traffic) == 4
    hidden, exposed = traffic["collective-permute", True], traffic["collective-permute", False]
    assert hidden.asynchronous and exposed.asynchronous and hidden.axes == exposed.axes == ("ring",)
    assert hidden.sites == exposed.sites == 1 and hidden.times == exposed.times == 4
    assert hidden.sent == exposed.sent == 4 * 4 * 8 * 2
    exchange, gather = traffic["all-to-all", False], traffic["all-gather", False]
    assert exchange.axes == ("ulysses",) and exchange.sent == 32 * 2 / 2 and not exchange.asynchronous
    assert gather.axes == ("ring", "ulysses") and gather.sent == 16 * 8 * 4 * 3 / 4


HOST = """
%body (p: (bf16[4,2,8], bf16[2,8])) -> (bf16[4,2,8], bf16[2,8]) {
  %p = (KEPT, bf16[2,8]{1,0}) parameter(0)
  %up = ((KEPT, bf16[1,2,8]{2,1,0}, s32[]), KEPT, u32[]{:S(2)}) dynamic-update-slice-start(%kept, %x, %i)
  %work = bf16[2,8]{1,0} fusion(%x), kind=kLoop, calls=%fused
  %up-done = KEPT dynamic-update-slice-done(%up)
  %down = ((KEPT, s32[]), bf16[1,2,8]{2,1,0}, u32[]{:S(2)}) dynamic-slice-start(%up-done, %i)
  %down-done = bf16[1,2,8]{2,1,0} dynamic-slice-done(%down)
  %within = (bf16[8]{0:S(1)}, bf16[8]{0}, u32[]{:S(2)}) copy-start(%bias)
  ROOT %end = (bf16[4,2,8], bf16[2,8]) tuple(%up-done, %work)
}
ENTRY %main (a: bf16[2,8]) -> bf16[2,8] {
  %whole = (bf16[6,8]{1,0:S(5)}, bf16[6,8]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %whole-done = bf16[6,8]{1,0:S(5)} copy-done(%whole)
  ROOT %loop = (bf16[4,2,8], bf16[2,8]) while(%start), condition=%cond, body=%body
}
""".replace("KEPT", "bf16[4,2,8]{2,1,0:T(8,128)(2,1)S(5)}")


def test_copies_to_the_host_are_read():
    copies = {(t.kind, t.hidden): t for t in read_traffic(HOST, {"ring": 2})}
    assert {key: t.sent for key, t in copies.items()} == {
        ("copy to the host", True): 2 * 8 * 2,
        ("copy from the host", False): 2 * 8 * 2,
        ("copy to the host", False): 6 * 8 * 2,
    }
    assert {t.where for t in copies.values()} == {"host"} and all(t.asynchronous for t in copies.values())
    assert (
        seconds_of(copies["copy to the host", True], MeshConfig(data=1, ring=2), Topology.parse("v5p:2x1x1").chip) == 0
    )


def test_the_compilers_words_of_memory():
    said = "RESOURCE_EXHAUSTED: ... Ran out of memory in memory space hbm. Used 17.53G of 15.75G hbm. Exceeded ..."
    assert _needed_bytes(said, 10) == int(17.53 * 2**30)
    said = "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    said += "temporaries (23.64G) exceeds available HBM (15.75G). HLO module: jit_step."
    assert _needed_bytes(said, 10) == int(23.64 * 2**30) + 10
    assert _needed_bytes("INVALID_ARGUMENT: something else", 10) is None


@pytest.mark.slow
@pytest.mark.parametrize("sample", [False, True])
def test_the_real_step_is_lowered_for_a_mesh(sample):
    """The same step as for a pod, here for 8 CPU devices: it compiles, and a device holds an eighth of the state."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, ring=2, ulysses=2))
    work = Workload(TINY, tokens=600, rows=2, text_tokens=16, sample=sample)
    kinds, lowered = lower(work, mesh)
    memory = lowered.compile().memory_analysis()
    leaves = jax.tree.leaves(kinds["parameters"])
    each = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in leaves)
    assert sum(x.size for x in leaves) == parameter_count(TINY)
    assert each < 1.2 * parameter_count(TINY) / 8
    assert memory.argument_size_in_bytes >= 4 * each * (1 if sample else 4)
    assert work.row_tokens(mesh) == (1536 if sample else 1024)
    if sample:
        small = lower(dataclasses.replace(work, weights="int8"), mesh)[1].compile().memory_analysis()
        assert small.argument_size_in_bytes < memory.argument_size_in_bytes


@pytest.mark.slow
def test_the_step_of_preference_tuning_is_lowered_for_a_mesh():
    """It reads the trained steps of a rollout, with the model of --init beside the trained one."""
    grpo = GrpoConfig("my.py:reward", steps=4, trained=2, kl=0.1)
    with pytest.raises(ValueError, match="each update its own: set conditioning.middle=0.1 to 0.0"):
        dataclasses.replace(TINY, grpo=grpo)
    task = dataclasses.replace(TINY, grpo=grpo, conditioning=dataclasses.replace(TINY.conditioning, middle=0.0))
    mesh = make_mesh(MeshConfig(data=2, ring=2), jax.devices()[:4])
    kinds, lowered = lower(Workload(task, tokens=600, rows=2, text_tokens=16), mesh)
    assert kinds["batch"].x_BSP.shape[0] == kinds["batch"].batch.segment_BS.shape[0] == 2
    assert kinds["parameters"]["frozen"]
    assert lowered.compile().memory_analysis().temp_size_in_bytes > 0


def in_blocks():
    return kernels(abstract_params(TINY.dit), r"^blocks/.*(attention|mlp)/")


def test_sampling_keeps_weights_in_their_own_type():
    mesh = make_mesh(MeshConfig(data=1, ring=8))
    types = "float32", "bfloat16", "int8"
    works = [Workload(TINY, 600, text_tokens=16, sample=True, weights=weights) for weights in types]
    held = [
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(lower(work, mesh)[0]["parameters"])) for work in works
    ]
    assert held[0] == 2 * held[1]
    blocks = in_blocks().values()
    count = lambda *axes: math.prod(n for axis in axes for n in axis)
    scales = sum(count(k.layers, k.outputs) for k in blocks)
    assert held[2] == held[0] - 3 * sum(count(k.layers, k.inputs, k.outputs) for k in blocks) + 4 * scales
    with pytest.raises(ValueError, match=r"=1 cannot be divided over mesh\.data=1 x mesh\.fsdp=8"):
        lower(Workload(TINY, 600, text_tokens=16), make_mesh(MeshConfig(data=1, fsdp=8)))


def test_arithmetic_is_the_closed_form():
    n, cfg = (
        512,
        dataclasses.replace(
            TINY.dit, caption="label", classes=3, micro_conditioning=False, positions="none", remat="none"
        ),
    )
    task = dataclasses.replace(TINY, dit=cfg)
    done = arithmetic(Workload(task, n))
    D, P = cfg.width, cfg.token_width
    block = 2 * n * (4 + 8) * D * D + 4 * n * n * D
    stem = 2 * n * (P + P + 256 + D + 6 * D + 2 * D) * D
    assert done.useful == pytest.approx(3 * (cfg.depth * block + stem))
    attention = cfg.depth * 4 * n * n * D
    assert done.executed == pytest.approx(done.useful + 0.5 * attention)
    full = arithmetic(Workload(dataclasses.replace(task, dit=dataclasses.replace(cfg, remat="full")), n))
    assert full.executed == pytest.approx(done.executed + done.useful / 3)
    assert arithmetic(Workload(task, n, clips=4)).useful == pytest.approx(4 * done.useful)


def test_meshes_divide_rows_heads_and_chips():
    for mesh in meshes(64, rows=4, heads=12):
        assert math.prod(vars(mesh).values()) == 64
        assert 4 % (mesh.data * mesh.fsdp) == 0 and 12 % (mesh.ulysses * mesh.tensor) == 0
    assert all(m.data % 2 == 0 for m in meshes(32, rows=4, heads=8, slices=2))


def test_the_search_prefers_less_to_do_and_less_to_send():
    work, topology = Workload(TINY, tokens=4096, rows=4), Topology.parse("v5p:2x2x1")
    found = search(work, topology, parameter_count(TINY))
    assert [f[2].step for f in found] == sorted(f[2].step for f in found)
    assert found[0][0].task.dit.remat == "none"  # everything fits, so nothing is computed again
    long = dataclasses.replace(work, tokens=40_000_000, rows=1)
    assert not search(long, Topology.parse("v5e:2x2"), parameter_count(TINY))


def test_more_chips_take_less_each():
    few, many = (
        estimate(Workload(TINY, tokens=65_536), MeshConfig(data=1, ring=n), Topology.parse(f"v5p:{n}x1x1"), 10**9)
        for n in (4, 8)
    )
    assert many.total_bytes == pytest.approx(few.total_bytes / 2, rel=0.01) and many.step < few.step
    assert few.mfu < 1


@pytest.mark.parametrize("base, bytes_each", [("float32", 4), ("bfloat16", 2), ("int8", 1), ("nf4", 0.5)])
def test_only_adapters_have_an_average_moments_and_a_gradient(base, bytes_each):
    """By hand: the attention kernels of TINY are 64 x 64, 4 of self- and 4 of cross-attention in each of 2 blocks."""
    rank, kernels = 3, 8 * 2
    work = Workload(dataclasses.replace(TINY, lora=LoraConfig(rank, base=base)), tokens=4096)
    held = estimate(work, MeshConfig(data=1), Topology.parse("l4:1"), parameter_count(TINY)).bytes
    adapters = 4 * kernels * rank * (64 + 64)
    assert held["average"] == held["gradient"] == adapters
    assert 2 * adapters <= held["optimiser"] < 2 * adapters + 100  # two moments, and the count of steps
    paths = traverse_util.flatten_dict(abstract_params(TINY.dit)["params"])
    sizes = {kind: sum(x.size for p, x in paths.items() if (p[-1] == "kernel") == kind) for kind in (True, False)}
    if base == "nf4":  # the blocks' attention and MLP; a scale for 64 weights, here in blocks of at most 64
        inner = sum(math.prod(k.inputs + k.outputs) * math.prod(k.layers) for k in in_blocks().values())
        scales = held["parameters"] - adapters - inner / 2 - 2 * (sizes[True] - inner) - 4 * sizes[False]
        assert 4 * inner / 64 <= scales < 4 * inner / 16
        return
    scales = held["parameters"] - adapters - bytes_each * sizes[True] - 4 * sizes[False]
    assert scales == 0 if base != "int8" else 0 < scales < 4 * sizes[True] / 8


def test_the_longest_clip_is_on_the_line():
    assert largest([(1000, 5e9), (2000, 8e9)], 11e9) == 3000


def test_clips_in_words():
    assert clip_tokens("60s@1080p", 24, "wan2.1-vae", (1, 2, 2))[0] == 361 * 68 * 120
    assert clip_tokens("5s@832x480", 16, "wan2.1-vae", (1, 2, 2))[0] == 21 * 30 * 52
    assert token_count("8k") == 8192 and token_count("16.8M") == 16_800_000 and token_count("77") == 77
    assert mesh_of("ring=4,ulysses=2", 16) == MeshConfig(data=2, fsdp=1, ring=4, ulysses=2, tensor=1)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: clip_tokens("an hour", 24, "wan2.1-vae", (1, 2, 2)), "--clip=an hour must look like 60s@1080p"),
        (lambda: clip_tokens("6s@1080p", 24, "mp4", (1, 2, 2)), "--codec=mp4 must be one of"),
        (lambda: mesh_of("rings=4", 8), "'rings=4' must be AXIS=SIZE with an axis of data, fsdp"),
        (lambda: mesh_of("ring=3", 8), "needs a multiple of 3 devices; 8 are here"),
        (lambda: Topology.parse("v9:2x2"), "must look like v5p:4x4x4"),
        (lambda: Topology.parse("v5e:16"), "TPUs come as a grid"),
        (lambda: task_of(None, [], None, "splash"), "--preset=NAME or by --config=FILE.py, one of the two"),
        (lambda: task_of("gpt-2", [], None, "splash"), "--preset=gpt-2 must be one of"),
    ],
)
def test_what_cannot_be_planned_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()

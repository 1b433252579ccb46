"""Plans of codecs: the train step, or a step of the streaming decoder, compiled for a pod (see compiled.py).

Nothing is computed or allocated, but for weights of LPIPS: the trainer's program has them as constants. Any will do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from minisora_jax.config import build, load, read_config
from minisora_jax.models import codec
from minisora_jax.models.perceptual import LPIPS, LPIPSConfig, abstract_params
from minisora_jax.models.vae import VAE, VAEConfig
from minisora_jax.parallel.attention import auto_is
from minisora_jax.parallel.halo import height_shards, require_whole_units
from minisora_jax.parallel.mesh import FRAMES, REPLICATED, MeshConfig, make_mesh, require_divisible, with_shardings
from minisora_jax.plan.compiled import CompiledStep, compile_lowered
from minisora_jax.plan.cost_model import Arithmetic
from minisora_jax.plan.hardware import Topology
from minisora_jax.plan.report import compiled_lines, mesh_name
from minisora_jax.training.codec_task import CodecTask, init_params, loss_of, optimizer_of
from minisora_jax.training.step import init_state, jit_train_step
from minisora_jax.weights.presets import CODECS

ADVICE = "try more chips, fewer crops a step (--rows), a smaller crop (--config.crop_THW) or a mesh with ring"


def codec_of(preset: str | None, config_flags: list[str]) -> CodecTask | None:
    """The codec to plan: a published one, or that of a config; None if these name a transformer."""
    if preset:
        return CodecTask(vae=dataclasses.replace(CODECS[preset].config, dtype="bfloat16")) if preset in CODECS else None
    files = [flag.removeprefix("--config=") for flag in config_flags if flag.startswith("--config=")]
    if not files or "vae" not in load(files[-1]):
        return None
    return build(CodecTask, read_config(config_flags, CodecTask, "vae_tiny"))


# ---- Arithmetic


def frame_flops(vae: VAEConfig, size_THW: tuple[int, int, int]) -> tuple[float, float]:
    """FLOPs of encoding and of decoding a clip of this size, for each frame of pixels."""
    params, x = _abstract_vae(vae, size_THW), jax.ShapeDtypeStruct((1, *size_THW, 3), jnp.float32)
    z = jax.ShapeDtypeStruct((1, *vae.latent_size(size_THW), vae.latent_channels), jnp.float32)
    run = lambda method: lambda params, x: VAE(vae).apply(params, x, method=method)[0]
    return counted(run("encode"), params, x) / size_THW[0], counted(run("decode"), params, z) / size_THW[0]


def stages(task: CodecTask) -> dict[str, tuple[int, CodecTask]]:
    """{name: (its first step, the task with the loss of that stage alone)} of a training, in order."""
    lpips, gan = dataclasses.replace(task.lpips, start=0), dataclasses.replace(task.gan, start=0)
    without = dataclasses.replace(
        task, lpips=dataclasses.replace(lpips, path=""), gan=dataclasses.replace(gan, weight=0.0)
    )
    parts = {"error": (0, {})}
    if task.lpips.path:
        parts["LPIPS"] = (task.lpips.start, {"lpips": lpips})
    if task.gan.weight:
        parts["discriminator"] = (task.gan.start, {"gan": gan})
    found, counting = {}, {}
    for name, (start, part) in sorted(parts.items(), key=lambda entry: entry[1][0]):
        counting |= part
        found["+ " * bool(found) + name] = (start, dataclasses.replace(without, **counting))
    return found


def step_flops(task: CodecTask) -> float:
    """FLOPs of the loss and its gradients over all crops of a step: what the task's terms take once all count."""
    T, H, W = task.crop_THW
    batch = {
        "frames": jax.ShapeDtypeStruct((1, T, H, W, 3), jnp.uint8),
        "number": jax.ShapeDtypeStruct((1,), jnp.int32),
    }
    loss = loss_of(task, _lpips(task))
    gradient = jax.grad(lambda params, batch, key: jnp.sum(loss(params, batch, key, jnp.int32(0))["loss"][0]))
    params = jax.eval_shape(lambda key: init_params(task, None, key), _key())
    return task.batch * task.run.optim.accumulate * counted(gradient, params, batch, _key())


def counted(f: Callable, *inputs: Any) -> float:
    """FLOPs of a function of abstract arrays on one device, by XLA's count of the program as it is traced."""
    with auto_is("reference"):  # the count takes a loop's body once, and this kernel has no loop
        cost = jax.jit(f).lower(*inputs).cost_analysis()
    if cost is None:
        raise RuntimeError("this version of jax counts no FLOPs of a lowered program")
    return cost["flops"]


# ---- Programs


def lower_training(task: CodecTask, mesh: jax.sharding.Mesh) -> tuple[dict[str, Any], jax.stages.Lowered]:
    """The train step, lowered for a mesh: one program, of all stages of the loss.

    Returns:
        ({kind: abstract arrays on the chips}, the lowered step).

    Raises:
        ValueError: The crops do not divide over the mesh.
    """
    require_divisible(mesh, rows=task.batch)
    require_whole_units(mesh, task.vae.latent_size(task.crop_THW)[1], "a crop")
    optimizer, optim = optimizer_of(task), task.run.optim
    init = lambda key: init_state(init_params(task, None, key), optimizer, optim.ema > 0)
    rows = (optim.accumulate, task.batch)
    on = NamedSharding(mesh, jax.P(None, *FRAMES[:1]))
    batch = {"frames": jax.ShapeDtypeStruct((*rows, *task.crop_THW, 3), jnp.uint8, sharding=on)}
    batch["number"] = jax.ShapeDtypeStruct(rows, jnp.int32, sharding=on)
    with jax.set_mesh(mesh):
        state = with_shardings(jax.eval_shape(init, _key()), mesh)
        step = jit_train_step(loss_of(task, _lpips(task)), optimizer, optim)
        lowered = step.lower(state, batch, with_shardings(_key(), mesh))
    return {"parameters": state.params, "average": state.ema, "optimiser": state.opt_state, "batch": batch}, lowered


def lower_decoding(
    vae: VAEConfig, size_HW: tuple[int, int], mesh: jax.sharding.Mesh
) -> tuple[dict[str, Any], jax.stages.Lowered]:
    """The step of the streaming decoder that makes the frames of one latent frame, lowered for a mesh.

    Args:
        vae: The codec.
        size_HW: Height and width of the frames.
        mesh: Its sequence axes divide the height.

    Returns:
        ({kind: abstract arrays on the chips}, the lowered step). "states" is what it remembers of earlier frames.
    """
    _, h, w = vae.latent_size((1, *size_HW))
    on = lambda tree, spec: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)), tree
    )
    with jax.set_mesh(mesh):
        shards = height_shards(h)
        height = shards.padded if shards else h
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        params = _abstract_vae(vae, (1 + vae.time_factor, vae.space_factor * 8, vae.space_factor * 8))
        params = on({"params": {"decoder": params["params"]["decoder"]}}, REPLICATED)
        z = on(jax.ShapeDtypeStruct((rows, 1, height, w, vae.latent_channels), jnp.float32), FRAMES)
        past = on(jax.eval_shape(lambda p, z: codec._decode(vae, h, p, z, None)[1], params, z), FRAMES)
        lowered = codec._decode.lower(vae, h, params, z, past)
    return {"parameters": params, "states": past, "latents": z}, lowered


def _abstract_vae(vae: VAEConfig, size_THW: tuple[int, int, int]) -> Any:
    x = jax.ShapeDtypeStruct((1, *size_THW, 3), jnp.float32)
    return jax.eval_shape(VAE(vae).init, _key(), x)


def _lpips(task: CodecTask) -> LPIPS | None:
    if not task.lpips.path:
        return None
    config, rng = LPIPSConfig(), np.random.default_rng(0)
    return LPIPS(config, jax.tree.map(lambda p: rng.standard_normal(p.shape, np.float32), abstract_params(config)))


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


# ---- In words


def plan_training(task: CodecTask, mesh: MeshConfig, topology: Topology, attention: str) -> CompiledStep | None:
    """Print the plan of a codec's training: its arithmetic, and on TPUs the numbers of the compiled step.

    Args:
        task: The training.
        mesh: The mesh, with the size of every axis.
        topology: The chips.
        attention: The kernel of the attention within frames.

    Returns:
        The compiled step; None for chips without a compiler here.
    """
    T, H, W = task.crop_THW
    t, h, w = task.vae.latent_size(task.crop_THW)
    params = _abstract_vae(task.vae, task.crop_THW)
    print(f"codec: {_count(params) / 1e6:.1f} M parameters; a crop: {T} frames of {W}x{H}, {t} x {h} x {w} latents")
    encode, decode = frame_flops(task.vae, task.crop_THW)
    print(f"  FLOPs of a frame   {encode:.3e} to encode, {decode:.3e} to decode")
    clips, peak, flops = task.batch * task.run.optim.accumulate, topology.chips * topology.chip.flops, []
    for name, (start, stage) in stages(task).items():
        flops.append(step_flops(stage))
        print(f"  from step {start:>9,}: {name:<16}{flops[-1]:.3e} FLOPs a step, {flops[-1] / peak:.3g} s at least")
    compiled = _compiled(lambda at: lower_training(task, at), mesh, topology, attention)
    if compiled is None:
        return None
    what = f"train step of {clips} crops of {T}x{H}x{W} ({task.batch / (mesh.data * mesh.fsdp):g} a chip at a time)"
    # Useful is the codec, there and back, and executed the last stage, with the networks of its loss.
    lines = compiled_lines(what, ADVICE, Arithmetic(flops[0], flops[-1]), mesh, topology, compiled)
    print("\n".join(lines), flush=True)
    return compiled


def _compiled(
    lower: Callable[[jax.sharding.Mesh], tuple[dict[str, Any], jax.stages.Lowered]],
    mesh: MeshConfig,
    topology: Topology,
    attention: str,
) -> CompiledStep | None:
    """The step that lower(mesh) gives, compiled; None for GPUs."""
    if not topology.is_tpu:
        print(f"{topology.chips} x {topology.kind}: nothing is compiled for GPUs, and memory depends on the compiler")
        return None
    print(f"\nmesh {mesh_name(mesh)}: compiling for {topology.chips} chips ...", flush=True)
    at = make_mesh(mesh, topology.devices())
    with auto_is(attention):
        return compile_lowered(*lower(at), at, topology)


def plan_decoding(
    vae: VAEConfig, size_THW: tuple[int, int, int], mesh: MeshConfig, topology: Topology, attention: str
) -> CompiledStep | None:
    """Print the plan of decoding a clip of this size, one latent frame at a time. Arguments: see `plan_training`."""
    T, H, W = size_THW
    steps, frames, clips = vae.latent_size(size_THW)[0], vae.time_factor, mesh.data * mesh.fsdp
    params = _abstract_vae(vae, (1 + frames, 8 * vae.space_factor, 8 * vae.space_factor))
    _, decode = frame_flops(vae, (1 + 4 * frames, H, W))
    print(f"codec: {_count(params) / 1e6:.1f} M parameters; {T} frames of {W}x{H} are decoded in {steps} steps")
    print(f"  FLOPs of a frame   {decode:.3e} to decode")
    compiled = _compiled(lambda at: lower_decoding(vae, (H, W), at), mesh, topology, attention)
    if compiled is None:
        return None
    what = f"step of {frames} frames of {W}x{H} of {clips} clip{'s' * (clips > 1)}"
    flops = Arithmetic(clips * frames * decode, clips * frames * decode)
    print("\n".join(compiled_lines(what, "try a mesh with more ring", flops, mesh, topology, compiled)), flush=True)
    return compiled


def _count(params: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))

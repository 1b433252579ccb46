"""Attention between packed rows: a query attends to a key if both carry the same segment id.

`attend` is called on global arrays, and their shardings choose the algorithm. A sequence over ("ring", "ulysses") is
exchanged for heads along ulysses, the inner axis (Jacobs et al. 2023, arXiv:2309.14509). Keys and values travel round
the ring axis (Liu et al. 2023, arXiv:2310.01889). Both together are USP (Fang & Zhao 2024, arXiv:2405.07719). Keys that
are replicated, such as a caption's, need no communication.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import logging
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp

from minisora_jax.config import how_to_install
from minisora_jax.parallel.kernels import KERNELS, NAMES, Kernel
from minisora_jax.parallel.kernels.cudnn import Cudnn
from minisora_jax.parallel.mesh import SEQUENCE
from minisora_jax.parallel.ring import Ring, forward_only, ring_attention

log = logging.getLogger("minisora")

CUDNN_FROM = 1024  # tokens of the longest segment from which cuDNN is faster than our Triton kernel

# Whether attention is differentiated forward, see `forward_mode`.
_forward_mode: contextvars.ContextVar[bool] = contextvars.ContextVar("forward_mode", default=False)

# What "auto" means while `auto_is` holds.
_auto: contextvars.ContextVar[str] = contextvars.ContextVar("auto", default="auto")


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """Attention in what is traced meanwhile has a forward derivative (`jax.jvp`), on any mesh.

    A function with a gradient of its own has none. So the kernel is "reference" where that is asked for and else
    "blockwise", which are JAX alone.
    """
    token = _forward_mode.set(True)
    try:
        yield
    finally:
        _forward_mode.reset(token)


@contextlib.contextmanager
def auto_is(impl: str) -> Iterator[None]:
    """ "auto" means this kernel in what is traced meanwhile, whatever the backend: to compile for another machine."""
    token = _auto.set(impl)
    try:
        yield
    finally:
        _auto.reset(token)


def attend(
    q_BSNK: jax.Array,
    k_BMNK: jax.Array,
    v_BMNK: jax.Array,
    q_segment_BS: jax.Array,
    kv_segment_BM: jax.Array,
    *,
    impl: str = "auto",
    scale: float | None = None,
    max_segment_len: int = 0,
    slots: int = 0,
    causal: bool = False,
    bias_NSM: jax.Array | None = None,
) -> jax.Array:
    """softmax(scale q k^T + bias) v within segments, with the softmax in float32.

    Args:
        q_BSNK: Queries.
        k_BMNK: Keys.
        v_BMNK: Values.
        q_segment_BS: Segment ids of queries. 0 is padding: it attends to nothing, and nothing attends to it.
        kv_segment_BM: Segment ids of keys.
        impl: A kernel of parallel/kernels, or "auto" for the fastest on this backend.
        scale: None: 1 / sqrt(K).
        max_segment_len: No segment has more tokens; 0: unknown. The ring sends blocks only as far as a segment
            reaches. Not checked: if a segment is longer, the result is silently wrong.
        slots: Ids are 1 to `slots` and the tokens of a segment lie together, which cuDNN needs; 0: unknown.
        causal: Ids are segment * FRAMES + frame, in rising order along a row. A query attends to the keys of its
            segment up to its own frame. Tokens of one id see each other, so a clip of one id is bidirectional.
        bias_NSM: Added to the logits; the first axis may be 1. Only for short rows that are not sharded.

    Returns:
        The output (B, S, N, K) in v's dtype. Zeros for queries without a key of their segment.

    Raises:
        ValueError: The heads of a device do not divide over the ulysses axis, or `impl` is unknown.
    """
    factor: float = q_BSNK.shape[-1] ** -0.5 if scale is None else scale
    if bias_NSM is not None:
        return _dense(q_BSNK, k_BMNK, v_BMNK, q_segment_BS, kv_segment_BM, factor, bias_NSM)
    # The barrier makes the ids depend on the queries. Ids are the same in all layers: without the barrier JAX computes
    # the masks of all hops ahead of the layers and keeps gigabytes of them.
    ids = jax.lax.optimization_barrier((jax.lax.stop_gradient(q_BSNK), q_segment_BS, kv_segment_BM))[1:]
    arrays = (q_BSNK, k_BMNK, v_BMNK, *ids)
    run: Any = ring_attention
    if _forward_mode.get():
        run, impl = forward_only, "reference" if impl == "reference" else "blockwise"
    kernel = choose(impl, q_BSNK, 0 if causal else slots, max_segment_len)  # cuDNN has no order of frames
    ring = Ring(kernel, factor, max_segment_len=max_segment_len, causal=causal)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual:
        return run(*arrays, ring)
    specs = tuple(jax.typeof(x).sharding.spec for x in arrays)
    ring_size, ulysses = (mesh.shape[axis] for axis in SEQUENCE)
    if specs[1][1] is None:  # keys are whole on every device
        ring_size = ulysses = 1
    heads = q_BSNK.shape[2] // mesh.shape["tensor"]
    if heads % ulysses:
        raise ValueError(
            f"{heads} heads a device cannot be divided over mesh.ulysses={ulysses}: "
            f"mesh.ulysses x mesh.tensor must divide the model's {q_BSNK.shape[2]} heads; use mesh.ring for the rest"
        )
    ring = dataclasses.replace(ring, size=ring_size)

    def on_device(q, k, v, q_ids, kv_ids):
        if ulysses == 1:
            return run(q, k, v, q_ids, kv_ids, ring)
        to_heads = lambda x: jax.lax.all_to_all(x, "ulysses", split_axis=2, concat_axis=1, tiled=True)
        gather = lambda ids: jax.lax.all_gather(ids, "ulysses", axis=1, tiled=True)
        o = run(to_heads(q), to_heads(k), to_heads(v), gather(q_ids), gather(kv_ids), ring)
        return jax.lax.all_to_all(o, "ulysses", split_axis=1, concat_axis=2, tiled=True)

    # check_vma is off because the outputs of Pallas kernels carry no varying axes.
    return jax.shard_map(on_device, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


def choose(impl: str, q_BSNK: jax.Array, slots: int, max_segment_len: int) -> Kernel:
    """The kernel of that name. "auto": splash on TPUs with tokamax installed, cudnn or triton on GPUs, else blockwise.

    cuDNN is chosen on Hopper GPUs and newer for 16-bit queries in long segments; see docs/benchmarks.md.

    Raises:
        ValueError: There is no kernel of that name, or it cannot take these queries.
    """
    impl = _auto.get() if impl == "auto" else impl
    if impl == "auto":
        impl = _best(jax.default_backend())
        if impl == "triton" and _is_hopper() and max_segment_len >= CUDNN_FROM and Cudnn(slots).fits(q_BSNK):
            impl = "cudnn"
    if impl == "cudnn":
        kernel = Cudnn(slots)
        if not kernel.fits(q_BSNK):
            shape = f"{q_BSNK.dtype}{list(q_BSNK.shape)} with slots={slots}"
            raise ValueError(f"attention='cudnn' cannot take {shape}: use attention='auto'")
        return kernel
    if impl not in KERNELS:
        raise ValueError(f"attention={impl!r} must be 'auto' or one of {', '.join(map(repr, NAMES))}")
    return KERNELS[impl]


@functools.cache
def _best(backend: str) -> str:
    if backend == "tpu" and find_spec("tokamax"):
        return "splash"
    if backend == "gpu":
        return "triton"
    if backend == "tpu":
        log.warning(f"attention: blockwise in XLA on this TPU; {how_to_install('tpu')} for splash attention")
    return "blockwise"


@functools.cache
def _is_hopper() -> bool:
    return float(getattr(jax.devices()[0], "compute_capability", 0)) >= 9.0


def _dense(q_BSNK, k_BMNK, v_BMNK, q_segment_BS, kv_segment_BM, scale, bias_NSM):
    same = (q_segment_BS[:, None, :, None] == kv_segment_BM[:, None, None, :]) & (q_segment_BS > 0)[:, None, :, None]
    logits = scale * jnp.einsum("bsnk,bmnk->bnsm", q_BSNK, k_BMNK, preferred_element_type=jnp.float32) + bias_NSM
    weights = jnp.where(same, jax.nn.softmax(jnp.where(same, logits, -1e30), axis=-1), 0.0)
    return jnp.einsum("bnsm,bmnk->bsnk", weights.astype(v_BMNK.dtype), v_BMNK)

"""Attention between packed rows: a query sees a key where both carry the same segment id.

`attend` is called on global arrays. How they lie on the mesh says what happens: a sequence over ("ring", "ulysses") is
exchanged for heads along ulysses (Jacobs et al. 2023, arXiv:2309.14509), innermost, and goes round along ring (Liu et
al. 2023, arXiv:2310.01889); both together are USP (Fang & Zhao 2024, arXiv:2405.07719). Keys that are whole on every
device, as a caption's are, need no communication at all.
"""

from __future__ import annotations

import functools
import logging
from importlib.util import find_spec

import jax
import jax.numpy as jnp

from minisora_jax.parallel.kernels import KERNELS
from minisora_jax.parallel.mesh import SEQUENCE
from minisora_jax.parallel.ring import Ring, ring_attention

log = logging.getLogger("minisora")


def attend(
    q_BSNK: jax.Array,
    k_BTNK: jax.Array,
    v_BTNK: jax.Array,
    q_segment_BS: jax.Array,
    kv_segment_BT: jax.Array,
    *,
    impl: str = "auto",
    scale: float | None = None,
    max_segment_len: int = 0,
    bias_NST: jax.Array | None = None,
) -> jax.Array:
    """softmax(scale q k^T + bias) v within segments -> (B, S, N, K) in v's dtype; softmax in float32.

    `scale` is 1 / sqrt(K) by default. Bidirectional. Padding is segment 0: it neither sees nor is seen, and a query
    with no key of its segment gets zeros. `impl` is a kernel (parallel/kernels), "auto" the one for this backend.
    `longest` promises that no segment is longer: the ring then sends blocks no further than one reaches. It is an
    error of the caller's, not checked here, to promise too little. A bias is for short rows that are whole on a device.
    """
    scale = q_BSNK.shape[-1] ** -0.5 if scale is None else scale
    if bias_NST is not None:
        return _dense(q_BSNK, k_BTNK, v_BTNK, q_segment_BS, kv_segment_BT, scale, bias_NST)
    # Ids are the same in all layers. Unless they depend on something that is not, JAX computes what follows from them
    # for all hops ahead of the layers, and keeps it: gigabytes of masks.
    ids = jax.lax.optimization_barrier((jax.lax.stop_gradient(q_BSNK), q_segment_BS, kv_segment_BT))[1:]
    arrays = (q_BSNK, k_BTNK, v_BTNK, *ids)
    ring = Ring(choose(impl), scale, max_segment_len=max_segment_len)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual:
        return ring_attention(*arrays, ring)
    specs = tuple(jax.typeof(x).sharding.spec for x in arrays)
    ring_size, ulysses = (mesh.shape[axis] for axis in SEQUENCE)
    if specs[1][1] is None:  # keys whole on every device
        ring_size = ulysses = 1
    heads = q_BSNK.shape[2] // mesh.shape["tensor"]
    if heads % ulysses:
        raise ValueError(
            f"{heads} heads a device cannot be divided over mesh.ulysses={ulysses}: "
            f"mesh.ulysses x mesh.tensor must divide the model's {q_BSNK.shape[2]} heads; use mesh.ring for the rest"
        )
    ring = Ring(ring.kernel, scale, size=ring_size, max_segment_len=max_segment_len)

    def on_device(q, k, v, q_ids, kv_ids):
        if ulysses == 1:
            return ring_attention(q, k, v, q_ids, kv_ids, ring)
        to_heads = lambda x: jax.lax.all_to_all(x, "ulysses", split_axis=2, concat_axis=1, tiled=True)
        whole = lambda ids: jax.lax.all_gather(ids, "ulysses", axis=1, tiled=True)
        o = ring_attention(to_heads(q), to_heads(k), to_heads(v), whole(q_ids), whole(kv_ids), ring)
        return jax.lax.all_to_all(o, "ulysses", split_axis=1, concat_axis=2, tiled=True)

    # check_vma is off for the Pallas kernels, whose outputs carry no varying axes.
    return jax.shard_map(on_device, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


def choose(impl: str) -> object:
    """The kernel of that name; "auto": splash on TPUs (where tokamax is installed), triton on GPUs, else blockwise."""
    if impl == "auto":
        impl = _best(jax.default_backend())
    if impl not in KERNELS:
        raise ValueError(f"attention={impl!r} must be 'auto' or one of {', '.join(map(repr, KERNELS))}")
    return KERNELS[impl]


@functools.cache
def _best(backend: str) -> str:
    if backend == "tpu" and find_spec("tokamax"):
        return "splash"
    if backend == "gpu":
        return "triton"
    if backend == "tpu":
        log.warning("attention: blockwise in XLA on this TPU; pip install 'minisora_jax[tpu]' for splash attention")
    return "blockwise"


def _dense(q_BSNK, k_BTNK, v_BTNK, q_segment_BS, kv_segment_BT, scale, bias_NST):
    same = (q_segment_BS[:, None, :, None] == kv_segment_BT[:, None, None, :]) & (q_segment_BS > 0)[:, None, :, None]
    logits = scale * jnp.einsum("bsnk,btnk->bnst", q_BSNK, k_BTNK, preferred_element_type=jnp.float32) + bias_NST
    weights = jnp.where(same, jax.nn.softmax(jnp.where(same, logits, -1e30), axis=-1), 0.0)
    return jnp.einsum("bnst,btnk->bsnk", weights.astype(v_BTNK.dtype), v_BTNK)

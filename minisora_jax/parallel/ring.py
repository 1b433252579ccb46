"""Ring attention over a sequence that is sharded over devices. Any kernel can compute one hop.

    device     0    1    2    3        hop 0: each device's own block of keys and values
    queries   q0   q1   q2   q3        hop i: the block of the device i to the left; meanwhile the device sends the
    hop 1     k3   k0   k1   k2               block on to the right

Each hop gives (o, lse), and two of them merge by their lse, so the order of blocks does not matter (Liu et al. 2023,
arXiv:2310.01889). Backward, the gradient of a block travels one hop behind the block, so sending never waits for
computing. It arrives home with the contributions of all devices.

Packed rows save work that a single long clip cannot save. A device skips the computation of a block that shares no
segment with its queries; no collective depends on that. If no clip reaches beyond r blocks, blocks travel r hops to
both sides and not all the way round.

In this module a *block* is a device's share of keys, values and their ids.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from minisora_jax.parallel.kernels import Kernel
from minisora_jax.parallel.kernels.blockwise import extent, meet, seen_extent
from minisora_jax.parallel.kernels.in_order import merge

SAVED = "attention"  # the checkpoint name of o and lse, for remat policies that keep them
AXIS = "ring"  # the mesh axis


class Trip(NamedTuple):
    """One direction that blocks travel in."""

    direction: int  # 1 or -1
    hops: int
    hops_home: int  # that the block's gradient then travels; the sign is its direction


@dataclasses.dataclass(frozen=True)
class Ring:
    """The static settings of `ring_attention`."""

    kernel: Kernel
    scale: float  # of the logits
    size: int = 1  # devices along the axis
    max_segment_len: int = 0  # no segment has more tokens; 0: unknown
    causal: bool = False  # see `attend`

    def reach_in_blocks(self, block: int) -> int:
        """Blocks of `block` tokens, to either side of a token's own, that a segment may reach."""
        return min(-(-(self.max_segment_len - 1) // block), self.size) if self.max_segment_len else self.size

    def hop_schedule(self, block: int) -> tuple[Trip, ...]:
        """The trips of blocks of `block` tokens.

        Trips to both sides and back are chosen only where the reach is below a third of the ring: in the backward pass
        the float32 gradients also travel out and home, each way with twice the bytes of the block.
        """
        reach = self.reach_in_blocks(block)
        if self.size == 1:
            return ()
        if 3 * reach < self.size:
            return (Trip(1, reach, -reach), Trip(-1, reach, reach)) if reach else ()
        return (Trip(1, self.size - 1, 1),)

    def send(self, tree: Any, direction: int) -> Any:
        """The tree of arrays that the neighbour against `direction` holds, after all devices sent theirs on."""
        pairs = [(i, (i + direction) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, pairs), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def ring_attention(
    q_BSNK: jax.Array,
    k_BMNK: jax.Array,
    v_BMNK: jax.Array,
    q_segment_BS: jax.Array,
    kv_segment_BM: jax.Array,
    ring: Ring,
) -> jax.Array:
    """Attention of this device's queries over the keys of all devices along the ring axis, (B, S, N, K).

    Call it inside `jax.shard_map`; a ring of one device works anywhere. The gradient keeps q, k, v, ids, o and lse.
    """
    return _forward(q_BSNK, k_BMNK, v_BMNK, q_segment_BS, kv_segment_BM, ring)[0]


def forward_only(
    q_BSNK: jax.Array,
    k_BMNK: jax.Array,
    v_BMNK: jax.Array,
    q_segment_BS: jax.Array,
    kv_segment_BM: jax.Array,
    ring: Ring,
) -> jax.Array:
    """`ring_attention` without its own gradient, so that JAX can differentiate it forward (`jax.jvp`).

    The kernel must be JAX alone: "blockwise" or "reference".
    """
    return _forward(q_BSNK, k_BMNK, v_BMNK, q_segment_BS, kv_segment_BM, ring)[0]


def _forward(q, k, v, q_ids, kv_ids, ring: Ring):
    visit = lambda block: ring.kernel.forward(q, block[0], block[1], q_ids, block[2], ring.scale, ring.causal)
    block = (k, v, kv_ids)
    o, lse = visit(block)
    trips = ring.hop_schedule(k.shape[1])
    if trips:
        near = _neighbours(q_ids, kv_ids, ring)
        merged = (o.astype(jnp.float32), lse)

        def join(merged, block, away):
            return jax.lax.cond(near(away), lambda m: merge(m, visit(block)), lambda m: m, merged)

        for trip in trips:
            merged = _travel(merged, block, trip.direction, trip.hops, join, ring)
        o, lse = merged[0].astype(v.dtype), merged[1]
    o, lse = checkpoint_name(o, SAVED), checkpoint_name(lse, SAVED)
    return o, (q, k, v, q_ids, kv_ids, o, lse)


def _travel(state, block, direction, hops, join, ring):
    """The state after join(state, block from `away` devices back, away) for away = 1 to hops.

    The next block is sent while a block is joined.
    """
    block = ring.send(block, direction)

    def hop(i, carry):
        state, block = carry
        ahead = ring.send(block, direction)
        return join(state, block, direction * i), ahead

    state, block = jax.lax.fori_loop(1, hops, hop, (state, block))
    return join(state, block, direction * hops)


def _backward(ring: Ring, saved, d_o):
    q, k, v, q_ids, kv_ids, o, lse = saved
    visit = lambda block: ring.kernel.backward(
        q, block[0], block[1], q_ids, block[2], o, lse, d_o, ring.scale, ring.causal
    )
    block = (k, v, kv_ids)
    d_q, *d_kv = visit(block)
    trips = ring.hop_schedule(k.shape[1])
    if not trips:
        return d_q, *d_kv, None, None
    near = _neighbours(q_ids, kv_ids, ring)
    d_q, d_kv = jax.tree.map(lambda x: x.astype(jnp.float32), (d_q, tuple(d_kv)))

    def join(state, block, away):
        add = lambda state: jax.tree.map(lambda s, x: s + x.astype(jnp.float32), state, _split(visit(block)))
        return jax.lax.cond(near(away), add, lambda state: state, state)

    arrived = jax.tree.map(jnp.zeros_like, d_kv)
    for trip in trips:
        d_q, d_kv = _travel_with_gradient((d_q, d_kv), block, trip.direction, trip.hops, join, ring)
        send_home = functools.partial(ring.send, direction=1 if trip.hops_home > 0 else -1)
        home = jax.lax.fori_loop(0, abs(trip.hops_home), lambda _, x, send=send_home: send(x), d_kv)
        arrived = jax.tree.map(jnp.add, arrived, home)
        d_kv = jax.tree.map(jnp.zeros_like, d_kv)  # the first trip took this device's own contribution along
    d_k, d_v = arrived
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


def _travel_with_gradient(state, block, direction, hops, join, ring):
    """`_travel`, with the gradient of each block one hop behind it: each hop sends what the hop before computed."""
    block = ring.send(block, direction)

    def hop(i, carry):
        (d_q, d_kv), block = carry
        ahead, d_kv = ring.send(block, direction), ring.send(d_kv, direction)
        return join((d_q, d_kv), block, direction * i), ahead

    (d_q, d_kv), block = jax.lax.fori_loop(1, hops, hop, (state, block))
    return join((d_q, ring.send(d_kv, direction)), block, direction * hops)


def _split(gradients):
    d_q, *d_kv = gradients
    return d_q, tuple(d_kv)


def _neighbours(q_ids, kv_ids, ring: Ring):
    """A function of `away`: whether the block from `away` devices back may share a segment with these queries."""
    own, all_extents = seen_extent(q_ids, ring.causal), jax.lax.all_gather(extent(kv_ids), AXIS)  # (B,), (ring, B)
    me = jax.lax.axis_index(AXIS)

    def near(away):
        return meet(own, jax.tree.map(lambda x: x[(me - away) % ring.size], all_extents))

    return near


ring_attention.defvjp(_forward, _backward)

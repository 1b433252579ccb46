"""Attention of a sequence cut over devices: keys and values go round a ring, whatever kernel computes each visit.

    device     0    1    2    3        hop 0: its own block of keys and values
    queries   q0   q1   q2   q3        hop i: the block of the device i to its left, sent on to the right meanwhile
    hop 1     k3   k0   k1   k2

Blockwise softmax makes the order irrelevant: each visit gives (o, lse), and two merge by their lse (Liu et al. 2023,
arXiv:2310.01889). Backward, the gradient of a block travels one hop behind the block itself, so that sending never
waits for computing, and arrives home with every device's part in it.

Packed rows make two things free that a single long clip must pay for. A visit to a block with no segment in common is
left out; no collective depends on it. And where no clip is long enough to reach beyond r blocks, blocks travel r hops
to both sides and not all the way round.

The names in this module: a *block* is a device's share of keys, values and their ids; *hops* is a static number.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from minisora_jax.parallel.kernels import EMPTY
from minisora_jax.parallel.kernels.blockwise import extent, meet

SAVED = "attention"  # the name of o and lse, for a remat policy that keeps them


@dataclasses.dataclass(frozen=True)
class Ring:
    """What attention needs to know of its surroundings; all static."""

    kernel: object  # a module of parallel/kernels
    scale: float
    axis: str = "ring"
    size: int = 1  # devices along the axis
    max_segment_len: int = 0  # tokens of the longest segment; 0: not known

    def reach_in_blocks(self, block: int) -> int:
        """Blocks of `block` tokens that a segment may stretch to either side of any of its tokens' own."""
        return min(-(-(self.max_segment_len - 1) // block), self.size) if self.max_segment_len else self.size

    def hop_schedule(self, block: int) -> tuple[tuple[int, int, int], ...]:
        """(direction, hops, hops home, 1 or -1 of the direction) for blocks to travel.

        To both sides and back again is worth it only where the reach is below a third of the ring: backward, the
        float32 gradients of a block then go out and come home, each way at twice the bytes of the block itself.
        """
        reach_in_blocks = self.reach_in_blocks(block)
        if self.size == 1:
            return ()
        if 3 * reach_in_blocks < self.size:
            return (
                ((1, reach_in_blocks, -reach_in_blocks), (-1, reach_in_blocks, reach_in_blocks))
                if reach_in_blocks
                else ()
            )
        return ((1, self.size - 1, 1),)

    def send(self, tree, direction: int, times: int = 1):
        """A tree of arrays to the neighbour in that direction, so many times over."""
        pairs = [(i, (i + direction) % self.size) for i in range(self.size)]
        once = lambda tree: jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, pairs), tree)
        return once(tree) if times == 1 else jax.lax.fori_loop(0, times, lambda _, tree: once(tree), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def ring_attention(q_BSNK, k_BTNK, v_BTNK, q_segment_BS, kv_segment_BT, ring: Ring):
    """o (B, S, N, K) of this device's queries over the keys of all devices along the ring's axis.

    Runs inside `jax.shard_map`, or anywhere for a ring of one. Kept for the gradient: q, k, v, ids, o and lse.
    """
    return _forward(q_BSNK, k_BTNK, v_BTNK, q_segment_BS, kv_segment_BT, ring)[0]


def _forward(q, k, v, q_ids, kv_ids, ring: Ring):
    visit = lambda block: ring.kernel.forward(q, *block[:2], q_ids, block[2], ring.scale)
    block = (k, v, kv_ids)
    o, lse = visit(block)
    hop_schedule = ring.hop_schedule(k.shape[1])
    if hop_schedule:
        near = _neighbours(q_ids, kv_ids, ring)
        merged = (o.astype(jnp.float32), lse)

        def join(merged, block, away):
            return jax.lax.cond(near(away), lambda m: _merge(m, visit(block)), lambda m: m, merged)

        for direction, hops, _ in hop_schedule:
            merged = _travel(merged, block, direction, hops, join, ring)
        o, lse = merged[0].astype(v.dtype), merged[1]
    o, lse = checkpoint_name(o, SAVED), checkpoint_name(lse, SAVED)
    return o, (q, k, v, q_ids, kv_ids, o, lse)


def _travel(state, block, direction, hops, join, ring):
    """join(state, the block from `away` devices back, away) for away = 1 .. hops; the next is under way meanwhile."""
    block = ring.send(block, direction)

    def hop(i, carry):
        state, block = carry
        ahead = ring.send(block, direction)
        return join(state, block, direction * i), ahead

    state, block = jax.lax.fori_loop(1, hops, hop, (state, block))
    return join(state, block, direction * hops)


def _backward(ring: Ring, saved, d_o):
    q, k, v, q_ids, kv_ids, o, lse = saved
    visit = lambda block: ring.kernel.backward(q, *block[:2], q_ids, block[2], o, lse, d_o, ring.scale)
    block = (k, v, kv_ids)
    d_q, *d_kv = visit(block)
    hop_schedule = ring.hop_schedule(k.shape[1])
    if not hop_schedule:
        return d_q, *d_kv, None, None
    near = _neighbours(q_ids, kv_ids, ring)
    d_q, d_kv = jax.tree.map(lambda x: x.astype(jnp.float32), (d_q, tuple(d_kv)))

    def join(state, block, away):
        add = lambda state: jax.tree.map(lambda s, x: s + x.astype(jnp.float32), state, _split(visit(block)))
        return jax.lax.cond(near(away), add, lambda state: state, state)

    arrived = jax.tree.map(jnp.zeros_like, d_kv)
    for direction, hops, home in hop_schedule:
        d_q, d_kv = _travel_with_gradient((d_q, d_kv), block, direction, hops, join, ring)
        homewards = functools.partial(ring.send, direction=1 if home > 0 else -1)
        arrived = jax.tree.map(
            jnp.add, arrived, jax.lax.fori_loop(0, abs(home), lambda _, x, send=homewards: send(x), d_kv)
        )
        d_kv = jax.tree.map(jnp.zeros_like, d_kv)  # this device's own part has gone with the first
    d_k, d_v = arrived
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


def _travel_with_gradient(state, block, direction, hops, join, ring):
    """As _travel, with the block's gradient one hop behind it: what is sent was finished the hop before."""
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
    """away -> whether the block that comes from `away` devices back may share a segment with these queries."""
    here, everywhere = extent(q_ids), jax.lax.all_gather(extent(kv_ids), ring.axis)  # (B,), (ring, B)
    me = jax.lax.axis_index(ring.axis)

    def near(away):
        return meet(here, jax.tree.map(lambda x: x[(me - away) % ring.size], everywhere))

    return near


def _merge(one, other):
    """Two (o, lse) over different keys as one over both; o float32."""
    (o, lse), (o2, lse2) = one, other
    both = jnp.logaddexp(lse, lse2)  # EMPTY + log 2 where both are empty: o is 0 then
    share = lambda x: jnp.moveaxis(jnp.exp(x - both), 1, 2)[..., None]
    return o * share(lse) + o2.astype(jnp.float32) * share(lse2), jnp.maximum(both, EMPTY)


ring_attention.defvjp(_forward, _backward)

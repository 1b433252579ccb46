"""Attention in the order of frames from a kernel that knows equal ids and the order of tokens only, such as splash.

A query sees the tokens of its clip up to itself, which is token-causal attention by clip, and the later tokens of its
own frame. The second are token-causal attention too: by frame, with the row reversed and the keys one place later. The
two merge by their lse, and their gradients add up.

    frame    0 0 1 1 1        1st part: . = keys up to the query     2nd part: + = later keys of the frame
    query 2  . . . + +

Ids rise along a row, so of two parts of a row one is earlier. A query sees all of its clip in an earlier part, and the
rest of its frame in a later one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from minisora_jax.parallel.kernels.reference import EMPTY, FRAMES

# (q, k, v, ids, ids, scale, in_token_order) -> (o, lse); with o, lse, d_o after the ids: -> (d_q, d_k, d_v).
# in_token_order: a query sees the keys at its own place and before, which needs as many keys as queries.
Run = Callable[..., Any]


def forward(run: Run, q, k, v, q_ids, kv_ids, scale: float) -> tuple[jax.Array, jax.Array]:
    """(o, lse), see `kernels.Kernel`. Keys are the queries' own tokens, with or without others before, or others."""

    def own(k, v, kv_ids):
        up_to = run(q, k, v, q_ids // FRAMES, kv_ids // FRAMES, scale, True)
        o, lse = run(_reversed(q), *map(_one_later, (k, v)), _reversed(q_ids), _one_later(kv_ids), scale, True)
        return merge(up_to, (_reversed(o), lse[..., ::-1]))

    def other(k, v, kv_ids):
        return run(q, k, v, *_of_other_part(q_ids, kv_ids), scale, False)

    parts = _parts(q_ids, kv_ids, own, other)
    first, *rest = [part(k[:, a:b], v[:, a:b], kv_ids[:, a:b]) for part, a, b in parts]
    return merge(first, rest[0]) if rest else first


def backward(run: Run, q, k, v, q_ids, kv_ids, o, lse, d_o, scale: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(d_q, d_k, d_v), see `kernels.Kernel`."""

    def own(k, v, kv_ids):
        up_to = run(q, k, v, q_ids // FRAMES, kv_ids // FRAMES, o, lse, d_o, scale, True)
        queries, ids = (_reversed(q), *map(_one_later, (k, v))), (_reversed(q_ids), _one_later(kv_ids))
        d_q, d_k, d_v = run(*queries, *ids, _reversed(o), lse[..., ::-1], _reversed(d_o), scale, True)
        return jax.tree.map(jnp.add, up_to, (_reversed(d_q), _one_earlier(d_k), _one_earlier(d_v)))

    def other(k, v, kv_ids):
        return run(q, k, v, *_of_other_part(q_ids, kv_ids), o, lse, d_o, scale, False)

    parts = _parts(q_ids, kv_ids, own, other)
    grads = [part(k[:, a:b], v[:, a:b], kv_ids[:, a:b]) for part, a, b in parts]
    d_k, d_v = (jnp.concatenate([grad[i] for grad in grads], axis=1) for i in (1, 2))
    return functools.reduce(jnp.add, [grad[0] for grad in grads]), d_k, d_v


def merge(one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(o, lse) over two sets of keys, from the (o, lse) over each."""
    (o, lse), (o2, lse2) = one, other
    both = jnp.logaddexp(lse, lse2)  # EMPTY + log 2 where both sets are empty; o is 0 there
    share = lambda x: jnp.moveaxis(jnp.exp(x - both), 1, 2)[..., None]
    merged = o.astype(jnp.float32) * share(lse) + o2.astype(jnp.float32) * share(lse2)
    return merged.astype(o.dtype), jnp.maximum(both, EMPTY)


def _parts(q_ids, kv_ids, own, other) -> list[tuple[Callable, int, int]]:
    """(function, first key, after the last) of the parts of the keys: those before the queries' own, and as many."""
    S, M = q_ids.shape[1], kv_ids.shape[1]
    if M < S:
        return [(other, 0, M)]

    def last(k, v, kv_ids):
        return jax.lax.cond(jnp.all(q_ids == kv_ids), own, other, k, v, kv_ids)

    return [*([(other, 0, M - S)] if M > S else []), (last, M - S, M)]


def _of_other_part(q_ids, kv_ids) -> tuple[jax.Array, jax.Array]:
    """Ids (B, S) and (B, M), of which equal ones see each other, for keys that all are earlier or all are later."""
    latest = jnp.max(q_ids, axis=1, keepdims=True)
    earliest = jnp.min(jnp.where(kv_ids > 0, kv_ids, jnp.iinfo(kv_ids.dtype).max), axis=1, keepdims=True)
    of = lambda ids: jnp.where(earliest >= latest, ids, ids // FRAMES)
    return of(q_ids), of(kv_ids)


def _reversed(x):
    return x[:, ::-1]


def _one_later(x):
    """Keys or ids reversed along axis 1, each one place later; zeros come first. Token 0, the last, is left out."""
    return jnp.pad(x[:, :0:-1], ((0, 0), (1, 0), *((0, 0),) * (x.ndim - 2)))


def _one_earlier(d_x):
    """The transpose of `_one_later`."""
    return jnp.pad(d_x[:, :0:-1], ((0, 0), (1, 0), *((0, 0),) * (d_x.ndim - 2)))

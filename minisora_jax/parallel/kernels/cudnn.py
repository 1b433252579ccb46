"""cuDNN's fused attention with ragged offsets, for GPUs from Hopper on: each segment is a sequence of its own.

cuDNN takes the start and the length of each sequence, so the number of segments of a row has a static bound, `slots`. A
segment's tokens lie together, and its id is 1 to `slots`. That is true of clips and captions in packed rows, and not of
spatial and temporal attention. cuDNN returns the lse by sequence, (B slots, N, S); here it is gathered to (B, N, S).

jax wraps this form but does not publish it: the primitives are private ones of jax 0.11 and 0.12.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from minisora_jax.parallel.kernels.reference import EMPTY

MOST_STATISTICS = 2**29  # numbers of the lse by sequence: 2 GiB


class Sequences(NamedTuple):
    """The segments that have both queries and keys; rows of cuDNN's tables are those of all (row, slot), in order."""

    q_start_BG: jax.Array  # first token of each segment in its row; -1 where there is none
    q_length_BG: jax.Array
    kv_start_BG: jax.Array
    kv_length_BG: jax.Array

    @property
    def exists_BG(self) -> jax.Array:
        return self.q_length_BG > 0


@dataclasses.dataclass(frozen=True)
class Cudnn:
    """The kernel for rows of at most `slots` segments. float16 and bfloat16 only, heads of at most 256."""

    slots: int

    def fits(self, q_BSNK: jax.Array) -> bool:
        """Whether cuDNN can take these queries, by type and size."""
        B, S, N, K = q_BSNK.shape
        small = B * self.slots * N * S <= MOST_STATISTICS
        return q_BSNK.dtype.itemsize == 2 and K % 8 == 0 and K <= 256 and self.slots > 0 and small

    def forward(
        self,
        q_BSNK: jax.Array,
        k_BMNK: jax.Array,
        v_BMNK: jax.Array,
        q_segment_BS: jax.Array,
        kv_segment_BM: jax.Array,
        scale: float,
        causal: bool = False,
        /,
    ) -> tuple[jax.Array, jax.Array]:
        """As `Kernel.forward`, not causal."""
        sequences = sequences_of(q_segment_BS, kv_segment_BM, self.slots)
        o, statistics = _call("fwd", scale, q_BSNK, k_BMNK, v_BMNK, sequences)
        seen_BS = _of_tokens(sequences.exists_BG, q_segment_BS) & (q_segment_BS > 0)
        lse_BNS = jnp.where(seen_BS[:, None], to_rows(statistics, sequences, q_segment_BS), EMPTY)
        return jnp.where(seen_BS[..., None, None], o, 0), lse_BNS

    def backward(
        self,
        q_BSNK: jax.Array,
        k_BMNK: jax.Array,
        v_BMNK: jax.Array,
        q_segment_BS: jax.Array,
        kv_segment_BM: jax.Array,
        o_BSNK: jax.Array,
        lse_BNS: jax.Array,
        d_o_BSNK: jax.Array,
        scale: float,
        causal: bool = False,
        /,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As `Kernel.backward`, not causal."""
        sequences = sequences_of(q_segment_BS, kv_segment_BM, self.slots)
        statistics = to_sequences(lse_BNS, sequences)
        gradients = _call("bwd", scale, q_BSNK, k_BMNK, v_BMNK, sequences, statistics, o_BSNK, d_o_BSNK)
        ids = (q_segment_BS, kv_segment_BM, kv_segment_BM)
        seen = (_of_tokens(sequences.exists_BG, x) & (x > 0) for x in ids)
        d_q, d_k, d_v = (jnp.where(s[..., None, None], d, 0) for s, d in zip(seen, gradients))
        return d_q, d_k, d_v


def sequences_of(q_segment_BS: jax.Array, kv_segment_BM: jax.Array, slots: int) -> Sequences:
    """Where the segments 1 to `slots` start and how long they are, in queries and in keys."""
    slots = max(slots, 2)  # one sequence a row is another form of cuDNN's
    (q_start, q_length), (kv_start, kv_length) = (_bounds(ids, slots) for ids in (q_segment_BS, kv_segment_BM))
    exists = (q_length > 0) & (kv_length > 0)
    only = lambda x: jnp.where(exists, x, -1).astype(jnp.int32)
    return Sequences(only(q_start), only(q_length), only(kv_start), only(kv_length))


def to_rows(statistics_ANS: jax.Array, sequences: Sequences, q_segment_BS: jax.Array) -> jax.Array:
    """The statistics of each query, (B, N, S), from those by sequence; A = B slots, sequences that exist first."""
    B, G = sequences.q_start_BG.shape
    number_BG = jnp.cumsum(sequences.exists_BG.reshape(-1)).reshape(B, G) - 1
    number_BS, start_BS = (_of_tokens(x, q_segment_BS) for x in (number_BG, sequences.q_start_BG))
    place_BS = jnp.arange(q_segment_BS.shape[1]) - start_BS
    heads = jnp.arange(statistics_ANS.shape[1])
    return statistics_ANS.at[number_BS[:, None], heads[None, :, None], place_BS[:, None]].get(mode="clip")


def to_sequences(lse_BNS: jax.Array, sequences: Sequences) -> jax.Array:
    """The inverse of `to_rows`: (A, N, S)."""
    G = sequences.q_start_BG.shape[1]
    exists = sequences.exists_BG.reshape(-1)
    slots_A = jnp.nonzero(exists, size=exists.size, fill_value=0)[0]
    place_AS = sequences.q_start_BG.reshape(-1)[slots_A][:, None] + jnp.arange(lse_BNS.shape[2])
    heads = jnp.arange(lse_BNS.shape[1])
    return lse_BNS.at[(slots_A // G)[:, None, None], heads[None, :, None], place_AS[:, None]].get(mode="clip")


def _bounds(ids_BS: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
    is_id_BGS = ids_BS[:, None, :] == jnp.arange(1, slots + 1)[None, :, None]
    return jnp.argmax(is_id_BGS, axis=-1), jnp.sum(is_id_BGS, axis=-1)


def _of_tokens(x_BG: jax.Array, segment_BS: jax.Array) -> jax.Array:
    """The value of each token's segment, (B, S); the first slot's for padding."""
    return jnp.take_along_axis(x_BG, jnp.maximum(segment_BS - 1, 0), axis=1)


def _call(which: str, scale: float, q_BSNK, k_BMNK, v_BMNK, sequences: Sequences, *residuals) -> Any:
    """cuDNN's primitive "fwd" -> (o, statistics), or "bwd" -> (d_q, d_k, d_v)."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    primitive = getattr(cudnn, f"_dot_product_attention_{which}_p_wrapper")
    offsets = lambda start: jnp.pad(start, ((0, 0), (0, 1)), constant_values=-1)
    none = jnp.zeros(0, q_BSNK.dtype)
    operands = (q_BSNK, k_BMNK, v_BMNK, none, sequences.q_length_BG, sequences.kv_length_BG)
    operands += (offsets(sequences.q_start_BG), offsets(sequences.kv_start_BG), none, none, *residuals)
    options: dict[str, Any] = {"scale": scale, "seed": 42, "dropout_rate": 0.0, "variadic_args": (False, False)}
    options |= {"mask_type": cudnn.MaskType.PADDING, "layout": cudnn.AttentionLayout.BTNH.value}
    options["sliding_window_length"] = None
    if "score_mod" in inspect.signature(cudnn._dot_product_attention_fwd).parameters:  # from jax 0.12 on
        options["score_mod"] = None
    if which == "fwd":
        options["is_training"] = True
    return primitive.bind(*operands, **options)

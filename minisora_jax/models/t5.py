"""The encoders of T5 v1.1, ByT5 and umT5.

    x = embedding[ids]
    x = x + attention(norm(x)),   softmax(q k^T + b) v, unscaled, b by binned distance of key and query
    x = x + (gelu(norm(x) W_0) * norm(x) W_1) W_2

T5 (Raffel et al. 2020, arXiv:1910.10683) is implemented in its v1.1 form, with gated GELU (Shazeer 2020,
arXiv:2002.05202). ByT5 (Xue et al. 2021, arXiv:2105.13626) is the same model over bytes. In umT5 (Chung et al. 2023,
arXiv:2304.09151) every layer has a distance bias of its own. Several captions may share a row: the bias depends on
differences of places only, and attention stays within a segment.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from minisora_jax.models.layers import Einsum, Norm, scan_layers, sharded
from minisora_jax.parallel.attention import attend
from minisora_jax.parallel.mesh import lookup, shard


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Shape of the encoder. The defaults are those of T5 v1.1 XXL.

    Raises:
        ValueError: The distance buckets do not fit `max_distance`.
    """

    vocabulary: int = 32_128
    width: int = 4096
    heads: int = 64
    head_width: int = 64
    mlp: int = 10_240
    depth: int = 24
    shared_bias: bool = True  # one distance bias for all layers; False for umT5
    buckets: int = 32
    max_distance: int = 128
    dtype: str = "bfloat16"  # of the computation

    def __post_init__(self) -> None:
        if self.buckets % 4 or self.max_distance <= self.buckets // 4:
            raise ValueError(
                f"buckets={self.buckets} must be a multiple of 4, and max_distance={self.max_distance} must be above "
                f"buckets / 4"
            )


def distance_buckets(cfg: T5Config, length: int) -> np.ndarray:
    """The bucket (query, key) of the distance key - query; int (length, length).

    Half of the buckets are for each sign. Buckets are exact up to a quarter of their number, then logarithmic up to
    `max_distance` (the T5 paper, section 2.1).
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half, exact = cfg.buckets // 2, cfg.buckets // 4
    far = np.log(np.maximum(np.abs(distance), 1).astype(np.float32) / np.float32(exact))
    far = far / np.float32(np.log(cfg.max_distance / exact)) * np.float32(half - exact)
    near = np.abs(distance) < exact
    bucket = np.where(near, np.abs(distance), np.minimum(exact + far.astype(np.int32), half - 1))
    return bucket + half * (distance > 0)


def distance_bias(table: jax.Array, cfg: T5Config, length: int) -> jax.Array:
    """The attention bias (heads, length, length), float32, from a table (buckets, heads)."""
    one_hot = jax.nn.one_hot(distance_buckets(cfg, length), cfg.buckets)
    return jnp.einsum("smb,bn->nsm", one_hot, table.astype(jnp.float32), precision="highest")


class T5Block(nn.Module):
    """One layer: self-attention with a distance bias, then the gated MLP."""

    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array, inputs: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, None]:
        segment_BL, bias_NLL = inputs
        cfg = self.config
        D, N, K, F = cfg.width, cfg.heads, cfg.head_width, cfg.mlp
        if not cfg.shared_bias:
            table = self.param("distance", nn.initializers.normal(D**-0.5), (cfg.buckets, N))
            bias_NLL = distance_bias(table, cfg, x.shape[1])
        linear = lambda equation, shape, name, inputs=1: Einsum(equation, shape, inputs, bias=False, name=name)
        h = Norm(name="attention_norm")(x)
        q, k, v = (linear("bld,dnk->blnk", (D, N, K), name)(h) for name in ("q", "k", "v"))
        h = attend(q, k, v, segment_BL, segment_BL, scale=1.0, bias_NSM=bias_NLL)
        x = x + linear("blnk,nkd->bld", (N, K, D), "out", 2)(h)
        h = Norm(name="mlp_norm")(x)
        gate = nn.gelu(linear("bld,df->blf", (D, F), "gate")(h), approximate=True)
        h = gate * linear("bld,df->blf", (D, F), "up")(h)
        return x + linear("blf,fd->bld", (F, D), "down")(h), None


class T5Encoder(nn.Module):
    """The whole encoder: one feature vector for each token."""

    config: T5Config

    @nn.compact
    def __call__(self, ids_BL: jax.Array, segment_BL: jax.Array) -> jax.Array:
        """The features (B, L, D) of packed captions, zeros on padding.

        Args:
            ids_BL: Token ids, int32.
            segment_BL: Segment ids; 0 is padding.
        """
        cfg = self.config
        table = self.param("embedding", sharded(nn.initializers.normal(1.0), 0), (cfg.vocabulary, cfg.width))
        x = lookup(shard(table, P(None, None)), ids_BL).astype(cfg.dtype)
        bias_NLL = None
        if cfg.shared_bias:
            distance = self.param("distance", nn.initializers.normal(cfg.width**-0.5), (cfg.buckets, cfg.heads))
            bias_NLL = distance_bias(distance, cfg, ids_BL.shape[1])
        stack = scan_layers(T5Block, cfg.depth, in_axes=nn.broadcast)
        x, _ = stack(cfg, name="blocks")(x, (segment_BL, bias_NLL))
        return jnp.where(segment_BL[..., None] > 0, Norm(name="norm")(x), 0)

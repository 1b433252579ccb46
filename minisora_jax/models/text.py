"""Captions as tokens, and the small refiner trained with the diffusion transformer.

The default needs no download. It is ByT5's vocabulary (Xue et al. 2021, arXiv:2105.13626): a token is a UTF-8 byte + 3,
0 is padding, and 1 ends a caption. The refiner's first layer reads the 7 bytes around each byte, so it sees words. It
then pools four bytes into one token, as CANINE does (Clark et al. 2021, arXiv:2103.06874). The tokens of a caption
attend to each other. Features of a large frozen encoder can replace the bytes; they enter by a projection.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import PartitionSpec as P

from minisora_jax.models.layers import MLP, Attention, Einsum, Norm, places_in_run, sharded
from minisora_jax.models.rope import rope_angles
from minisora_jax.parallel.mesh import shard

BYTE_VOCABULARY = 384  # 3 specials, 256 bytes, 125 unused (ByT5 keeps them for its sentinels)
END = 1
PAD = 0
NEIGHBOURHOOD = 7  # bytes that one position of the refiner's first layer sees
BYTES_PER_TOKEN = 4
BYTE_WIDTH = 64  # width of a byte's embedding


def encode_bytes(caption: str) -> np.ndarray:
    """The ByT5 ids (L, 1) of a caption, int32. The end token is included, and padding makes L a multiple of 4."""
    ids = [b + 3 for b in caption.encode("utf-8")] + [END]
    return np.array(ids + [PAD] * (-len(ids) % BYTES_PER_TOKEN), np.int32)[:, None]


def shift_within(x_BLD: jax.Array, segment_BL: jax.Array, by: int) -> jax.Array:
    """x of the token `by` places later in the row (earlier if negative); zeros if that token is of another segment."""
    length, pad = segment_BL.shape[1], abs(by)

    def move(a: jax.Array, fill: int) -> jax.Array:
        widths = ((0, 0), (pad, pad)) + ((0, 0),) * (a.ndim - 2)
        return jnp.pad(a, widths, constant_values=fill)[:, pad + by : pad + by + length]

    same = move(segment_BL, -1) == segment_BL
    return jnp.where(same[..., None], move(x_BLD, 0), 0)


class ByteTokens(nn.Module):
    """ByT5 ids (B, L, 1) -> (tokens (B, L / 4, width), segment ids (B, L / 4)). Captions start at multiples of 4."""

    width: int
    dtype: str

    @nn.compact
    def __call__(self, ids_BL1: jax.Array, segment_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        # A one-hot product shards, which a gather does not; the table is small.
        table = self.param("embedding", sharded(nn.initializers.normal(1.0), 0), (BYTE_VOCABULARY, BYTE_WIDTH))
        x = (ids_BL1 == jnp.arange(BYTE_VOCABULARY)).astype(self.dtype) @ shard(table, P(None, None)).astype(self.dtype)
        reach = NEIGHBOURHOOD // 2
        x = jnp.concatenate([shift_within(x, segment_BL, by) for by in range(-reach, reach + 1)], axis=-1)
        x = nn.gelu(Einsum("ble,ed->bld", (x.shape[-1], 2 * self.width), name="words")(x))
        x = jnp.mean(rearrange(x, "b (l k) d -> b l k d", k=BYTES_PER_TOKEN), axis=2)
        return Einsum("ble,ed->bld", (2 * self.width, self.width), name="tokens")(x), segment_BL[:, ::BYTES_PER_TOKEN]


class TextRefiner(nn.Module):
    """Caption features of packed rows -> (tokens_BLD, segment_BL). Captions do not see each other.

    Attributes:
        width: Width of the tokens.
        depth: Layers of attention and MLP.
        heads: Attention heads.
        features: E, the width of the incoming features. 1: they are byte ids.
        dtype: Of the computation.
    """

    width: int
    depth: int
    heads: int
    features: int
    dtype: str

    @nn.compact
    def __call__(self, text_BLE: jax.Array, segment_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        if self.features == 1:
            x, segment_BL = ByteTokens(self.width, self.dtype, name="bytes")(text_BLE, segment_BL)
        else:
            x = Einsum("ble,ed->bld", (self.features, self.width), name="project")(text_BLE.astype(self.dtype))
        # Positions count from each caption's first token, so packing changes no angle.
        angles = rope_angles(places_in_run(segment_BL)[..., None], self.width // self.heads)
        for i in range(self.depth):
            x = x + Attention(self.heads, name=f"attention{i}")(Norm(name=f"norm{i}a")(x), segment_BL, angles)
            x = x + MLP(name=f"mlp{i}")(Norm(name=f"norm{i}b")(x))
        return Norm(name="norm_out")(x), segment_BL

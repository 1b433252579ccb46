"""Captions as tokens, and the small refiner trained with the diffusion transformer.

The default needs no download: ByT5's vocabulary (Xue et al. 2021, arXiv:2105.13626), where a token is a UTF-8
byte + 3, 0 pads and 1 ends. The refiner reads bytes a neighbourhood at a time, so that words are visible to its
first layer, then pools each four into one token, as CANINE does (Clark et al. 2021, arXiv:2103.06874), and lets a
caption's tokens attend to each other. Features of a large frozen encoder enter by a projection in the bytes' place.
"""

from __future__ import annotations

import flax.linen as nn
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
NEIGHBOURHOOD = 7  # bytes seen by one position of the refiner's first layer
BYTES_PER_TOKEN = 4
BYTE_WIDTH = 64  # of a byte's embedding


def encode_bytes(caption: str) -> np.ndarray:
    """A caption as ByT5 ids (L, 1) int32, the end token included, padded to whole tokens of four bytes."""
    ids = [b + 3 for b in caption.encode("utf-8")] + [END]
    return np.array(ids + [PAD] * (-len(ids) % BYTES_PER_TOKEN), np.int32)[:, None]


def shift_within(x_BLD, segment_BL, by: int):
    """x of the token `by` places later in the row (earlier where negative), zeros across segment borders."""
    length, pad = segment_BL.shape[1], abs(by)

    def move(a, fill):
        widths = ((0, 0), (pad, pad)) + ((0, 0),) * (a.ndim - 2)
        return jnp.pad(a, widths, constant_values=fill)[:, pad + by : pad + by + length]

    same = move(segment_BL, -1) == segment_BL
    return jnp.where(same[..., None], move(x_BLD, 0), 0)


class ByteTokens(nn.Module):
    """ByT5 ids (B, L, 1) -> ((B, L / 4, width), segment ids (B, L / 4)). Captions start at multiples of four."""

    width: int
    dtype: str

    @nn.compact
    def __call__(self, ids_BL1, segment_BL):
        # A one-hot product and not a gather: it shards, and the table is small.
        table = self.param("embedding", sharded(nn.initializers.normal(1.0), 0), (BYTE_VOCABULARY, BYTE_WIDTH))
        x = (ids_BL1 == jnp.arange(BYTE_VOCABULARY)).astype(self.dtype) @ shard(table, P(None, None)).astype(self.dtype)
        reach = NEIGHBOURHOOD // 2
        x = jnp.concatenate([shift_within(x, segment_BL, by) for by in range(-reach, reach + 1)], axis=-1)
        x = nn.gelu(Einsum("ble,ed->bld", (x.shape[-1], 2 * self.width), name="words")(x))
        x = jnp.mean(rearrange(x, "b (l k) d -> b l k d", k=BYTES_PER_TOKEN), axis=2)
        return Einsum("ble,ed->bld", (2 * self.width, self.width), name="tokens")(x), segment_BL[:, ::BYTES_PER_TOKEN]


class TextRefiner(nn.Module):
    """Caption features of a packed row -> (tokens_BLD, segment_BL), each caption by itself."""

    width: int
    depth: int
    heads: int
    features: int  # width E of the incoming features; 1: they are byte ids
    dtype: str

    @nn.compact
    def __call__(self, text_BLE, segment_BL):
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

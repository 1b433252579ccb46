"""CLIP's text encoder, as trained by OpenAI (Radford et al. 2021, arXiv:2103.00020) and OpenCLIP (arXiv:2212.07143).

    x = token[ids] + position[0, 1, ..]
    x = x + attention(norm(x)),   causal
    x = x + act(norm(x) W_1) W_2
    features = norm(x),   pooled = features at the caption's end token (W_projection)

Several captions may share a row. Positions restart in each caption, and attention stays within its segment.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from minisora_jax.models.layers import Einsum, LayerNorm, places_in_run, scan_layers, sharded
from minisora_jax.parallel.attention import attend
from minisora_jax.parallel.mesh import lookup, shard

ACTIVATIONS = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # OpenAI's
    "gelu": lambda x: nn.gelu(x, approximate=False),  # OpenCLIP's
}


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Shape of the encoder. The defaults are those of OpenAI's ViT-L/14.

    Raises:
        ValueError: The heads do not divide the width, or the activation is unknown.
    """

    vocabulary: int = 49_408
    width: int = 768
    heads: int = 12
    mlp: int = 3072
    depth: int = 12
    positions: int = 77  # the most tokens of a caption
    activation: str = "quick_gelu"
    projection: int | None = 768  # width of the pooled features; None: no projection
    end: int | None = None  # the token that ends a caption; None: the caption's highest id, as in published models
    dtype: str = "float32"  # of the computation

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} must be one of {', '.join(ACTIVATIONS)}")


class CLIPBlock(nn.Module):
    """One layer: self-attention within segments, then the MLP.

    Attributes:
        config: A `CLIPConfig`, or the config of the vision encoder (models/clip_vision.py).
        causal: Whether tokens see only those before them.
    """

    config: Any
    causal: bool = True

    @nn.compact
    def __call__(self, x_BLD: jax.Array, segment_BL: jax.Array) -> tuple[jax.Array, None]:
        cfg = self.config
        D, N, F, L = cfg.width, cfg.heads, cfg.mlp, x_BLD.shape[1]
        h = LayerNorm(epsilon=1e-5, name="attention_norm")(x_BLD)
        qkv_BL3NK = Einsum("bld,dpnk->blpnk", (D, 3, N, D // N), name="qkv")(h)
        # The bias makes attention causal within a row; `attend` keeps the segments apart.
        causal_bias_1LL = jnp.where(jnp.tri(L, dtype=bool), 0.0, -1e30)[None] if self.causal else None
        q, k, v = (qkv_BL3NK[:, :, i] for i in range(3))
        h = attend(q, k, v, segment_BL, segment_BL, bias_NSM=causal_bias_1LL)
        x_BLD = x_BLD + Einsum("blnk,nkd->bld", (N, D // N, D), inputs=2, name="out")(h)
        h = LayerNorm(epsilon=1e-5, name="mlp_norm")(x_BLD)
        h = ACTIVATIONS[cfg.activation](Einsum("bld,df->blf", (D, F), name="up")(h))
        return x_BLD + Einsum("blf,fd->bld", (F, D), name="down")(h), None


class CLIPEncoder(nn.Module):
    """The whole encoder: features of each token, and one pooled vector for each caption."""

    config: CLIPConfig

    @nn.compact
    def __call__(self, ids_BL: jax.Array, segment_BL: jax.Array, slots: int = 1) -> tuple[jax.Array, jax.Array]:
        """The features of packed captions.

        Args:
            ids_BL: Token ids, int32.
            segment_BL: Segment ids 1 to `slots`; 0 is padding.
            slots: G.

        Returns:
            features_BLD: Zeros on padding. NaN for tokens beyond `config.positions`.
            pooled_BGE: Zeros for slots without a caption. NaN where the caption's end is beyond `config.positions`.
        """
        cfg = self.config
        tokens = self.param("embedding", sharded(nn.initializers.normal(0.02), 0), (cfg.vocabulary, cfg.width))
        positions = self.param("positions", nn.initializers.normal(0.01), (cfg.positions, cfg.width))
        position_BL = places_in_run(segment_BL)
        fits_BL = position_BL < cfg.positions
        x = lookup(shard(tokens, P(None, None)), ids_BL) + lookup(positions, jnp.where(fits_BL, position_BL, 0))
        x = x.astype(cfg.dtype)
        stack = scan_layers(CLIPBlock, cfg.depth, in_axes=nn.broadcast)
        x, _ = stack(cfg, name="blocks")(x, segment_BL)
        x = jnp.where(segment_BL[..., None] > 0, LayerNorm(epsilon=1e-5, name="norm")(x), 0)
        ends_BGL = end_places(cfg, ids_BL, segment_BL, slots)
        pooled_BGE = jnp.einsum("bgl,bld->bgd", ends_BGL.astype(x.dtype), x)
        if cfg.projection is not None:
            pooled_BGE = Einsum("bgd,de->bge", (cfg.width, cfg.projection), bias=False, name="projection")(pooled_BGE)
        # A caption that is too long becomes NaN. The other captions of its row are not affected.
        too_long_BL = ~fits_BL & (segment_BL > 0)
        too_long_BG = jnp.any(ends_BGL & too_long_BL[:, None, :], axis=-1)
        invalidate = lambda features, mask: jnp.where(mask[..., None], jnp.nan, features)
        return invalidate(x, too_long_BL), invalidate(pooled_BGE, too_long_BG)


def end_places(cfg: CLIPConfig, ids_BL: jax.Array, segment_BL: jax.Array, slots: int) -> jax.Array:
    """(B, G, L) bool: True at the first end token of each caption, or at its first token if no token ends it."""
    inside_BGL = segment_BL[:, None, :] == jnp.arange(1, slots + 1)[:, None]
    score_BL = ids_BL + 1 if cfg.end is None else 1 + (ids_BL == cfg.end)
    score_BGL = jnp.where(inside_BGL, score_BL[:, None, :], 0)
    best_BG1 = jnp.max(score_BGL, axis=-1, keepdims=True)
    is_best_BGL = inside_BGL & (score_BGL == best_BG1)
    return is_best_BGL & (jnp.cumsum(is_best_BGL, axis=-1) == 1)

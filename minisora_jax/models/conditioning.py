"""Conditions of a clip beside its noise: a caption or class, the clip's size, an image, given frames.

The config says which of these modules a model has (models/dit_config.py).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from minisora_jax.models.dit_config import DiTConfig
from minisora_jax.models.layers import Einsum, LayerNorm, per_slot_mean, per_token, places_in_run, sharded
from minisora_jax.models.rope import sinusoids
from minisora_jax.models.text import TextRefiner
from minisora_jax.parallel.mesh import lookup, shard
from minisora_jax.types import PackedBatch


def caption_tokens(cfg: DiTConfig, batch: PackedBatch) -> tuple[tuple[jax.Array, jax.Array] | None, jax.Array | None]:
    """The caption's tokens, and their mean for each clip.

    Returns:
        caption: (tokens_BLD, segment_BL) for cross-attention; None with caption="label".
        pooled_BGE: Mean of each slot's tokens; None with caption="projected".
    """
    text_BLE, segment_BL, slots = batch.text_BLE, batch.text_segment_BL, batch.fps_BG.shape[1]
    if cfg.caption == "label":
        return None, per_slot_mean(Labels(cfg.classes, cfg.width, name="labels")(text_BLE), segment_BL, slots)
    if cfg.caption == "projected":
        return (Projection(cfg.width, cfg.dtype, name="text")(text_BLE), segment_BL), None
    refiner = TextRefiner(
        cfg.text_width, cfg.text_depth, cfg.text_width // 64, cfg.text_features, cfg.dtype, name="text"
    )
    text_BLE, segment_BL = refiner(text_BLE, segment_BL)
    return (text_BLE, segment_BL), per_slot_mean(text_BLE.astype(jnp.float32), segment_BL, slots)


class Labels(nn.Module):
    """Class ids (B, L, 1) -> (B, L, D): the caption of a clip is one token, its class (DiT)."""

    classes: int
    width: int

    @nn.compact
    def __call__(self, ids_BL1: jax.Array) -> jax.Array:
        table = self.param("embedding", sharded(nn.initializers.normal(0.02), 0), (self.classes, self.width))
        return lookup(shard(table, P(None, None)), ids_BL1[..., 0])


class Projection(nn.Module):
    """Caption features (B, L, E) -> (B, L, D) by two layers, each token by itself (PixArt, Wan)."""

    width: int
    dtype: str

    @nn.compact
    def __call__(self, text_BLE: jax.Array) -> jax.Array:
        E, D = text_BLE.shape[-1], self.width
        h = nn.gelu(Einsum("ble,ed->bld", (E, D), name="up")(text_BLE.astype(self.dtype)), approximate=True)
        return Einsum("bld,de->ble", (D, D), name="down")(h)


class ImageTokens(nn.Module):
    """An image encoder's tokens (B, I, E) -> (tokens_BID, segment_BI), for Wan's image-to-video."""

    config: DiTConfig

    @nn.compact
    def __call__(self, batch: PackedBatch) -> tuple[jax.Array, jax.Array]:
        E, D, count = self.config.image_features, self.config.width, self.config.image_positions
        if batch.image_BIE is None or batch.image_segment_BI is None:
            raise ValueError(f"the model attends to image tokens of width {E}, and the batch has none")
        x = batch.image_BIE.astype(self.config.dtype)
        if count:
            positions = self.param("positions", nn.initializers.zeros, (count, E)).astype(x.dtype)
            x = x + lookup(positions, jnp.minimum(places_in_run(batch.image_segment_BI), count - 1))
        x = LayerNorm(epsilon=1e-5, name="norm_in")(x)
        x = nn.gelu(Einsum("bie,ed->bid", (E, E), name="up")(x), approximate=False)
        x = Einsum("bie,ed->bid", (E, D), name="down")(x)
        return LayerNorm(epsilon=1e-5, name="norm_out")(x), batch.image_segment_BI


def with_given_frames(cfg: DiTConfig, x_BSP: jax.Array, batch: PackedBatch) -> jax.Array:
    """Tokens (B, S, P + x) with the channels of given frames after each latent's own, for Wan's image to video."""
    if not cfg.given_channels:
        return x_BSP
    if batch.given_BSx is None:
        raise ValueError(f"the model reads {cfg.given_channels} channels of given frames, and the batch has none")
    by_latent = lambda x, channels: x.reshape(*x.shape[:2], -1, channels)
    given = by_latent(batch.given_BSx.astype(x_BSP.dtype), cfg.given_channels)
    joined = jnp.concatenate([by_latent(x_BSP, cfg.latent_channels), given], axis=-1)
    return joined.reshape(*x_BSP.shape[:2], -1)


class ActionCondition(nn.Module):
    """The vector of each noise level (B, U, D) for the actions of its frame, which is added to the time embedding.

    It is zero in a new model, which so starts as the model without actions.
    """

    config: DiTConfig

    @nn.compact
    def __call__(self, batch: PackedBatch, frame_BU: jax.Array | None) -> jax.Array:
        width, D = self.config.action_width, self.config.width
        if frame_BU is None or batch.actions_BUx is None or batch.actions_BUx.shape[-1] != width:
            got = "none" if batch.actions_BUx is None else batch.actions_BUx.shape[-1]
            raise ValueError(
                f"the model reads {width} numbers of actions for each latent frame, and the batch has {got}"
            )
        h_BUD = Einsum("bux,xd->bud", (width, D), name="up")(batch.actions_BUx.astype(self.config.dtype))
        h_BUD = Einsum("bud,de->bue", (D, D), scale=0.0, name="down")(nn.silu(h_BUD))
        return per_token(h_BUD, frame_BU)


class ClipCondition(nn.Module):
    """The vector of each clip (B, G, D) that is added to the time embedding; None where the family has none.

    A class embedding (DiT), micro-conditioning (SDXL: arXiv:2307.01952), or height, width and aspect (PixArt).
    """

    config: DiTConfig

    @nn.compact
    def __call__(self, batch: PackedBatch, pooled_BGE: jax.Array | None) -> jax.Array | None:
        cfg = self.config
        D = cfg.width
        if cfg.caption == "label":
            return pooled_BGE
        if cfg.micro_conditioning and pooled_BGE is not None:  # a refined caption, as the config requires
            micro_BG4 = jnp.concatenate([batch.size_BG3.astype(jnp.float32), batch.fps_BG[..., None]], axis=-1)
            micro_BGx = sinusoids(micro_BG4, 64, max_period=1000.0).reshape(*batch.fps_BG.shape, 4 * 64)
            pooled = Einsum("bge,ed->bgd", (cfg.text_width, D), name="pooled_text")(pooled_BGE)
            # "facts" is the layer's name in saved weights.
            return pooled + Einsum("bge,ed->bgd", (4 * 64, D), name="facts")(micro_BGx)
        if cfg.size_pixels:
            pixels_BG2 = cfg.size_pixels * batch.size_BG3[..., 1:].astype(jnp.float32)
            aspect_BG1 = pixels_BG2[..., :1] / jnp.maximum(pixels_BG2[..., 1:], 1.0)
            sides_BGx = SizeEmbedding(D // 3, name="sides")(pixels_BG2).reshape(*batch.fps_BG.shape, 2 * (D // 3))
            return jnp.concatenate([sides_BGx, SizeEmbedding(D // 3, name="aspect")(aspect_BG1)[..., 0, :]], axis=-1)
        return None


class SizeEmbedding(nn.Module):
    """Numbers (B, G, x) -> (B, G, x, width): PixArt's embedding of a clip's sides and aspect."""

    width: int

    @nn.compact
    def __call__(self, value_BGx: jax.Array) -> jax.Array:
        h = Einsum("bgne,ed->bgnd", (256, self.width), name="up")(sinusoids(value_BGx, 256))
        return Einsum("bgnd,de->bgne", (self.width, self.width), name="down")(nn.silu(h))

"""The diffusion transformer over packed clips of any size.

    tokens at their noise level, (t, y, x) positions, captions  ->  prediction for each token

Blocks are DiT's (Peebles & Xie 2022, arXiv:2212.09748): self-attention, cross-attention to the caption, MLP, the first
and last modulated by adaLN. The noise level is one number per token, so known frames are tokens at time 0 (Diffusion
Forcing: Chen et al. 2024, arXiv:2407.01392). Everything is masked by segment ids: a clip's output does not depend
on what else is in its row.

One config covers the published families, whose weights load (weights/presets.py): DiT, SiT (Ma et al. 2024,
arXiv:2401.08740), PixArt-alpha (Chen et al. 2023, arXiv:2310.00426), Latte (Ma et al. 2024, arXiv:2401.03048) and
Wan 2.1 (Wan Team 2025, arXiv:2503.20314). The defaults are this project's own model.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from minisora_jax.models.conditioning import ClipCondition, ImageTokens, caption_tokens
from minisora_jax.models.layers import MLP, Attention, Einsum, LayerNorm, per_token
from minisora_jax.models.rope import fixed_positions, rope_angles, sinusoids
from minisora_jax.parallel.kernels import KERNELS
from minisora_jax.parallel.ring import SAVED
from minisora_jax.types import PackedBatch


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    latent_channels: int = 16
    out_channels: int | None = None  # None: latent_channels; DiT and PixArt predict a mean and a variance, twice that
    patch: tuple[int, int, int] = (1, 2, 2)  # latents per token along t, y, x
    width: int = 384
    depth: int = 12  # repeats of `groups`
    heads: int = 6
    mlp_ratio: float = 4.0
    text_features: int = 1  # width of the caption features; 1: byte ids, or with caption="label" a class
    text_width: int = 256  # of the refined caption's tokens
    text_depth: int = 2  # layers of the refiner
    dtype: str = "bfloat16"  # of the computation; parameters are float32
    remat: str = "none"  # what a block's backward computes again: "none", all but "matmuls" or "attention", or "full"
    attention: str = "auto"  # the kernel (parallel/kernels); "auto": the best on this backend
    # ---- What sets the published families apart
    time_input: str = "1000 t"  # what the model is told of the noise level; SiT is told "1 - t"
    attention_pattern: tuple[str, ...] = (
        "joint",
    )  # who attends to whom, a block each: whole clip; "spatial", "temporal" (Latte)
    modulation: str = "shared"  # adaLN from one layer and a table a block; "single": the head's too (PixArt); "block"
    qk_norm: str = "head"  # RMS norm of queries and keys over each "head", over "all" of them (Wan), or "none"
    rope: bool = True  # rotary positions
    positions: str = "learned"  # added to the tokens: a "learned" projection of sinusoids, "fixed" sinusoids, or "none"
    base_grid: int = 16  # tokens along a side that fixed positions were trained at; other grids are stretched onto it
    caption: str = "refined"  # by a small transformer; "projected" by two layers; a "label" without cross-attention
    caption_tokens: int = 0  # captions are padded with zeros to so many tokens, which are attended to (Wan); 0: not
    cross_norm: bool = True  # LayerNorm before cross-attention
    micro_conditioning: bool = True  # the clip's size, frame rate and mean caption join the noise level
    classes: int = 0  # of a label's table, the one that stands for none included
    size_pixels: int = 0  # pixels a token is wide, for PixArt's embedding of height, width and aspect; 0: none
    image_features: int = 0  # width of an image encoder's tokens, which Wan's image-to-video attends to; 0: none

    def __post_init__(self):
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(repr, allowed))}")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width={self.width} over heads={self.heads} must give an even whole head width")
        if self.caption == "refined" and self.text_width % 64:
            raise ValueError(f"text_width={self.text_width} must be a multiple of 64, the text heads' width")
        if self.caption != "refined" and self.micro_conditioning:
            raise ValueError(
                f"micro_conditioning=True needs the mean of a refined caption: caption={self.caption!r} has none"
            )
        if (self.caption == "label") != (self.classes > 0):
            raise ValueError(f"classes={self.classes} with caption={self.caption!r}: a label needs them, and only it")
        if len(self.patch) != 3 or self.patch[0] != 1:
            raise ValueError(f"patch={self.patch} must be (1, y, x): latent frames come as 1 + k, so one at a time")
        if not self.attention_pattern or set(self.attention_pattern) - {"joint", "spatial", "temporal"}:
            raise ValueError(
                f"attention_pattern={self.attention_pattern} must be made of 'joint', 'spatial' and 'temporal'"
            )

    @property
    def makes_images(self) -> bool:
        """Whether it has no notion of time: what its tokens are told of their place is (y, x)."""
        return self.positions == "fixed" and "temporal" not in self.attention_pattern

    @property
    def token_width(self) -> int:
        return self.patch[0] * self.patch[1] * self.patch[2] * self.latent_channels

    @property
    def out_width(self) -> int:
        return self.token_width // self.latent_channels * (self.out_channels or self.latent_channels)


_CHOICES = {
    "remat": ("none", "matmuls", "attention", "full"),
    "attention": ("auto", *KERNELS),
    "time_input": ("1000 t", "1 - t"),
    "modulation": ("shared", "single", "block"),
    "qk_norm": ("head", "all", "none"),
    "positions": ("learned", "fixed", "none"),
    "caption": ("refined", "projected", "label"),
}


_KEPT = {
    "matmuls": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(SAVED),
    "full": None,
}


@struct.dataclass
class BlockInputs:
    """What all blocks share, and none changes."""

    modulation_BSx: jax.Array  # 6 D wide, or the condition itself where each block has a layer for it
    segments: dict[str, jax.Array]  # by group: who attends to whom
    angles_BSk: jax.Array | None  # rotary positions
    frame_BSD: jax.Array | None  # fixed positions in time, which join before the first temporal block (Latte)
    caption: tuple[jax.Array, jax.Array] | None  # tokens, segment ids
    image: tuple[jax.Array, jax.Array] | None
    max_segment_len: int = struct.field(pytree_node=False, default=0)  # tokens of the longest clip; 0: not known


class Block(nn.Module):
    config: DiTConfig
    group: str

    @nn.compact
    def __call__(self, x, inputs: BlockInputs):
        cfg = self.config
        D = cfg.width
        if cfg.modulation == "block":
            modulation = Einsum("bsd,de->bse", (D, 6 * D), scale=0.0, name="modulation")(inputs.modulation_BSx)
        else:
            table = self.param("modulation", nn.initializers.zeros, (6 * D,))
            modulation = inputs.modulation_BSx + table.astype(x.dtype)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation, 6, axis=-1)
        h = LayerNorm(learned=False)(x) * (1 + scale_a) + shift_a
        attention = Attention(cfg.heads, cfg.qk_norm, impl=cfg.attention, name="self_attention")
        x = x + gate_a * attention(
            h, inputs.segments[self.group], inputs.angles_BSk, max_segment_len=inputs.max_segment_len
        )
        if inputs.caption and self.group != "temporal":
            h = LayerNorm(name="cross_norm")(x) if cfg.cross_norm else x
            cross = Attention(cfg.heads, cfg.qk_norm, out_scale=0.0, impl=cfg.attention, name="cross_attention")
            x = x + cross(h, inputs.segments["joint"], None, inputs.caption, inputs.image)
        h = LayerNorm(learned=False)(x) * (1 + scale_m) + shift_m
        return x + gate_m * MLP(cfg.mlp_ratio, name="mlp")(h)


class Blocks(nn.Module):
    """One block a group; what is scanned over depth."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x, inputs: BlockInputs, layer):
        for group in self.config.attention_pattern:
            if group == "temporal" and inputs.frame_BSD is not None:
                x = x + jnp.where(layer == 0, inputs.frame_BSD, 0)
            x = Block(self.config, group, name=group)(x, inputs)
        return x, None


class DiT(nn.Module):
    config: DiTConfig

    @nn.compact
    def __call__(self, x_BSP: jax.Array, time_BS: jax.Array, batch: PackedBatch) -> jax.Array:
        """Prediction (B, S, out_width) float32 for tokens x at times in [0, 1] (0 clean, 1 noise).

        Of `batch` it reads the ids, positions, captions and per-slot tables, never its tokens.
        """
        cfg = self.config
        D, dtype, segment_BS = cfg.width, jnp.dtype(cfg.dtype), batch.segment_BS

        # ---- Conditioning: the noise level, by token, and what holds for the whole clip, by slot
        caption, pooled_BGD = caption_tokens(cfg, batch)
        level_BS = 1.0 - time_BS if cfg.time_input == "1 - t" else 1000.0 * time_BS
        level_BSx = sinusoids(level_BS, 256).astype(dtype)
        level_BSD = Einsum("bse,ed->bsd", (256, D), name="time1")(level_BSx)
        condition_BSD = Einsum("bsd,de->bse", (D, D), name="time2")(nn.silu(level_BSD))
        clip_BGD = ClipCondition(cfg, name="clip")(batch, pooled_BGD)
        if clip_BGD is not None:
            condition_BSD = condition_BSD + per_token(clip_BGD, segment_BS).astype(dtype)
        modulation = nn.silu(condition_BSD)
        if cfg.modulation != "block":
            modulation = Einsum("bsd,de->bse", (D, 6 * D), scale=0.0, name="modulation")(modulation)

        # ---- Tokens
        x = Einsum("bsp,pd->bsd", (cfg.token_width, D), name="patch_in")(x_BSP.astype(dtype))
        frame_BSD = None
        if cfg.positions == "learned":
            position = sinusoids(batch.position_BS3, 64, max_period=1000.0).reshape(*segment_BS.shape, 3 * 64)
            x = x + Einsum("bse,ed->bsd", (3 * 64, D), name="position_in")(position.astype(dtype))
        elif cfg.positions == "fixed":
            size_BS3 = per_token(batch.size_BG3.astype(jnp.float32), segment_BS)
            within_BSD, frame_BSD = fixed_positions(batch.position_BS3, size_BS3, D, cfg.base_grid)
            x, frame_BSD = x + within_BSD.astype(dtype), frame_BSD.astype(dtype)

        # ---- Blocks
        inputs = BlockInputs(
            modulation_BSx=modulation,
            segments=attention_segments(cfg.attention_pattern, batch),
            angles_BSk=rope_angles(batch.position_BS3, D // cfg.heads) if cfg.rope else None,
            frame_BSD=frame_BSD if "temporal" in cfg.attention_pattern else None,
            caption=caption,
            image=ImageTokens(D, cfg.image_features, cfg.dtype, name="image")(batch) if cfg.image_features else None,
            max_segment_len=batch.max_segment_len,
        )
        blocks: Any = Blocks
        if cfg.remat != "none":
            blocks = nn.remat(Blocks, policy=_KEPT[cfg.remat], prevent_cse=False)
        stack = nn.scan(
            blocks,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),
            length=cfg.depth,
        )
        x, _ = stack(cfg, name="blocks")(x, inputs, jnp.arange(cfg.depth))

        # ---- Head
        if cfg.modulation == "single":
            table = self.param("modulation_out", nn.initializers.zeros, (2, D)).astype(dtype)
            shift, scale = condition_BSD + table[0], condition_BSD + table[1]
        else:
            layer = Einsum("bsd,de->bse", (D, 2 * D), scale=0.0, name="modulation_out")
            shift, scale = jnp.split(layer(nn.silu(condition_BSD)), 2, axis=-1)
        x = LayerNorm(learned=False)(x) * (1 + scale) + shift
        return Einsum("bsd,dp->bsp", (D, cfg.out_width), scale=0.0, name="patch_out")(x.astype(jnp.float32))


def abstract_batch(
    config: DiTConfig,
    rows: int = 1,
    tokens: int = 1,
    text_tokens: int = 4,
    image_tokens: int = 1,
    sharding=None,
    slots: int = 1,
) -> PackedBatch:
    """A batch of `slots` clips a row as `jax.ShapeDtypeStruct`s, laid out as `sharding`: nothing is allocated."""
    floats = lambda *shape: jax.ShapeDtypeStruct((rows, *shape), jnp.float32, sharding=sharding)
    ids = lambda *shape: jax.ShapeDtypeStruct((rows, *shape), jnp.int32, sharding=sharding)
    return PackedBatch(
        tokens_BSP=floats(tokens, config.token_width),
        segment_BS=ids(tokens),
        position_BS3=ids(tokens, 3),
        cond_mask_BS=jax.ShapeDtypeStruct((rows, tokens), bool, sharding=sharding),
        text_BLE=(ids if config.text_features == 1 else floats)(text_tokens, config.text_features),
        text_segment_BL=ids(text_tokens),
        fps_BG=floats(slots),
        size_BG3=ids(slots, 3),
        image_BIE=floats(image_tokens, config.image_features) if config.image_features else None,
        image_segment_BI=ids(image_tokens) if config.image_features else None,
    )


def abstract_params(config: DiTConfig) -> Any:
    """The parameter tree as `jax.ShapeDtypeStruct`s, float32: nothing is computed or allocated."""
    batch = abstract_batch(config)
    time_BS = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    init = lambda time_BS, batch: DiT(config).init(jax.random.key(0), batch.tokens_BSP, time_BS, batch)
    return jax.eval_shape(init, time_BS, batch)


def drop_variance(config: DiTConfig, y_BSP: jax.Array) -> jax.Array:
    """The prediction itself, where a model predicts a variance beside it (DiT, PixArt, Latte); else y."""
    c = config.latent_channels
    if config.out_channels != 2 * c:
        return y_BSP
    pixels = config.patch[1] * config.patch[2]
    return jnp.concatenate([y_BSP[..., 2 * c * i : 2 * c * i + c] for i in range(pixels)], axis=-1)


def attention_segments(attention_pattern: tuple[str, ...], batch: PackedBatch) -> dict[str, jax.Array]:
    """For each group and "joint", an id (B, S) for each token: it attends to those that share it; 0 for padding.

    "spatial": the tokens of its frame. "temporal": those of its place in all frames. Up to 65,536 of either a clip.
    """
    segment_BS = batch.segment_BS
    t_BS, y_BS, x_BS = (batch.position_BS3[..., i] for i in range(3))
    ids = {"joint": segment_BS}
    if "spatial" in attention_pattern:
        ids["spatial"] = jnp.where(segment_BS > 0, segment_BS * 65_536 + t_BS, 0)
    if "temporal" in attention_pattern:
        across_BS = per_token(batch.size_BG3[..., 2:].astype(jnp.float32), segment_BS)[..., 0].astype(jnp.int32)
        ids["temporal"] = jnp.where(segment_BS > 0, segment_BS * 65_536 + y_BS * across_BS + x_BS, 0)
    return ids

"""The diffusion transformer over packed clips of any size.

    tokens at their noise level, (t, y, x) positions, captions  ->  prediction for each token

Blocks are DiT's (Peebles & Xie 2022, arXiv:2212.09748): self-attention, cross-attention to the caption, MLP. adaLN
modulates the first and the last. The time is one number per token, so given frames are tokens at time 0 (Diffusion
Forcing: Chen et al. 2024, arXiv:2407.01392). Segment ids mask every attention, so a clip's output does not depend on
the other clips of its row.

One config covers the published families, whose weights load (weights/presets.py): DiT, SiT, PixArt-alpha, Latte and
Wan 2.1. models/dit_config.py has the table of their switches.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from minisora_jax.models.attention_ids import attention_segments
from minisora_jax.models.conditioning import (
    ActionCondition,
    ClipCondition,
    ImageTokens,
    caption_tokens,
    with_given_frames,
)
from minisora_jax.models.dit_config import DiTConfig
from minisora_jax.models.layers import MLP, Attention, Einsum, LayerNorm, per_token, scan_layers
from minisora_jax.models.levels import Levels, noise_levels
from minisora_jax.models.motion import MotionModule, as_images
from minisora_jax.models.past import Past
from minisora_jax.models.rope import fixed_positions, in_trained_grid, rope_angles, sinusoids
from minisora_jax.parallel.ring import SAVED
from minisora_jax.types import PackedBatch

BLOCK_INPUT = "block input"  # the checkpoint name of what a block starts from

# What a block keeps for its backward pass, by `DiTConfig.remat`.
_SAVE_POLICIES = {
    "matmuls": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(SAVED),
    "full": None,
    "host": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[BLOCK_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@struct.dataclass
class BlockInputs:
    """The inputs that all blocks share."""

    levels: Levels
    modulation_BUx: jax.Array  # (B, U, 6 D) over the levels; with modulation="block" the condition itself, (B, U, D)
    segments: dict[str, jax.Array]  # ids (B, S) by kind of attention, see `attention_segments`
    angles_BSk: jax.Array | None  # rotary positions
    frame_BSD: jax.Array | None  # fixed time positions, added before the first temporal block (Latte)
    motion_angles_BSk: jax.Array | None  # rotary positions in time alone, for motion modules
    caption: tuple[jax.Array, jax.Array] | None  # (tokens_BLD, segment_BL)
    image: tuple[jax.Array, jax.Array] | None  # (tokens_BID, segment_BI)
    past: Past | None = None  # the frames before these, whose keys and values the layers keep
    max_segment_len: int = struct.field(pytree_node=False, default=0)  # see PackedBatch
    slots: int = struct.field(pytree_node=False, default=0)  # segments of a row, at most


class Block(nn.Module):
    """One transformer block: x + attention, + cross-attention to the caption, + MLP."""

    config: DiTConfig
    kind: str  # who attends to whom: "joint", "spatial" or "temporal"

    @nn.compact
    def __call__(self, x_BSD: jax.Array, inputs: BlockInputs) -> jax.Array:
        cfg = self.config
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self._modulation(inputs)

        h = LayerNorm(learned=False)(x_BSD) * (1 + scale_a) + shift_a
        kind = "spatial" if cfg.motion_modules else self.kind
        kind = "causal" if "causal" in inputs.segments else kind
        sharpness = cfg.scaling.sharpness(kind)
        attention = Attention(cfg.heads, cfg.qk_norm, impl=cfg.attention, sharpness=sharpness, name="self_attention")
        x_BSD = x_BSD + gate_a * attention(
            h,
            inputs.segments[kind],
            inputs.angles_BSk,
            max_segment_len=inputs.max_segment_len,
            slots=inputs.slots if kind == "joint" else 0,
            causal=kind == "causal",
            past=inputs.past,
        )
        if inputs.caption and self.kind != "temporal":
            h = LayerNorm(name="cross_norm")(x_BSD) if cfg.cross_norm else x_BSD
            cross = Attention(cfg.heads, cfg.qk_norm, out_scale=0.0, impl=cfg.attention, name="cross_attention")
            x_BSD = x_BSD + cross(h, inputs.segments["joint"], None, inputs.caption, inputs.image, slots=inputs.slots)
        h = LayerNorm(learned=False)(x_BSD) * (1 + scale_m) + shift_m
        return x_BSD + gate_m * MLP(cfg.mlp_ratio, name="mlp")(h)

    def _modulation(self, inputs: BlockInputs) -> list[jax.Array]:
        """Shift, scale and gate (B, S, D) of attention, then of the MLP."""
        D, modulation_BUx = self.config.width, inputs.modulation_BUx
        if self.config.modulation == "block":
            modulation_BUx = Einsum("bud,de->bue", (D, 6 * D), scale=0.0, name="modulation")(modulation_BUx)
            parts = jnp.split(modulation_BUx, 6, axis=-1)
        else:
            table = self.param("modulation", nn.initializers.zeros, (6 * D,)).astype(modulation_BUx.dtype)
            # By parts: their sum is never in memory as a whole.
            parts = [part + row for part, row in zip(jnp.split(modulation_BUx, 6, axis=-1), jnp.split(table, 6))]
        return [inputs.levels.to_tokens(part) for part in parts]


class Blocks(nn.Module):
    """One repeat of the attention pattern, which is scanned over depth."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x_BSD: jax.Array, inputs: BlockInputs, layer: jax.Array) -> tuple[jax.Array, None]:
        x_BSD = checkpoint_name(x_BSD, BLOCK_INPUT)
        for kind in self.config.attention_pattern:
            if kind == "temporal" and inputs.frame_BSD is not None:
                x_BSD = x_BSD + jnp.where(layer == 0, inputs.frame_BSD, 0)
            x_BSD = Block(self.config, kind, name=kind)(x_BSD, inputs)
        if inputs.motion_angles_BSk is not None:
            module = MotionModule(self.config, name="motion")
            x_BSD = module(x_BSD, inputs.segments["temporal"], inputs.motion_angles_BSk)
        return x_BSD, None


class DiT(nn.Module):
    """The diffusion transformer.

    Attributes:
        config: Shape and family, see `DiTConfig`.
    """

    config: DiTConfig

    @nn.compact
    def __call__(
        self,
        x_BSP: jax.Array,
        time_BS: jax.Array,
        batch: PackedBatch,
        residual_BSD: jax.Array | None = None,
        interval_BS: jax.Array | None = None,
        past: Past | None = None,
    ) -> jax.Array:
        """Predict velocity, noise, clean latents or v for each token, as the model was trained.

        Args:
            x_BSP: Noisy tokens.
            time_BS: Time of each token, from 0 (clean) to 1 (noise).
            batch: Ids, positions, captions and tables over slots. Its tokens are not read.
            residual_BSD: What the blocks are to add, in place of running them (generate/step_cache.py). What they added
                is "residual" in the collection "intermediates".
            interval_BS: t - r of each token, for a model with `interval_input`; None: 0, the velocity at t itself.
            past: The frames before these, for models of causal attention. The layers keep their keys and values in the
                collection "cache", see `models/past.py`.

        Returns:
            The prediction (B, S, config.out_width), float32.
        """
        cfg = self.config
        D, dtype = cfg.width, jnp.dtype(cfg.dtype)
        if cfg.causal:
            batch = dataclasses.replace(batch, causal_BG=batch.fps_BG >= 0)

        # ---- Conditioning: the caption's tokens, and one vector for time and clip of each noise level
        caption, pooled_BGE = caption_tokens(cfg, batch)
        levels = noise_levels(time_BS, batch, interval_BS)
        seen = as_images(batch) if cfg.motion_modules else batch
        placed = in_trained_grid(seen, cfg.scaling)
        condition_BUD = self._condition(levels, pooled_BGE, placed)
        modulation_BUx = nn.silu(condition_BUD)
        if cfg.modulation != "block":
            modulation_BUx = Einsum("bud,de->bue", (D, 6 * D), scale=0.0, name="modulation")(modulation_BUx)

        # ---- Tokens
        x_BSx = with_given_frames(cfg, x_BSP.astype(dtype), batch)
        x_BSD = Einsum("bsp,pd->bsd", (x_BSx.shape[-1], D), name="patch_in")(x_BSx)
        x_BSD, frame_BSD = self._add_positions(x_BSD, placed)

        # ---- Blocks
        inputs = BlockInputs(
            levels=levels,
            modulation_BUx=modulation_BUx,
            segments=attention_segments(cfg.attention_kinds, batch),
            angles_BSk=rope_angles(seen.position_BS3, D // cfg.heads, cfg.scaling) if cfg.rope else None,
            frame_BSD=frame_BSD if "temporal" in cfg.attention_pattern else None,
            motion_angles_BSk=(
                rope_angles(batch.position_BS3[..., :1], D // cfg.heads, cfg.scaling) if cfg.motion_modules else None
            ),
            caption=caption,
            image=ImageTokens(cfg, name="image")(batch) if cfg.image_features else None,
            max_segment_len=batch.max_segment_len,
            slots=batch.fps_BG.shape[1],
            past=past,
        )
        blocks: Any = Blocks
        if cfg.remat != "none":
            blocks = nn.remat(Blocks, policy=_SAVE_POLICIES[cfg.remat], prevent_cse=False)
        stack = scan_layers(blocks, cfg.depth, in_axes=(nn.broadcast, 0))
        if residual_BSD is None:
            start_BSD = x_BSD
            x_BSD, _ = stack(cfg, name="blocks")(x_BSD, inputs, jnp.arange(cfg.depth))
            self.sow("intermediates", "residual", x_BSD - start_BSD)
        else:
            x_BSD = x_BSD + residual_BSD

        # ---- Head
        shift, scale = (levels.to_tokens(x_BUD) for x_BUD in self._head_modulation(condition_BUD))
        x_BSD = LayerNorm(learned=False)(x_BSD) * (1 + scale) + shift
        return Einsum("bsd,dp->bsp", (D, cfg.out_width), scale=0.0, name="patch_out")(x_BSD.astype(jnp.float32))

    def _condition(self, levels: Levels, pooled_BGE: jax.Array | None, batch: PackedBatch) -> jax.Array:
        """The conditioning vector of each level (B, U, D): its time, plus the vector of its clip if there is one."""
        cfg = self.config
        D, dtype = cfg.width, jnp.dtype(cfg.dtype)
        time_input_BU = 1.0 - levels.time_BU if cfg.time_input == "1 - t" else 1000.0 * levels.time_BU
        sinusoids_BUx = sinusoids(time_input_BU, 256).astype(dtype)
        h_BUD = Einsum("bue,ed->bud", (256, D), name="time1")(sinusoids_BUx)
        condition_BUD = Einsum("bud,de->bue", (D, D), name="time2")(nn.silu(h_BUD))
        if cfg.interval_input:
            interval_BU = jnp.zeros_like(levels.time_BU) if levels.interval_BU is None else levels.interval_BU
            # Low frequencies, whose derivative is small; zeros at first, so that an older model starts as it is.
            waves_BUx = sinusoids(10.0 * interval_BU, 64, max_period=100.0).astype(dtype)
            condition_BUD = condition_BUD + Einsum("bue,ed->bud", (64, D), scale=0.0, name="interval")(waves_BUx)
        clip_BGD = ClipCondition(cfg, name="clip")(batch, pooled_BGE)
        if clip_BGD is not None:
            condition_BUD = condition_BUD + per_token(clip_BGD, levels.segment_BU).astype(dtype)
        if cfg.action_width:
            condition_BUD = condition_BUD + ActionCondition(cfg, name="action")(batch, levels.frame_BU)
        return condition_BUD

    def _add_positions(self, x_BSD: jax.Array, batch: PackedBatch) -> tuple[jax.Array, jax.Array | None]:
        """(tokens with their positions added, fixed time positions (B, S, D) that are still to be added or None)."""
        cfg = self.config
        if cfg.positions in ("learned", "space"):
            position_BSx = batch.position_BS3 if cfg.positions == "learned" else batch.position_BS3[..., 1:]
            axes = position_BSx.shape[-1]
            sinusoids_BSxx = sinusoids(position_BSx, 64, max_period=1000.0)
            sinusoids_BSx = sinusoids_BSxx.reshape(*batch.segment_BS.shape, axes * 64)
            project = Einsum("bse,ed->bsd", (axes * 64, cfg.width), name="position_in")
            return x_BSD + project(sinusoids_BSx.astype(x_BSD.dtype)), None
        if cfg.positions == "fixed":
            size_BS3 = per_token(batch.size_BG3.astype(jnp.float32), batch.segment_BS)
            within_BSD, frame_BSD = fixed_positions(batch.position_BS3, size_BS3, cfg.width, cfg.base_grid)
            return x_BSD + within_BSD.astype(x_BSD.dtype), frame_BSD.astype(x_BSD.dtype)
        return x_BSD, None

    def _head_modulation(self, condition_BUD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Shift and scale (B, U, D) of the last layer norm."""
        D = self.config.width
        if self.config.modulation == "single":
            table = self.param("modulation_out", nn.initializers.zeros, (2, D)).astype(condition_BUD.dtype)
            return condition_BUD + table[0], condition_BUD + table[1]
        layer = Einsum("bud,de->bue", (D, 2 * D), scale=0.0, name="modulation_out")
        shift_BUD, scale_BUD = jnp.split(layer(nn.silu(condition_BUD)), 2, axis=-1)
        return shift_BUD, scale_BUD


def split_variance(config: DiTConfig, y_BSP: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """The prediction, and the variance that DiT, SiT, PixArt and Latte output beside it (arXiv:2102.09672, eq. 15).

    Args:
        config: The model's config.
        y_BSP: The model's output (B, S, out_width).

    Returns:
        (the prediction (B, S, P), the variance's place from -1 to 1 between its bounds (B, S, P) or None).
    """
    c = config.latent_channels
    if config.out_channels != 2 * c:
        return y_BSP, None
    latents = config.patch[1] * config.patch[2]
    part = lambda first: jnp.concatenate([y_BSP[..., i : i + c] for i in range(first, 2 * c * latents, 2 * c)], axis=-1)
    return part(0), part(c)


def drop_variance(config: DiTConfig, y_BSP: jax.Array) -> jax.Array:
    """The prediction (B, S, P) of `split_variance`."""
    return split_variance(config, y_BSP)[0]


def abstract_batch(
    config: DiTConfig,
    rows: int = 1,
    tokens: int = 1,
    text_tokens: int = 4,
    image_tokens: int = 1,
    sharding: jax.sharding.Sharding | None = None,
    slots: int = 1,
) -> PackedBatch:
    """A batch of `jax.ShapeDtypeStruct`s, which allocate nothing.

    Args:
        config: The model that reads the batch.
        rows: B.
        tokens: S.
        text_tokens: L.
        image_tokens: I, for a model with `image_features`.
        sharding: The sharding of every array.
        slots: G.
    """
    floats = lambda *shape: jax.ShapeDtypeStruct((rows, *shape), jnp.float32, sharding=sharding)
    ids = lambda *shape: jax.ShapeDtypeStruct((rows, *shape), jnp.int32, sharding=sharding)
    fields: dict[str, Any] = dict(
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
        given_BSx=floats(tokens, config.given_width) if config.given_channels else None,
        actions_BUx=floats(1, config.action_width) if config.action_width else None,
    )
    return PackedBatch(**fields)


def abstract_params(config: DiTConfig) -> Any:
    """The parameter tree {"params": ...} as `jax.ShapeDtypeStruct`s, float32. Nothing is computed or allocated."""
    batch = abstract_batch(config)
    time_BS = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    init = lambda time_BS, batch: DiT(config).init(jax.random.key(0), batch.tokens_BSP, time_BS, batch)
    return jax.eval_shape(init, time_BS, batch)

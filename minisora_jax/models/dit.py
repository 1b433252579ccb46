"""The diffusion transformer over packed clips of any size.

    tokens at their noise level, (t, y, x) positions, captions  ->  velocity of each token

Blocks are DiT's (Peebles & Xie 2022, arXiv:2212.09748): self-attention, cross-attention to the caption, MLP,
the first and last modulated by adaLN. The modulation is computed once and shared by all blocks, each adding
a learned table of its own (PixArt-alpha's adaLN-single: Chen et al. 2023, arXiv:2310.00426). The noise level is
one number per token, so known frames are tokens at time 0 (Diffusion Forcing: Chen et al. 2024, arXiv:2407.01392).
Everything is masked by segment ids: a clip's output does not depend on what else is in its row.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from minisora_jax.models.layers import MLP, Attention, Einsum, Norm, per_slot_mean, per_token
from minisora_jax.models.rope import rope_angles, sinusoids
from minisora_jax.models.text import TextRefiner
from minisora_jax.types import PackedBatch


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    latent_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)  # latents per token along t, y, x
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    text_features: int = 1  # width of the caption features; 1: byte ids
    text_width: int = 256
    text_depth: int = 2
    dtype: str = "bfloat16"  # of the computation; parameters are float32
    remat: str = "none"  # what a block's backward computes again: "none", "matmuls" kept, or "full"

    def __post_init__(self):
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width={self.width} over heads={self.heads} must give an even whole head width")
        if self.text_width % 64:
            raise ValueError(f"text_width={self.text_width} must be a multiple of 64, the text heads' width")
        if self.remat not in ("none", "matmuls", "full"):
            raise ValueError(f"remat={self.remat!r} must be 'none', 'matmuls' or 'full'")
        if len(self.patch) != 3 or self.patch[0] != 1:
            raise ValueError(f"patch={self.patch} must be (1, y, x): latent frames come as 1 + k, so one at a time")

    @property
    def token_width(self) -> int:
        return self.patch[0] * self.patch[1] * self.patch[2] * self.latent_channels


class Block(nn.Module):
    config: DiTConfig

    @nn.compact
    def __call__(self, x, inputs):
        shared_BS6D, segment, angles, text, text_segment = inputs
        cfg = self.config
        D = cfg.width
        table = self.param("modulation", nn.initializers.zeros, (6 * D,))
        modulation = jnp.split(shared_BS6D + table.astype(x.dtype), 6, axis=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        h = Norm(learned=False)(x) * (1 + scale_a) + shift_a
        x = x + gate_a * Attention(cfg.heads, name="self_attention")(h, segment, angles)
        cross = Attention(cfg.heads, out_scale=0.0, name="cross_attention")
        x = x + cross(Norm(name="cross_norm")(x), segment, None, text, text_segment)
        h = Norm(learned=False)(x) * (1 + scale_m) + shift_m
        return x + gate_m * MLP(cfg.mlp_ratio, name="mlp")(h), None


class DiT(nn.Module):
    config: DiTConfig

    @nn.compact
    def __call__(self, x_BSP: jax.Array, time_BS: jax.Array, batch: PackedBatch) -> jax.Array:
        """Velocity (B, S, P) float32 of tokens x at times in [0, 1] (0 clean, 1 noise).

        Of `batch` it reads the ids, positions, captions and per-slot tables, never its tokens.
        """
        cfg = self.config
        D, dtype = cfg.width, jnp.dtype(cfg.dtype)
        segment_BS, slots = batch.segment_BS, batch.fps_BG.shape[1]

        text_BLD, text_segment_BL = TextRefiner(
            cfg.text_width, cfg.text_depth, cfg.text_width // 64, cfg.text_features, cfg.dtype, name="text"
        )(batch.text_BLE, batch.text_segment_BL)

        # ---- Conditioning: what holds for the whole clip, by slot, then the noise level, by token
        pooled_BGD = per_slot_mean(text_BLD.astype(jnp.float32), text_segment_BL, slots)
        facts_BG4 = jnp.concatenate([batch.size_BG3.astype(jnp.float32), batch.fps_BG[..., None]], axis=-1)
        facts_BGx = sinusoids(facts_BG4, 64, max_period=1000.0).reshape(*batch.fps_BG.shape, 4 * 64)
        clip_BGD = Einsum("bge,ed->bgd", (cfg.text_width, D), name="pooled_text")(pooled_BGD)
        clip_BGD = clip_BGD + Einsum("bge,ed->bgd", (4 * 64, D), name="clip_facts")(facts_BGx)
        level_BSx = sinusoids(1000.0 * time_BS, 256).astype(dtype)
        level_BSD = Einsum("bse,ed->bsd", (256, D), name="time1")(level_BSx)
        level_BSD = Einsum("bsd,de->bse", (D, D), name="time2")(nn.silu(level_BSD))
        condition_BSD = nn.silu(level_BSD + per_token(clip_BGD, segment_BS).astype(dtype))
        shared_BS6D = Einsum("bsd,de->bse", (D, 6 * D), scale=0.0, name="modulation")(condition_BSD)

        # ---- Tokens
        x = Einsum("bsp,pd->bsd", (cfg.token_width, D), name="patch_in")(x_BSP.astype(dtype))
        position = sinusoids(batch.position_BS3, 64, max_period=1000.0).reshape(*segment_BS.shape, 3 * 64)
        x = x + Einsum("bse,ed->bsd", (3 * 64, D), name="position_in")(position.astype(dtype))
        angles_BSk = rope_angles(batch.position_BS3, D // cfg.heads)
        inputs = (shared_BS6D, segment_BS, angles_BSk, text_BLD, text_segment_BL)
        block = Block
        if cfg.remat != "none":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if cfg.remat == "matmuls" else None
            block = nn.remat(Block, policy=policy, prevent_cse=False)
        stack = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=cfg.depth
        )
        x, _ = stack(cfg, name="blocks")(x, inputs)

        # ---- Head
        shift, scale = jnp.split(
            Einsum("bsd,de->bse", (D, 2 * D), scale=0.0, name="modulation_out")(condition_BSD), 2, axis=-1
        )
        x = Norm(learned=False)(x) * (1 + scale) + shift
        return Einsum("bsd,dp->bsp", (D, cfg.token_width), scale=0.0, name="patch_out")(x.astype(jnp.float32))

"""Wan 2.1's video VAE (Wan Team 2025, arXiv:2503.20314), as diffusers' `AutoencoderKLWan` names it."""

from __future__ import annotations

from minisora_jax.models.vae import VAEConfig
from minisora_jax.weights.rules import Rule

CONFIG = VAEConfig()  # 96 channels, (1, 2, 4, 4), 4x8x8 into 16

# Statistics of the latents of the published weights (`latents_mean`, `latents_std` of their config).
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

_CONV = "o i t h w -> t h w i o"
_CONV_2D = "o i h w -> 1 h w i o"


def rules(cfg: VAEConfig) -> list[Rule]:
    """The name map of a codec of this layout, of any width; ValueError for one of another layout."""
    if cfg.patch != 1 or cfg.shortcuts or not cfg.attention or cfg.multipliers[0] != 1:
        raise ValueError(
            f"patch={cfg.patch}, shortcuts={cfg.shortcuts}, attention={cfg.attention}, multipliers={cfg.multipliers}: "
            f"Wan 2.1's layout has patch=1, shortcuts=False, attention=True, and a first multiplier of 1"
        )
    encoder, decoder = _Side("params/encoder", "encoder"), _Side("params/decoder", "decoder")
    stages = len(cfg.multipliers)
    widths = [cfg.base * m for m in cfg.multipliers]

    encoder.conv("conv_in/conv", "conv_in")
    at, width = 0, widths[0]
    for i in range(stages):
        for j in range(cfg.residual_blocks):
            encoder.residual(f"stage{i}_residual{j}", f"down_blocks.{at}", width != widths[i])
            at, width = at + 1, widths[i]
        if i < stages - 1:
            encoder.resample(f"stage{i}_down", f"down_blocks.{at}", cfg.time_down[i])
            at += 1
    encoder.middle()
    encoder.head()
    encoder.rules += _conv("params/encoder/moments", "quant_conv")

    decoder.rules += _conv("params/decoder/latents", "post_quant_conv")
    decoder.conv("conv_in/conv", "conv_in")
    decoder.middle()
    width = widths[-1]
    for i, out in enumerate(reversed(widths)):
        for j in range(cfg.residual_blocks + 1):
            decoder.residual(f"stage{i}_residual{j}", f"up_blocks.{i}.resnets.{j}", width != out)
            width = out
        if i < stages - 1:
            decoder.resample(f"stage{i}_up", f"up_blocks.{i}.upsamplers.0", cfg.time_down[-1 - i])
            width = out // 2
    decoder.head()
    return encoder.rules + decoder.rules


def _conv(ours: str, theirs: str, pattern: str = _CONV) -> list[Rule]:
    return [Rule(f"{ours}/kernel", f"{theirs}.weight", pattern), Rule(f"{ours}/bias", f"{theirs}.bias")]


class _Side:
    """Collects the rules of the encoder or the decoder."""

    def __init__(self, ours: str, theirs: str):
        self.ours, self.theirs, self.rules = ours, theirs, []

    def conv(self, ours: str, theirs: str, pattern: str = _CONV):
        self.rules += _conv(f"{self.ours}/{ours}", f"{self.theirs}.{theirs}", pattern)

    def norm(self, ours: str, theirs: str, pattern: str = "c 1 1 1 -> c"):
        self.rules += [Rule(f"{self.ours}/{ours}/scale", f"{self.theirs}.{theirs}.gamma", pattern)]

    def residual(self, ours: str, theirs: str, shortcut: bool):
        for k in (1, 2):
            self.norm(f"{ours}/norm{k}", f"{theirs}.norm{k}")
            self.conv(f"{ours}/conv{k}/conv", f"{theirs}.conv{k}")
        if shortcut:
            self.conv(f"{ours}/shortcut", f"{theirs}.conv_shortcut")

    def resample(self, ours: str, theirs: str, time: bool):
        self.conv(f"{ours}/space", f"{theirs}.resample.1", _CONV_2D)
        if time:
            self.conv(f"{ours}/time", f"{theirs}.time_conv")

    def middle(self):
        self.residual("middle/residual1", "mid_block.resnets.0", False)
        self.norm("middle/attention/norm", "mid_block.attentions.0.norm", "c 1 1 -> c")
        self.conv("middle/attention/qkv", "mid_block.attentions.0.to_qkv", _CONV_2D)
        self.conv("middle/attention/out", "mid_block.attentions.0.proj", _CONV_2D)
        self.residual("middle/residual2", "mid_block.resnets.1", False)

    def head(self):
        self.norm("norm_out", "norm_out")
        self.conv("conv_out/conv", "conv_out")

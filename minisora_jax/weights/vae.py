"""The rules of codecs: one walk over our VAE, with a table of names for each published layout.

A table maps each part of our VAE to its published name (wan_vae.py, sd_vae.py). A name may contain numbers:

    {i}  stage, in the order of computation        {k}  stage, counted from the last
    {j}  block of the stage; resampling is last    {n}  block, counted through all stages
"""

from __future__ import annotations

from typing import Any

from minisora_jax.models.vae import VAEConfig
from minisora_jax.weights.rules import Rule


def vae_rules(cfg: VAEConfig, names: dict[str, Any]) -> list[Rule]:
    """The rules of a codec of any width, for the layout that `names` describes."""
    stages, steps = len(cfg.multipliers), len(cfg.time_down)
    encoder, decoder = _Side("encoder", cfg, names), _Side("decoder", cfg, names)

    widths = [cfg.base * m for m in cfg.multipliers]
    encoder.conv("conv_in/conv", names["conv_in"])
    width, n = widths[0], 0
    for i in range(stages):
        for j in range(cfg.residual_blocks):
            theirs = names["down"].format(i=i, j=j, n=n)
            encoder.residual(f"stage{i}_residual{j}", theirs, width != widths[i])
            width, n = widths[i], n + 1
        if i < steps:
            theirs = names["downsampler"].format(i=i, j=cfg.residual_blocks, n=n)
            encoder.resample(f"stage{i}_down", theirs, cfg.time_down[i])
            n += 1
    encoder.middle()
    encoder.head()
    encoder.rules += _conv("params/encoder/moments", names["moments"], _axes(cfg))

    widths = [(cfg.decoder_base or cfg.base) * m for m in reversed(cfg.multipliers)]
    decoder.rules += _conv("params/decoder/latents", names["latents"], _axes(cfg))
    decoder.conv("conv_in/conv", names["conv_in"])
    decoder.middle()
    width, n = widths[0], 0
    for i in range(stages):
        for j in range(cfg.residual_blocks + 1):
            theirs = names["up"].format(i=i, k=stages - 1 - i, j=j, n=n)
            decoder.residual(f"stage{i}_residual{j}", theirs, width != widths[i])
            width, n = widths[i], n + 1
        if i < steps:
            theirs = names["upsampler"].format(i=i, k=stages - 1 - i, j=cfg.residual_blocks + 1, n=n)
            decoder.resample(f"stage{i}_up", theirs, cfg.time_down[-1 - i])
            width, n = width // 2 if cfg.halve_up else width, n + 1
    decoder.head()
    return encoder.rules + decoder.rules


def _axes(cfg: VAEConfig) -> str:
    """The axes of a published kernel for einops. Kernels of an image codec have no time axis."""
    return "o i h w" if cfg.images else "o i t h w"


def _conv(ours: str, theirs: str, axes: str) -> list[Rule]:
    kernel = f"{axes} -> {'t' if 't' in axes else 1} h w i o"
    return [Rule(f"{ours}/kernel", f"{theirs}.weight", kernel), Rule(f"{ours}/bias", f"{theirs}.bias")]


class _Side:
    """Collects the rules of the encoder or the decoder."""

    def __init__(self, side: str, cfg: VAEConfig, names: dict[str, Any]) -> None:
        self.side, self.cfg, self.names = side, cfg, names
        self.rules: list[Rule] = []

    def conv(self, ours: str, theirs: str, axes: str = "") -> None:
        self.rules += _conv(f"params/{self.side}/{ours}", f"{self.side}.{theirs}", axes or _axes(self.cfg))

    def norm(self, ours: str, theirs: str, ones: str = "1 1 1") -> None:
        ours, theirs = f"params/{self.side}/{ours}", f"{self.side}.{theirs}"
        if self.cfg.images:
            self.rules += [Rule(f"{ours}/scale", f"{theirs}.weight"), Rule(f"{ours}/bias", f"{theirs}.bias")]
        else:
            self.rules += [Rule(f"{ours}/scale", f"{theirs}.gamma", f"c {ones} -> c")]

    def residual(self, ours: str, theirs: str, shortcut: bool) -> None:
        for k in (1, 2):
            self.norm(f"{ours}/norm{k}", f"{theirs}.{self.names[f'norm{k}']}")
            self.conv(f"{ours}/conv{k}/conv", f"{theirs}.{self.names[f'conv{k}']}")
        if shortcut:
            self.conv(f"{ours}/shortcut", f"{theirs}.{self.names['shortcut']}")

    def resample(self, ours: str, theirs: str, time: bool) -> None:
        self.conv(f"{ours}/space", f"{theirs}.{self.names['space']}", "o i h w")
        if time:
            self.conv(f"{ours}/time", f"{theirs}.time_conv")

    def middle(self) -> None:
        self.residual("middle/residual1", self.names["residual1"], False)
        self.attention("middle/attention", self.names["attention"])
        self.residual("middle/residual2", self.names["residual2"], False)

    def attention(self, ours: str, theirs: str) -> None:
        """Matrices or convolutions of size 1. Our q, k and v are one parameter; theirs are one tensor or three."""
        names, axes = self.names, self.names["matrix"]
        self.norm(f"{ours}/norm", f"{theirs}.{names['attention_norm']}", "1 1")
        ours, theirs = f"params/{self.side}/{ours}", f"{self.side}.{theirs}"
        if isinstance(names["qkv"], str):
            self.rules += _matrix(f"{ours}/qkv", f"{theirs}.{names['qkv']}", axes)
        else:
            three = {"fuses": names["qkv"], "sizes": (("p", 3),)}
            self.rules += [
                Rule(f"{ours}/qkv/kernel", theirs + ".{fused}.weight", f"p {axes} -> 1 1 1 i (p o)", **three),
                Rule(f"{ours}/qkv/bias", theirs + ".{fused}.bias", "p o -> (p o)", **three),
            ]
        self.rules += _matrix(f"{ours}/out", f"{theirs}.{names['attention_out']}", axes)

    def head(self) -> None:
        self.norm("norm_out", self.names["norm_out"])
        self.conv("conv_out/conv", self.names["conv_out"])


def _matrix(ours: str, theirs: str, axes: str) -> list[Rule]:
    return [Rule(f"{ours}/kernel", f"{theirs}.weight", f"{axes} -> 1 1 1 i o"), Rule(f"{ours}/bias", f"{theirs}.bias")]

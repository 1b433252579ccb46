"""LPIPS in the layouts of torchvision's VGG16 and of the `lpips` package, beside or with the heads of the latter."""

from __future__ import annotations

from collections.abc import Iterable

from minisora_jax.models.perceptual import LPIPSConfig
from minisora_jax.weights.rules import Rule

CONFIG = LPIPSConfig()
ABOUT = "LPIPS 0.1 with VGG16: a folder with torchvision's vgg16-397923af.pth and lpips/weights/v0.1/vgg.pth"
IGNORED = ("classifier.", "scaling_layer.")  # of ImageNet's classes; LPIPS's own constants
NAME_MAPS = {"torchvision": "features.{i}", "lpips": "net.slice{stage}.{i}"}


def rules(cfg: LPIPSConfig, name_map: str = "torchvision") -> list[Rule]:
    """The rules of a network of any shape, for a key of NAME_MAPS."""
    result, i = [], 0  # i counts VGG16's layers: each convolution has a ReLU, and each stage ends with a pool
    for stage, depth in enumerate(cfg.depths):
        for j in range(depth):
            ours, theirs = f"params/stage{stage}_conv{j}", NAME_MAPS[name_map].format(stage=stage + 1, i=i)
            result.append(Rule(f"{ours}/kernel", f"{theirs}.weight", "o i h w -> h w i o"))
            result.append(Rule(f"{ours}/bias", f"{theirs}.bias"))
            i += 2
        i += 1
        # The package's own state has each head twice.
        head = f"{stage}.model.1.weight"
        result.append(Rule(f"params/head{stage}", f"lin{head}", "1 c 1 1 -> c", aliases=(f"lins.{head}",)))
    return result


def name_map_of(tensor_names: Iterable[str]) -> str:
    """The key of NAME_MAPS for a checkpoint, by the name of its first convolution."""
    return "lpips" if "net.slice1.0.weight" in tensor_names else "torchvision"

"""LoRA: a kernel W becomes W + (alpha / rank) A B, and A and B alone are trained (Hu et al. 2021, arXiv:2106.09685).

An adapter is a collection "lora" beside "params", with leaves at the path of the kernel that they adapt:

    params/blocks/joint/self_attention/q/kernel   (layers, D, N, K)
    lora/blocks/joint/self_attention/q/a          (layers, D, r)
    lora/blocks/joint/self_attention/q/b          (layers, r, N, K)

`models.layers.Einsum` applies it, if it is there. The scale is folded into b when an adapter is applied (`scaled`), so
several adapters are one of a larger rank (`stacked`).
"""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import PartitionSpec as P

from minisora_jax.models.layers import matrix_axes
from minisora_jax.parallel.mesh import parameter_spec, shard

# Names of targets: a pattern that is searched for in a kernel's path, such as "blocks/joint/self_attention/q".
TARGETS = {
    "attention": r"^blocks/.*attention/",
    "mlp": r"^blocks/.*mlp/",
    "spatial": r"^blocks/spatial/.*(attention|mlp)/",  # of models where they are apart, such as Latte
    "temporal": r"^blocks/temporal/.*(attention|mlp)/|^blocks/motion/",
    "all": "",
}
MOST_RANK = 8192
BASES = ("float32", "bfloat16", "int8", "nf4")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The settings of a LoRA.

    Raises:
        ValueError: A number is negative, the rank is above `MOST_RANK`, or `base` is unknown.
    """

    rank: int = 0  # columns of A; 0: no LoRA, all parameters are trained
    alpha: float = 0.0  # the adapter is scaled by alpha / rank; 0: alpha = rank
    targets: str = "attention"  # or "mlp", "spatial", "temporal", "all", or a pattern of the paths of kernels
    base: str = "bfloat16"  # the type that the frozen kernels are held in: "float32", "bfloat16", "int8" or "nf4"
    debias: float = 0.0  # beta of MotionDirector's appearance-debiased loss, which is added for motion; 0: none

    def __post_init__(self) -> None:
        for name in ("rank", "alpha", "debias"):
            if getattr(self, name) < 0:
                raise ValueError(f"lora.{name}={getattr(self, name)} must be 0 or more")
        if self.rank > MOST_RANK:
            raise ValueError(f"lora.rank={self.rank} must be at most {MOST_RANK}: more than any kernel's has no use")
        if self.base not in BASES:
            raise ValueError(f"lora.base={self.base!r} must be one of {', '.join(map(repr, BASES))}")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(f"lora.targets={self.targets!r} is no pattern: {error}") from error

    @property
    def scale(self) -> float:
        """The factor of A B."""
        return self.alpha / self.rank if self.alpha else 1.0


def lora_settings(text: str) -> dict[str, Any]:
    """Settings of a `LoraConfig` from "rank=32,alpha=32,targets=attention".

    Raises:
        ValueError: The rank is missing, a name or a number is none, or a name comes twice.
    """
    items = [item.partition("=") for item in text.split(",")]
    kinds: dict[str, Any] = {"rank": int, "alpha": float, "targets": str, "debias": float, "base": str}
    try:
        values = {name: kinds[name](value) for name, _, value in items}
    except (KeyError, ValueError):
        message = "must be rank=N, and may have alpha=X, targets=WHICH, debias=BETA and base=TYPE after commas"
        raise ValueError(f"--lora {text!r} {message}") from None
    if values.get("rank", 0) < 1 or len(values) < len(items):
        raise ValueError(f"--lora {text!r} must have each setting once, and a rank of at least 1, such as rank=32")
    return values


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel as a matrix: `layers` of them, from `inputs` to `outputs`."""

    layers: tuple[int, ...]  # () or (depth,)
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    tensor: int | None = None  # the axis of inputs + outputs that is sharded over the mesh's tensor axis

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """The shapes of a and b."""
        return {"a": (*self.layers, *self.inputs, rank), "b": (*self.layers, rank, *self.outputs)}

    def specs(self, rank: int) -> dict[str, P]:
        """The shardings of a and b on the mesh in use: their longest axis is divided, and the kernel's tensor axis."""
        first, result = len(self.layers), {}
        for name, shape in self.shapes(rank).items():
            shape, tensor = shape[first:], None
            if self.tensor is not None and (self.tensor < len(self.inputs)) == (name == "a"):
                tensor = self.tensor if name == "a" else self.tensor - len(self.inputs) + 1
            longest = max((axis for axis in range(len(shape)) if axis != tensor), key=lambda axis: shape[axis])
            result[name] = P(*[None] * first, *parameter_spec(shape, longest, tensor))
        return result


def kernels(abstract: Any, targets: str = "all") -> dict[str, Kernel]:
    """The kernels of a model by path.

    Args:
        abstract: {"params": ...}, arrays or `jax.ShapeDtypeStruct`s.
        targets: See `LoraConfig.targets`.

    Raises:
        ValueError: No kernel matches.
    """
    every = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(abstract["params"])[0]:
        if path[-1].key == "kernel":
            layers, inputs = matrix_axes(path, leaf.ndim)
            shape = leaf.shape
            spec: list[Any] = list(getattr(getattr(leaf, "sharding", None), "spec", ()))
            tensor = spec.index("tensor") - layers if "tensor" in spec else None
            kernel = Kernel(shape[:layers], shape[layers : layers + inputs], shape[layers + inputs :], tensor)
            every["/".join(k.key for k in path[:-1])] = kernel
    chosen = {path: kernel for path, kernel in every.items() if re.search(TARGETS.get(targets, targets), path)}
    if not chosen:
        raise ValueError(
            f"lora.targets={targets!r} matches no kernel; give {', '.join(TARGETS)}, or a pattern of paths such as "
            f"{', '.join(list(every)[:3])}"
        )
    return chosen


def init_adapter(config: LoraConfig, abstract: Any, key: jax.Array) -> Any:
    """{"lora": ...} at the start of training: A is uniform in +-1 / sqrt(fan in), as in peft, and B is zero.

    Args:
        config: Rank and targets.
        abstract: The base's parameters, see `kernels`.
        key: A's seed. A kernel's draw depends on its path, and not on which others are adapted.
    """
    flat = {}
    for path, kernel in kernels(abstract, config.targets).items():
        shapes, specs = kernel.shapes(config.rank), kernel.specs(config.rank)
        bound = 1 / math.sqrt(math.prod(kernel.inputs))
        of_path = jax.random.fold_in(key, zlib.crc32(path.encode()))
        a = jax.random.uniform(of_path, shapes["a"], minval=-bound, maxval=bound)
        flat[f"lora/{path}/a"], flat[f"lora/{path}/b"] = shard(a, specs["a"]), shard(jnp.zeros(shapes["b"]), specs["b"])
    return traverse_util.unflatten_dict(flat, sep="/")


def scaled(lora: Any, scale: float) -> Any:
    """The tree under "lora" with each b times `scale`."""
    times = lambda path, x: x * scale if path[-1].key == "b" and scale != 1 else x
    return jax.tree_util.tree_map_with_path(times, lora)


def stacked(loras: Sequence[Any]) -> Any:
    """One tree for the sum of several: their ranks follow one another. The scales are in b already."""
    flat: dict[str, list[Any]] = {}
    for lora in loras:
        for name, leaf in traverse_util.flatten_dict(lora, sep="/").items():
            flat.setdefault(name, []).append(leaf)
    axes = {name: _rank_axis(name, leaves[0].ndim) for name, leaves in flat.items()}
    joined = {n: leaves[0] if len(leaves) == 1 else jnp.concatenate(leaves, axes[n]) for n, leaves in flat.items()}
    return traverse_util.unflatten_dict(joined, sep="/")


def _rank_axis(name: str, ndim: int) -> int:
    """The axis of the rank in a leaf of the tree under "lora"."""
    return ndim - 1 if name.endswith("/a") else int(name.startswith("blocks/"))


def delta(a: Any, b: Any, layered: bool) -> Any:
    """A B, in the shape of the kernel.

    Args:
        a: (layers, inputs, r) or (inputs, r).
        b: (layers, r, outputs) or (r, outputs), with the scale.
        layered: Whether there is an axis of layers.
    """
    lead = a.shape[: int(layered)]
    rank = a.shape[-1]
    product = a.reshape(*lead, -1, rank) @ b.reshape(*lead, rank, -1)
    return product.reshape(*a.shape[:-1], *b.shape[len(lead) + 1 :])


def apart(params: Mapping[str, Any], pattern: str) -> tuple[Any, Any]:
    """(the parameters whose path matches the pattern, the others), as two trees.

    Raises:
        ValueError: No path matches.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    chosen = {name for name in flat if re.search(pattern, name.removeprefix("params/"))}
    if not chosen:
        raise ValueError(f"train_only={pattern!r} matches no parameter; their paths are such as {list(flat)[0]}")
    pick = lambda wanted: traverse_util.unflatten_dict(
        {name: leaf for name, leaf in flat.items() if (name in chosen) == wanted}, sep="/"
    )
    return pick(True), pick(False)


def together(one: Any, other: Any) -> Any:
    """Two trees of nested dicts, whose leaves have different paths, as one."""
    flat = traverse_util.flatten_dict(one, sep="/") | traverse_util.flatten_dict(other, sep="/")
    return traverse_util.unflatten_dict(flat, sep="/")

"""How a published family's tensors become ours and back: one `Rule` each, read by both directions.

    Rule("decoder/conv_in/conv/kernel", "decoder.conv_in.weight", "o i t h w -> t h w i o")

The pattern is einops', from theirs to ours; read backwards it exports. So a round trip is exact, and what is missing,
extra or misshapen in a checkpoint is known before any tensor is moved.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from einops import rearrange
from flax import traverse_util
from safetensors.numpy import save_file
from tqdm import tqdm

from minisora_jax.weights.checkpoint import Checkpoint, CheckpointError


@dataclasses.dataclass(frozen=True)
class Rule:
    ours: str  # path in our tree, joined by "/"
    theirs: str  # a tensor's name; with `layers`, a name with {i}
    pattern: str = ""  # einops, theirs -> ours; "" keeps the axes
    sizes: tuple[tuple[str, int], ...] = ()  # of axes that the pattern splits
    layers: int = 0  # our leading axis stacks this many of theirs
    aliases: tuple[str, ...] = ()  # other names that the same tensor is stored by
    copies: int = 0  # theirs is stored this many times over, by a name with {i}
    part: tuple[int, int] = (0, 1)  # (i, n): ours is part i of n equal parts of theirs along its first axis
    negate: bool = False

    @property
    def names(self) -> list[str]:
        count = self.layers or self.copies
        return [self.theirs.format(i=i) for i in range(count)] if count else [self.theirs]

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        i, n = self.part
        tensor = np.split(tensor, n)[i] if n > 1 else tensor
        tensor = -tensor if self.negate else tensor
        return rearrange(tensor, self.pattern, **dict(self.sizes)) if self.pattern else tensor

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Of a tensor that several rules share parts of, this rule's part."""
        array = -array if self.negate else array
        if not self.pattern:
            return array
        theirs, ours = self.pattern.split("->")
        return rearrange(array, f"{ours}->{theirs}", **dict(self.sizes))


def import_params(
    checkpoint: Checkpoint,
    rules: Sequence[Rule],
    abstract: Any,
    *,
    ignored: tuple[str, ...] = (),
    progress: bool = True,
) -> Any:
    """Our parameter tree from a checkpoint, each leaf of `abstract`'s shape, dtype and sharding (where it has one).

    `abstract` is a tree of `jax.ShapeDtypeStruct`s. Tensors are read, placed and dropped one after another. Those whose
    names begin with one of `ignored` are left alone.
    CheckpointError names every missing and extra tensor, and the first that does not fit.
    """
    targets = traverse_util.flatten_dict(abstract, sep="/")
    _check_names(checkpoint, rules, targets, ignored)
    leaves = {}
    for rule in tqdm(rules, desc="importing", unit="tensor", disable=not progress):
        target = targets[rule.ours]
        leaves[rule.ours] = _place(_read(checkpoint, rule, target), target)
    return traverse_util.unflatten_dict(leaves, sep="/")


def _check_names(checkpoint: Checkpoint, rules: Sequence[Rule], targets: dict, ignored: tuple[str, ...]) -> None:
    have = set(checkpoint.names)
    missing = [n for rule in rules for n in rule.names if not have & {n, *rule.aliases}]
    known = {n for rule in rules for n in (*rule.names, *rule.aliases)}
    extra = sorted(n for n in have - known if not n.startswith(ignored))
    if missing or extra:
        said = [
            f"{len(x)} {kind} ({', '.join(x[:4])}{', ...' if len(x) > 4 else ''})"
            for kind, x in (("missing", missing), ("extra", extra))
            if x
        ]
        raise CheckpointError(f"{checkpoint.path} is not of this preset: tensors {' and '.join(said)}")
    ours = {rule.ours for rule in rules}
    if ours != set(targets):
        raise CheckpointError(f"the rules leave out or invent parameters of ours: {sorted(ours ^ set(targets))[:4]}")


def _read(checkpoint: Checkpoint, rule: Rule, target) -> np.ndarray:
    layers = []
    for name in rule.names:
        name = next(n for n in (name, *rule.aliases) if n in checkpoint)
        try:
            layers.append(rule.to_ours(checkpoint.read(name)))
        except Exception as error:
            raise CheckpointError(
                f"{name} of shape {checkpoint.shape(name)} does not fit {rule.ours}: {error}"
            ) from error
    if rule.copies and not all(np.array_equal(layers[0], other) for other in layers[1:]):
        raise CheckpointError(
            f"{rule.theirs} is stored {rule.copies} times and should be the same each time, but is not"
        )
    array = np.stack(layers) if rule.layers else layers[0]
    if array.shape != target.shape:
        raise CheckpointError(
            f"{name} of shape {checkpoint.shape(name)} gives {rule.ours} the shape {array.shape}, "
            f"which is {target.shape} in this preset"
        )
    return array


def _place(array: np.ndarray, target):
    array = np.asarray(array, target.dtype)
    sharding = getattr(target, "sharding", None)
    if sharding is None:
        return array
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def export_params(params: Any, rules: Sequence[Rule]) -> Iterator[tuple[str, np.ndarray]]:
    """(their name, tensor) of every parameter: the inverse of `import_params`."""
    flat = traverse_util.flatten_dict(params, sep="/")
    parts: dict[str, list[np.ndarray]] = {}  # of tensors that several rules share
    for rule in rules:
        array = np.asarray(jax.device_get(flat[rule.ours]))
        for i, name in enumerate(rule.names):
            tensor = rule.to_theirs(array[i] if rule.layers else array)
            if rule.part[1] > 1:
                parts.setdefault(name, []).append(tensor)
                if len(parts[name]) < rule.part[1]:
                    continue
                tensor = np.concatenate(parts.pop(name))
            yield name, np.asarray(tensor, order="C")


def save_sharded(directory: str | Path, tensors: Iterator[tuple[str, np.ndarray]], stem: str, shard_bytes: int = 2**32):
    """Safetensors in diffusers' layout: STEM.safetensors, or numbered shards with STEM.safetensors.index.json."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    partial: list[tuple[Path, list[str]]] = []
    shard, size, total = {}, 0, 0

    def flush():
        path = directory / f"{stem}-{len(partial) + 1:05}.partial"
        save_file(shard, path)
        partial.append((path, list(shard)))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        shard[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(partial) == 1:
        partial[0][0].replace(directory / f"{stem}.safetensors")
        return
    weight_map = {}
    for i, (path, names) in enumerate(partial):
        final = f"{stem}-{i + 1:05}-of-{len(partial):05}.safetensors"
        path.replace(directory / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

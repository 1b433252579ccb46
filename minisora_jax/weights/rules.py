"""How a published family's tensors become ours and back: one `Rule` each, read by both directions.

    Rule("decoder/conv_in/conv/kernel", "decoder.conv_in.weight", "o i t h w -> t h w i o")

The pattern is einops', from theirs to ours; read backwards it exports. So a round trip is exact, and what is missing,
extra or misshapen in a checkpoint is known before any tensor is moved.
"""

from __future__ import annotations

import dataclasses
import functools
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
    theirs: str  # a tensor's name; with `layers`, a name with {i}; with `fuses`, one with {fused}
    pattern: str = ""  # einops, theirs -> ours; "" keeps the axes
    sizes: tuple[tuple[str, int], ...] = ()  # of axes that the pattern splits
    layers: int = 0  # our leading axis stacks this many of theirs
    aliases: tuple[str, ...] = ()  # other names that the same tensor is stored by
    copies: int = 0  # theirs is stored this many times over, by a name with {i}
    part: tuple[int, int] = (0, 1)  # (i, n): ours is part i of n equal parts of theirs along its first axis
    fuses: tuple[
        str, ...
    ] = ()  # ours is made of several of theirs, named by these, stacked as the pattern's first axis
    negate: bool = False

    @property
    def names_by_layer(self) -> list[list[str]]:
        """Of each layer or copy, the tensors that it is made of: one of them unless the rule fuses several."""
        count = self.layers or self.copies or 1
        return [[self.theirs.format(i=i, fused=fused) for fused in self.fuses or ("",)] for i in range(count)]

    @property
    def names(self) -> list[str]:
        return [name for layer in self.names_by_layer for name in layer]

    def to_ours(self, *tensors: np.ndarray) -> np.ndarray:
        """Ours, or one layer of it, of the tensors that it is made of."""
        i, n = self.part
        tensor = np.stack(tensors) if self.fuses else np.split(tensors[0], n)[i] if n > 1 else tensors[0]
        tensor = -tensor if self.negate else tensor
        return rearrange(tensor, self.pattern, **dict(self.sizes)) if self.pattern else tensor

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """The inverse: of a tensor that several rules share parts of, this rule's part; what we fuse, stacked."""
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
    keep_dtype: bool = False,
    progress: bool = True,
) -> Any:
    """Our parameter tree from a checkpoint, each leaf of `abstract`'s shape, dtype and sharding (where it has one).

    `abstract` is a tree of `jax.ShapeDtypeStruct`s. Tensors are read, placed and dropped one after another: beyond the
    result, memory holds one tensor. Those whose names begin with one of `ignored` are left alone. With `keep_dtype`
    leaves have the dtype that they are stored in.
    CheckpointError names every missing and extra tensor, and the first that does not fit, before any is read.
    """
    planned = planned_params(checkpoint, rules, abstract, ignored=ignored, keep_dtype=keep_dtype)
    planned, leaves = traverse_util.flatten_dict(planned, sep="/"), {}
    for rule in tqdm(rules, desc="importing", unit="tensor", disable=not progress):
        leaves[rule.ours] = _place(_read(checkpoint, rule, planned[rule.ours]), planned[rule.ours])
    return traverse_util.unflatten_dict(leaves, sep="/")


def planned_params(
    checkpoint: Checkpoint, rules: Sequence[Rule], abstract: Any, *, ignored: tuple[str, ...] = (), keep_dtype=False
) -> Any:
    """What `import_params` gives, as `jax.ShapeDtypeStruct`s with the shardings of `abstract`.

    It takes only the names, shapes and types that stand in the checkpoint's header: no tensor is read, and nothing is
    allocated. So whether a checkpoint fits is known at once, and a pod can be planned for from the header alone.
    """
    targets = traverse_util.flatten_dict(abstract, sep="/")
    _check_names(checkpoint, rules, targets, ignored)
    planned = {}
    for rule in rules:
        target, layers = targets[rule.ours], _stored_names(checkpoint, rule)
        for names in layers:
            shape = _layer_shape(checkpoint, rule, names)
            expected = target.shape[1:] if rule.layers else target.shape
            if shape != expected:
                raise CheckpointError(
                    f"{_described(checkpoint, names)} gives {rule.ours} the shape {shape}, which is {expected} here"
                )
        dtypes = (checkpoint.dtype(name) for names in layers for name in names)
        dtype = functools.reduce(np.promote_types, dtypes) if keep_dtype else target.dtype
        shape = (len(layers), *shape) if rule.layers else shape
        planned[rule.ours] = jax.ShapeDtypeStruct(shape, dtype, sharding=getattr(target, "sharding", None))
    return traverse_util.unflatten_dict(planned, sep="/")


def _check_names(checkpoint: Checkpoint, rules: Sequence[Rule], targets: dict, ignored: tuple[str, ...]) -> None:
    have = set(checkpoint.names)
    missing = list(dict.fromkeys(n for rule in rules for n in rule.names if not have & {n, *rule.aliases}))
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


def _stored_names(checkpoint: Checkpoint, rule: Rule) -> list[list[str]]:
    """`rule.names_by_layer`, each by the name that the checkpoint has for it."""
    stored_as = lambda name: next(n for n in (name, *rule.aliases) if n in checkpoint)
    return [[stored_as(name) for name in names] for names in rule.names_by_layer]


def _described(checkpoint: Checkpoint, names: list[str]) -> str:
    return f"{' and '.join(names)} of shape {checkpoint.shape(names[0])}"


def _layer_shape(checkpoint: Checkpoint, rule: Rule, names: list[str]) -> tuple[int, ...]:
    """The shape that the rule gives tensors of the header's shapes, tried on views of a single zero."""
    try:
        return rule.to_ours(*(np.broadcast_to(np.zeros((), np.int8), checkpoint.shape(name)) for name in names)).shape
    except Exception as error:
        raise CheckpointError(f"{_described(checkpoint, names)} does not fit {rule.ours}: {error}") from error


def _read(checkpoint: Checkpoint, rule: Rule, planned: jax.ShapeDtypeStruct) -> np.ndarray:
    """The leaf that `rule` gives, a tensor at a time into its place."""
    array = np.empty(planned.shape, planned.dtype)
    for i, names in enumerate(_stored_names(checkpoint, rule)):
        layer = rule.to_ours(*(checkpoint.read(name) for name in names))
        if rule.copies and i and not np.array_equal(layer.astype(array.dtype), array):
            raise CheckpointError(
                f"{rule.theirs} is stored {rule.copies} times and should be the same each time, but is not"
            )
        array[i if rule.layers else ...] = layer
    return array


def _place(array: np.ndarray, planned: jax.ShapeDtypeStruct):
    if planned.sharding is None:
        return array
    return jax.make_array_from_callback(array.shape, planned.sharding, lambda index: array[index])


def export_params(params: Any, rules: Sequence[Rule]) -> Iterator[tuple[str, np.ndarray]]:
    """(their name, tensor) of every parameter: the inverse of `import_params`. A leaf may be a function giving it."""
    flat = traverse_util.flatten_dict(params, sep="/")
    parts: dict[str, list[np.ndarray]] = {}  # of tensors that several rules share
    for rule in rules:
        leaf = flat[rule.ours]
        array = np.asarray(jax.device_get(leaf() if callable(leaf) else leaf))
        for i, names in enumerate(rule.names_by_layer):
            tensor = rule.to_theirs(array[i] if rule.layers else array)
            if rule.part[1] > 1:
                parts.setdefault(names[0], []).append(tensor)
                if len(parts[names[0]]) < rule.part[1]:
                    continue
                tensor = np.concatenate(parts.pop(names[0]))
            for name, fused in zip(names, tensor if rule.fuses else [tensor]):
                yield name, np.asarray(fused, order="C")


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

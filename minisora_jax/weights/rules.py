"""Conversion of a published family's tensors to our parameters and back: one `Rule` for each parameter.

    Rule("decoder/conv_in/conv/kernel", "decoder.conv_in.weight", "o i t h w -> t h w i o")

The pattern is einops', from the published tensor to ours. Read backwards, it exports. So a round trip is exact.
Missing, extra or misshapen tensors of a checkpoint are found before any tensor is read.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from einops import rearrange
from flax import traverse_util

from minisora_jax.io.atomic import write_text
from minisora_jax.io.safetensors import LazyArray, StoredTensor, write_tensors
from minisora_jax.weights.checkpoint import Checkpoint
from minisora_jax.weights.errors import WeightsFileError, shown


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one of our parameters ("ours") is stored in a published file ("theirs")."""

    ours: str  # path in our tree, joined by "/"
    theirs: str  # the tensor's name; with `layers` or `copies` it contains {i}, with `fuses` it contains {fused}
    pattern: str = ""  # einops, theirs -> ours; "": the axes are the same
    sizes: tuple[tuple[str, int], ...] = ()  # lengths of axes that the pattern splits
    layers: int = 0  # the first axis of ours stacks this many of their tensors
    aliases: tuple[str, ...] = ()  # other names for the same tensor
    copies: int = 0  # their file stores the tensor this many times, by a name with {i}
    part: tuple[int, int] = (0, 1)  # (i, n): ours is part i of n equal parts of theirs along its first axis
    fuses: tuple[str, ...] = ()  # ours stacks several tensors of these names, as the pattern's first axis
    negate: bool = False  # ours = -theirs

    @property
    def names_by_layer(self) -> list[list[str]]:
        """For each layer or copy, the names of its tensors: one name, or one for each of `fuses`."""
        count = self.layers or self.copies or 1
        return [[self.theirs.format(i=i, fused=fused) for fused in self.fuses or ("",)] for i in range(count)]

    @property
    def names(self) -> list[str]:
        """The names of all their tensors."""
        return [name for layer in self.names_by_layer for name in layer]

    def to_ours(self, *tensors: np.ndarray) -> np.ndarray:
        """Our parameter, or one layer of it, from their tensors."""
        i, n = self.part
        tensor = np.stack(tensors) if self.fuses else np.split(tensors[0], n)[i] if n > 1 else tensors[0]
        tensor = -tensor if self.negate else tensor
        return rearrange(tensor, self.pattern, **dict(self.sizes)) if self.pattern else tensor

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Their tensor from our parameter or from one layer of it.

        With `part` it is this rule's part of the tensor. With `fuses` the tensors are stacked along a first axis.
        """
        array = -array if self.negate else array
        if not self.pattern:
            return array
        theirs, ours = self.pattern.split("->")
        return rearrange(array, f"{ours}->{theirs}", **dict(self.sizes))


def import_lazily(
    checkpoint: Checkpoint,
    rules: Sequence[Rule],
    abstract: Any,
    *,
    ignored: tuple[str, ...] = (),
    keep_dtype: bool = False,
) -> Any:
    """Our parameter tree from a checkpoint, as `LazyArray`s. Each layer is read when it is used.

    Args:
        checkpoint: The published file.
        rules: The rules of its family and layout.
        abstract: Our tree as `jax.ShapeDtypeStruct`s.
        ignored: Prefixes of names of tensors that are not needed.
        keep_dtype: Keep the stored dtype in place of `abstract`'s.

    Raises:
        WeightsFileError: Tensors are missing or extra, or one has the wrong shape. No tensor is read for this check.
    """
    targets: dict[str, Any] = traverse_util.flatten_dict(abstract, sep="/")
    _check_names(checkpoint, rules, targets, ignored)
    leaves = {rule.ours: _leaf(checkpoint, rule, targets[rule.ours], keep_dtype) for rule in rules}
    return traverse_util.unflatten_dict(leaves, sep="/")


def planned_params(checkpoint: Checkpoint, rules: Sequence[Rule], abstract: Any, **options: Any) -> Any:
    """The tree of `import_lazily` as `jax.ShapeDtypeStruct`s with the shardings of `abstract`.

    It reads only the names, shapes and dtypes in the checkpoint's header, so a pod can be planned from the header
    alone. Arguments are those of `import_lazily`.
    """
    planned = lambda leaf, target: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=getattr(target, "sharding", None)
    )
    return jax.tree.map(planned, import_lazily(checkpoint, rules, abstract, **options), abstract)


def _check_names(
    checkpoint: Checkpoint, rules: Sequence[Rule], targets: dict[str, Any], ignored: tuple[str, ...]
) -> None:
    names = set(checkpoint.names)
    missing = list(dict.fromkeys(n for rule in rules for n in rule.names if not names & {n, *rule.aliases}))
    expected = {n for rule in rules for n in (*rule.names, *rule.aliases)}
    extra = sorted(n for n in names - expected if not n.startswith(ignored))
    if missing or extra:
        differences = [
            f"{len(x)} {kind} ({', '.join(map(shown, x[:4]))}{', ...' if len(x) > 4 else ''})"
            for kind, x in (("missing", missing), ("extra", extra))
            if x
        ]
        raise WeightsFileError(
            f"{checkpoint.path} is not a checkpoint of this preset: tensors {' and '.join(differences)}. "
            f"Check the file and the preset's name"
        )
    ours = {rule.ours for rule in rules}
    if ours != set(targets):
        raise WeightsFileError(f"the rules do not match our parameters: {sorted(ours ^ set(targets))[:4]}")


def _leaf(checkpoint: Checkpoint, rule: Rule, target: jax.ShapeDtypeStruct, keep_dtype: bool) -> LazyArray:
    """The parameter of `rule`, with layers as its parts. The shapes of the tensors are checked now."""
    stored_as = lambda name: next(n for n in (name, *rule.aliases) if n in checkpoint)
    layers = [[stored_as(name) for name in names] for names in rule.names_by_layer]
    shape = target.shape[1:] if rule.layers else target.shape
    for names in layers:
        stored = f"{' and '.join(names)} of shape {checkpoint.shape(names[0])}"
        try:
            layer = rule.to_ours(*(_blank(checkpoint.shape(name)) for name in names))
        except Exception as error:
            raise WeightsFileError(f"{stored} does not fit {rule.ours}: {error}") from error
        if layer.shape != shape:
            raise WeightsFileError(f"{stored} gives {rule.ours} the shape {layer.shape}, which is {shape} here")

    def parts() -> Iterator[np.ndarray]:
        read = lambda names: rule.to_ours(*(checkpoint.read(name) for name in names))
        if not rule.copies:
            yield from map(read, layers)
            return
        first = read(layers[0])
        if not all(np.array_equal(read(names), first) for names in layers[1:]):
            raise WeightsFileError(
                f"{checkpoint.path}: the {rule.copies} copies of {rule.theirs} differ, and they must be equal"
            )
        yield first

    stored_dtypes = (checkpoint.dtype(name) for names in layers for name in names)
    dtype = functools.reduce(np.promote_types, stored_dtypes) if keep_dtype else np.dtype(target.dtype)
    return LazyArray(target.shape, dtype, parts)


def _blank(shape: tuple[int, ...]) -> np.ndarray:
    """An array of this shape that takes one byte of memory."""
    return np.broadcast_to(np.zeros((), np.uint8), shape)


def export_lazily(params: Any, rules: Sequence[Rule]) -> dict[str, LazyArray]:
    """Their tensors by name, the inverse of `import_lazily`. Each is computed when it is used.

    Args:
        params: Our tree of arrays or `StoredTensor`s.
        rules: The rules of the family and layout.
    """
    on_host = lambda x: x if isinstance(x, StoredTensor) else np.asarray(jax.device_get(x))
    flat = {k: on_host(v) for k, v in traverse_util.flatten_dict(params, sep="/").items()}
    # For each tensor, the (rule, layer, place in `fuses`) of its parts: several rules may share a tensor.
    sources: dict[str, list[tuple[Rule, int, int]]] = {}
    for rule in rules:
        for i, names in enumerate(rule.names_by_layer):
            for j, name in enumerate(names):
                sources.setdefault(name, []).append((rule, i, j))

    def shape_of(rule: Rule) -> tuple[int, ...]:
        shape = flat[rule.ours].shape
        return rule.to_theirs(_blank(shape[1:] if rule.layers else shape)).shape[1 if rule.fuses else 0 :]

    def parts(entries: list[tuple[Rule, int, int]]) -> Iterator[np.ndarray]:
        for rule, i, j in entries:
            leaf = flat[rule.ours]
            theirs = rule.to_theirs(leaf[i] if rule.layers else leaf[...])
            yield theirs[j] if rule.fuses else theirs

    tensors = {}
    for name, entries in sources.items():
        shapes, dtype = [shape_of(rule) for rule, _, _ in entries], flat[entries[0][0].ours].dtype
        shape = (sum(s[0] for s in shapes), *shapes[0][1:]) if len(entries) > 1 else shapes[0]
        tensors[name] = LazyArray(shape, dtype, functools.partial(parts, entries))
    return tensors


def save_sharded(directory: str | Path, tensors: Mapping[str, LazyArray], stem: str, shard_bytes: int = 2**32) -> None:
    """Write safetensors as diffusers does.

    Args:
        directory: The directory to write.
        tensors: Tensors by published name.
        stem: The file is STEM.safetensors, or numbered shards with STEM.safetensors.index.json.
        shard_bytes: The most bytes of a shard.
    """
    directory, size = Path(directory), 0
    shards: list[list[str]] = [[]]
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    if len(shards) == 1:
        return write_tensors(directory / f"{stem}.safetensors", tensors, "exporting")
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors"
        write_tensors(directory / file, {n: tensors[n] for n in names}, f"exporting {i + 1} of {len(shards)}")
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    write_text(directory / f"{stem}.safetensors.index.json", json.dumps(index, indent=2) + "\n")

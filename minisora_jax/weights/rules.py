"""How a published family's tensors become ours and back: one `Rule` each, read by both directions.

    Rule("decoder/conv_in/conv/kernel", "decoder.conv_in.weight", "o i t h w -> t h w i o")

The pattern is einops', from theirs to ours; read backwards it exports. So a round trip is exact, and what is missing,
extra or misshapen in a checkpoint is known before any tensor is moved.
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
from tqdm import tqdm

from minisora_jax.io.atomic import write_text
from minisora_jax.io.safetensors import LazyArray, StoredTensor, write_tensors
from minisora_jax.weights.checkpoint import Checkpoint, WeightsFileError


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


def import_lazily(
    checkpoint: Checkpoint,
    rules: Sequence[Rule],
    abstract: Any,
    *,
    ignored: tuple[str, ...] = (),
    keep_dtype: bool = False,
) -> Any:
    """Our parameter tree from a checkpoint, of `LazyArray`s: their parts are layers, each read when it is asked for.

    `abstract` is a tree of `jax.ShapeDtypeStruct`s. Tensors whose names begin with one of `ignored` are left alone.
    With `keep_dtype` leaves have the dtype that they are stored in.
    CheckpointError names every missing and extra tensor, and the first that does not fit; no tensor is read for that.
    """
    targets = traverse_util.flatten_dict(abstract, sep="/")
    _check_names(checkpoint, rules, targets, ignored)
    leaves = {rule.ours: _leaf(checkpoint, rule, targets[rule.ours], keep_dtype) for rule in rules}
    return traverse_util.unflatten_dict(leaves, sep="/")


def planned_params(checkpoint: Checkpoint, rules: Sequence[Rule], abstract: Any, **options) -> Any:
    """What `import_params` gives, as `jax.ShapeDtypeStruct`s with the shardings of `abstract`.

    It takes only the names, shapes and types that stand in the checkpoint's header: no tensor is read, and nothing is
    allocated. So a pod can be planned for from the header alone.
    """
    planned = lambda leaf, target: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=getattr(target, "sharding", None)
    )
    return jax.tree.map(planned, import_lazily(checkpoint, rules, abstract, **options), abstract)


def import_params(
    checkpoint: Checkpoint,
    rules: Sequence[Rule],
    abstract: Any,
    *,
    ignored: tuple[str, ...] = (),
    progress: bool = True,
) -> Any:
    """`import_lazily` read: each leaf of `abstract`'s shape, dtype and sharding (where it has one), one after another.

    On a mesh, host memory holds one leaf beyond the result.
    """
    leaves = import_lazily(checkpoint, rules, abstract, ignored=ignored)
    with tqdm(desc="importing", unit="leaf", total=len(rules), disable=not progress) as bar:

        def place(leaf: LazyArray, target):
            array, sharding = leaf.whole(), getattr(target, "sharding", None)
            bar.update()
            return array if sharding is None else jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

        return jax.tree.map(place, leaves, abstract)


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
        raise WeightsFileError(f"{checkpoint.path} is not of this preset: tensors {' and '.join(said)}")
    ours = {rule.ours for rule in rules}
    if ours != set(targets):
        raise WeightsFileError(f"the rules leave out or invent parameters of ours: {sorted(ours ^ set(targets))[:4]}")


def _leaf(checkpoint: Checkpoint, rule: Rule, target, keep_dtype: bool) -> LazyArray:
    """The leaf that `rule` gives, its parts the layers. That the tensors fit is checked now, by their shapes."""
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
                f"{rule.theirs} is stored {rule.copies} times and should be the same each time, but is not"
            )
        yield first

    stored_dtypes = (checkpoint.dtype(name) for names in layers for name in names)
    dtype = functools.reduce(np.promote_types, stored_dtypes) if keep_dtype else np.dtype(target.dtype)
    return LazyArray(target.shape, dtype, parts)


def _blank(shape: tuple[int, ...]) -> np.ndarray:
    """An array of one byte, seen as `shape`."""
    return np.broadcast_to(np.zeros((), np.uint8), shape)


def export_lazily(params: Any, rules: Sequence[Rule]) -> dict[str, LazyArray]:
    """Their tensors by name, the inverse of `import_lazily`: each is read from its layer when it is asked for.

    Leaves are arrays or `StoredTensor`s.
    """
    on_disk_or_host = lambda x: x if isinstance(x, StoredTensor) else np.asarray(jax.device_get(x))
    flat = {k: on_disk_or_host(v) for k, v in traverse_util.flatten_dict(params, sep="/").items()}
    sources: dict[str, list[tuple[Rule, int, int]]] = {}  # several rules may share parts of a tensor
    for rule in rules:
        for i, names in enumerate(rule.names_by_layer):
            for j, name in enumerate(names):
                sources.setdefault(name, []).append((rule, i, j))

    def shape_of(rule: Rule) -> tuple[int, ...]:
        shape = flat[rule.ours].shape
        return rule.to_theirs(_blank(shape[1:] if rule.layers else shape)).shape[1 if rule.fuses else 0 :]

    def parts(of: list[tuple[Rule, int, int]]) -> Iterator[np.ndarray]:
        for rule, i, j in of:
            leaf = flat[rule.ours]
            theirs = rule.to_theirs(leaf[i] if rule.layers else leaf[...])
            yield theirs[j] if rule.fuses else theirs

    tensors = {}
    for name, of in sources.items():
        shapes, dtype = [shape_of(rule) for rule, _, _ in of], flat[of[0][0].ours].dtype
        shape = (sum(s[0] for s in shapes), *shapes[0][1:]) if len(of) > 1 else shapes[0]
        tensors[name] = LazyArray(shape, dtype, functools.partial(parts, of))
    return tensors


def export_params(params: Any, rules: Sequence[Rule]) -> Iterator[tuple[str, np.ndarray]]:
    """(their name, tensor) of every parameter: the inverse of `import_params`."""
    for name, tensor in export_lazily(params, rules).items():
        yield name, tensor.whole()


def save_sharded(directory: str | Path, tensors: Mapping[str, LazyArray], stem: str, shard_bytes: int = 2**32):
    """Safetensors in diffusers' layout: STEM.safetensors, or numbered shards with STEM.safetensors.index.json."""
    directory, shards, size = Path(directory), [[]], 0
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

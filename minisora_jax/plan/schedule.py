"""Reads a compiled TPU program: what is sent along which mesh axis, how often, and what runs meanwhile.

The text of a compiled module is its schedule: operations stand in the order they run in. An asynchronous collective is
a pair, `-start` and `-done`; it is hidden where an operation that computes (a fusion, a kernel, a loop or a branch with
one in it) stands between the two. Loops count as often as they turn, which their conditions say. What goes from
slice to slice over the data centre's network is a `send` to the host and a `recv`, both naming the same rendezvous.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict

BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BETWEEN_SLICES = ("data",)  # the only axis over more than one slice (parallel/mesh.py)
# What makes an operation worth waiting for; the rest moves or names data.
COMPUTES = ("fusion", "custom-call", "convolution", "dot", "while", "conditional", "call")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one kind along the same axes of the mesh, in one run of the program."""

    kind: str
    axes: tuple[str, ...]
    asynchronous: bool
    hidden: bool  # computing goes on meanwhile
    sites: int  # places in the program
    times: int  # that they run
    sent: float  # bytes that a chip sends, altogether
    network: bool = False  # between slices, over the data centre's network

    @property
    def where(self) -> str:
        return "slices" if self.network else "+".join(self.axes)


@dataclasses.dataclass(frozen=True)
class Operation:
    name: str
    opcode: str
    text: str


OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


def read(hlo: str, mesh_shape: dict[str, int]) -> list[Traffic]:
    """The traffic of a compiled module's text (`compiled.as_text()`) on a mesh of that shape, ids in order."""
    computations, entry = _computations(hlo)
    total: dict[tuple, list[float]] = defaultdict(lambda: [0, 0, 0.0])
    seen: set[str] = set()

    def visit(name: str, times: int) -> None:
        operations = computations.get(name, [])
        for i, op in enumerate(operations):
            kind, network = next((k for k in KINDS if op.opcode in (k, f"{k}-start")), None), False
            # XLA keeps a reduce-scatter as an all-reduce and a slice in a fusion of that name.
            if op.opcode == "fusion" and "all-reduce-scatter" in op.text:
                kind, inner = "reduce-scatter", computations.get(_called(op.text, "calls"), [])
                source = next((o.text for o in inner if o.opcode == "all-reduce"), op.text)
            elif op.opcode == "send" and (between := re.search(r'_xla_megascale_transfer_type="(\w+)"', op.text)):
                kind, network, source = between[1].lower().replace("_", "-"), True, op.text
            else:
                source = op.text
            if kind:
                axes = BETWEEN_SLICES if network else _axes(source, mesh_shape)
                n = _slices(source) if network else math.prod(mesh_shape[a] for a in axes)
                begun = network or op.opcode.endswith("-start") or "async_collective" in op.text
                hidden = begun and _covered(operations, i)
                sums = total[kind, axes, begun, hidden, network]
                sums[0] += (name, op.name) not in seen
                sums[1] += times
                sums[2] += times * _sent(kind, op.text if kind != "reduce-scatter" or network else source, n)
                seen.add((name, op.name))
            elif op.opcode == "while":
                visit(_called(op.text, "body"), times * _turns(op, operations, computations))
            elif op.opcode == "conditional":
                for branch in _branches(op.text):
                    visit(branch, times)
            elif op.opcode == "call" or op.opcode == "async-start":
                visit(_called(op.text, "to_apply") or _called(op.text, "calls"), times)

    visit(entry, 1)
    return [
        Traffic(kind, axes, begun, hidden, int(sites), int(times), sent, network)
        for (kind, axes, begun, hidden, network), (sites, times, sent) in sorted(
            total.items(), key=lambda item: -item[1][2]
        )
        if axes
    ]


def _computations(hlo: str) -> tuple[dict[str, list[Operation]], str]:
    found: dict[str, list[Operation]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if line.startswith(("%", "ENTRY")) and line.rstrip().endswith("{"):
            name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)[1]
            entry = name if line.startswith("ENTRY") else entry
            found[name] = []
        elif name and (match := OPERATION.match(line)):
            found[name].append(Operation(match[1], match[3], line))
    return found, entry


def _called(text: str, what: str) -> str:
    match = re.search(rf"{what}=%?([\w.\-]+)", text)
    return match[1] if match else ""


def _branches(text: str) -> list[str]:
    if match := re.search(r"branch_computations=\{([^}]*)\}", text):
        return [b.strip().lstrip("%") for b in match[1].split(",")]
    return [b for b in (_called(text, "true_computation"), _called(text, "false_computation")) if b]


def _turns(loop: Operation, operations: list[Operation], computations) -> int:
    """How often a loop that counts up to a constant runs; 1 where it does something else."""
    condition = computations.get(_called(loop.text, "condition"), [])
    by_name = {op.name: op for op in condition}
    compare = next((op for op in condition if op.opcode == "compare" and "ROOT" in op.text), None)
    if compare is None or "direction=LT" not in compare.text:
        return 1
    counter, limit = re.search(r"compare\(%?([\w.\-]+), %?([\w.\-]+)\)", compare.text).groups()
    if limit not in by_name or counter not in by_name or by_name[limit].opcode != "constant":
        return 1
    last = int(re.search(r"constant\((-?\d+)\)", by_name[limit].text)[1])
    index = int(re.search(r"index=(\d+)", by_name[counter].text)[1])
    outside = {op.name: op for op in operations}
    state = outside.get(re.search(r"while\(%?([\w.\-]+)\)", loop.text)[1])
    first = 0
    if state is not None and state.opcode == "tuple":
        operands = re.findall(r"%([\w.\-]+)", state.text.partition(" tuple(")[2].partition(")")[0])
        start = outside.get(operands[index]) if index < len(operands) else None
        if start is not None and start.opcode in ("copy", "bitcast"):
            start = outside.get(re.search(rf"{start.opcode}\(%?([\w.\-]+)", start.text)[1])
        if start is not None and (constant := re.search(r"constant\((-?\d+)\)", start.text)):
            first = int(constant[1])
    return max(last - first, 0)


def _covered(operations: list[Operation], start: int) -> bool:
    """Whether something computes between a collective's start and its end."""
    begun, meeting = operations[start], _rendezvous(operations[start].text)
    for op in operations[start + 1 :]:
        if meeting and op.opcode == "recv" and _rendezvous(op.text) == meeting:
            return False
        if not meeting and op.opcode.endswith("-done") and re.search(rf"\(%?{re.escape(begun.name)}\)", op.text):
            return False
        if op.opcode in COMPUTES and "AllocateBuffer" not in op.text:
            return True
    return True


def _rendezvous(text: str) -> str:
    """By which a `send` between slices and its `recv` know each other."""
    match = re.search(r'_xla_host_transfer_rendezvous="([^"]+)"', text)
    return match[1] if match else ""


def _slices(text: str) -> int:
    """How many slices a transfer between slices is among."""
    match = re.search(r'_xla_megascale_target="\{([\d,]+)\}', text)
    return len(match[1].split(",")) if match else 2


def _axes(text: str, mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which a collective's devices differ."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", text):
        named = re.findall(r"'(\w+)'", match[2])
        if set(named) <= set(mesh_shape):
            return tuple(axis for axis in mesh_shape if axis in named and mesh_shape[axis] > 1)
        sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", match[1])}  # a mesh of XLA's own
        places = [_place(device, sizes) for device in range(math.prod(sizes.values()))]
        fixed = [i for i, axis in enumerate(sizes) if axis not in named]
        group = [device for device, place in enumerate(places) if all(place[i] == 0 for i in fixed)]
    elif match := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        group = [int(match[1]), int(match[2])]
    elif match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        group = [int(n) for n in match[1].split(",")]
    elif match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        group = _iota_group(match)
    else:
        group = list(range(math.prod(mesh_shape.values())))
    places = [_place(device, mesh_shape) for device in group]
    return tuple(a for i, a in enumerate(mesh_shape) if len({p[i] for p in places}) > 1)


def _iota_group(match) -> list[int]:
    """The first group of `[groups,size]<=[dims]T(permutation)`."""
    import numpy as np

    dims = [int(n) for n in match[3].split(",")]
    ids = np.arange(math.prod(dims)).reshape(dims)
    if match[4]:
        ids = ids.transpose([int(n) for n in match[4].split(",")])
    return ids.reshape(int(match[1]), int(match[2]))[0].tolist()


def _place(device: int, mesh_shape: dict[str, int]) -> tuple[int, ...]:
    place = []
    for size in reversed(mesh_shape.values()):
        place.append(device % size)
        device //= size
    return tuple(reversed(place))


def _sent(kind: str, text: str, n: int) -> float:
    """Bytes that a chip sends of a collective among n."""
    opcode = "send(" if "_xla_megascale" in text else kind
    result = text.partition(" = ")[2].partition(f" {opcode}")[0]
    sizes = [BYTES.get(t, 0) * math.prod(int(d) for d in dims.split(",") if d) for t, dims in SHAPE.findall(result)]
    if kind == "collective-permute":
        return sizes[0] if sizes else 0  # of (input, output, two counters)
    if "_xla_megascale" in text:
        sizes = sizes[:1]  # of (input, a counter, a token)
    if kind == "all-reduce":
        return 2 * sum(sizes) * (n - 1) / n
    if kind == "all-gather" and "-start" in text.partition("(")[0]:
        sizes = sizes[-1:]
    return sum(sizes) * (n - 1) / n

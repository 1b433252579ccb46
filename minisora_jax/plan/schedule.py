"""Reads the collectives of a compiled TPU program: bytes by mesh axis, how often, and whether they are hidden.

The text of a compiled module is its schedule: operations are listed in the order in which they run. An asynchronous
collective is a pair, `-start` and `-done`. It is hidden if an operation that computes (a fusion, a kernel, a loop or a
branch) stands between the two. The operations of a loop count once for each iteration, by the loop's condition.
Transfers between slices over the data centre's network are a `send` to the host and a `recv` of the same rendezvous.
Copies to and from the host's memory, space S(5), are what remat="host" makes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict

import numpy as np

BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
TO_HOST, FROM_HOST = "copy to the host", "copy from the host"
HOST_COPIES = ("copy-start", "dynamic-slice-start", "dynamic-update-slice-start")
BETWEEN_SLICES = ("data",)  # the only axis that spans slices (parallel/mesh.py)
# Operations that compute. All others move or name data.
COMPUTES = ("fusion", "custom-call", "convolution", "dot", "while", "conditional", "call")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one kind along the same mesh axes, in one run of the program."""

    kind: str  # one of KINDS, TO_HOST or FROM_HOST
    axes: tuple[str, ...]  # () for copies to and from the host
    asynchronous: bool
    hidden: bool  # computation runs at the same time
    sites: int  # places in the program
    times: int  # executions
    sent: float  # bytes that one chip sends, in all executions
    network: bool = False  # between slices, over the data centre's network

    @property
    def where(self) -> str:
        """The axes in words."""
        return "slices" if self.network else "+".join(self.axes) or "host"


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a module."""

    name: str
    opcode: str
    text: str  # its line


OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
CONSTANT = r"constant\((-?\d+)\)"


def read_traffic(hlo: str, mesh_shape: dict[str, int]) -> list[Traffic]:
    """The traffic of a compiled module, the largest first.

    Args:
        hlo: Text of the module (`compiled.as_text()`).
        mesh_shape: Size of each mesh axis. Devices are numbered in the mesh's order.
    """
    computations, entry = _computations(hlo)
    total: dict[tuple, list[float]] = defaultdict(lambda: [0, 0, 0.0])
    seen: set[tuple[str, str]] = set()

    def visit(name: str, times: int) -> None:
        operations = computations.get(name, [])
        for i, op in enumerate(operations):
            kind, network = next((k for k in KINDS if op.opcode in (k, f"{k}-start")), None), False
            # XLA writes a reduce-scatter as a fusion "all-reduce-scatter" of an all-reduce and a slice.
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
                asynchronous = network or op.opcode.endswith("-start") or "async_collective" in op.text
                hidden = asynchronous and _is_hidden(operations, i)
                sums = total[kind, axes, asynchronous, hidden, network]
                sums[0] += (name, op.name) not in seen
                sums[1] += times
                sums[2] += times * _sent(kind, op.text if kind != "reduce-scatter" or network else source, n)
                seen.add((name, op.name))
            elif op.opcode in HOST_COPIES and (copy := _host_copy(op)):
                sums = total[copy[0], (), True, _is_hidden(operations, i), False]
                sums[0] += (name, op.name) not in seen
                sums[1] += times
                sums[2] += times * copy[1]
                seen.add((name, op.name))
            elif op.opcode == "while":
                visit(_called(op.text, "body"), times * _iterations(op, operations, computations))
            elif op.opcode == "conditional":
                for branch in _branches(op.text):
                    visit(branch, times)
            elif op.opcode == "call" or op.opcode == "async-start":
                visit(_called(op.text, "to_apply") or _called(op.text, "calls"), times)

    visit(entry, 1)
    return [
        Traffic(kind, axes, asynchronous, hidden, int(sites), int(times), sent, network)
        for (kind, axes, asynchronous, hidden, network), (sites, times, sent) in sorted(
            total.items(), key=lambda item: -item[1][2]
        )
        if axes or kind in (TO_HOST, FROM_HOST)
    ]


def _computations(hlo: str) -> tuple[dict[str, list[Operation]], str]:
    """({computation: its operations in order}, the name of the entry computation)."""
    computations: dict[str, list[Operation]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if line.startswith(("%", "ENTRY")) and line.rstrip().endswith("{"):
            name = _search(r"^(?:ENTRY )?%?([\w.\-]+)", line)
            entry = name if line.startswith("ENTRY") else entry
            computations[name] = []
        elif name and (match := OPERATION.match(line)):
            computations[name].append(Operation(match[1], match[3], line))
    return computations, entry


def _search(pattern: str, text: str) -> str:
    """The first group of the pattern's first match; "" without a match."""
    match = re.search(pattern, text)
    return match[1] if match else ""


def _called(text: str, attribute: str) -> str:
    """The computation that an operation names in an attribute; "" if it has none."""
    return _search(rf"{attribute}=%?([\w.\-]+)", text)


def _branches(text: str) -> list[str]:
    """The computations of a conditional."""
    if match := re.search(r"branch_computations=\{([^}]*)\}", text):
        return [b.strip().lstrip("%") for b in match[1].split(",")]
    return [b for b in (_called(text, "true_computation"), _called(text, "false_computation")) if b]


def _iterations(loop: Operation, operations: list[Operation], computations: dict[str, list[Operation]]) -> int:
    """The iterations of a loop that counts up to a constant; 1 for other loops."""
    condition = computations.get(_called(loop.text, "condition"), [])
    by_name = {op.name: op for op in condition}
    compare = next((op for op in condition if op.opcode == "compare" and "ROOT" in op.text), None)
    if compare is None or "direction=LT" not in compare.text:
        return 1
    operands = re.search(r"compare\(%?([\w.\-]+), %?([\w.\-]+)\)", compare.text)
    counter, limit = (by_name.get(name) for name in operands.groups()) if operands else (None, None)
    if counter is None or limit is None or limit.opcode != "constant":
        return 1
    end = int(_search(CONSTANT, limit.text))
    index = int(_search(r"index=(\d+)", counter.text))
    outside = {op.name: op for op in operations}
    state = outside.get(_search(r"while\(%?([\w.\-]+)\)", loop.text))
    start = 0
    if state is not None and state.opcode == "tuple":
        entries = re.findall(r"%([\w.\-]+)", state.text.partition(" tuple(")[2].partition(")")[0])
        initial = outside.get(entries[index]) if index < len(entries) else None
        if initial is not None and initial.opcode in ("copy", "bitcast"):
            initial = outside.get(_search(rf"{initial.opcode}\(%?([\w.\-]+)", initial.text))
        if initial is not None and (constant := _search(CONSTANT, initial.text)):
            start = int(constant)
    return max(end - start, 0)


def _is_hidden(operations: list[Operation], start: int) -> bool:
    """Whether an operation computes between a collective's start and its end."""
    rendezvous, operand = _rendezvous(operations[start].text), rf"\(%?{re.escape(operations[start].name)}\)"
    for op in operations[start + 1 :]:
        if rendezvous and op.opcode == "recv" and _rendezvous(op.text) == rendezvous:
            return False
        if not rendezvous and op.opcode.endswith("-done") and re.search(operand, op.text):
            return False
        if op.opcode in COMPUTES and "AllocateBuffer" not in op.text:
            return True
    return True


def _host_copy(op: Operation) -> tuple[str, float] | None:
    """(TO_HOST or FROM_HOST, bytes) of an asynchronous copy; None if no side of it is the host's memory."""
    result = op.text.partition(" = ")[2].partition(f" {op.opcode}(")[0]
    arrays = re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", result)
    host = ["S(5)" in layout for _, _, layout in arrays]
    if not any(host):
        return None
    sizes = [BYTES.get(t, 0) * math.prod(int(d) for d in dims.split(",") if d) for t, dims, _ in arrays]
    device = max(size for size, on_host in zip(sizes, host) if not on_host)
    slices = op.opcode != "copy-start"  # the result of a plain copy begins with what it writes
    to_host = op.opcode == "dynamic-update-slice-start" if slices else host[0]
    return TO_HOST if to_host else FROM_HOST, device


def _rendezvous(text: str) -> str:
    """The name that a `send` between slices shares with its `recv`; "" for other operations."""
    return _search(r'_xla_host_transfer_rendezvous="([^"]+)"', text)


def _slices(text: str) -> int:
    """The number of slices that a transfer between slices connects."""
    targets = _search(r'_xla_megascale_target="\{([\d,]+)\}', text)
    return len(targets.split(",")) if targets else 2


def _axes(text: str, mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which a collective's devices differ."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", text):
        named = re.findall(r"'(\w+)'", match[2])
        if set(named) <= set(mesh_shape):
            return tuple(axis for axis in mesh_shape if axis in named and mesh_shape[axis] > 1)
        sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", match[1])}  # a mesh that XLA made
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


def _iota_group(match: re.Match[str]) -> list[int]:
    """The first group of `[groups,size]<=[dims]T(permutation)`."""
    dims = [int(n) for n in match[3].split(",")]
    ids = np.arange(math.prod(dims)).reshape(dims)
    if match[4]:
        ids = ids.transpose([int(n) for n in match[4].split(",")])
    return ids.reshape(int(match[1]), int(match[2]))[0].tolist()


def _place(device: int, mesh_shape: dict[str, int]) -> tuple[int, ...]:
    """The index of a device along each mesh axis."""
    place = []
    for size in reversed(mesh_shape.values()):
        place.append(device % size)
        device //= size
    return tuple(reversed(place))


def _sent(kind: str, text: str, n: int) -> float:
    """The bytes that one chip sends in a collective of n chips."""
    opcode = "send(" if "_xla_megascale" in text else kind
    result = text.partition(" = ")[2].partition(f" {opcode}")[0]
    sizes = [BYTES.get(t, 0) * math.prod(int(d) for d in dims.split(",") if d) for t, dims in SHAPE.findall(result)]
    if kind == "collective-permute":
        return sizes[0] if sizes else 0  # the result is (input, output, two counters)
    if "_xla_megascale" in text:
        sizes = sizes[:1]  # the result is (input, a counter, a token)
    if kind == "all-reduce":
        return 2 * sum(sizes) * (n - 1) / n
    if kind == "all-gather" and "-start" in text.partition("(")[0]:
        sizes = sizes[-1:]
    return sum(sizes) * (n - 1) / n

"""The tree of containers, numbers and tensors in a torch file's pickle, read without running any of it.

A pickle is a program: it names functions and calls them. Here its steps are followed by hand. Only what rebuilds a
tensor is understood; every other function, class or call becomes an inert `Placeholder`. So nothing is imported or
called, no object of ours can be altered, and memory grows with the number of steps, which has a limit.
"""

from __future__ import annotations

import dataclasses
import io
import pickletools
from typing import Any

MOST_STEPS = 4_000_000
_SCALARS = (str, int, float, bool, bytes, type(None))


class PickleError(ValueError):
    """The pickle is damaged, or larger than any checkpoint's."""


@dataclasses.dataclass(frozen=True)
class Placeholder:
    """A function, a class or an object that was not made. `name` is the function's or the class's."""

    name: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """A named run of numbers in the file: its key, its torch type and its length in numbers."""

    key: str
    type: str
    length: int


@dataclasses.dataclass(frozen=True)
class View:
    """A tensor: its place in a storage, counted in numbers, as the pickle states it. `type` is the tensor's own."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    type: str


class _Mark:
    pass


_MARK = _Mark()


@dataclasses.dataclass(frozen=True)
class Pickle:
    """What a pickle holds. Dictionaries have only entries whose keys are strings or numbers. A tree may have a loop."""

    tree: Any
    foreign: list[str]  # the names that it would import beyond those of tensors
    storages: dict[str, Storage]  # all that it names, by key


def read_pickle(data: bytes | io.BytesIO) -> Pickle:
    """Read a pickle; of a stream the one that begins at its place, and leave its place behind it.

    Raises:
        PickleError: the pickle is damaged, states a tensor that cannot be, or has too many steps.
    """
    machine = _Machine()
    try:
        stream = io.BytesIO(data) if isinstance(data, bytes) else data
        for count, (step, argument, _) in enumerate(pickletools.genops(stream)):
            if count >= MOST_STEPS:
                raise PickleError(f"it has more than {MOST_STEPS:,} steps")
            if step.name == "STOP":
                return Pickle(machine.pop(), sorted(machine.foreign), machine.storages)
            machine.do(step.name, argument)
    except PickleError:
        raise
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        OverflowError,
        EOFError,
        AttributeError,
        RecursionError,
    ) as error:
        raise PickleError(f"{type(error).__name__}: {error}") from error
    raise PickleError("it has no end")


class _Machine:
    """A stack, and a memo of values that are used again."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.foreign: set[str] = set()
        self.storages: dict[str, Storage] = {}

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise PickleError("a value is missing")
        return value

    def to_mark(self) -> list[Any]:
        """The values above the last mark, which are taken off with it."""
        at = next((i for i in range(len(self.stack) - 1, -1, -1) if self.stack[i] is _MARK), None)
        if at is None:
            raise PickleError("a mark is missing")
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def do(self, step: str, argument: Any) -> None:
        """Follow one step."""
        if step in _CONSTANTS:
            self.stack.append(_CONSTANTS[step])
        elif step in _NUMBERS_AND_TEXT:
            self.stack.append(argument)
        elif step in _EMPTY:
            self.stack.append(_EMPTY[step]())
        elif step in _PUT:
            self.memo[len(self.memo) if step == "MEMOIZE" else argument] = self.stack[-1]
        elif step in _GET:
            self.stack.append(self.memo[argument])
        elif step in ("PROTO", "FRAME"):
            pass
        elif step == "MARK":
            self.stack.append(_MARK)
        elif step == "POP":
            self.stack.pop()
        elif step == "POP_MARK":
            self.to_mark()
        elif step == "DUP":
            self.stack.append(self.stack[-1])
        elif step in _TUPLES:
            values = [self.pop() for _ in range(_TUPLES[step])][::-1]
            self.stack.append(tuple(values))
        elif step == "TUPLE":
            self.stack.append(tuple(self.to_mark()))
        elif step in ("LIST", "FROZENSET"):
            self.stack.append(self.to_mark())
        elif step == "DICT":
            values = self.to_mark()
            self.stack.append({})
            self.fill(self.stack[-1], values)
        elif step in ("APPEND", "APPENDS", "ADDITEMS"):
            values = [self.pop()] if step == "APPEND" else self.to_mark()
            if isinstance(self.stack[-1], list):
                self.stack[-1].extend(values)
        elif step == "SETITEM":
            value, key = self.pop(), self.pop()
            self.fill(self.stack[-1], [key, value])
        elif step == "SETITEMS":
            values = self.to_mark()
            self.fill(self.stack[-1], values)
        elif step == "GLOBAL":
            self.stack.append(Placeholder(argument.replace(" ", ".")))
        elif step == "STACK_GLOBAL":
            name, module = self.pop(), self.pop()
            self.stack.append(Placeholder(f"{module}.{name}" if isinstance(module, str) else "?"))
        elif step in ("PERSID", "BINPERSID"):
            storage = _storage(argument if step == "PERSID" else self.pop())
            if self.storages.setdefault(storage.key, storage) != storage:
                raise PickleError(f"the storage {storage.key[:40]!r} has two types or lengths")
            self.stack.append(storage)
        elif step in ("REDUCE", "NEWOBJ"):
            arguments, function = self.pop(), self.pop()
            self.stack.append(self.called(function, arguments))
        elif step == "NEWOBJ_EX":
            _, arguments, function = self.pop(), self.pop(), self.pop()
            self.stack.append(self.called(function, arguments))
        elif step == "BUILD":
            self.pop()  # the state of an object: ours have none, and a placeholder needs none
        elif step in ("INST", "OBJ"):
            values = self.to_mark()
            name = argument.replace(" ", ".") if step == "INST" else getattr(values[0], "name", "?")
            self.foreign.add(name)
            self.stack.append(Placeholder(name))
        else:
            raise PickleError(f"its step {step} occurs in no checkpoint")

    def fill(self, container: Any, values: list[Any]) -> None:
        """Add keys and values, in turns, to a dictionary."""
        if len(values) % 2:
            raise PickleError("a dictionary's key has no value")
        if isinstance(container, dict):
            for key, value in zip(values[::2], values[1::2]):
                if isinstance(key, _SCALARS):
                    container[key] = value

    def called(self, function: Any, arguments: Any) -> Any:
        """What a call of a function gives: a tensor, a container, or a placeholder for all else."""
        if not isinstance(function, Placeholder) or not isinstance(arguments, tuple):
            return Placeholder("?")
        if function.name in _REBUILD:
            return _view(function.name, arguments)
        if function.name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
            return arguments[0] if arguments else Placeholder("?")
        if function.name == "torch._tensor._rebuild_from_type_v2":  # a tensor that carries attributes
            return self.called(arguments[0], arguments[2]) if len(arguments) == 4 else Placeholder("?")
        if function.name == "collections.OrderedDict":
            container: dict[Any, Any] = {}
            for pair in arguments[0] if arguments and isinstance(arguments[0], list) else []:
                if isinstance(pair, list | tuple):
                    self.fill(container, list(pair))
            return container
        if function.name != "torch.Size":
            self.foreign.add(function.name)
        return arguments[0] if function.name == "torch.Size" and arguments else Placeholder(function.name)


def _storage(identity: Any) -> Storage:
    """The storage that a persistent id ("storage", type, key, device, length) names. Old ones end with None."""
    if isinstance(identity, tuple) and len(identity) == 6 and identity[5] is None:
        identity = identity[:5]
    if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
        raise PickleError("a storage is named in an unknown way")
    _, kind, key, _, length = identity
    if not (isinstance(kind, Placeholder) and isinstance(key, str) and _is_count(length)):
        raise PickleError("a storage is named in an unknown way")
    return Storage(key, kind.name.removeprefix("torch.").removeprefix("storage."), length)


def _view(function: str, arguments: tuple) -> View:
    if len(arguments) < 4 or not isinstance(arguments[0], Storage):
        raise PickleError("a tensor has no storage")
    storage, offset, shape, stride = arguments[:4]
    kind = storage.type
    if function.endswith("v3"):
        if len(arguments) < 7 or not isinstance(arguments[6], Placeholder):
            raise PickleError("a tensor has no type")
        kind = arguments[6].name.removeprefix("torch.")
    lists = all(isinstance(n, list | tuple) and all(map(_is_count, n)) for n in (shape, stride))
    if not (lists and _is_count(offset) and len(shape) == len(stride) <= 32):
        raise PickleError("a tensor's place in its storage is not made of counts: a negative or no number")
    return View(storage, offset, tuple(shape), tuple(stride), kind)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


_REBUILD = tuple(f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3"))
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": list}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUT = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
_GET = ("GET", "BINGET", "LONG_BINGET")
_NUMBERS_AND_TEXT = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
)

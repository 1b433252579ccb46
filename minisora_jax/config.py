"""From a config file and the command line to the frozen dataclasses the code runs on.

ml_collections is seen only here and in configs/. `--config=NAME:arg=...` names a shipped config or a file, and
`--config.a.b=1` changes an entry, whether the file names it or leaves it at its default. An unknown key or a wrong type
is an error before anything is compiled.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import math
import re
import runpy
import sys
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# Settings that had another name before 0.2. Files that were written with the old names are still read.
RENAMED = {
    "facts": "micro_conditioning",
    "grid": "time_schedule",
    "groups": "attention_pattern",
    "known": "conditioning",
    "law": "distribution",
    "level": "time_input",
}


def with_current_names(values: dict) -> dict:
    """Settings, nested or not, with the names that they have today."""
    current = lambda value: with_current_names(value) if isinstance(value, dict) else value
    return {RENAMED.get(name, name): current(value) for name, value in values.items()}


# ---- Config files


def names() -> dict[str, str]:
    """The shipped configs: name -> the first line of what it says about itself.

    Example:
        >>> import minisora_jax as ms
        >>> "dit_tiny" in ms.configs.names()
        True
    """
    return {
        path.stem: (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
        for path in sorted(_shipped().glob("*.py"))
    }


def load(name: str, /, **arguments: Any) -> ConfigDict:
    """The entries of a config, to be changed at will and given to `train` or `train_codec`.

    Args:
        name: a shipped config such as "dit_tiny", or a file; ":a=1,b=2" after it gives its arguments.
        **arguments: the same arguments by name.

    Raises:
        FileNotFoundError: if there is no such config; the message lists the shipped ones.
        ValueError: for an argument that the config does not take.

    Example:
        >>> import minisora_jax as ms
        >>> config = ms.configs.load("dit_tiny", data="data/latents", steps=200)
        >>> config.run.optim.learning_rate = 1e-3
        >>> config.run.steps
        200
    """
    file, _, text = name.partition(":")
    path = _find(file)
    if path.parent != _shipped():  # so that a config can import its neighbours
        sys.path.insert(0, str(path.resolve().parent.parent))
    given = ",".join(filter(None, [text, *(f"{k}={v}" for k, v in arguments.items())]))
    return runpy.run_path(str(path))["get_config"](given or None)


def parse_arg(arg: str | None, **defaults: Any) -> dict[str, Any]:
    """{name: value} from "a=1,b=text", each converted to its default's type (big_vision's idiom); for config files.

    Raises:
        ValueError: for a name that has no default, and for a value of another type.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        name, separator, text = item.partition("=")
        if not separator or name not in defaults:
            raise ValueError(f"config argument {item!r}: give {', '.join(f'{k}=...' for k in defaults)}")
        kind = type(defaults[name])
        try:
            values[name] = text.lower() in ("1", "true", "yes") if kind is bool else kind(text)
        except ValueError:
            raise ValueError(f"config argument {item!r} must be a number such as {name}={defaults[name]}") from None
    return values


def _find(name: str) -> Path:
    """The file of a config: the path itself, or the shipped config of that name."""
    for path in (Path(name), _shipped() / f"{name}.py", _shipped() / Path(name).name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"no config file {name}; the shipped configs are {', '.join(names())}")


def _shipped() -> Path:
    """configs/: within the package after an installation, beside it in a checkout."""
    installed = Path(__file__).parent / "bundled" / "configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "configs"


def how_to_install(extra: str) -> str:
    """The command that installs the packages of an extra, in the checkout that this package comes from."""
    return f"uv sync --extra {extra}, or pip install '.[{extra}]', in the checkout"


# ---- From entries to dataclasses


def complete(entries: dict, cls: type, settled: dict | None = None) -> dict:
    """All settings of a config: the defaults of the dataclass `cls`, then `settled`, then the config's entries."""
    return _over(_over(dataclasses.asdict(cls()), settled or {}), with_current_names(entries))


def read_config(flags: list[str], cls: type, example: str, settled: dict | None = None) -> dict:
    """The config that a command line names, as a plain dict with every setting.

    Args:
        flags: the command line's `--config...` arguments. They come last, over the file's entries.
        cls: the dataclass with the defaults. The file may have entries that it has not, such as prompts.
        example: what to show when no config is named.
        settled: settings that the file may override, of the model to start from.

    Raises:
        FileNotFoundError: if there is no such config.
        ValueError: for an unknown flag or a value of the wrong type.
    """
    from absl import flags as absl_flags
    from ml_collections import ConfigDict, config_flags

    files = [f.removeprefix("--config=") for f in flags if f.startswith("--config=")]
    if not files:
        raise ValueError(f"no --config=NAME given; for example --config={example}. Configs: {', '.join(names())}")
    config = ConfigDict(complete(load(files[-1]).to_dict(), cls, settled))
    values = absl_flags.FlagValues()
    rest = ["minisora", *(_with_current_key(f) for f in flags if not f.startswith("--config="))]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=rest)
        extra = values(rest)[1:]
    except (absl_flags.Error, KeyError, AttributeError, TypeError) as error:
        message = " ".join(str(error.args[0]).split())
        if isinstance(error, KeyError | AttributeError) and (key := re.search(r"\w+", message)):
            near = re.search(r'Did you mean "(\w+)"', message)
            message = f"there is no setting {key[0]!r}" + (f"; did you mean {near[1]!r}?" if near else "")
        raise ValueError(f"in {' '.join(rest[1:])}: {message}. `--list-config` prints every setting") from error
    if extra:
        raise ValueError(f"unrecognised arguments: {' '.join(extra)}")
    return values.config.to_dict()


def _with_current_key(flag: str) -> str:
    """--config.times.distribution=x of --config.times.law=x: names before 0.2 are taken for one release."""
    key, equals, value = flag.partition("=")
    return ".".join(RENAMED.get(part, part) for part in key.split(".")) + equals + value


def _over(defaults: dict, entries: dict) -> dict:
    """`defaults` with `entries` in their place, nested dicts entry by entry; whole numbers fit floats."""
    merged = dict(defaults)
    for name, value in entries.items():
        default = defaults.get(name)
        if isinstance(default, dict) and isinstance(value, dict):
            value = _over(default, value)
        elif isinstance(default, float) and type(value) is int:
            value = float(value)
        merged[name] = value
    return merged


def build(cls: type, values: dict, at: str = "config") -> Any:
    """An instance of the dataclass `cls` from nested dicts; lists become tuples; unknown keys are refused."""
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{at}.{unknown[0]} is not a setting; {at} has {', '.join(hints)}")
    arguments = {}
    for name, value in values.items():
        hint = hints[name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                fields = ", ".join(f"{at}.{name}.{field.name}" for field in dataclasses.fields(hint))
                raise ValueError(f"{at}.{name}={value!r} must be a group of settings: {fields}")
            value = build(hint, value, f"{at}.{name}")
        elif not _fits(value := _tuples(value), hint):
            finite = "finite " if isinstance(value, float) and not math.isfinite(value) else ""
            raise ValueError(f"{at}.{name}={value!r} must be {finite}{getattr(hint, '__name__', hint)}")
        arguments[name] = value
    return cls(**arguments)


def _tuples(value: Any) -> Any:
    """Lists, and lists within lists, as tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, h) for h in typing.get_args(hint))
    base = typing.get_origin(hint) or hint
    if base is tuple and isinstance(value, tuple) and (hints := typing.get_args(hint)):
        of_each = hints[:1] * len(value) if hints[-1] is ... else hints
        return len(of_each) == len(value) and all(map(_fits, value, of_each))
    if base is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return not isinstance(base, type) or (isinstance(value, base) and (base is bool or not isinstance(value, bool)))


# ---- What can be set


@dataclasses.dataclass(frozen=True)
class Setting:
    """One key of a config."""

    key: str  # dotted, as in --config.KEY=VALUE
    type: str
    default: Any
    meaning: str


def settings(cls: type, prefix: str = "") -> Iterator[Setting]:
    """Every setting of a config dataclass, nested ones too. Its meaning is the comment of its field."""
    hints, comments = typing.get_type_hints(cls), _comments(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from settings(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield Setting(prefix + field.name, str(field.type), field.default, comments.get(field.name, ""))


def _comments(cls: type) -> dict[str, str]:
    """{field: its comment} of a dataclass: at the end of the field's line, and on comment lines right after it."""
    source = textwrap.dedent(inspect.getsource(cls))
    fields = {
        node.end_lineno: node.target.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    comments: dict[str, str] = {}
    name, last = "", 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith("# ----"):
            line = token.start[0]
            if line in fields:
                name = fields[line]
            elif line != last + 1 or not token.line.strip().startswith("#"):
                continue
            comments[name] = f"{comments.get(name, '')} {token.string.lstrip('# ')}".strip()
            last = line
    return comments

"""From a config file and the command line to the frozen dataclasses the code runs on.

ml_collections is seen only here and in configs/: `--config=configs/x.py:arg=...` names the file, `--config.a.b=1`
changes an entry, whether the file names it or leaves it at its default. An unknown key or a wrong type is an
error before anything is compiled.
"""

from __future__ import annotations

import dataclasses
import runpy
import sys
import types
import typing
from pathlib import Path
from typing import Any

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


def read_config(flags: list[str], cls: type, example: str, settled: dict | None = None) -> dict:
    """The config as a plain dict: the defaults of the dataclass `cls`, `settled`, the file's entries, then the flags'.

    `flags` are the command line's `--config...` arguments. The file may have entries that `cls` has not.
    """
    from absl import flags as absl_flags
    from ml_collections import ConfigDict, config_flags

    files = [f.removeprefix("--config=") for f in flags if f.startswith("--config=")]
    if not files:
        raise ValueError(f"no --config=FILE given; for example --config={example}")
    name, _, argument = files[-1].partition(":")
    if not Path(name).is_file():
        raise FileNotFoundError(f"no config file {name}; for example --config={example}")
    # So that a config can import its neighbours, as in `from configs.common import parse_arg`.
    sys.path.insert(0, str(Path(name).resolve().parent.parent))
    entries = runpy.run_path(name)["get_config"](argument or None).to_dict()
    config = ConfigDict(_over(_over(dataclasses.asdict(cls()), settled or {}), entries))
    values = absl_flags.FlagValues()
    rest = ["minisora", *(f for f in flags if not f.startswith("--config="))]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=rest)
        extra = values(rest)[1:]
    except (absl_flags.Error, KeyError, AttributeError, TypeError) as error:
        said = " ".join(str(error.args[0]).split())
        raise ValueError(f"in {' '.join(rest[1:])}: {said}") from error
    if extra:
        raise ValueError(f"unrecognised arguments: {' '.join(extra)}")
    return values.config.to_dict()


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
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                fields = ", ".join(f"{at}.{name}.{field.name}" for field in dataclasses.fields(hint))
                raise ValueError(f"{at}.{name}={value!r} must be a group of settings: {fields}")
            value = build(hint, value, f"{at}.{name}")
        elif isinstance(value, list):
            value = tuple(value)
        elif not _fits(value, hint):
            raise ValueError(f"{at}.{name}={value!r} must be {getattr(hint, '__name__', hint)}")
        arguments[name] = value
    return cls(**arguments)


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, h) for h in typing.get_args(hint))
    base = typing.get_origin(hint) or hint
    if base is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return not isinstance(base, type) or (isinstance(value, base) and (base is bool or not isinstance(value, bool)))

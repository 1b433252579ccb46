"""From a config file and the command line to the frozen dataclasses the code runs on.

ml_collections is seen only here and in configs/: `--config=configs/x.py:arg=...` names the file, `--config.a.b=1`
changes an entry of it. An unknown key or a wrong type is an error before anything is compiled.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from pathlib import Path
from typing import Any


def read_config(flags: list[str], example: str) -> dict:
    """The config as a plain dict. `flags` are the command line's `--config...` arguments."""
    from absl import flags as absl_flags
    from ml_collections import config_flags

    files = [f.split("=", 1)[1].split(":")[0] for f in flags if f.startswith("--config=")]
    if not files:
        raise ValueError(f"no --config=FILE given; for example --config={example}")
    if not Path(files[-1]).exists():
        raise FileNotFoundError(f"no config file {files[-1]}; for example --config={example}")
    # So that a config can import its neighbours, as in `from configs.common import parse_arg`.
    sys.path.insert(0, str(Path(files[-1]).resolve().parent.parent))
    values = absl_flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    try:
        extra = values(["minisora", *flags])[1:]
    except (absl_flags.Error, KeyError, AttributeError) as error:
        raise ValueError(f"{error}") from error
    if extra:
        raise ValueError(f"unrecognised arguments: {' '.join(extra)}")
    return values.config.to_dict()


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

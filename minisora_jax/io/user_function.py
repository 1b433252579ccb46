"""Functions of the user's own, which a setting names as FILE.py:FUNCTION: a score, a reward, a captioner, a policy."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any


class UserFunctionError(RuntimeError):
    """A function that the user names fails. That is no fault of the clip, so the run stops."""


@functools.cache
def load_function(spec: str) -> Callable:
    """The function "FILE.py:NAME" or "package.module:NAME".

    Raises:
        ValueError: The file or the function is missing.
        UserFunctionError: The file raises an error when it is run.
    """
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise ValueError(f"{spec!r} must be FILE.py:FUNCTION or package.module:function")
    if where.endswith(".py"):
        if not Path(where).is_file():
            raise ValueError(f"{spec!r}: there is no file {where}")
        module_spec = importlib.util.spec_from_file_location(f"minisora_plug_{Path(where).stem}", where)
        if module_spec is None or module_spec.loader is None:
            raise ValueError(f"{spec!r}: {where} is no Python file")
        module = importlib.util.module_from_spec(module_spec)
        try:
            module_spec.loader.exec_module(module)
        except ImportError:
            raise
        except Exception as error:
            raise UserFunctionError(f"{spec!r}: {where} raised {type(error).__name__}: {error}") from error
    else:
        module = importlib.import_module(where)
    if not callable(getattr(module, name, None)):
        raise ValueError(f"{spec!r}: {where} has no function {name}")
    return getattr(module, name)


def number_by(function: Callable, spec: str, *arguments: Any) -> float:
    """The number that a user's function gives.

    Raises:
        UserFunctionError: It raises an error, or gives something that is no number.
    """
    try:
        value = function(*arguments)
    except Exception as error:
        message = f"{spec} raised {type(error).__name__}: {error}; MINISORA_TRACEBACK=1 shows where"
        raise UserFunctionError(message) from error
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise UserFunctionError(f"{spec} gave {value!r:.100}, and must give a number") from error

"""`--config=configs/x.py:a=1,b=text`: named arguments of a config file (big_vision's idiom)."""

from __future__ import annotations


def parse_arg(arg: str | None, **defaults):
    """{name: value} from "a=1,b=text", each converted to the type of its default; unknown names are refused."""
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        name, separator, text = item.partition("=")
        if not separator or name not in defaults:
            raise ValueError(f"config argument {item!r}: give {', '.join(f'{k}=...' for k in defaults)}")
        kind = type(defaults[name])
        values[name] = text.lower() in ("1", "true", "yes") if kind is bool else kind(text)
    return values

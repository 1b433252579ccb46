"""Videos longer or larger than those of training in one piece: the model with its rotary positions scaled.

The other ways are windows (windows.py) and upscaling (upscaling.py). docs/long-context.md compares them.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from minisora_jax.models.dit_config import DiTConfig

if TYPE_CHECKING:
    from minisora_jax.generate.native import NativePipeline

Factors = tuple[float, float, float]


def parse_rope(text: str) -> tuple[str, Factors | None]:
    """(method, factors of t, y, x or None) of "METHOD" or "METHOD=T,Y,X", such as "yarn=2,1,1"."""
    method, equals, numbers = text.partition("=")
    if not equals:
        return method, None
    try:
        t, y, x = map(float, numbers.split(","))
    except ValueError:
        raise ValueError(f"--rope {text!r:.60} must be METHOD or METHOD=T,Y,X, such as yarn=2,1,1") from None
    return method, (t, y, x)


def spelled(config: DiTConfig) -> str:
    """What `parse_rope` reads, with the factors of this config."""
    return f"{config.rope_scaling}={','.join(map(repr, config.rope_factors))}"


def extrapolated(
    pipeline: NativePipeline, method: str, size_THW: tuple[int, int, int] | None, factors: Factors | None
) -> dict:
    """The fields of a pipeline that `NativePipeline.extrapolated` changes."""
    config, sides = pipeline.config, pipeline.sides
    if config.rope_scaling != "none":
        raise ValueError(
            f"the model was trained with rope_scaling={config.rope_scaling!r} and rope_factors={config.rope_factors}: "
            f"it makes {pipeline.known_size} as it is; leave --rope out"
        )
    trained = (pipeline.window, *(-(-n // patch) for n, patch in zip(sides or (0, 0), config.patch[1:])))
    if factors is None:
        if size_THW is None:
            raise ValueError(f"--rope {method} needs factors where no size is asked for: --rope {method}=T,Y,X")
        T, H, W = size_THW
        asked = (1 + -(-(T - 1) // pipeline.codec.config.time_factor), -(-H // pipeline.cell), -(-W // pipeline.cell))
        t, y, x = (max(1.0, n / most) if most else 1.0 for n, most in zip(asked, trained))
        factors = (t, y, x)
    t, y, x = factors
    scaled = lambda cfg: dataclasses.replace(cfg, rope_scaling=method, rope_factors=factors, rope_trained=trained)
    longer = lambda n, factor: max(n, round(n * factor))
    return {
        "config": scaled(config),
        "guide": pipeline.guide and (scaled(pipeline.guide[0]), pipeline.guide[1]),
        "window": longer(pipeline.window, t),
        "sides": sides and (longer(sides[0], y), longer(sides[1], x)),
    }

"""minisora_jax: an open Sora in JAX. Importing this package touches no device.

    import minisora_jax as ms

    pipeline = ms.VideoPipeline.load()
    [video] = pipeline.generate("a red circle moves left on a black background")

The names below are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minisora_jax import config as configs
    from minisora_jax.api.encoding import encode
    from minisora_jax.api.notebook import plot_metrics, read_video, show
    from minisora_jax.api.training import train, train_codec
    from minisora_jax.curation.prepare import prepare
    from minisora_jax.data.latents import open_latents
    from minisora_jax.generate.pipeline import VideoPipeline
    from minisora_jax.generate.request import Request
    from minisora_jax.media.video_writer import write_video
    from minisora_jax.models.codec import Codec
    from minisora_jax.sources.clips import open_clips

__version__ = "0.2.0"

__all__ = [
    "Codec",
    "Request",
    "VideoPipeline",
    "configs",
    "encode",
    "open_clips",
    "open_latents",
    "plot_metrics",
    "prepare",
    "read_video",
    "show",
    "train",
    "train_codec",
    "write_video",
]

_HOMES = {
    "Codec": "models.codec",
    "Request": "generate.request",
    "VideoPipeline": "generate.pipeline",
    "configs": "config",
    "encode": "api.encoding",
    "open_clips": "sources.clips",
    "open_latents": "data.latents",
    "plot_metrics": "api.notebook",
    "prepare": "curation.prepare",
    "read_video": "api.notebook",
    "show": "api.notebook",
    "train": "api.training",
    "train_codec": "api.training",
    "write_video": "media.video_writer",
}


def __getattr__(name: str) -> Any:
    if name == "Generator":
        raise AttributeError("minisora_jax.Generator is now minisora_jax.VideoPipeline")
    if name not in _HOMES:
        raise AttributeError(f"minisora_jax has no {name!r}; it has {', '.join(__all__)}")
    module = importlib.import_module(f"minisora_jax.{_HOMES[name]}")
    value = module if name == "configs" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""A published text encoder on disk, as `minisora import` writes it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from minisora_jax.io.model_dir import check_shapes, export_model, in_words, load_model, model_hash, saved_settings
from minisora_jax.models.clip import CLIPConfig, CLIPEncoder
from minisora_jax.models.t5 import T5Config, T5Encoder

CONFIGS = {"t5": T5Config, "clip": CLIPConfig}
MODULES = {T5Config: T5Encoder, CLIPConfig: CLIPEncoder}


@dataclasses.dataclass(frozen=True, repr=False)
class TextEncoder:
    """A text encoder with its weights.

    `module.apply(params, ids_BL, segment_BL)` returns the features; see models/t5.py and models/clip.py.
    """

    config: T5Config | CLIPConfig
    params: dict  # {"params": ...}, in the precision of the files
    hash: str = ""  # of the exported files

    def __repr__(self) -> str:
        return f"TextEncoder({type(self.module).__name__}, {in_words(self.params, self.hash)})"

    @property
    def module(self) -> T5Encoder | CLIPEncoder:
        """The Flax module of this config."""
        return MODULES[type(self.config)](self.config)

    @classmethod
    def load(cls, directory: str | Path) -> TextEncoder:
        """The text encoder that `minisora import` wrote to `directory`.

        Raises:
            ValueError: The directory holds another kind of model, or one of another shape.
        """
        params, config = load_model(directory, dtype=None)
        kind = config.get("kind")
        if not isinstance(kind, str) or kind not in CONFIGS:
            raise ValueError(f"{directory} holds a {kind!r} model, not a text encoder ({' or '.join(CONFIGS)})")
        settings = saved_settings(CONFIGS[kind], config, kind, directory)
        check_shapes(params, abstract_params(settings), directory)
        return cls(settings, params, model_hash(directory))

    def export(self, directory: str | Path, record: dict, dtype: str | None = None, progress: str = "") -> str:
        """Write the encoder to `directory`, so that `load` reads it.

        Args:
            directory: The directory to write.
            record: The encoder's origin, stored in its config.
            dtype: dtype of the stored weights; None: as they are.
            progress: Label of the progress bar; "": no bar.

        Returns:
            The hash of the written files.
        """
        kind = next(k for k, config in CONFIGS.items() if isinstance(self.config, config))
        config = {"kind": kind, kind: dataclasses.asdict(self.config), "training": record}
        return export_model(directory, self.params, config, dtype=dtype, progress=progress)


def abstract_params(config: T5Config | CLIPConfig) -> Any:
    """The parameter tree {"params": ...} as `jax.ShapeDtypeStruct`s, float32."""
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return jax.eval_shape(MODULES[type(config)](config).init, jax.random.key(0), ids, ids)

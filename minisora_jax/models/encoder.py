"""A published text encoder on disk: what `minisora import` writes, as models/codec.py is for codecs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from minisora_jax.io.model_dir import config_fields, export_model, load_model, model_hash
from minisora_jax.models.clip import CLIPConfig, CLIPEncoder
from minisora_jax.models.t5 import T5Config, T5Encoder

CONFIGS = {"t5": T5Config, "clip": CLIPConfig}
MODULES = {T5Config: T5Encoder, CLIPConfig: CLIPEncoder}


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """`module.apply(params, ids_BL, segment_BL)` gives the features; see models/t5.py and models/clip.py."""

    config: T5Config | CLIPConfig
    params: dict  # {"params": ...}, in the precision they are stored in
    hash: str = ""

    @property
    def module(self) -> T5Encoder | CLIPEncoder:
        return MODULES[type(self.config)](self.config)

    @classmethod
    def load(cls, directory: str | Path) -> TextEncoder:
        params, config = load_model(directory, dtype=None)
        kind = config.get("kind")
        if kind not in CONFIGS:
            raise ValueError(f"{directory} holds a {kind!r} model, not a text encoder ({' or '.join(CONFIGS)})")
        return cls(CONFIGS[kind](**config_fields(config[kind])), params, model_hash(directory))

    def export(self, directory: str | Path, record: dict, dtype: str | None = None, progress: str = "") -> str:
        """Write the encoder for `load`; `record` says where it is from. Returns its hash."""
        kind = next(k for k, config in CONFIGS.items() if isinstance(self.config, config))
        config = {"kind": kind, kind: dataclasses.asdict(self.config), "training": record}
        return export_model(directory, self.params, config, dtype=dtype, progress=progress)

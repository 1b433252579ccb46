"""The README.md of an exported model: what the Hugging Face Hub shows of it, with the facts that its config records.

The front matter follows huggingface.co/docs/hub/model-cards. A license is the owner's to state, so none is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minisora_jax.io.atomic import write_text

NAME = "README.md"
TASKS = {"dit": "text-to-video", "lora": "text-to-video"}
TASKS |= {"vae": "image-to-image", "t5": "feature-extraction", "clip": "feature-extraction"}
TASKS |= {"clip_vision": "image-feature-extraction"}
NOUNS = {"dit": "diffusion transformer", "lora": "LoRA adapter"}
NOUNS |= {"vae": "video codec", "t5": "text encoder", "clip": "text encoder", "clip_vision": "image encoder"}
RECORDED = (  # (label, keys of the entry in the run's config)
    ("converted from the published", "imported"),
    ("started from", "init"),
    ("training data", "data", "path"),
    ("held-out data", "data", "held_out"),
    ("steps", "run", "steps"),
    ("optimiser", "run", "optim", "name"),
    ("learning rate", "run", "optim", "learning_rate"),
)
SHAPE = ("width", "depth", "heads", "latent_channels", "base", "multipliers", "time_down")


def write_card(folder: Path, config: dict[str, Any], parameters: int, loader: str = "") -> None:
    """Write FOLDER/README.md, unless there is one: it may be the owner's.

    Args:
        folder: where the model was written.
        config: the model's saved config.
        parameters: their number.
        loader: the class of diffusers or transformers that reads the folder; "": it has this project's layout.
    """
    if not (folder / NAME).exists():
        write_text(folder / NAME, model_card(folder.resolve().name, config, parameters, loader))


def model_card(name: str, config: dict[str, Any], parameters: int, loader: str = "") -> str:
    """The text of a model card. See `write_card`."""
    kind = str(config.get("kind"))
    training = config.get("training")
    training = training if isinstance(training, dict) else {}
    library = loader.partition(".")[0] or "minisora_jax"
    lines = [
        "---",
        f"library_name: {library}",
        f"pipeline_tag: {TASKS.get(kind, 'other')}",
        "tags: [jax, minisora_jax]",
    ]
    what = f"A {NOUNS.get(kind, kind)} of {parameters / 1e6:,.1f} million parameters, written by minisora_jax."
    lines += ["---", "", f"# {name}", "", what]
    return "\n".join([*lines, *_how_to_load(kind, config, loader), *_facts(kind, config, training)]) + "\n"


def _how_to_load(kind: str, config: dict[str, Any], loader: str) -> list[str]:
    if loader:
        package, _, name = loader.partition(".")
        return [
            "",
            "```python",
            f"from {package} import {name}",
            "",
            f'model = {name}.from_pretrained("OWNER/NAME")',
            "```",
        ]
    if kind == "lora":
        return ["", "```", 'minisora generate "a caption" --model=ITS_MODEL --lora hf://OWNER/NAME', "```"]
    if kind != "dit":
        return []
    codec = " --codec=hf://OWNER/CODEC" if "codec" in config else ""
    return ["", "```", f'minisora generate "a caption" --model=hf://OWNER/NAME{codec}', "```"]


def _facts(kind: str, config: dict[str, Any], training: dict[str, Any]) -> list[str]:
    """Tables of the shape and of the training, as far as they are recorded."""
    shape = config.get(kind)
    rows = [(k, shape[k]) for k in SHAPE if k in shape] if isinstance(shape, dict) else []
    if size := config.get("latent_size"):
        rows.append(("largest latents in training (t, h, w)", size))
    if codec := config.get("codec"):
        rows.append(("its codec, by hash", codec))
    for label, *keys in RECORDED:
        value: Any = training
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value:
            rows.append((label, value))
    return ["", "| | |", "|---|---|", *(f"| {label} | `{_cell(value)}` |" for label, value in rows)] if rows else []


def _cell(value: Any) -> str:
    """A value within one cell of a table, whatever a config holds."""
    return str(value).replace("`", "'").replace("|", "/").replace("\n", " ")[:200]

"""Writes docs/configuration.md: every key of the configs, its type, default and meaning.

uv run python docs/make_configuration.py
"""

from pathlib import Path

from minisora_jax.config import names, settings

PAGE = Path(__file__).with_name("configuration.md")


def page() -> str:
    from minisora_jax.training.codec_task import CodecTask
    from minisora_jax.training.diffusion_task import DiffusionTask

    lines = [
        "# Configuration",
        "",
        "`python docs/make_configuration.py` generates this page from the code; a test compares the two.",
        "`minisora train --list-config` prints the same list. `--config=NAME:arg=value` names a config,",
        "`--config.KEY=VALUE` changes a key, and in Python `ms.configs.load(NAME)` returns the entries.",
        "",
        "| config | what it is |",
        "|---|---|",
        *(f"| `{name}` | {about} |" for name, about in names().items()),
    ]
    for verb, cls in (("train", DiffusionTask), ("train-vae", CodecTask)):
        lines += ["", f"## `minisora {verb}`", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for row in settings(cls):
            meaning = row.meaning.replace("|", "\\|")
            lines.append(f"| `{row.key}` | `{row.type.replace('|', 'or')}` | `{row.default!r}` | {meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

"""The configuration of a run, kept in its work directory: a run goes on with the same one only."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jax

from minisora_jax.config import complete, with_current_names
from minisora_jax.io.atomic import write_text
from minisora_jax.io.json_files import read_json
from minisora_jax.parallel.processes import barrier, is_main, several

# Settings of a run that may change when it goes on: they change no result.
FREE = ("mesh", "profile", "wandb", "goodput")


def require_same_config(workdir: Path, run_config: dict, settings: type | None = None) -> None:
    """Write WORKDIR/config.json, or raise ValueError if it differs from `run_config` in what changes the result.

    The defaults of `settings` stand for what the file lacks: a version that had no such setting did what they say.
    """
    path = workdir / "config.json"
    text = json.dumps(run_config, indent=2, sort_keys=True) + "\n"
    if path.exists():
        whole = lambda config: complete(config, settings) if settings else with_current_names(config)
        before, now = (_of_the_result(whole(config)) for config in (read_json(path), json.loads(text)))
        if changed := _changes(before, now):
            raise ValueError(
                f"{workdir} was begun with another config ({'; '.join(changed)}): use a new --workdir or that config"
            )
    elif is_main():
        write_text(path, text)
    barrier("config.json")
    deadline = time.monotonic() + 10  # some network file systems cache for seconds that a file does not exist
    while several() and not path.exists():
        if time.monotonic() > deadline:
            raise ValueError(
                f"process {jax.process_index()} does not see {path}, which process 0 wrote: --workdir must lie on a "
                f"file system that all {jax.process_count()} processes share"
            )
        time.sleep(0.2)


def _of_the_result(run_config: dict) -> dict:
    """The config without what does not change the result. A run may go on with another mesh, or be traced."""
    run = run_config.get("run")
    if not isinstance(run, dict):
        return run_config
    return run_config | {"run": {k: v for k, v in run.items() if k not in FREE}}


def _changes(old: Any, new: Any, at: str = "config") -> list[str]:
    """The settings that differ, as "config.run.steps: 40 -> 3"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [c for k in keys for c in _changes(old.get(k), new.get(k), f"{at}.{k}")]
    return [] if old == new else [f"{at}: {old} -> {new}"]

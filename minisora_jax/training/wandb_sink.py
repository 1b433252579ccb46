"""A run's metrics on Weights & Biases. One work directory is one run there, also when it is continued."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from minisora_jax.io.atomic import write_text


def wandb_package(project: str) -> Any:
    """The package, for a run of that project; ImportError, with the command that installs it, if it is missing."""
    try:
        import wandb
    except ImportError as error:
        raise ImportError(f"run.wandb={project} needs the package wandb: pip install wandb") from error
    return wandb


class WandbSink:
    """Sends scalars and videos. What the service does is set by its own variables, such as WANDB_MODE=offline."""

    def __init__(self, project: str, workdir: Path, config: dict) -> None:
        """Begin or continue the run of a work directory.

        Args:
            project: PROJECT or ENTITY/PROJECT.
            workdir: The work directory. Its wandb_id names the run.
            config: The run's whole configuration.

        Raises:
            ImportError: wandb is not installed.
        """
        wandb = wandb_package(project)
        path = workdir / "wandb_id"
        if not path.exists():
            write_text(path, secrets.token_hex(8))
        entity, _, name = project.rpartition("/")
        self._video, identity = wandb.Video, path.read_text(encoding="utf-8").strip()
        settings = wandb.Settings(console="off", silent=True)  # the progress bar is ours
        self._run = wandb.init(
            project=name,
            entity=entity or None,
            name=workdir.resolve().name,
            dir=str(workdir),
            id=identity,
            resume="allow",
            config=config,
            settings=settings,
        )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Send scalars of a step. The service drops those of steps before the newest that it has."""
        self._run.log(values, step=step)

    def video(self, step: int, name: str, path: Path) -> None:
        """Send a video of a step, a GIF."""
        self._run.log({name: self._video(str(path), format="gif", caption=path.name)}, step=step)

    def close(self) -> None:
        """Send what is left, and end the run there."""
        self._run.finish()

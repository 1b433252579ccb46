"""What a model that reads given frames as channels can do, and the given frames of its requests."""

from __future__ import annotations

import numpy as np

from minisora_jax.data.rows import patchify
from minisora_jax.generate.request import Request
from minisora_jax.models.dit_config import DiTConfig

FLAGS = {"image_to_video": "--image FIRST", "interpolate": "--first FIRST --last LAST"}


def require_able(config: DiTConfig, task: str) -> None:
    """Raise ValueError if the model cannot do this task of generate/tasks.py. The message says what it can do."""
    if config.given_channels and task not in (able := able_tasks(config)):
        can = " and ".join(f"{name} ({FLAGS[name]})" for name in able)
        raise ValueError(f"this model makes videos from given frames: it can do {can}, and not {task}")


def able_tasks(config: DiTConfig) -> list[str]:
    """The tasks of a model with given channels. Wan 2.1 has one for one image and one for two; Wan 2.2's does both."""
    if not config.image_features:
        return list(FLAGS)
    return ["interpolate"] if config.image_positions else ["image_to_video"]


def frame_tokens(config: DiTConfig, request: Request, grid_thw: tuple[int, int, int]) -> tuple:
    """A request's given frames (channels by token (n, x), image tokens (I, E)); None for what the model does not read.

    Raises:
        ValueError: The request gives none, has those of another size, or gives them to a model that does not read them.
    """
    if not config.given_channels:
        if request.frames:
            raise ValueError("Request.frames is for models with given_channels: use Request.given")
        return None, None
    if request.frames is None or request.given is not None:
        require_able(config, "a request without frames" if request.given is None else "one with given latents")
    assert request.frames is not None
    given_thwx = patchify(request.frames.channels_thwc, config.patch)
    if given_thwx.shape != (*grid_thw, config.given_width):
        raise ValueError(
            f"the given frames have {given_thwx.shape[:3]} tokens of {given_thwx.shape[-1]} numbers; the request "
            f"has {grid_thw}, and the model reads {config.given_width}"
        )
    given_nx = given_thwx.reshape(-1, config.given_width)
    return given_nx, _image_tokens(config, request.frames.image_IE) if config.image_features else None


def _image_tokens(config: DiTConfig, image_IE: np.ndarray | None) -> np.ndarray:
    if image_IE is not None:
        count, width = image_IE.shape
        if width == config.image_features and config.image_positions in (0, count):
            return image_IE
    found = "missing" if image_IE is None else image_IE.shape
    wanted = f"{config.image_positions or 'any number'} of width {config.image_features}"
    raise ValueError(f"the image tokens of given frames are {found}: the model reads {wanted}")

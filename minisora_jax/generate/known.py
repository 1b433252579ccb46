"""Tokens that are known while the rest is sampled: given clean, or held on their way from noise.

A model that was trained with such conditioning masks is given the tokens clean, and told that their time is 0. To any
other model, clean tokens beside noisy ones are strange. For such a model they are held: after each step they are the
known latents with that step's share of the noise (Song et al. 2021, arXiv:2011.13456, section 5; "replacement" in Ho et
al. 2022, arXiv:2204.03458). It sees a noisy video whose known part goes the true way, and makes the rest fit to it,
less surely than a model that was trained to.
"""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from minisora_jax.diffusion.noise_path import NoisePath
from minisora_jax.generate.given_frames import able_tasks
from minisora_jax.generate.noise import Noise
from minisora_jax.models.dit_config import DiTConfig

log = logging.getLogger("minisora")

# The kind of conditioning mask that teaches a task (data/conditioning.py); "" for those that need none.
TASKS = {
    "text_to_video": "",
    "image_to_video": "first",
    "interpolate": "ends",
    "video_to_video": "",
    "inpaint": "box",
    "outpaint": "outside",
    "extend": "prefix",
    "transition": "between",
    "long_video": "prefix",
}


@struct.dataclass
class Held:
    """Tokens that are held."""

    mask_BS: jax.Array  # bool
    noise: Noise  # of the start of sampling

    def back(self, path: NoisePath, x_BSP: jax.Array, known_BSP: jax.Array, time_BS: jax.Array) -> jax.Array:
        """The noisy tokens x at a time, with the known ones in the held places."""
        noisy_BSP = path.mix(known_BSP, self.noise.draw(0, x_BSP.shape[-1]), time_BS[..., None])
        return jnp.where(self.mask_BS[..., None], noisy_BSP, x_BSP)


def clean_tokens(trained: frozenset[str] | None, cond_mask_thw: np.ndarray, first: int = 0) -> np.ndarray:
    """The known tokens that a model can be given clean; the other known ones are held.

    Args:
        trained: Kinds of conditioning mask that the model was trained with; None: not recorded, which counts as all.
        cond_mask_thw: The known tokens, bool.
        first: The time position of the first latent frame; only 0 is that of a clip.
    """
    if trained is None or trained & kinds_of(cond_mask_thw):
        return cond_mask_thw
    clean_thw = np.zeros_like(cond_mask_thw)
    if trained & {"first", "ends", "prefix"} and first == 0 and cond_mask_thw[0].all():
        clean_thw[0] = True
    if cond_mask_thw.any():
        _say_that_tokens_are_held(", ".join(sorted(trained)) or "none")
    return clean_thw


def leads_over(trained: frozenset[str] | None) -> bool:
    """Whether a model was trained with a known past and future: its loops are made as transitions back."""
    return "between" in (trained or ())


def kinds_of(cond_mask_thw: np.ndarray) -> frozenset[str]:
    """The kinds of conditioning mask of which this is one."""
    known_t: np.ndarray = np.all(cond_mask_thw, axis=(1, 2))
    if not (cond_mask_thw == known_t[:, None, None]).all():
        return frozenset({"box", "outside"})
    before, after = (int(np.argmin([*order, False])) for order in (known_t, known_t[::-1]))
    kinds = {"frames"}
    if before + after == known_t.sum():
        kinds |= {"prefix"} if not after else {"suffix"} if not before else {"between"}
        kinds |= {(1, 0): {"first"}, (0, 1): {"last"}, (1, 1): {"ends"}}.get((before, after), set())
    return frozenset(kinds)


def tasks_of(trained: frozenset[str] | None, config: DiTConfig) -> str:
    """The tasks that a model can do, in words."""
    if config.given_channels:
        return f"only {' and '.join(able_tasks(config))}"
    if trained is None:
        return "all; which of them it was trained for is not recorded"
    able = [task for task, kind in TASKS.items() if not kind or kind in trained]
    others = ", ".join(task for task in TASKS if task not in able)
    return ", ".join(able) + (f"; not trained for, what is given is held: {others}" if others else "")


@functools.cache
def _say_that_tokens_are_held(trained: str) -> None:
    log.warning(
        "the model was not trained with what is given here (its conditioning masks: %s): it is held at the noise of "
        "each step, and the rest fits less well than with a model that was. configs/wan_tasks_lora.py trains it",
        trained,
    )

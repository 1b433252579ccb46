"""A run for test_train.py to start, kill and start again: python tests/train_tiny.py WORKDIR CACHE STEPS."""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np

jax.config.update("jax_platforms", "cpu")

from minisora_jax.data.latents import Latents, write_latents  # noqa: E402
from minisora_jax.data.loader import DataConfig  # noqa: E402
from minisora_jax.data.packing import PackConfig  # noqa: E402
from minisora_jax.models.dit import DiTConfig  # noqa: E402
from minisora_jax.models.text import encode_bytes  # noqa: E402
from minisora_jax.training.diffusion_task import DiffusionTask, train_diffusion  # noqa: E402
from minisora_jax.training.loop import RunConfig  # noqa: E402
from minisora_jax.training.optim import OptimConfig  # noqa: E402
from minisora_jax.types import LatentClip  # noqa: E402


def make_cache(directory, codec_hash: str = "test") -> None:
    rng = np.random.default_rng(0)

    def clips():
        for i in range(100):
            t, h, w = rng.integers(1, 4), *(2 * rng.integers(1, 3, 2))
            mean = rng.normal([2, -2, 1, -1], 0.2, (t, h, w, 4)).astype(np.float32)  # something to learn at once
            caption = f"clip number {i}"
            yield LatentClip(mean, np.full_like(mean, 0.1), encode_bytes(caption), caption, 8.0, str(i))

    text = {"encoder": "bytes"}
    write_latents(directory, list(clips()), codec_hash=codec_hash, text=text, empty_text_LE=encode_bytes(""))


def train_with(cache, workdir, steps: int, **settings) -> None:
    """A run with other settings of `RunConfig`."""
    small = task(steps)
    small = dataclasses.replace(small, run=dataclasses.replace(small.run, **settings))
    train_diffusion(small, workdir, Latents(cache), {"run": settings}, {})


def task(steps: int, rows: int = 8, strict: bool = False) -> DiffusionTask:
    return DiffusionTask(
        data=DataConfig(strict=strict),
        # Little to compile, which takes most of a start.
        dit=DiTConfig(
            latent_channels=4,
            patch=(1, 2, 2),
            width=32,
            depth=1,
            heads=2,
            text_width=64,
            text_depth=0,
            positions="none",
            qk_norm="none",
            cross_norm=False,
            micro_conditioning=False,
        ),
        pack=PackConfig(tokens=16, text_tokens=128, slots=8, rows=rows),
        run=RunConfig(
            steps=steps,
            log_every=1,
            save_every=3,
            sample_every=0,
            optim=OptimConfig(learning_rate=1e-3, warmup=2, accumulate=2),
        ),
    )


def run(workdir, cache, steps: int, **changes):
    return train_diffusion(task(steps, **changes), Path(workdir), Latents(cache), {"steps": steps} | changes, {})


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], int(sys.argv[3]))

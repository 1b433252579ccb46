"""Training the diffusion transformer on a latent cache: every clip, at its own size, packed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from minisora_jax.data.known import KnownConfig
from minisora_jax.data.loader import packed_batches
from minisora_jax.data.packing import PackConfig, PackPlan, Segment, pack_segments, token_counts
from minisora_jax.diffusion.loss import diffusion_loss
from minisora_jax.diffusion.objective import ObjectiveConfig
from minisora_jax.diffusion.time import TimeConfig
from minisora_jax.models.dit import DiT, DiTConfig
from minisora_jax.models.files import export_model, load_model
from minisora_jax.models.text import encode_bytes
from minisora_jax.parallel.mesh import like
from minisora_jax.train.flops import count_work
from minisora_jax.train.loop import RunConfig, train
from minisora_jax.types import PackedBatch


@dataclasses.dataclass(frozen=True)
class DiffusionTask:
    dit: DiTConfig = DiTConfig()
    run: RunConfig = RunConfig()
    pack: PackConfig = PackConfig()
    times: TimeConfig = TimeConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    known: KnownConfig = KnownConfig()
    caption_dropout: float = 0.1
    export_dtype: str = "float32"
    start: str = ""  # an exported model to go on from, of the same shape; "" for random weights

    def __post_init__(self):
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"caption_dropout={self.caption_dropout} must be in [0, 1)")


def example_batch(task: DiffusionTask) -> PackedBatch:
    """The smallest batch the model can be initialised with: one token in one row."""
    text = encode_bytes("") if task.dit.text_features == 1 else np.zeros((4, task.dit.text_features), np.float32)
    one = Segment(np.zeros((1, task.dit.token_width), np.float32), np.zeros(1, bool), (1, 1, 1), text, 8.0)
    return pack_segments([[one]], PackConfig(tokens=1, text_tokens=4, slots=1, rows=1))


def train_diffusion(
    task: DiffusionTask, workdir: Path, latents, describe: dict, export: dict, sample: Callable | None = None
) -> Path:
    """Train on a latent cache and export the averaged weights to WORKDIR/export, whose path is returned.

    `export` is stored in the exported config beside the model's own: the codec's hash, the text encoder.
    """
    model = DiT(task.dit)
    _check_latents(task, latents)

    start = load_model(task.start)[0] if task.start else None

    def init_params(key):
        batch = jax.tree.map(jnp.asarray, example_batch(task))
        params = model.init(key, batch.tokens_BSP, jnp.zeros((1, 1)), batch)
        return jax.tree.map(_in_place_of, start, params) if start else params

    rows_per_step = task.run.optim.accumulate * task.pack.rows
    plan = PackPlan(*token_counts(latents.sizes, task.dit.patch), task.pack, task.run.seed, rows_per_step)
    plan.place(0)  # raises now where the clips do not fill a step

    def batches(start: int) -> Iterator:
        options = {"patch": task.dit.patch, "known": task.known, "caption_dropout": task.caption_dropout}
        for batch, rows in packed_batches(latents, plan, range(start, task.run.steps), **options):
            yield batch, count_work(task.dit, task.pack, rows)

    state = train(
        task.run,
        workdir,
        name="diffusion",
        rows=task.pack.rows,
        tokens=task.pack.tokens,
        heads=task.dit.heads,
        init_params=init_params,
        loss_fn=lambda params, batch, key: diffusion_loss(model, task.times, params, batch, key, task.objective),
        batches=batches,
        describe=describe,
        sample=sample,
    )
    config = {"kind": "dit"} | {k: dataclasses.asdict(getattr(task, k)) for k in ("dit", "times", "objective")}
    export_model(workdir / "export", state.ema, config | export | {"training": describe}, dtype=task.export_dtype)
    return workdir / "export"


def _in_place_of(loaded: np.ndarray, fresh: jax.Array) -> jax.Array:
    """A loaded parameter, laid out as the fresh one that it replaces."""
    if loaded.shape != fresh.shape:
        raise ValueError(f"a parameter of the model to start from is {loaded.shape}, dit here wants {fresh.shape}")
    return like(jnp.asarray(loaded), fresh)


def _check_latents(task: DiffusionTask, latents) -> None:
    channels, features = latents[0].mean_thwc.shape[-1], latents.empty_text_LE.shape[1]
    if channels != task.dit.latent_channels:
        raise ValueError(f"the latent cache has {channels} channels: set dit.latent_channels={channels}")
    if features != task.dit.text_features:
        raise ValueError(f"the latent cache has caption features of width {features}: set dit.text_features={features}")

"""Training of the codec: reconstruction of random crops, with a weak pull of the posterior towards N(0, 1).

codec_losses.py has the loss: absolute and squared error, then LPIPS, then a discriminator, each from its own step on.

The codec is convolutional and causal. So crops of one size train it for every size, and the first frame of each crop
trains it for images.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dm_pix as pix
import jax
import jax.numpy as jnp
import numpy as np
import optax

from minisora_jax.data.loader import ClipsConfig, crop_batches
from minisora_jax.io.retry import Damaged
from minisora_jax.models.codec import Codec, to_float
from minisora_jax.models.perceptual import LPIPS
from minisora_jax.models.vae import VAE, VAEConfig
from minisora_jax.parallel.halo import require_whole_units, shard_height
from minisora_jax.parallel.mesh import FRAMES, like, make_mesh, shard
from minisora_jax.parallel.processes import barrier, gathered, is_main
from minisora_jax.training import codec_losses as losses
from minisora_jax.training.codec_losses import AdversarialConfig, PerceptualConfig
from minisora_jax.training.loop import RunConfig, train
from minisora_jax.training.metrics import Metrics
from minisora_jax.training.optim import make_optimizer
from minisora_jax.training.step import LossFn
from minisora_jax.types import Clip, ClipSequence


@dataclasses.dataclass(frozen=True)
class CodecTask:
    """The settings of a codec's training.

    Raises:
        ValueError: The codec's factors do not divide the crop, or two settings contradict each other.
    """

    vae: VAEConfig = VAEConfig()
    run: RunConfig = RunConfig()
    data: ClipsConfig = ClipsConfig()
    crop_THW: tuple[int, int, int] = (9, 32, 32)  # frames, height and width of a training crop
    enlarge: float = 1.0  # above 1: half of the crops come from clips enlarged by up to this factor
    batch: int = 8  # crops of a step, on all devices together
    l2: float = 4.0  # weight of half the squared error, beside the absolute error
    kl: float = 1e-4  # weight of the KL divergence to a standard normal, per latent
    lpips: PerceptualConfig = PerceptualConfig()  # how it looks, as a part of the loss
    gan: AdversarialConfig = AdversarialConfig()  # a discriminator against the codec
    export_dtype: str = "float32"  # of the exported weights
    start: str = ""  # an exported codec to start from; "": random weights
    decoder_only: bool = False  # keep the encoder of `start`, so its latents stay valid

    def __post_init__(self) -> None:
        self.vae.latent_size(self.crop_THW)
        if self.enlarge < 1:
            raise ValueError(f"enlarge={self.enlarge} must be at least 1 (1: clips keep their size)")
        if self.decoder_only and not self.start:
            raise ValueError("decoder_only=True needs a trained encoder: set start to an exported codec")


def loss_terms(
    task: CodecTask, params: Any, frames_BTHWC: jax.Array, key: jax.Array, step: Any = 0, lpips: LPIPS | None = None
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The loss terms of each clip: {name: (values (B,), weights (B,))}, all weights 1.

    On a mesh the height of the crops is divided over the sequence axes.

    Args:
        task: The settings.
        params: Parameters of the VAE; with `task.gan.weight`, {"codec": those, "discriminator": its own}.
        frames_BTHWC: Crops, uint8.
        key: For the posterior's sample.
        step: The number of the step, which decides which terms count.
        lpips: The network of `task.lpips`; None: without LPIPS.
    """
    playing = task.gan.weight > 0
    params, critic = (params["codec"], params["discriminator"]) if playing else (params, None)
    vae, units = VAE(task.vae), task.vae.latent_size(task.crop_THW)[1]
    x = to_float(shard(frames_BTHWC, FRAMES))
    mean, logvar = shard_height(lambda p, x: vae.apply(p, x, method="encode")[:2], units, params, x)
    if task.decoder_only:
        mean, logvar = jax.lax.stop_gradient((mean, logvar))
    z = mean + jnp.exp(0.5 * logvar) * like(jax.random.normal(key, mean.shape), mean)
    decoded = lambda params: shard_height(lambda p, z: vae.apply(p, z, method="decode")[0], units, params, z)
    rebuild = lambda y: losses.reconstruction(x, y, step, task.l2, task.lpips, lpips)
    if playing:
        y, at_last = jax.vjp(lambda k: decoded(losses.with_last_kernel(params, k)), losses.last_kernel(params))
        against = lambda critic, y: losses.against(task.gan, critic, x, y, rebuild, lambda g: at_last(g)[0])
        loss, terms = losses.staged(task.gan.start, step, against, lambda _, y: rebuild(y), critic, y)
    else:
        loss, terms = rebuild(decoded(params))
    kl = losses.divergence(mean, logvar)
    terms = {"loss": loss + task.kl * kl, **terms, "kl": kl}
    return {name: (v, jnp.ones_like(v)) for name, v in terms.items()}


def init_params(task: CodecTask, start: Codec | None, key: jax.Array) -> Any:
    """The parameters that `loss_terms` takes: random, but for a codec to start from."""
    frames = jnp.zeros((1, *task.crop_THW, 3))
    params = jax.tree.map(jnp.asarray, start.params) if start else VAE(task.vae).init(key, frames)
    if not task.gan.weight:
        return params
    critic = task.gan.discriminator.init(jax.random.fold_in(key, 1), frames)
    return {"codec": params, "discriminator": critic}


def optimizer_of(task: CodecTask) -> optax.GradientTransformation:
    """The optimiser of these parameters."""
    if not task.gan.weight:
        return make_optimizer(task.run.optim, task.run.steps)
    return losses.two_optimizers(task.run.optim, task.gan, task.run.steps)


def loss_of(task: CodecTask, lpips: LPIPS | None) -> LossFn:
    """The loss function of the task, of batches {"frames": uint8 (B, T, H, W, 3), "number": the step's (B,)}."""
    return lambda params, batch, key, step: loss_terms(
        task, params, batch["frames"], key, jnp.max(batch["number"]), lpips
    )


def train_codec(task: CodecTask, workdir: Path, clips: ClipSequence, held_out: ClipSequence, run_config: dict) -> Codec:
    """Train a codec and export it to WORKDIR/export.

    Args:
        task: The settings.
        workdir: The work directory. A run with checkpoints there goes on from the newest.
        clips: Training clips.
        held_out: Clips whose reconstructions are logged.
        run_config: The run's whole configuration, stored with the codec.

    Returns:
        The exported codec.

    Raises:
        ValueError: The crops do not divide over the mesh, or `task.start` has another shape.
    """
    require_whole_units(make_mesh(task.run.mesh), task.vae.latent_size(task.crop_THW)[1], "a crop")
    start = Codec.load(task.start) if task.start else None
    if start and start.config != task.vae:
        raise ValueError(
            f"the codec to start from, {task.start}, has another shape: {start.config}, and the config has {task.vae}"
        )

    lpips = LPIPS.load(task.lpips.path) if task.lpips.path else None

    of_codec = lambda params: params["codec"] if task.gan.weight else params

    damaged = Damaged(workdir / f"damaged_{jax.process_index()}.jsonl", strict=task.data.strict)

    def batches(numbers: range) -> Iterator:
        options = {"crop_THW": task.crop_THW, "batch": task.batch, "enlarge": task.enlarge}
        options |= {"accumulate": task.run.optim.accumulate, "seed": task.run.seed}
        for number, frames in zip(numbers, crop_batches(clips, numbers, **options, damaged=damaged)):
            batch = {"frames": frames, "number": np.full(frames.shape[:2], number, np.int32)}
            yield batch, {"clips": float(task.batch * task.run.optim.accumulate)}

    def sample(step: int, params: Any, metrics: Metrics) -> None:
        codec = Codec(task.vae, of_codec(params), *_unit_stats(task.vae))
        scores, pairs = reconstruct(codec, [held_out[i] for i in range(min(8, len(held_out)))])
        metrics.scalars(step, {f"held_out/{k}": v for k, v in scores.items()})
        clip, frames = pairs[0]
        metrics.video(step, "reconstruction", np.concatenate([clip.frames_THWC, frames], axis=2), clip.fps)

    state = train(
        task.run,
        workdir,
        name="codec",
        rows=task.batch,
        init_params=functools.partial(init_params, task, start),
        loss_fn=loss_of(task, lpips),
        optimizer=optimizer_of(task),
        batches=batches,
        run_config=run_config,
        settings=CodecTask,
        sample=sample,
    )
    raw = Codec(task.vae, gathered(of_codec(state.average)), *_unit_stats(task.vae))
    if is_main():
        if start and task.decoder_only:
            statistics = {"latent_mean": start.latent_mean, "latent_std": start.latent_std, "latents": start.latents}
        else:
            statistics = latent_statistics(raw, clips)
        dataclasses.replace(raw, **statistics).export(workdir / "export", run_config, task.export_dtype)
    barrier("export")
    return Codec.load(workdir / "export")


def latent_statistics(codec: Codec, clips: ClipSequence, count: int = 256) -> dict[str, np.ndarray]:
    """{"latent_mean", "latent_std"}: mean and standard deviation (c,) of the latents of the first `count` clips."""
    means = [codec.encode(clips[i].frames_THWC[None])[0] for i in range(min(count, len(clips)))]
    flat = np.concatenate([m.reshape(-1, m.shape[-1]) for m in means])
    return {"latent_mean": flat.mean(0), "latent_std": np.maximum(flat.std(0), 1e-6)}


def reconstruct(codec: Codec, clips: ClipSequence) -> tuple[dict[str, float], list[tuple[Clip, np.ndarray]]]:
    """Encode and decode clips.

    Returns:
        ({"psnr", "ssim"} averaged over clips, [(clip, its reconstruction (T, H, W, 3), uint8)]).
    """
    scores, pairs = [], []
    for clip in clips:
        mean, _ = codec.encode(clip.frames_THWC[None])
        frames = codec.decode(mean)[0]
        a, b = (np.asarray(f, np.float32) / 255.0 for f in (clip.frames_THWC, frames))
        # PSNR is computed from the mean squared error of the whole clip, so one exact frame cannot make it infinite.
        mse = max(float(np.mean((a - b) ** 2)), 1e-10)
        scores.append({"psnr": -10.0 * np.log10(mse), "ssim": float(_ssim(a, b))})
        pairs.append((clip, frames))
    return {k: float(np.mean([s[k] for s in scores])) for k in ("psnr", "ssim")}, pairs


@jax.jit
def _ssim(a_THWC, b_THWC):
    """The mean SSIM over frames. As one jitted program: `pix.ssim` by itself compiles about a hundred."""
    return jnp.mean(pix.ssim(a_THWC, b_THWC))


def _unit_stats(config: VAEConfig) -> tuple[np.ndarray, np.ndarray]:
    c = config.latent_channels
    return np.zeros(c, np.float32), np.ones(c, np.float32)

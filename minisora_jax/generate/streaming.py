"""Frames one after another from a causal model, for as long as one likes: each costs the same, and memory is bounded.

    given or made frames -> keys and values of the last `window` frames -> the next frame, by its action and caption

A frame is denoised with the kept keys and values of those before it. Then one more call at `past_time` keeps its own
(Chen et al. 2024, arXiv:2407.01392; Huang et al. 2025, arXiv:2506.08009). When the window is full the oldest frame
leaves it, but for the first `sinks` frames (StreamingLLM: Xiao et al. 2023, arXiv:2309.17453). Positions are those in
the window, so they never exceed the ones of training.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minisora_jax.data.rows import grid_positions, padded_text, patchify, unpatchify
from minisora_jax.diffusion.denoiser import Denoiser
from minisora_jax.diffusion.loss import FLOW_MATCHING
from minisora_jax.diffusion.objective import ObjectiveConfig
from minisora_jax.diffusion.sampler import SAMPLERS
from minisora_jax.diffusion.time import TimeConfig, latest_time, sampling_times
from minisora_jax.models.dit import DiT, DiTConfig
from minisora_jax.models.past import Past, empty_cache, past_of
from minisora_jax.parallel.kernels import FRAMES
from minisora_jax.types import PackedBatch

TIMES = TimeConfig()
TEXT_BLOCK = 64  # captions are padded to multiples of it, so that few lengths are compiled


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """How frames are streamed.

    Raises:
        ValueError: A number is out of range.
    """

    steps: int = 4  # of the sampler, for each frame
    sampler: str = "euler"  # a key of SAMPLERS; "consistency" or "meanflow" for models that were distilled so
    window: int = 32  # latent frames that a new frame sees; at most those of training's clips, less one
    sinks: int = 0  # of these, the first frames of the stream, which stay
    past_time: float = 0.05  # noise on the past, as a time: it hides small errors, so they do not add up
    guidance: float = 1.0  # of caption and actions together; 1: none, which halves the cost

    def __post_init__(self) -> None:
        if self.steps < 1 or self.window < 1 or not 0 <= self.sinks < self.window or not 0 <= self.past_time < 1:
            raise ValueError(
                f"steps={self.steps} and window={self.window} must be at least 1, sinks={self.sinks} from 0 to "
                f"window - 1, and past_time={self.past_time} from 0 to below 1"
            )
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance={self.guidance} must be a finite number")
        if self.sampler not in SAMPLERS or SAMPLERS[self.sampler].memory:
            single = [name for name, sampler in SAMPLERS.items() if not sampler.memory]
            raise ValueError(f"sampler={self.sampler!r} must be one of {', '.join(single)}")


class Stream:
    """The latents of one video, or of several side by side, frame by frame.

    Args:
        params: Parameters of a causal model.
        config: The model's shape.
        size_hw: Height and width of a latent frame.
        empty_text_LE: Features of the empty caption.
        settings: How frames are streamed.
        times, objective: Those of the model's training.
        rows: Videos side by side (B).
        fps: Frames per second of the pixels.
        seed: Of the noise. The same seed, actions and captions give the same video.

    Raises:
        ValueError: The model is not causal, or it reads more of a clip than its frames, actions and caption.
    """

    def __init__(
        self,
        params: Any,
        config: DiTConfig,
        size_hw: tuple[int, int],
        empty_text_LE: np.ndarray,
        settings: StreamConfig = StreamConfig(),
        *,
        times: TimeConfig = TIMES,
        objective: ObjectiveConfig = FLOW_MATCHING,
        rows: int = 1,
        fps: float = 8.0,
        seed: int = 0,
    ):
        if not config.causal and not times.causal:
            raise ValueError(
                "the model was trained with dit.causal=False and times.causal=0: the frames of its clips see later "
                "ones, so it cannot make them one after another"
            )
        wanted = {"positions": ("space", "none"), "micro_conditioning": (False,)}
        wanted |= {"given_channels": (0,), "image_features": (0,)}
        if wrong := [f"{n}={x!r}" for n, allowed in wanted.items() if (x := getattr(config, n)) not in allowed]:
            raise ValueError(
                f"the model has {', '.join(wrong)}: streaming is for models that are told no place in a clip and "
                f"no given frames (positions='space' or 'none', micro_conditioning=False, no channels of given frames)"
            )
        self.params, self.config, self.settings = params, config, settings
        self.rows, self.fps, self.empty_text_LE = rows, fps, empty_text_LE
        self.grid_thw = (1, size_hw[0] // config.patch[1], size_hw[1] // config.patch[2])
        self.static = (config, settings, times, objective, self.grid_thw)
        self.reset(seed)

    def reset(self, seed: int = 0) -> None:
        """Forget all frames, and begin with the noise of this seed."""
        self.frame, self.key = 0, jax.random.key(seed)
        self.kept: list[int] = []  # the places of kept frames in the cache, from the first frame to the last
        copies = 2 if self.settings.guidance != 1 else 1
        self.cache = empty_cache(self.config, copies * self.rows, self.settings.window * math.prod(self.grid_thw))

    def give(self, latents_Bhwc: np.ndarray, actions_Bx: np.ndarray | None, text_BLE: np.ndarray) -> None:
        """Append a frame that is known, and the actions that led to it (`data.actions.by_latent_frame`)."""
        tokens = [patchify(x[None], self.config.patch).reshape(-1, self.config.token_width) for x in latents_Bhwc]
        batch = self._batch(np.stack(tokens), actions_Bx, text_BLE)
        self.cache = _keep(self.static, self.params, self.cache, batch, *self._advance())

    def next(self, actions_Bx: np.ndarray | None, text_BLE: np.ndarray) -> np.ndarray:
        """Make the frame that follows these actions: its latents (B, h, w, c)."""
        empty = np.zeros((self.rows, math.prod(self.grid_thw), self.config.token_width), np.float32)
        batch = self._batch(empty, actions_Bx, text_BLE)
        x_BSP, self.cache = _next(self.static, self.params, self.cache, batch, *self._advance())
        grids = np.asarray(x_BSP).reshape(self.rows, *self.grid_thw, -1)
        return np.stack([unpatchify(grid, self.config.patch)[0] for grid in grids])

    def undo(self) -> None:
        """Forget the newest frame. One that left the window for it does not come back."""
        self.kept.pop()
        self.frame -= 1

    def _advance(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(rank of each place's frame in the window or -1, place of the next frame, key), and count the next frame."""
        settings, key = self.settings, jax.random.fold_in(self.key, self.frame)
        if len(self.kept) == settings.window:
            self.kept.pop(settings.sinks)
        place = next(place for place in range(settings.window) if place not in self.kept)
        ranks_F = np.full(settings.window, -1, np.int32)
        ranks_F[self.kept] = np.arange(len(self.kept))
        self.kept.append(place)
        self.frame += 1
        return jnp.asarray(ranks_F), jnp.int32(place), key

    def _batch(self, tokens_BSP: np.ndarray, actions_Bx: np.ndarray | None, text_BLE: np.ndarray) -> PackedBatch:
        """The frame as clips of one frame; with guidance each once more, without caption and actions."""
        B, S, _ = tokens_BSP.shape
        place = min(len(self.kept), self.settings.window - 1)
        actions_BUx = np.zeros((B, 1, self.config.action_width), np.float32)
        if actions_Bx is not None:
            actions_BUx[:, 0] = actions_Bx
        L = -(-max(text_BLE.shape[1], len(self.empty_text_LE)) // TEXT_BLOCK) * TEXT_BLOCK
        texts = [padded_text(text, L) for text in (*text_BLE, *([self.empty_text_LE] * B))]
        lengths = [text_BLE.shape[1]] * B + [len(self.empty_text_LE)] * B
        if self.settings.guidance == 1:
            texts, lengths = texts[:B], lengths[:B]
        else:
            tokens_BSP, actions_BUx = np.tile(tokens_BSP, (2, 1, 1)), np.concatenate([actions_BUx, 0 * actions_BUx])
        rows = len(texts)
        return PackedBatch(
            tokens_BSP=jnp.asarray(tokens_BSP),
            segment_BS=jnp.ones((rows, S), jnp.int32),
            position_BS3=jnp.tile(grid_positions(self.grid_thw, place)[None], (rows, 1, 1)),
            cond_mask_BS=jnp.zeros((rows, S), bool),
            text_BLE=jnp.asarray(np.stack(texts)),
            text_segment_BL=jnp.asarray(np.arange(L) < np.array(lengths)[:, None], jnp.int32),
            fps_BG=jnp.full((rows, 1), self.fps, jnp.float32),
            size_BG3=jnp.tile(jnp.array(self.grid_thw, jnp.int32), (rows, 1, 1)),
            actions_BUx=jnp.asarray(actions_BUx) if self.config.action_width else None,
            causal_BG=jnp.ones((rows, 1), bool),
        )


# ---- Compiled once for a stream


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _next(static, params, cache, batch: PackedBatch, ranks_F, place, key):
    """(tokens of the next frame (B, S, P), the cache with them)."""
    config, settings, times, objective, grid_thw = static
    noise_key, own_key, past_key = jax.random.split(key, 3)
    copies = 1 if settings.guidance == 1 else 2
    rows, S, P = batch.tokens_BSP.shape
    past = _past(config, grid_thw, ranks_F, rows)

    def predict(x_BSP, time_BS):
        x, time = objective.model_input(jnp.tile(x_BSP, (copies, 1, 1)), jnp.tile(time_BS, (copies, 1)))
        y_BSP: Any = DiT(config).apply({**params, **cache}, x, time, batch, past=past)
        if copies == 1:
            return y_BSP
        good_BSP, guide_BSP = jnp.split(y_BSP, 2)
        return guide_BSP + settings.guidance * (good_BSP - guide_BSP)

    denoiser = Denoiser(predict, objective.noise_path, objective.prediction)
    path, sampler = objective.noise_path, SAMPLERS[settings.sampler]
    own = jax.tree.map(lambda x: x[: rows // copies], batch)
    times_KBS = sampling_times(times, settings.steps, own, path, latest=latest_time(path, objective.prediction))
    x_BSP = jax.random.normal(noise_key, (rows // copies, S, P)) * path.spread(times_KBS[0])[..., None]

    def step(k, x_BSP):
        fresh = None if sampler.eta is None else jax.random.normal(jax.random.fold_in(own_key, k), x_BSP.shape)
        return sampler.step(denoiser, x_BSP, times_KBS[k], times_KBS[k + 1], (), fresh, sampler.eta or 0.0)[0]

    x_BSP = jax.lax.fori_loop(0, settings.steps, step, x_BSP)
    batch = dataclasses.replace(batch, tokens_BSP=jnp.tile(x_BSP, (copies, 1, 1)))
    return x_BSP, _kept(static, params, cache, batch, past, place, past_key)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _keep(static, params, cache, batch: PackedBatch, ranks_F, place, key):
    """The cache with the keys and values of a given frame."""
    config, *_, grid_thw = static
    past = _past(config, grid_thw, ranks_F, batch.tokens_BSP.shape[0])
    return _kept(static, params, cache, batch, past, place, jax.random.split(key, 3)[2])


def _kept(static, params, cache, batch: PackedBatch, past: Past, place, key):
    config, settings, _, objective, _ = static
    rows, S, P = batch.tokens_BSP.shape
    copies = 1 if settings.guidance == 1 else 2
    time_BS = jnp.full((rows, S), settings.past_time)
    noise_BSP = jnp.tile(jax.random.normal(key, (rows // copies, S, P)), (copies, 1, 1))
    x_BSP = objective.noise_path.mix(batch.tokens_BSP, noise_BSP, time_BS[..., None])
    past = dataclasses.replace(past, write_at=place * S)
    x_BSP, time_BS = objective.model_input(x_BSP, time_BS)
    return DiT(config).apply({**params, **cache}, x_BSP, time_BS, batch, past=past, mutable=["cache"])[1]


def _past(config: DiTConfig, grid_thw, ranks_F, rows: int) -> Past:
    """What the places of the cache hold: frames with these ranks in the window, -1 for none."""
    n = math.prod(grid_thw)
    rank_M = jnp.repeat(ranks_F, n)
    place_M2 = jnp.tile(jnp.asarray(grid_positions(grid_thw))[:, 1:], (len(ranks_F), 1))
    position_BM3 = jnp.tile(jnp.concatenate([rank_M[:, None], place_M2], axis=1)[None], (rows, 1, 1))
    segment_BM = jnp.tile(jnp.where(rank_M < 0, 0, FRAMES + rank_M)[None], (rows, 1))
    return past_of(config, segment_BM, position_BM3)

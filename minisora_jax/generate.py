"""From prompts to videos: pack requests into rows, integrate the flow, decode.

A request's noise comes from its own seed, so its video does not depend on what it is generated with.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from minisora_jax.data.packing import PackConfig, Segment, pack_segments, unpatchify
from minisora_jax.diffusion.guidance import guide
from minisora_jax.diffusion.sampler import STEPS
from minisora_jax.diffusion.time import TimeConfig, sampling_times
from minisora_jax.models.codec import Codec
from minisora_jax.models.dit import DiT, DiTConfig
from minisora_jax.models.files import load_model, model_hash
from minisora_jax.models.text import encode_bytes


@dataclasses.dataclass(frozen=True)
class Request:
    """One video asked for. Sizes are pixels: T = 1 + 4k frames, H and W multiples of the model's cell."""

    prompt: str
    size_THW: tuple[int, int, int]
    seed: int = 0
    fps: float = 8.0


@dataclasses.dataclass(frozen=True)
class Generator:
    """A trained diffusion transformer with its codec."""

    codec: Codec
    config: DiTConfig
    times: TimeConfig
    params: dict
    hash: str = ""

    @classmethod
    def load(cls, model: str | Path, codec: str | Path) -> Generator:
        """From the directories exported by `minisora train` and `minisora train-vae`."""
        params, config = load_model(model)
        if config.get("kind") != "dit":
            raise ValueError(f"{model} holds a {config.get('kind')!r} model, not a diffusion transformer ('dit')")
        codec_ = Codec.load(codec)
        if config["codec"] != codec_.hash:
            raise ValueError(
                f"{model} was trained on latents of codec {config['codec']}, but {codec} is codec {codec_.hash}: "
                f"their latents mean different things; give the codec it was trained with"
            )
        dit = DiTConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in config["dit"].items()})
        params = jax.tree.map(jnp.asarray, params)
        return cls(codec_, dit, TimeConfig(**config["times"]), params, model_hash(model))

    @property
    def cell(self) -> int:
        """Pixels per token along y and x: what sizes must be multiples of."""
        return self.codec.config.space_factor * self.config.patch[1]

    def grid(self, size_THW: tuple[int, int, int]) -> tuple[int, int, int]:
        """(t, h, w) tokens of a clip of that size; ValueError names the sizes that would do."""
        T, H, W = size_THW
        self.codec.config.latent_size((T, self.cell, self.cell))
        for name, n in (("height", H), ("width", W)):
            if n < self.cell or n % self.cell:
                low = max(n // self.cell, 1) * self.cell
                raise ValueError(f"{name}={n} must be a multiple of {self.cell}; use {low} or {low + self.cell}")
        return 1 + (T - 1) // self.codec.config.time_factor, H // self.cell, W // self.cell

    def generate(
        self,
        requests: Sequence[Request],
        *,
        steps: int = 20,
        guidance: float = 3.0,
        sampler: str = "heun",
        tokens_at_once: int = 8192,
        progress: bool = True,
    ) -> list[np.ndarray]:
        """uint8 (T, H, W, 3) for each request, in order.

        `steps` sampler steps ("euler": one model call each; "heun": two), guidance 1 for none. Requests are packed
        into rows, and rows run together up to `tokens_at_once` tokens.
        """
        if sampler not in STEPS:
            raise ValueError(f"sampler={sampler!r} must be one of {', '.join(STEPS)}")
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1")
        if self.config.text_features != 1:
            raise ValueError(
                "this model was trained on features of a text encoder; only byte captions are supported yet"
            )
        grids = [self.grid(r.size_THW) for r in requests]
        longest = 2 * max(int(np.prod(g)) for g in grids)
        rows = _fill_rows(grids, longest)
        at_once = max(1, tokens_at_once // longest)
        chunks = [rows[i : i + at_once] for i in range(0, len(rows), at_once)]
        videos: list[np.ndarray | None] = [None] * len(requests)
        with tqdm(total=len(chunks) * steps, desc="sampling", unit="step", disable=not progress) as bar:
            for chunk in chunks:
                padded = chunk + [chunk[-1]] * (min(at_once, len(rows)) - len(chunk))  # one shape, one compilation
                for i, latents in self._sample(padded, requests, grids, longest, steps, guidance, sampler, bar):
                    videos[i] = latents
        return self._decode(videos, progress)

    def _sample(self, rows, requests, grids, length, steps, guidance, sampler, bar):
        """(request, latents_thwc) of each request of the rows."""
        none = encode_bytes("")
        text = max(sum(len(encode_bytes(requests[i].prompt)) + len(none) for i in row) for row in rows)
        slots = 2 * max(len(row) for row in rows)
        pack = PackConfig(tokens=length, text_tokens=-(-text // 64) * 64, slots=slots, rows=len(rows))
        segments, with_caption, without, noise = [], [], [], []
        for row in rows:
            twins = np.arange(length)
            row_with, row_without, row_segments, at = twins.copy(), twins.copy(), [], 0
            row_noise = np.zeros((length, self.config.token_width), np.float32)
            for i in row:
                n = int(np.prod(grids[i]))
                draw = np.random.default_rng(requests[i].seed).standard_normal((n, self.config.token_width), np.float32)
                blank, known = np.zeros_like(draw), np.zeros(n, bool)
                for caption in (encode_bytes(requests[i].prompt), none):
                    row_segments.append(Segment(blank, known, grids[i], caption, requests[i].fps))
                row_noise[at : at + 2 * n] = np.concatenate([draw, draw])
                row_with[at : at + 2 * n] = np.tile(np.arange(at, at + n), 2)
                row_without[at : at + 2 * n] = np.tile(np.arange(at + n, at + 2 * n), 2)
                at += 2 * n
            segments.append(row_segments), with_caption.append(row_with), without.append(row_without)
            noise.append(row_noise)
        batch = jax.tree.map(jnp.asarray, pack_segments(segments, pack))
        twins = (jnp.asarray(np.stack(with_caption), jnp.int32), jnp.asarray(np.stack(without), jnp.int32))
        x = jnp.asarray(np.stack(noise))
        times = sampling_times(self.times, steps, batch)
        for k in range(steps):
            x = _step(self.config, sampler, self.params, batch, x, times[k], times[k + 1], *twins, guidance)
            x.block_until_ready()
            bar.update()
        x = np.asarray(x)
        done = set()
        for b, row in enumerate(rows):
            at = 0
            for i in row:
                n = int(np.prod(grids[i]))
                if i not in done:
                    patches = x[b, at : at + n].reshape(*grids[i], -1)
                    yield i, unpatchify(patches, self.config.patch)
                    done.add(i)
                at += 2 * n

    def _decode(self, latents: list[np.ndarray], progress: bool) -> list[np.ndarray]:
        """Decoded clips; those of one size go through the codec together."""
        groups: dict[tuple, list[int]] = {}
        for i, z in enumerate(latents):
            groups.setdefault(z.shape, []).append(i)
        videos: list[np.ndarray | None] = [None] * len(latents)
        with tqdm(total=len(latents), desc="decoding", unit="clip", disable=not progress) as bar:
            for members in groups.values():
                for some in (members[k : k + 16] for k in range(0, len(members), 16)):
                    for i, frames in zip(some, self.codec.decode(np.stack([latents[i] for i in some]))):
                        videos[i] = frames
                        bar.update()
        return videos


def _fill_rows(grids: list[tuple[int, int, int]], length: int) -> list[list[int]]:
    """First-fit decreasing of requests, each taking twice its tokens (with and without caption)."""
    rows, room = [], []
    for i in sorted(range(len(grids)), key=lambda i: -int(np.prod(grids[i]))):
        need = 2 * int(np.prod(grids[i]))
        for r, left in enumerate(room):
            if left >= need:
                rows[r].append(i)
                room[r] -= need
                break
        else:
            rows.append([i])
            room.append(length - need)
    return rows


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(config: DiTConfig, sampler: str, params, batch, x_BSP, time_BS, next_BS, with_caption_BS, without_BS, scale):
    def velocity(x_BSP, time_BS):
        v_BSP = DiT(config).apply(params, x_BSP, time_BS, batch)
        return guide(v_BSP, with_caption_BS, without_BS, scale)

    return STEPS[sampler](velocity, x_BSP, time_BS, next_BS)

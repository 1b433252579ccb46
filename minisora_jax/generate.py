"""From prompts to videos: pack requests into rows, integrate the flow, decode.

A request's noise, at the start and at every step of a stochastic sampler, comes from its own seed, so its video does
not depend on what it is generated with.
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

from minisora_jax.bundled import CODEC
from minisora_jax.data.packing import PackConfig
from minisora_jax.data.rows import Segment, pack_segments, padded_text, unpatchify
from minisora_jax.diffusion.adaptive import dopri5
from minisora_jax.diffusion.denoiser import Denoiser
from minisora_jax.diffusion.guidance import GuidanceConfig, guide, rescale, twins
from minisora_jax.diffusion.objective import ObjectiveConfig
from minisora_jax.diffusion.sampler import SAMPLERS, SamplerConfig
from minisora_jax.diffusion.time import TimeConfig, latest_time, sampling_times, token_times
from minisora_jax.models.captions import BYTES, Captions, captions_of
from minisora_jax.models.codec import Codec
from minisora_jax.models.dit import DiT, DiTConfig, abstract_params, mean_of
from minisora_jax.models.files import config_fields, load_model, model_hash
from minisora_jax.parallel.mesh import TOKENS, cuts, on_mesh, params_on_mesh
from minisora_jax.weights.presets import TRANSFORMERS


@dataclasses.dataclass(frozen=True)
class Request:
    """One video asked for. Sizes are pixels: T = 1 + 4k frames, H and W multiples of the model's cell."""

    prompt: str  # of a model of classes, the number of one
    size_THW: tuple[int, int, int]
    seed: int = 0
    fps: float = 8.0


@dataclasses.dataclass(frozen=True)
class Generator:
    """A trained diffusion transformer with its codec, and, for autoguidance, a worse one on the same latents."""

    codec: Codec
    config: DiTConfig
    times: TimeConfig
    params: dict
    hash: str = ""
    objective: ObjectiveConfig = ObjectiveConfig()
    captions: Captions = BYTES
    worse: tuple[DiTConfig, dict] | None = None

    @classmethod
    def load(
        cls,
        model: str | Path,
        codec: str | Path | None = None,
        guide_model: str | Path | None = None,
        text_encoder: str | Path | None = None,
    ) -> Generator:
        """From the directories written by `minisora train`, `minisora train-vae` and `minisora import`.

        Without `codec`, the bundled one. The text encoder is the one that the model's training recorded, or
        `text_encoder`. `guide_model` is the worse model of autoguidance, trained with the same codec, patch and
        objective.
        """
        params, dit, config = _load_dit(model)
        pair = TRANSFORMERS.get(config.get("training", {}).get("imported", "")) if "codec" not in config else None
        if codec is None and pair:
            raise ValueError(
                f"{model} was imported and does not name its codec: give it by --codec=DIR (made by "
                f"`minisora import {pair.codec}`)"
            )
        codec = codec or CODEC
        codec_ = Codec.load(codec)
        _require_codec(config, dit, model, codec_, codec)
        times, objective = TimeConfig(**config["times"]), ObjectiveConfig(**config.get("objective", {}))
        worse = None
        if guide_model is not None:
            worse_params, worse_dit, worse_config = _load_dit(guide_model)
            _require_codec(worse_config, worse_dit, guide_model, codec_, codec)
            theirs = ObjectiveConfig(**worse_config.get("objective", {}))
            for name, ours, other in (
                ("patch", dit.patch, worse_dit.patch),
                ("text_features", dit.text_features, worse_dit.text_features),
                ("caption_tokens", dit.caption_tokens, worse_dit.caption_tokens),
                ("path", objective.path, theirs.path),
                ("prediction", objective.prediction, theirs.prediction),
            ):
                if ours != other:
                    raise ValueError(f"the guide model has {name}={other!r}, the model {ours!r}: they must be the same")
            worse = (worse_dit, worse_params)
        captions = captions_of(dit, config.get("text"), text_encoder, pair and pair.text_encoder)
        return cls(codec_, dit, times, params, model_hash(model), objective, captions, worse)

    @property
    def cell(self) -> int:
        """Pixels per token along y and x: what sizes must be multiples of."""
        return self.codec.config.space_factor * self.config.patch[1]

    @property
    def copies(self) -> int:
        """Segments of a request: with and without its caption, or the one that both models of autoguidance see."""
        return 1 if self.worse else 2

    def grid(self, size_THW: tuple[int, int, int]) -> tuple[int, int, int]:
        """(t, h, w) tokens of a clip of that size; ValueError names the sizes that would do."""
        T, H, W = size_THW
        if self.config.makes_images and T > 1:
            raise ValueError(f"frames={T}: this model makes images; use --frames 1")
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
        guidance: float | GuidanceConfig = 3.0,
        sampler: str | SamplerConfig = "heun",
        tokens_at_once: int = 8192,
        progress: bool = True,
    ) -> list[np.ndarray]:
        """uint8 (T, H, W, 3) for each request, in order.

        A guidance scale (1 for none) or all of guidance; the name of a sampler and its steps or, in place of both, all
        of the sampler. Requests are packed into rows, and rows run together up to `tokens_at_once` tokens.
        """
        if isinstance(sampler, str):
            sampler = SamplerConfig(sampler, steps)
        if not isinstance(guidance, GuidanceConfig):
            guidance = GuidanceConfig(float(guidance))
        grids = [self.grid(r.size_THW) for r in requests]
        row_cuts, token_cuts = cuts()
        longest = self.copies * max(int(np.prod(g)) for g in grids)
        longest += -longest % token_cuts
        rows = _fill_rows(grids, longest, self.copies)
        at_once = max(1, tokens_at_once // longest)
        rows_at_once = min(at_once, len(rows))
        rows_at_once += -rows_at_once % row_cuts
        chunks = [rows[i : i + at_once] for i in range(0, len(rows), at_once)]
        texts = self.captions.encode([r.prompt for r in requests] + [""])
        texts = [padded_text(text_LE, self.config.caption_tokens) for text_LE in texts]
        params = tuple(params_on_mesh(p, functools.partial(abstract_params, c)) for c, p in self._models)
        videos: list[np.ndarray | None] = [None] * len(requests)
        ticks = 1 if sampler.name == "dopri5" else sampler.steps
        with tqdm(total=len(chunks) * ticks, desc="sampling", unit="step", disable=not progress) as bar:
            for chunk in chunks:
                padded = chunk + [chunk[-1]] * (rows_at_once - len(chunk))  # one shape, one compilation
                for i, latents in self._sample(padded, requests, texts, grids, longest, guidance, sampler, params, bar):
                    videos[i] = latents
        return self._decode(videos, progress)

    @property
    def _models(self) -> list[tuple[DiTConfig, dict]]:
        return [(self.config, self.params)] + ([self.worse] if self.worse else [])

    def _sample(self, rows, requests, texts, grids, length, guidance, sampler, params, bar):
        """(request, latents_thwc) of each request of the rows; `texts`: all captions' features, the empty one last."""
        captions = [[text_LE, texts[-1]][: self.copies] for text_LE in texts[:-1]]
        text = max(sum(len(c) for i in row for c in captions[i]) for row in rows)
        slots = self.copies * max(len(row) for row in rows)
        pack = PackConfig(tokens=length, text_tokens=-(-text // 64) * 64, slots=slots, rows=len(rows))
        segments, with_caption, without = [], [], []
        for row in rows:
            twins = np.arange(length)
            row_with, row_without, row_segments, at = twins.copy(), twins.copy(), [], 0
            for i in row:
                n = int(np.prod(grids[i]))
                blank, known = np.zeros((n, self.config.token_width), np.float32), np.zeros(n, bool)
                row_segments += [Segment(blank, known, grids[i], caption, requests[i].fps) for caption in captions[i]]
                end = at + self.copies * n
                row_with[at:end] = np.tile(np.arange(at, at + n), self.copies)
                row_without[at:end] = np.tile(np.arange(end - n, end), self.copies)
                at = end
            segments.append(row_segments), with_caption.append(row_with), without.append(row_without)
        batch = on_mesh(pack_segments(segments, pack))

        path, latest = self.objective.along, latest_time(self.objective.along, self.objective.prediction)
        configs = tuple(c for c, _ in self._models)
        static = (configs, self.objective, guidance.rescale)
        both = (on_mesh(np.stack(index).astype(np.int32), TOKENS) for index in (with_caption, without))
        inputs = (params, batch, *both, guidance.scale, guidance.interval)
        noise = lambda step: on_mesh(self._noise(rows, requests, grids, length, step), TOKENS)
        if sampler.name == "dopri5":
            first = jnp.minimum(token_times(self.times, jnp.ones(()), batch), latest)
            x = noise(0) * path.spread(first)[..., None]
            x = _integrate(static, self.times, latest, sampler.tolerance, x, inputs).block_until_ready()
            bar.update()
        else:
            times = sampling_times(self.times, sampler.steps, batch, path, sampler.grid, latest)
            x = noise(0) * path.spread(times[0])[..., None]
            past = SAMPLERS[sampler.name].begin(x, times[0])
            for k in range(sampler.steps):
                fresh = noise(k + 1) if sampler.noise else None
                step = functools.partial(sampling_step, static, sampler.name)
                x, past = step(x, times[k], times[k + 1], past, fresh, sampler.noise, inputs)
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
                at += self.copies * n

    def _noise(self, rows, requests, grids, length, step):
        """Standard normal (B, S, P) for a sampler step (0: the start), by each request's seed, equal for its twins."""
        noise = np.zeros((len(rows), length, self.config.token_width), np.float32)
        for b, row in enumerate(rows):
            at = 0
            for i in row:
                seed = (requests[i].seed, step) if step else requests[i].seed
                shape = (int(np.prod(grids[i])), self.config.token_width)
                draw = np.random.default_rng(seed).standard_normal(shape, np.float32)
                for _ in range(self.copies):
                    noise[b, at : at + len(draw)] = draw
                    at += len(draw)
        return noise

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


def _load_dit(model: str | Path) -> tuple[dict, DiTConfig, dict]:
    """(parameters, model config, whole exported config) of a model."""
    params, config = load_model(model)
    if config.get("kind") != "dit":
        raise ValueError(f"{model} holds a {config.get('kind')!r} model, not a diffusion transformer ('dit')")
    dit = DiTConfig(**config_fields(config["dit"]))
    if dit.image_features:
        raise ValueError(
            f"{model} makes videos of images, by features of an image encoder: those are not made here yet"
        )
    return jax.tree.map(jnp.asarray, params), dit, config


def _require_codec(config: dict, dit: DiTConfig, model: str | Path, loaded: Codec, codec: str | Path) -> None:
    """ValueError unless the model was trained with that codec or, where it does not say, has as many channels."""
    if "codec" in config and config["codec"] != loaded.hash:
        raise ValueError(
            f"{model} was trained on latents of codec {config['codec']}, but {codec} is codec {loaded.hash}: "
            f"their latents mean different things; give the codec it was trained with"
        )
    if dit.latent_channels != loaded.config.latent_channels:
        raise ValueError(
            f"{model} takes latents of {dit.latent_channels} channels, codec {codec} makes "
            f"{loaded.config.latent_channels}: give the codec it was trained with"
        )


def _fill_rows(grids: list[tuple[int, int, int]], length: int, copies: int) -> list[list[int]]:
    """First-fit decreasing of requests, each taking `copies` times its tokens."""
    rows, room = [], []
    for i in sorted(range(len(grids)), key=lambda i: -int(np.prod(grids[i]))):
        need = copies * int(np.prod(grids[i]))
        for r, left in enumerate(room):
            if left >= need:
                rows[r].append(i)
                room[r] -= need
                break
        else:
            rows.append([i])
            room.append(length - need)
    return rows


def _denoiser(static, inputs) -> Denoiser:
    """The guided model. static: (configs, objective, rescale); configs has the worse model second, if there is one."""
    configs, objective, share = static
    params, batch, with_caption_BS, without_BS, scale, interval = inputs
    path = objective.along

    def predict(x_BSP, time_BS):
        seen = path.model_input(x_BSP, time_BS)
        good_BSP, *worse_BSP = (mean_of(c, DiT(c).apply(p, *seen, batch)) for c, p in zip(configs, params))
        if worse_BSP:
            worse_BSP = worse_BSP[0]
        else:
            good_BSP, worse_BSP = twins(good_BSP, with_caption_BS, without_BS)
        p_BSP = guide(good_BSP, worse_BSP, time_BS, scale, interval)
        if share:
            unknown_BS, slots = jnp.where(batch.known_BS, 0, batch.segment_BS), batch.fps_BG.shape[1]
            p_BSP = rescale(path, objective.prediction, p_BSP, good_BSP, x_BSP, time_BS, unknown_BS, slots, share)
        return p_BSP

    return Denoiser(predict, path, objective.prediction)


@functools.partial(jax.jit, static_argnums=(0, 1))
def sampling_step(static, sampler: str, x_BSP, time_BS, next_BS, past, noise_BSP, eta, inputs):
    return SAMPLERS[sampler].step(_denoiser(static, inputs), x_BSP, time_BS, next_BS, past, noise_BSP, eta)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _integrate(static, times: TimeConfig, latest, tolerance, x_BSP, inputs):
    batch = inputs[1]
    time_at = lambda u: jnp.minimum(token_times(times, u, batch), latest)
    return dopri5(_denoiser(static, inputs), x_BSP, time_at, tolerance)[0]

"""A trained model with its codec: what makes latents and pictures of requests."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from minisora_jax.bundled import CODEC
from minisora_jax.diffusion.guidance import GuidanceConfig
from minisora_jax.diffusion.objective import ObjectiveConfig
from minisora_jax.diffusion.sampler import SamplerConfig
from minisora_jax.diffusion.time import TimeConfig
from minisora_jax.generate.request import Request
from minisora_jax.generate.sampling import Layout, features, fill_rows, sample
from minisora_jax.io.model_dir import config_fields, load_model, model_hash
from minisora_jax.models.captions import BYTES, Captions, captions_of
from minisora_jax.models.codec import Codec
from minisora_jax.models.dit import DiTConfig, abstract_params
from minisora_jax.parallel.mesh import cuts, params_on_mesh
from minisora_jax.weights.presets import TRANSFORMERS

AT_ONCE = 16  # clips through the codec together


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
    window: int = 21  # latent frames that the model makes at once; longer videos are made of windows
    sides: tuple[int, int] | None = None  # the tallest and widest latents of its training, where that is on record

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
        frames, *sides = config.get("latent_size", [cls.window])
        return cls(
            codec_, dit, times, params, model_hash(model), objective, captions, worse, frames, tuple(sides) or None
        )

    @property
    def window_frames(self) -> int:
        """Frames of a window that is a clip's beginning."""
        return 1 + (self.window - 1) * self.codec.config.time_factor

    @property
    def overlap(self) -> int:
        """Latent frames of a window that are known from the one before."""
        return max(self.window // 2, 1)

    @property
    def known_size(self) -> tuple[int, int, int] | None:
        """Frames, height and width of the longest, tallest and widest of training's clips; None where not on record."""
        if not self.sides:
            return None
        codec = self.codec.config
        return codec.pixel_size((self.window, *self.sides))

    @property
    def cell(self) -> int:
        """Pixels per token along y and x: what sizes must be multiples of."""
        return self.codec.config.space_factor * self.config.patch[1]

    @property
    def copies(self) -> int:
        """Segments of a request: with and without its caption, or the one that both models of autoguidance see."""
        return 1 if self.worse else 2

    def grid(self, request: Request) -> tuple[int, int, int]:
        """(t, h, w) tokens of a request; ValueError names the sizes that would do."""
        T, H, W = request.size_THW
        factor = self.codec.config.time_factor
        if self.config.makes_images and T > 1:
            raise ValueError(f"frames={T}: this model makes images; use --frames 1")
        for name, n in (("height", H), ("width", W)):
            if n < self.cell or n % self.cell:
                low = max(n // self.cell, 1) * self.cell
                raise ValueError(f"{name}={n} must be a multiple of {self.cell}; use {low} or {low + self.cell}")
        if set(request.spacing) != {1.0} and {"spatial", "temporal"} & set(self.config.groups):
            raise ValueError("this model attends by rows of places, which have to be whole: it makes no larger sizes")
        if not request.first:
            t, _, _ = self.codec.config.latent_size((T, self.cell, self.cell))
            return t, H // self.cell, W // self.cell
        if T < factor or T % factor:
            kind, low = "a loop" if request.loop else "a middle stretch", max(T // factor, 1) * factor
            raise ValueError(f"frames={T} of {kind} must be a multiple of {factor}; use {low} or {low + factor}")
        return T // factor, H // self.cell, W // self.cell

    def generate(self, requests: Sequence[Request], **options) -> list[np.ndarray]:
        """uint8 (T, H, W, 3) for each request, in order; the options are those of `sample`."""
        latents = self.sample(requests, **options)
        progress = options.get("progress", True)
        return self.decode(latents, [r.loop for r in requests], progress=progress)

    def sample(
        self,
        requests: Sequence[Request],
        *,
        steps: int = 20,
        guidance: float | GuidanceConfig = 3.0,
        sampler: str | SamplerConfig = "heun",
        tokens_at_once: int = 8192,
        progress: bool = True,
        watch: Callable[[float, Callable[[], dict[int, np.ndarray]]], None] | None = None,
    ) -> list[np.ndarray]:
        """Latents (t, h, w, c) for each request, in order.

        A guidance scale (1 for none) or all of guidance; the name of a sampler and its steps or, in place of both, all
        of the sampler; what starts from less than all noise takes as many fewer steps. Requests are packed into rows,
        and rows run together up to `tokens_at_once` tokens. `watch(share done, look)` is called after each step; look()
        gives latents as they promise to be, by request.
        """
        if isinstance(sampler, str):
            sampler = SamplerConfig(sampler, steps)
        if not isinstance(guidance, GuidanceConfig):
            guidance = GuidanceConfig(float(guidance))
        if self.worse and any(r.negative for r in requests):
            raise ValueError(
                "a negative prompt takes the place of the empty one, and autoguidance has none: give either"
            )
        grids = [self.grid(r) for r in requests]
        captions = features(self.captions, requests, self.copies, self.config.caption_tokens)
        models = [(c, params_on_mesh(p, functools.partial(abstract_params, c))) for c, p in self._models]
        work = [
            (fewer, layout)
            for fewer, members in _by_steps(requests, sampler)
            for layout in self._layouts(requests, grids, members, tokens_at_once)
        ]
        latents: dict[int, np.ndarray] = {}
        ticks = sum(1 if s.name == "dopri5" else s.steps for s, _ in work)
        ticked = itertools.count(1)
        with tqdm(total=ticks, desc="sampling", unit="step", disable=not progress) as bar:

            def on_step(_, look):
                bar.update()
                if watch:
                    watch(next(ticked) / ticks, look)

            for fewer, layout in work:
                latents |= sample(layout, captions, models, self.times, self.objective, guidance, fewer, on_step)
        return [latents[i] for i in range(len(requests))]

    def _layouts(self, requests, grids, members: Sequence[int], tokens_at_once: int) -> list[Layout]:
        """Some of the requests in rows, and rows in batches of one shape."""
        row_cuts, token_cuts = cuts()
        longest = self.copies * max(int(np.prod(grids[i])) for i in members)
        longest += -longest % token_cuts
        rows = [[members[i] for i in row] for row in fill_rows([grids[i] for i in members], longest, self.copies)]
        at_once = max(1, tokens_at_once // longest)
        together = min(at_once, len(rows))
        together += -together % row_cuts
        chunks = [rows[i : i + at_once] for i in range(0, len(rows), at_once)]
        padded = [chunk + [chunk[-1]] * (together - len(chunk)) for chunk in chunks]  # one shape, one compilation
        return [Layout(requests, grids, chunk, self.copies, longest, self.config) for chunk in padded]

    @property
    def _models(self) -> list[tuple[DiTConfig, dict]]:
        return [(self.config, self.params)] + ([self.worse] if self.worse else [])

    def encode(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Latents (t, h, w, c) of uint8 clips; those of one size go through the codec together."""
        mean = lambda some, _: self.codec.encode(np.stack(some))[0]
        return _by_size(mean, clips, [c.shape for c in clips])

    def decode(
        self, latents: Sequence[np.ndarray], loops: Sequence[bool] | None = None, *, progress: bool = False
    ) -> list[np.ndarray]:
        """uint8 (T, H, W, 3) of latents, T = 1 + 4 (t - 1), or 4 t of those on a circle.

        A circle's begin within its first latent frame: steps are evenest there, and a player's restart does not come
        together with where two latent frames meet.
        """
        inside = self.codec.config.time_factor // 2
        loops = loops or [False] * len(latents)
        keys = [(z.shape, loop) for z, loop in zip(latents, loops)]
        with tqdm(total=len(latents), desc="decoding", unit="clip", disable=not progress) as bar:

            def frames(some, key):
                z = np.stack(some)
                made = np.roll(self.codec.decode_loop(z), -inside, axis=1) if key[1] else self.codec.decode(z)
                bar.update(len(some))
                return made

            return _by_size(frames, latents, keys)


def _by_steps(requests: Sequence[Request], sampler: SamplerConfig) -> list[tuple[SamplerConfig, list[int]]]:
    """The requests of each number of steps: a share of them for those that start from a share of the noise."""
    members: dict[int, list[int]] = {}
    for i, request in enumerate(requests):
        strength = request.given.strength if request.given else 1.0
        members.setdefault(math.ceil(strength * sampler.steps), []).append(i)
    return [(dataclasses.replace(sampler, steps=steps), some) for steps, some in members.items()]


def _by_size(apply: Callable, arrays: Sequence[np.ndarray], keys: Sequence) -> list:
    """apply(arrays, key) for those of one key together, `AT_ONCE` at most; results in order."""
    groups: dict = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    results: list = [None] * len(arrays)
    for key, members in groups.items():
        for some in (members[k : k + AT_ONCE] for k in range(0, len(members), AT_ONCE)):
            made = apply([arrays[i] for i in some], key)
            for i, result in zip(some, made):
                results[i] = result
    return results


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
    if "codec" in config and config["codec"] != loaded.latents:
        raise ValueError(
            f"{model} was trained on latents of codec {config['codec']}, but {codec} makes those of {loaded.latents}: "
            f"their latents mean different things; give the codec it was trained with"
        )
    if dit.latent_channels != loaded.config.latent_channels:
        raise ValueError(
            f"{model} takes latents of {dit.latent_channels} channels, codec {codec} makes "
            f"{loaded.config.latent_channels}: give the codec it was trained with"
        )

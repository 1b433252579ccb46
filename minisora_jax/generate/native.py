"""A trained model with its codec, at the sizes that it was trained on: requests to latents, and latents to pixels."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Self

import numpy as np

from minisora_jax.diffusion.distillation import Distilled, sampling_of
from minisora_jax.diffusion.guidance import GuidanceConfig
from minisora_jax.diffusion.objective import ObjectiveConfig
from minisora_jax.diffusion.sampler import SamplerConfig
from minisora_jax.diffusion.time import TimeConfig
from minisora_jax.generate.experts import LowNoise
from minisora_jax.generate.extrapolation import extrapolated
from minisora_jax.generate.packed import PackedRequests, by_steps, fill_rows
from minisora_jax.generate.request import Request
from minisora_jax.generate.sampling import features, require_finite, sample
from minisora_jax.generate.storyboard import whole_lines
from minisora_jax.io.model_dir import in_words
from minisora_jax.io.progress import Progress
from minisora_jax.models.captions import BYTES, Captions
from minisora_jax.models.clip_vision import ImageEncoder
from minisora_jax.models.codec import Codec, by_size
from minisora_jax.models.dit import DiTConfig, abstract_params
from minisora_jax.parallel.mesh import cuts, params_on_mesh
from minisora_jax.parallel.processes import is_main
from minisora_jax.toy.grammar import example_captions

MOST_UNKNOWN = 5  # unknown words that a hint names

# watch(share of the steps done, look); look() gives the latents as they seem at this step, by number of request.
Watch = Callable[[float, Callable[[], dict[int, np.ndarray]]], None]


@dataclasses.dataclass(frozen=True, repr=False)
class NativePipeline:
    """A diffusion transformer and its codec. With autoguidance also a weaker guide model on the same latents."""

    codec: Codec
    config: DiTConfig
    times: TimeConfig
    params: dict
    hash: str = ""
    objective: ObjectiveConfig = ObjectiveConfig()
    captions: Captions = BYTES
    guide: tuple[DiTConfig, dict] | None = None
    low_noise: LowNoise | None = None  # the expert for low noise, if the model is one of a pair
    image_encoder: ImageEncoder | None = None  # of a model that attends to image tokens
    window: int = 21  # latent frames that the model makes at once; longer videos are made window by window
    sides: tuple[int, int] | None = None  # height and width of the largest latents in training; None: not recorded
    distilled: Distilled = Distilled()  # how it was distilled, which is how it is sampled by default
    trained: frozenset[str] | None = None  # kinds of conditioning mask that it was trained with; None: not recorded
    vocabulary: frozenset[str] | None = None  # all words of the training captions; None: not recorded

    def __repr__(self) -> str:
        """One line: the weights would fill the screen."""
        known = "x".join(map(str, self.known_size or ("?",)))
        parts = [in_words(self.params, self.hash), f"known_size={known}", f"cell={self.cell}"]
        return f"{type(self).__name__}({', '.join(parts)}, codec={self.codec.hash or 'unsaved'})"

    @property
    def window_frames(self) -> int:
        """Frames of the first window of a video."""
        return 1 + (self.window - 1) * self.codec.config.time_factor

    @property
    def overlap(self) -> int:
        """Latent frames that a window shares with the one before it."""
        return max(self.window // 2, 1)

    @property
    def known_size(self) -> tuple[int, int, int] | None:
        """Frames, height and width in pixels of the longest, tallest and widest training clips; None: not recorded."""
        if not self.sides:
            return None
        return self.codec.config.pixel_size((self.window, *self.sides))

    @property
    def cell(self) -> int:
        """Pixels that a token covers along y and x. Heights and widths are multiples of it."""
        return self.codec.config.space_factor * self.config.patch[1]

    def grid(self, request: Request) -> tuple[int, int, int]:
        """Tokens (t, h, w) of a request. Raises ValueError, which names the nearest sizes that work."""
        T, H, W = request.size_THW
        factor = self.codec.config.time_factor
        if self.config.makes_images and T > 1:
            raise ValueError(f"frames={T}: this model makes images; use --frames 1")
        for name, n in (("height", H), ("width", W)):
            if n < self.cell or n % self.cell:
                low = max(n // self.cell, 1) * self.cell
                raise ValueError(f"{name}={n} must be a multiple of {self.cell}; use {low} or {low + self.cell}")
        if set(request.spacing) != {1.0} and {"spatial", "temporal"} & set(self.config.attention_kinds):
            raise ValueError("this model has spatial and temporal attention and cannot make sizes beyond training")
        if not request.first:
            t, _, _ = self.codec.config.latent_size((T, self.cell, self.cell))
            return t, H // self.cell, W // self.cell
        if T < factor or T % factor:
            kind, low = "a loop" if request.loop else "a middle stretch", max(T // factor, 1) * factor
            raise ValueError(f"frames={T} of {kind} must be a multiple of {factor}; use {low} or {low + factor}")
        return T // factor, H // self.cell, W // self.cell

    def extrapolated(
        self,
        method: str,
        size_THW: tuple[int, int, int] | None = None,
        *,
        factors: tuple[float, float, float] | None = None,
    ) -> Self:
        """This pipeline with its rotary positions scaled (models/rope_scaling.py), so that its `known_size` is larger.

        Args:
            method: "linear", "ntk", "ntk-by-parts", "yarn", "riflex" or "abf".
            size_THW: the largest video that it is to make in one piece; or
            factors: how many times more tokens along t, y, x than in training.

        Raises:
            ValueError: no method has this name, or the model's config has one already.

        Example:
            >>> import minisora_jax as ms
            >>> ms.VideoPipeline.load().extrapolated("yarn", (33, 64, 64)).known_size
            (33, 64, 64)
        """
        return dataclasses.replace(self, **extrapolated(self, method, size_THW, factors))

    @property
    def loop_start(self) -> int:
        """The frame of a loop's first latent frame at which the loop starts, see `decode`."""
        return self.codec.config.time_factor // 2

    def sizes_up_to(self, size_THW: tuple[int, int, int], *, loop: bool = False) -> list[tuple[int, int, int]]:
        """Sizes (frames, height, width) from a trained one up to `size_THW`, each at most twice the one before.

        Frames are added first, then pixels. A loop keeps its frames. Without a recorded `known_size`, only `size_THW`.

        Example:
            >>> import minisora_jax as ms
            >>> ms.VideoPipeline.load().sizes_up_to((17, 128, 96))
            [(17, 64, 48), (17, 128, 96)]
        """
        T, H, W = size_THW
        sizes = [(T, H, W)]
        while self.known_size:
            t_most, h_most, w_most = self.known_size
            T, H, W = sizes[0]
            shrink = min(2.0, max(H / h_most, W / w_most))
            if shrink > 1:
                shrunk = [max(self.cell, round(n / shrink / self.cell) * self.cell) for n in (H, W)]
                smaller = (T, shrunk[0], shrunk[1])
            elif T > t_most and not loop:
                factor = self.codec.config.time_factor
                smaller = (1 + factor * -(-(T - 1) // (2 * factor)), H, W)
            else:
                break
            if smaller == sizes[0]:
                break
            sizes.insert(0, smaller)
        return sizes

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of a prompt that no training caption contains; [] if the vocabulary is not recorded.

        Example:
            >>> import minisora_jax as ms
            >>> ms.VideoPipeline.load().unknown_words("a red cat moves left")
            ['cat']
        """
        if self.vocabulary is None:
            return []
        text = " ".join(whole_lines(prompt) if "[" in prompt else [prompt]).lower()
        text = unicodedata.normalize("NFC", text)  # else a letter and its accent are two words
        words = re.findall(r"[^\W_]+(?:[-'][^\W_]+)*", text)
        return list(dict.fromkeys(word for word in words if word not in self.vocabulary))

    def unknown_words_hint(self, prompt: str) -> str:
        """A sentence about the words of a prompt that the bundled model does not know; "" for none.

        Example:
            >>> import minisora_jax as ms
            >>> ms.VideoPipeline.load().unknown_words_hint("a red cat moves left")[:40]
            'The bundled model does not know "cat". I'
        """
        words = self.unknown_words(prompt)
        if not words:
            return ""
        rest = ", ..." if len(words) > MOST_UNKNOWN else ""
        shown = ", ".join(f'"{word}"' for word in words[:MOST_UNKNOWN]) + rest
        trained = f'It was trained on coloured shapes in motion, such as "{example_captions()[0]}".'
        return f"The bundled model does not know {shown}. {trained}"

    def sample_at_native_size(self, requests: Sequence[Request], **options) -> list[np.ndarray]:
        """Sample requests in one pass of the model, without upscaling.

        Args:
            requests: what to make. No request may be longer, taller or wider than `known_size`.
            **options: those of `sample`.

        Returns:
            uint8 frames (T, H, W, 3) of each request.

        Raises:
            ValueError: if a request exceeds `known_size`. `VideoPipeline.generate` makes such sizes by upscaling.

        Example:
            >>> import minisora_jax as ms
            >>> request = ms.Request("a red circle grows on a black background", (5, 48, 48))
            >>> [video] = ms.VideoPipeline.load().sample_at_native_size([request], steps=2, progress=False)
            >>> video.shape
            (5, 48, 48, 3)
        """
        for request in requests:
            if not isinstance(request, Request):
                raise TypeError(f"{request!r} is no Request; `VideoPipeline.generate` takes prompts, too")
            require_native(self, request)
        latents = self.sample(requests, **options)
        for request, z_thwc in zip(requests, latents):
            require_finite(z_thwc, request)
        return self.decode(latents, [r.loop for r in requests], progress=options.get("progress", True))

    def sample(
        self,
        requests: Sequence[Request],
        *,
        steps: int | None = None,
        guidance: float | GuidanceConfig | None = None,
        sampler: str | SamplerConfig | None = None,
        tokens_at_once: int = 8192,
        progress: bool = True,
        watch: Watch | None = None,
        measure: Callable[[int, np.ndarray], None] | None = None,
    ) -> list[np.ndarray]:
        """Latents (t, h, w, c) of each request, in order.

        Args:
            requests: what to make. They are packed into rows.
            steps: sampler steps (20); ignored if `sampler` is a `SamplerConfig`. A request with strength s takes the
                share s of them.
            guidance: the guidance scale (3; 1: none), or the whole configuration.
            sampler: a name of diffusion/sampler.py ("heun"), or the whole configuration. A distilled model has other
                defaults: the sampler of its method in its own number of steps, without guidance.
            tokens_at_once: rows run together up to this number of tokens.
            progress: whether to show a progress bar. Without it and `watch`, all steps run as one program.
            watch: called after each step with the share of steps done and a function that returns the current estimate
                of the clean latents, by number of request.
            measure: of a sampler with `reuse`, called after each step k with (k, `StepCache.change_CG`).

        Raises:
            ValueError: for a size that the model cannot make, or a negative prompt together with a guide model.
        """
        sampler, guidance = sampling_of(self.distilled, steps, guidance, sampler)
        if self.guide and any(r.negative for r in requests):
            raise ValueError("a negative prompt replaces the empty prompt, which autoguidance does not use: drop one")
        grids = [self.grid(r) for r in requests]
        # Segments of a request: with and without its caption. A guide model takes the second's place.
        copies = 2 if guidance.acts and not self.guide else 1
        captions = features(self.captions, requests, copies, self.config.caption_tokens)
        on_mesh = lambda c, p: params_on_mesh(p, functools.partial(abstract_params, c))
        models = [(c, on_mesh(c, p)) for c, p in filter(None, ((self.config, self.params), self.guide))]
        low = self.low_noise and LowNoise(on_mesh(self.config, self.low_noise.params), self.low_noise.below)
        work = [
            (fewer, packed)
            for fewer, members in by_steps(requests, sampler)
            for packed in self._packed(requests, grids, members, copies, tokens_at_once)
        ]
        latents: dict[int, np.ndarray] = {}
        ticks = sum(1 if s.name == "dopri5" else s.steps for s, _ in work)
        ticked = itertools.count(1)
        with Progress(total=ticks, desc="sampling", unit="step", disable=not progress or not is_main()) as bar:

            def on_step(_, look):
                bar.update()
                if watch:
                    watch(next(ticked) / ticks, look)

            stepwise = on_step if progress or watch else None
            settings = self.times, self.objective, guidance
            for fewer, packed in work:
                latents |= sample(packed, captions, models, *settings, fewer, low, stepwise, measure)
        return [latents[i] for i in range(len(requests))]

    def _packed(
        self, requests, grids, members: Sequence[int], copies: int, tokens_at_once: int
    ) -> list[PackedRequests]:
        """The requests with these numbers in rows, and rows in batches of one shape."""
        row_cuts, token_cuts = cuts()
        row_tokens = copies * max(int(np.prod(grids[i])) for i in members)
        row_tokens += -row_tokens % token_cuts
        rows = [[members[i] for i in row] for row in fill_rows([grids[i] for i in members], row_tokens, copies)]
        at_once = max(1, tokens_at_once // row_tokens)
        batch_rows = min(at_once, len(rows))
        batch_rows += -batch_rows % row_cuts
        batches = [rows[i : i + at_once] for i in range(0, len(rows), at_once)]
        padded = [batch + [batch[-1]] * (batch_rows - len(batch)) for batch in batches]  # one shape, one compilation
        shape = copies, row_tokens, self.config, self.trained
        return [PackedRequests(requests, grids, batch, *shape) for batch in padded]

    def encode(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Latents (t, h, w, c) of uint8 clips (1 + 4k, H, W, 3). Clips of one size go through the codec together.

        Example:
            >>> import numpy as np
            >>> import minisora_jax as ms
            >>> [latents] = ms.VideoPipeline.load().encode([np.zeros((9, 48, 64, 3), np.uint8)])
            >>> latents.shape
            (3, 6, 8, 16)
        """
        encode = lambda same_size, _: self.codec.encode(np.stack(same_size))[0]
        return by_size(encode, clips, [c.shape for c in clips])

    def decode(
        self, latents: Sequence[np.ndarray], loops: Sequence[bool] | None = None, *, progress: bool = False
    ) -> list[np.ndarray]:
        """uint8 frames (T, H, W, 3) of latents (t, h, w, c).

        Args:
            latents: as `encode` and `sample` return them.
            loops: which of them are loops. A loop has T = 4 t frames, another clip T = 1 + 4 (t - 1). A loop starts
                inside its first latent frame: there steps are most even, so that a player's restart does not coincide
                with a boundary of latent frames.
            progress: whether to show a progress bar.
        """
        loops = loops or [False] * len(latents)
        keys = [(z.shape, loop) for z, loop in zip(latents, loops)]
        with Progress(total=len(latents), desc="decoding", unit="clip", disable=not progress or not is_main()) as bar:

            def decode(same_size, key):
                z, loop = np.stack(same_size), key[1]
                frames = np.roll(self.codec.decode_loop(z), -self.loop_start, axis=1) if loop else self.codec.decode(z)
                bar.update(len(same_size))
                return frames

            return by_size(decode, latents, keys)


def require_native(pipeline: NativePipeline, request: Request) -> None:
    """Raise ValueError for a request that exceeds `known_size`."""
    if pipeline.known_size and any(n > most for n, most in zip(request.size_THW, pipeline.known_size)):
        asked, known = ("x".join(map(str, size)) for size in (request.size_THW, pipeline.known_size))
        raise ValueError(
            f"{asked} (frames x height x width) is more than the {known} that the model was trained on: use "
            f"pipeline.generate, which samples at a trained size and upscales"
        )

"""The Python face of generation: one object that loads a model and performs every task.

pipeline = VideoPipeline.load()
[video] = pipeline.generate("a red circle moves left on a black background")
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np

from minisora_jax.bundled import folder
from minisora_jax.generate import tasks
from minisora_jax.generate.loading import load_parts
from minisora_jax.generate.native import NativePipeline
from minisora_jax.generate.request import Request, image_size, video_size
from minisora_jax.generate.runner import Task, run_tasks
from minisora_jax.generate.storyboard import storyboard

SAMPLING_OPTIONS = ("steps", "guidance", "sampler", "tokens_at_once", "progress", "watch")


class VideoPipeline(NativePipeline):
    """A trained model with its codec, which performs every task of `generate/tasks.py`.

    Each task is a method that returns the frames of one video, uint8 (T, H, W, 3). `generate` takes several prompts,
    requests or tasks and packs them together. Sizes beyond training are made at a trained size and upscaled.

    Every method takes `steps` (20), `guidance` (3.0; 1: none), `sampler` ("heun", or a `SamplerConfig`), `progress`.

    Example:
        >>> import minisora_jax as ms
        >>> pipeline = ms.VideoPipeline.load()
        >>> video = pipeline.text_to_video("a red circle moves left on a black background", frames=5, steps=2)
        >>> video.shape, str(video.dtype)
        ((5, 48, 48, 3), 'uint8')
    """

    @classmethod
    def load(
        cls,
        model: str | Path | None = None,
        codec: str | Path | None = None,
        guide_model: str | Path | None = None,
        text_encoder: str | Path | None = None,
        dtype: str | None = None,
        loras: Sequence[str] = (),
        image_encoder: str | Path | None = None,
        offload: bool = False,
    ) -> VideoPipeline:
        """Load a model that `minisora train` or `minisora import` wrote.

        Args:
            model, codec: their directories; None: the bundled ones, "fast": the bundled model distilled to 4 steps.
            guide_model: a weaker model for autoguidance, trained with the same codec, patch and objective.
            text_encoder: the directory of its text encoder; None for the one that the model's training recorded.
            dtype: "float32" or "bfloat16" for weights and arithmetic; None: as the model says; "int8", "nf4": weights.
            loras: adapters of the model, each "PATH" or "PATH:WEIGHT".
            image_encoder: the directory of the image encoder of a model that attends to one (Wan 2.1 image to video).
            offload: whether the expert of a pair that is not at work waits in the host's memory.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if a part is damaged or does not belong to the others.

        Example:
            >>> import minisora_jax as ms
            >>> ms.VideoPipeline.load().known_size
            (17, 64, 64)
        """
        others = guide_model, text_encoder, dtype, loras, image_encoder, offload
        return cls(**load_parts(folder(model), codec, *others))

    def generate(
        self,
        what: str | Request | Task | Sequence[str | Request | Task],
        *,
        frames: int = 17,
        size: tuple[int, int] = (48, 48),
        seed: int = 0,
        fps: float = 8.0,
        negative: str = "",
        **sampling,
    ) -> list[np.ndarray]:
        """Make several videos, packed together.

        Args:
            what: prompts, requests, or tasks of `generate/tasks.py`; one, or a sequence of any of them.
            frames: frames of each prompt's video, 1 + 4k; 1 makes an image.
            size: height and width in pixels of each prompt's video, multiples of `cell`.
            seed, fps: of the first prompt, the next ones count up from it; frames per second, which the model is told.
            negative: what the videos shall not show.
            **sampling: steps, guidance, sampler, progress.

        Returns:
            uint8 frames (T, H, W, 3) of each, in order.

        Raises:
            ValueError: if the model cannot make one of them; the message names what it can make.

        Example:
            >>> import minisora_jax as ms
            >>> pipeline = ms.VideoPipeline.load()
            >>> prompts = ["a red circle grows on a black background", "a blue square shrinks on a navy background"]
            >>> [video.shape for video in pipeline.generate(prompts, frames=5, steps=2)]
            [(5, 48, 48, 3), (5, 48, 48, 3)]
        """
        items = [what] if isinstance(what, str | Request | Generator) else list(what)
        common = {"fps": fps, "negative": negative}
        requests = [
            Request(x, (frames, *size), seed + i, **common) if isinstance(x, str) else x for i, x in enumerate(items)
        ]
        started = [tasks.text_to_video(self, x) if isinstance(x, Request) else x for x in requests]
        return self._run(started, sampling)

    def text_to_video(
        self,
        prompt: str,
        *,
        frames: int = 17,
        size: tuple[int, int] = (48, 48),
        seed: int = 0,
        fps: float = 8.0,
        negative: str = "",
        **sampling,
    ) -> np.ndarray:
        """A video from words; with `frames=1` an image of shape (1, H, W, 3). See `generate` for the arguments.

        Example:
            >>> import minisora_jax as ms
            >>> photo = "a photo of a small green cross on a navy background"
            >>> ms.VideoPipeline.load().text_to_video(photo, frames=1, steps=2).shape
            (1, 48, 48, 3)
        """
        request = Request(prompt, (frames, *size), seed, fps, negative)
        return self._one(tasks.text_to_video(self, request), sampling)

    def image_to_video(
        self, prompt: str, image: np.ndarray, *, frames: int = 17, seed: int = 0, fps: float = 8.0, **sampling
    ) -> np.ndarray:
        """A video whose first frame is an image, as the codec reproduces it.

        Args:
            prompt: what happens.
            image: uint8 (H, W, 3); H and W multiples of `cell`.
            frames: 1 + 4k.
            **sampling: as in `generate`, like `seed` and `fps`.

        Example:
            >>> import numpy as np
            >>> import minisora_jax as ms
            >>> image = np.zeros((48, 48, 3), np.uint8)
            >>> prompt = "a red circle moves left on a black background"
            >>> ms.VideoPipeline.load().image_to_video(prompt, image, frames=5, steps=2).shape
            (5, 48, 48, 3)
        """
        request = Request(prompt, (frames, *image_size(image)), seed, fps)
        return self._one(tasks.image_to_video(self, request, image), sampling)

    def interpolate(
        self,
        prompt: str,
        first: np.ndarray,
        last: np.ndarray,
        *,
        frames: int = 17,
        seed: int = 0,
        fps: float = 8.0,
        **sampling,
    ) -> np.ndarray:
        """A video from one image to another, both uint8 (H, W, 3); `frames` is 1 + 4k and at least 9.

        Example:
            >>> import numpy as np
            >>> import minisora_jax as ms
            >>> image = np.zeros((48, 48, 3), np.uint8)
            >>> prompt = "a red circle moves left on a black background"
            >>> ms.VideoPipeline.load().interpolate(prompt, image, image, frames=9, steps=2).shape
            (9, 48, 48, 3)
        """
        request = Request(prompt, (frames, *image_size(first)), seed, fps)
        return self._one(tasks.interpolate(self, request, first, last), sampling)

    def video_to_video(
        self, prompt: str, video: np.ndarray, *, strength: float = 0.6, seed: int = 0, fps: float = 8.0, **sampling
    ) -> np.ndarray:
        """A video made again from words, starting from its own latents with noise of `strength` (0: as it is, 1: new).

        Source: SDEdit (Meng et al. 2021, arXiv:2108.01073). `video` is uint8 (1 + 4k, H, W, 3).

        Example:
            >>> import numpy as np
            >>> import minisora_jax as ms
            >>> video = np.zeros((5, 48, 48, 3), np.uint8)
            >>> prompt = "a red circle moves left on a black background"
            >>> ms.VideoPipeline.load().video_to_video(prompt, video, steps=2).shape
            (5, 48, 48, 3)
        """
        request = Request(prompt, video_size(video), seed, fps)
        return self._one(tasks.video_to_video(self, request, video, strength), sampling)

    def inpaint(
        self, prompt: str, video: np.ndarray, mask: np.ndarray, *, seed: int = 0, fps: float = 8.0, **sampling
    ) -> np.ndarray:
        """The video with the masked part made anew; all other pixels stay as they are.

        Args:
            prompt: what the whole video shows.
            video: uint8 (1 + 4k, H, W, 3).
            mask: bool (H, W) or (T, H, W), True where to make it anew.
            **sampling: as in `generate`, like `seed` and `fps`.

        Example:
            >>> import numpy as np
            >>> import minisora_jax as ms
            >>> video, mask = np.zeros((5, 48, 48, 3), np.uint8), np.arange(48)[None] * np.ones((48, 1)) > 24
            >>> prompt = "a red circle moves left on a black background"
            >>> ms.VideoPipeline.load().inpaint(prompt, video, mask, steps=2).shape
            (5, 48, 48, 3)
        """
        request = Request(prompt, video_size(video), seed, fps)
        return self._one(tasks.inpaint(self, request, video, mask), sampling)

    def outpaint(
        self, prompt: str, video: np.ndarray, size: tuple[int, int], *, seed: int = 0, fps: float = 8.0, **sampling
    ) -> np.ndarray:
        """The video (1 + 4k, H, W, 3) in the middle of a larger frame of `size` (height, width).

        Example:
            >>> import numpy as np
            >>> import minisora_jax as ms
            >>> prompt = "a red circle moves left on a black background"
            >>> video = np.zeros((5, 32, 32, 3), np.uint8)
            >>> ms.VideoPipeline.load().outpaint(prompt, video, (48, 48), steps=2).shape
            (5, 48, 48, 3)
        """
        request = Request(prompt, (video_size(video)[0], *size), seed, fps)
        return self._one(tasks.outpaint(self, request, video), sampling)

    def extend(
        self,
        prompt: str,
        video: np.ndarray,
        *,
        before: int = 0,
        after: int = 0,
        seed: int = 0,
        fps: float = 8.0,
        **sampling,
    ) -> np.ndarray:
        """The video (T, H, W, 3) with `before` new frames before it and `after` new frames after it.

        Example:
            >>> import numpy as np
            >>> import minisora_jax as ms
            >>> prompt = "a red circle moves left on a black background"
            >>> video = np.zeros((9, 48, 48, 3), np.uint8)
            >>> ms.VideoPipeline.load().extend(prompt, video, after=4, steps=2).shape
            (13, 48, 48, 3)
        """
        request = Request(prompt, (1, *video_size(video)[1:]), seed, fps)
        return self._one(tasks.extend(self, request, video, before=before, after=after), sampling)

    def transition(
        self,
        prompt: str,
        first: np.ndarray,
        second: np.ndarray,
        *,
        between: int = 12,
        seed: int = 0,
        fps: float = 8.0,
        **sampling,
    ) -> np.ndarray:
        """Two videos of one size with about `between` new frames that lead from the first to the second.

        `between` is rounded up to the codec's grid.

        Example:
            >>> import numpy as np
            >>> import minisora_jax as ms
            >>> prompt = "a red circle moves left on a black background"
            >>> video = np.zeros((9, 48, 48, 3), np.uint8)
            >>> ms.VideoPipeline.load().transition(prompt, video, video, between=7, steps=2).shape
            (25, 48, 48, 3)
        """
        request = Request(prompt, (1, *video_size(first)[1:]), seed, fps)
        return self._one(tasks.transition(self, request, first, second, between=between), sampling)

    def loop(
        self,
        prompt: str,
        *,
        frames: int = 16,
        size: tuple[int, int] = (48, 48),
        seed: int = 0,
        fps: float = 8.0,
        **sampling,
    ) -> np.ndarray:
        """A seamless loop from words; `frames` is 4k. For a loop of a given video see `tasks.transition(loop=True)`.

        A model trained with both ends known goes there and back; others take the latent shift (arXiv:2502.20307).

        Example:
            >>> import minisora_jax as ms
            >>> prompt = "a red circle moves in a circle on a black background"
            >>> ms.VideoPipeline.load().loop(prompt, frames=8, steps=2).shape
            (8, 48, 48, 3)
        """
        return self.generate(Request(prompt, (frames, *size), seed, fps, loop=True), **sampling)[0]

    def long_video(
        self,
        prompt: str,
        *,
        frames: int,
        size: tuple[int, int] = (48, 48),
        first: np.ndarray | None = None,
        seed: int = 0,
        fps: float = 8.0,
        **sampling,
    ) -> np.ndarray:
        """A video of any length, made window by window.

        Args:
            prompt: a prompt, or a storyboard "... [4s] ..." whose second line begins at 4 s (storyboard.py).
            frames, size: number of frames; height and width in pixels.
            first: the first frame, uint8 (H, W, 3), or None.
            fps: frames per second, which the times of a storyboard refer to.
            **sampling: as in `generate`, like `seed`.

        Example:
            >>> import minisora_jax as ms
            >>> prompt = "a red circle moves in a circle on a black background"
            >>> ms.VideoPipeline.load().long_video(prompt, frames=30, steps=2).shape
            (30, 48, 48, 3)
        """
        prompts = storyboard(prompt, fps)
        request = Request(prompts[0][1], (1, *size), seed, fps)
        return self._one(tasks.long_video(self, request, frames, prompts, first), sampling)

    def _one(self, task: Task, sampling: dict) -> np.ndarray:
        return self._run([task], sampling)[0]

    def _run(self, started: Sequence[Task], sampling: dict) -> list[np.ndarray]:
        if unknown := sorted(set(sampling) - set(SAMPLING_OPTIONS)):
            raise TypeError(f"unknown option {unknown[0]!r}; sampling has {', '.join(SAMPLING_OPTIONS)}")
        return run_tasks(self, started, **sampling)

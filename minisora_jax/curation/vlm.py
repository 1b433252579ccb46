"""A captioner on this machine: a vision-language model of `transformers`, by name or path. It runs on PyTorch.

Any model of `AutoModelForImageTextToText` with a chat template will do: Qwen2.5-VL, SmolVLM, LLaVA, InternVL, Gemma 3.
Answers are the most likely ones (greedy), so they do not change from run to run on the same hardware.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

TOKENS = 400  # of an answer
SIDE = 768  # pixels of the longer side that frames are shrunk to


class VisionLanguageModel:
    """spec: a name on the Hugging Face hub, or a directory. Loaded when first asked, onto a GPU where there is one."""

    processes = 1  # a model of some billion weights a machine

    def __init__(self, spec: str, asked: str = "", *, tokens: int = TOKENS):
        self.spec, self.tokens = spec, tokens
        self.identity = f"{spec} asked {asked}"
        self._model = None

    def check(self) -> None:
        """ImportError or RuntimeError with what is missing."""
        try:
            import torch  # noqa: F401
            import transformers
        except ImportError as error:
            raise ImportError(
                f"the captioner {self.spec} needs PyTorch: pip install torch 'minisora_jax[text]' ({error})"
            ) from error
        try:
            transformers.AutoConfig.from_pretrained(self.spec)
        except (OSError, ValueError) as error:
            raise RuntimeError(
                f"{self.spec} is no vision-language model of transformers (a name on the hub, or a directory with its "
                f"config.json); an endpoint is spelled http://HOST/v1#MODEL, a function FILE.py:FUNCTION ({error})"
            ) from error

    def ask(self, instruction: str, frames_nHWC: np.ndarray | None = None) -> str:
        import torch

        if self._model is None:
            self._load()
        images = [] if frames_nHWC is None else [_image(frame) for frame in frames_nHWC]
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": instruction}]
        prompt = self._processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = self._processor(text=[prompt], images=images or None, return_tensors="pt").to(
            self._model.device, self._model.dtype
        )
        with torch.inference_mode():
            tokens = self._model.generate(**inputs, do_sample=False, max_new_tokens=self.tokens)
        return self._processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]

    def _load(self) -> None:
        self.check()
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self._processor = AutoProcessor.from_pretrained(self.spec)
        if not getattr(self._processor, "chat_template", None):
            raise RuntimeError(f"{self.spec} has no chat template: take a model that was tuned to follow instructions")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = AutoModelForImageTextToText.from_pretrained(self.spec, dtype="auto").to(device).eval()


def _image(frame_HWC: np.ndarray) -> Image.Image:
    image = Image.fromarray(frame_HWC)
    image.thumbnail((SIDE, SIDE))
    return image

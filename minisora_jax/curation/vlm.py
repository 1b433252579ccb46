"""A local captioner: a vision-language model of `transformers`, by name or path. It runs on PyTorch.

Any model of `AutoModelForImageTextToText` with a chat template works: Qwen2.5-VL, SmolVLM, LLaVA, InternVL, Gemma 3.
Decoding is greedy, so answers do not change from run to run on the same hardware.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from PIL import Image

from minisora_jax.config import how_to_install

TOKENS = 400  # at most so many tokens an answer
SIDE = 768  # frames are shrunk until the longer side has at most so many pixels


class VisionLanguageModel:
    """A captioner that loads its model with the first question, onto a GPU if there is one.

    Args:
        spec: a name on the Hugging Face hub, or a directory.
        instructions_hash: a hash of the instructions, for the identity.
        tokens: at most so many tokens an answer.
    """

    processes = 1  # a machine has memory for one model of some billion weights

    def __init__(self, spec: str, instructions_hash: str = "", *, tokens: int = TOKENS):
        self.spec, self.tokens = spec, tokens
        self.identity = f"{spec} asked {instructions_hash}"

    def check(self) -> None:
        """Raise ImportError or RuntimeError with the fix if a package or the model is missing."""
        try:
            import torch  # noqa: F401
            import transformers
        except ImportError as error:
            raise ImportError(
                f"the captioner {self.spec} needs PyTorch: pip install torch, and {how_to_install('text')} ({error})"
            ) from error
        try:
            transformers.AutoConfig.from_pretrained(self.spec, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise RuntimeError(
                f"{self.spec} is no vision-language model of transformers (a name on the hub, or a directory with its "
                f"config.json). Write an endpoint as http://HOST/v1#MODEL, a function as FILE.py:FUNCTION ({error})"
            ) from error

    def ask(self, instruction: str, frames_nHWC: np.ndarray | None = None) -> str:
        """The model's answer; see `Captioner.ask`."""
        import torch

        processor, model = self._loaded
        images = [] if frames_nHWC is None else [_image(frame) for frame in frames_nHWC]
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": instruction}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=[prompt], images=images or None, return_tensors="pt").to(model.device, model.dtype)
        with torch.inference_mode():
            tokens = model.generate(**inputs, do_sample=False, max_new_tokens=self.tokens)
        return processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]

    @functools.cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """(processor, model)."""
        self.check()
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        processor = AutoProcessor.from_pretrained(self.spec, trust_remote_code=False)
        if not getattr(processor, "chat_template", None):
            raise RuntimeError(f"{self.spec} has no chat template: choose a model that is tuned to follow instructions")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = AutoModelForImageTextToText.from_pretrained(self.spec, dtype="auto", trust_remote_code=False)
        return processor, model.to(device).eval()


def _image(frame_HWC: np.ndarray) -> Image.Image:
    image = Image.fromarray(frame_HWC)
    image.thumbnail((SIDE, SIDE))
    return image

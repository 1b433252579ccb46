"""A vision-language model of transformers as a captioner: a tiny LLaVA of random weights, built from a config.

    python tests/parity/captioner.py        in the environment of make.py (PyTorch); as tests/test_captioners.py does

It is saved, loaded by its path, and asked. What it says is nonsense; that it is the model's own greedy answer to these
frames and this instruction, the same each time, is compared with a loop over the model's logits.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile

import numpy as np

TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }}"
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} answer{% endif %}"
)
WORDS = "a red blue cat runs over the green grass and it rains on frames what is seen answer".split()
TOKENS = 6


def build(folder: pathlib.Path) -> None:
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    pixels = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    transformers.LlavaProcessor(
        pixels,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(image_size=28, patch_size=14, projection_dim=16, **sizes),
        text_config=transformers.LlamaConfig(vocab_size=len(words), num_key_value_heads=2, eos_token_id=2, **sizes),
        image_token_index=words.index("<image>"),
    )
    model = transformers.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.3)  # large enough that other frames have another answer
    model.save_pretrained(folder)


def greedy(folder: pathlib.Path, instruction: str, frames_nHWC: np.ndarray) -> str:
    """The answer by a loop over logits, without `generate` and its cache."""
    import torch
    import transformers
    from PIL import Image

    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    text = "<image>" * len(frames_nHWC) + f" {instruction} answer"
    inputs = processor(text=[text], images=[Image.fromarray(f) for f in frames_nHWC] or None, return_tensors="pt")
    ids, said = inputs["input_ids"], []
    for _ in range(TOKENS):
        with torch.no_grad():
            logits = model(input_ids=ids, **{k: v for k, v in inputs.items() if k == "pixel_values"}).logits[0, -1]
        said.append(int(logits.argmax()))
        if said[-1] == 2:
            break
        ids = torch.cat([ids, torch.tensor([[said[-1]]])], 1)
    return processor.tokenizer.decode(said, skip_special_tokens=True)


def check(folder: pathlib.Path) -> None:
    from minisora_jax.curation.captioners import describe, expand
    from minisora_jax.curation.vlm import VisionLanguageModel

    build(folder)
    rng = np.random.default_rng(0)
    film = rng.integers(0, 255, (9, 40, 60, 3), dtype=np.uint8)
    other = np.zeros((1, 40, 60, 3), np.uint8)
    model = VisionLanguageModel(str(folder), tokens=TOKENS)
    model.check()
    answers = []
    for frames in (film[:8], film[:2], other, film[:0]):
        answer = model.ask("what is seen", frames)
        assert answer == greedy(folder, "what is seen", frames), (answer, greedy(folder, "what is seen", frames))
        answers.append(answer)
    assert len(set(answers)) > 1, f"the answers do not depend on the frames: {answers}"
    assert model.ask("what is seen", film[:0]) == model.ask("what is seen")
    captions = describe(model, film)
    assert set(captions) == {"short", "long"} and all(captions.values())
    assert expand("a cat runs", model) == expand("a cat runs", model)
    try:
        VisionLanguageModel(str(folder / "nowhere")).check()
    except RuntimeError as error:
        assert "is no vision-language model of transformers" in str(error)
    else:
        raise AssertionError("a path that is none was taken")
    print(f"captioner: a tiny LLaVA answers {answers}, as the loop over its logits does")


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
    with tempfile.TemporaryDirectory() as scratch:
        check(pathlib.Path(scratch))

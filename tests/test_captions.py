"""Captions by bytes, by class and by an imported encoder; what does not belong together is refused with its numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from needs import needs

from minisora_jax.models.captions import BYTES, captions_of, class_captions, encoder_captions
from minisora_jax.models.clip import CLIPConfig
from minisora_jax.models.dit import DiTConfig
from minisora_jax.models.encoder import TextEncoder
from minisora_jax.models.t5 import T5Config
from minisora_jax.models.text import encode_bytes

BYT5 = T5Config(384, 24, 3, 8, 40, 2, dtype="float32")
CLIP = CLIPConfig(300, 24, 3, 40, 2, 20, projection=12)


def export(config, directory):
    ids = jnp.zeros((1, 4), jnp.int32)
    params = TextEncoder(config, {}).module.init(jax.random.key(0), ids, ids)
    TextEncoder(config, params).export(directory, {})
    return directory


def put_tokenizer(directory, size: int):
    """Words w0, w1, ... are ids 2, 3, ...; every caption ends with 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    PreTrainedTokenizerFast = needs("transformers").PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "</s>": 1} | {f"w{i}": i + 2 for i in range(size - 2)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(directory / "tokenizer")


@pytest.fixture(scope="module")
def byt5(tmp_path_factory):
    return export(BYT5, tmp_path_factory.mktemp("models") / "byt5")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    directory = export(CLIP, tmp_path_factory.mktemp("models") / "clip")
    put_tokenizer(directory, 300)
    return directory


def test_byt5_needs_no_tokenizer_and_captions_are_encoded_alone(byt5):
    captions = encoder_captions(byt5)
    texts = ["a red circle", "", "weiß " * 9, "a red circle", *(f"number {i}" for i in range(9))]
    features = captions.encode(texts)
    assert captions.width == 24 and captions.record == {"encoder": TextEncoder.load(byt5).hash, "path": str(byt5)}
    encoder = TextEncoder.load(byt5)
    for text, feature in zip(texts, features):
        ids = encode_bytes(" ".join(text.split()))[:, 0]
        ids = ids[ids > 0][None]
        np.testing.assert_allclose(feature, encoder.module.apply(encoder.params, ids, np.ones_like(ids))[0], atol=2e-5)
    assert features[1].shape == (1, 24)  # the empty caption is its end


@pytest.mark.slow
def test_a_tokenizer_beside_the_weights_is_used_and_long_captions_are_cut(clip, caplog):
    captions, encoder = encoder_captions(clip), TextEncoder.load(clip)
    features = captions.encode(["w7  w1\n w9", " ".join(["w5"] * 40)])
    ids = np.array([[9, 3, 11, 1]])
    np.testing.assert_allclose(
        features[0], encoder.module.apply(encoder.params, ids, np.ones_like(ids))[0][0], atol=2e-5
    )
    assert features[1].shape == (20, 24) and np.isfinite(features[1]).all()
    assert "a caption of 41 tokens is cut to 20: w5" in caplog.text


@pytest.mark.slow
def test_a_tokenizer_that_is_missing_or_of_another_encoder_is_named(tmp_path, clip):
    directory = export(dataclasses.replace(BYT5, vocabulary=50), tmp_path / "t5")
    with pytest.raises(FileNotFoundError, match="t5/tokenizer is missing: copy the tokenizer's files there"):
        encoder_captions(directory)
    put_tokenizer(directory, 300)
    with pytest.raises(ValueError, match="gives the token 102, and .* has a vocabulary of 50"):
        encoder_captions(directory).encode(["w100"])


@pytest.mark.slow
def test_a_model_gets_the_captions_that_it_was_trained_with(byt5, clip, tmp_path):
    assert captions_of(DiTConfig(), {"encoder": "bytes"}, None, None) is BYTES
    reads = DiTConfig(text_features=24)
    record = encoder_captions(byt5).record
    assert captions_of(reads, record, None, None).record == record
    with pytest.raises(ValueError, match="features of width 24 and does not name its text encoder.*import umt5-xxl"):
        captions_of(reads, None, None, "umt5-xxl")
    with pytest.raises(ValueError, match="has its text encoder at /gone, which is gone: give it by --text-encoder=DIR"):
        captions_of(reads, record | {"path": "/gone"}, None, None)
    assert captions_of(reads, record | {"path": "/gone"}, byt5, None).record == record
    with pytest.raises(ValueError, match="makes features of width 24, and the model reads 4096"):
        captions_of(DiTConfig(text_features=4096), None, byt5, None)
    with pytest.raises(ValueError, match=f"trained on features of text encoder {record['encoder']}, but .*clip is"):
        captions_of(reads, record, clip, None)


def test_classes_are_numbers(tmp_path):
    captions = class_captions(11)
    assert [c.tolist() for c in captions.encode(["7", " 0", ""])] == [[[7]], [[0]], [[10]]]
    for wrong in ("10", "a dog", "-1"):
        with pytest.raises(ValueError, match=f"prompt '{wrong}' must be the number of a class, 0 to 9"):
            captions.encode([wrong])
    label = DiTConfig(caption="label", classes=11, micro_conditioning=False)
    assert captions_of(label, None, None, None).record == {"encoder": "classes"}
    with pytest.raises(ValueError, match="--text-encoder=models/umt5: the model reads classes, not features"):
        captions_of(label, None, "models/umt5", None)

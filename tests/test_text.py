"""Captions as bytes are ByT5's, and the refiner keeps captions apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from needs import needs

from minisora_jax.models.text import BYTES_PER_TOKEN, TextRefiner, encode_bytes, shift_within


@pytest.mark.slow
def test_ids_are_those_of_the_byt5_tokenizer():
    ByT5Tokenizer = needs("transformers").ByT5Tokenizer

    tokenizer = ByT5Tokenizer()  # its vocabulary is the bytes: nothing to download
    for caption in ("a red circle", "weiß, naïve, 猫が走る", "", "🎬 x"):
        ids = encode_bytes(caption)[:, 0]
        expected = tokenizer(caption).input_ids
        assert ids[: len(expected)].tolist() == expected and not ids[len(expected) :].any()


@given(st.text(max_size=40))
def test_whole_tokens_and_the_caption_comes_back(caption):
    ids = encode_bytes(caption)[:, 0]
    assert len(ids) % BYTES_PER_TOKEN == 0
    assert bytes(i - 3 for i in ids if i >= 3).decode() == caption


def test_shift_stops_at_segment_borders():
    x = jnp.arange(1.0, 7.0).reshape(1, 6, 1)
    segment = jnp.array([[1, 1, 1, 2, 2, 0]])
    np.testing.assert_array_equal(shift_within(x, segment, 1)[0, :, 0], [2, 3, 0, 5, 0, 0])
    np.testing.assert_array_equal(shift_within(x, segment, -2)[0, :, 0], [0, 0, 1, 0, 0, 0])


def test_a_caption_is_read_alone():
    refiner = TextRefiner(width=64, depth=2, heads=1, features=1, dtype="float32")
    texts = [encode_bytes(c) for c in ("a red circle moves left", "two", "a blue square")]

    def packed(chosen, length=64):
        ids, segment = np.zeros((1, length, 1), np.int32), np.zeros((1, length), np.int32)
        at = 0
        for number, i in enumerate(chosen):
            ids[0, at : at + len(texts[i])], segment[0, at : at + len(texts[i])] = texts[i], number + 1
            at += len(texts[i])
        return jnp.asarray(ids), jnp.asarray(segment)

    params = refiner.init(jax.random.key(0), *packed([0]))
    (alone, _), (together, segment) = (refiner.apply(params, *packed(c)) for c in ([2], [1, 2, 0]))
    mine = np.flatnonzero(np.asarray(segment[0]) == 2)
    assert len(mine) == len(texts[2]) // BYTES_PER_TOKEN
    np.testing.assert_allclose(together[0, mine], alone[0, : len(mine)], atol=1e-5)

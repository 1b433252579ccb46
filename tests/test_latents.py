"""The latent cache: exact to float16, resumable, and never silently wrong."""

import json
import shutil
import types

import numpy as np
import pytest

from minisora_jax.data import encode
from minisora_jax.data.encode import encode_clips
from minisora_jax.data.latents import Latents, write_latents
from minisora_jax.io.manifest import seal
from minisora_jax.io.retry import DataError
from minisora_jax.models.text import encode_bytes
from minisora_jax.types import Clip, LatentClip

COUNT = 9
MADE_WITH = dict(codec_hash="c0ffee", text={"encoder": "bytes"}, empty_text_LE=encode_bytes(""), clips_per_part=2)


def latent(i):
    rng = np.random.default_rng(i)
    shape = (1 + i % 3, 2 + i % 4, 4, 4)
    mean, std = rng.normal(size=shape), np.exp(rng.normal(size=shape) - 6)
    text = encode_bytes(f"clip {'x' * i}") if i != 3 else rng.normal(size=(5, 8)).astype(np.float32)
    return LatentClip(mean.astype(np.float32), std.astype(np.float32), text, f"clip {i} é", 29.97, f"a/{i}.mp4")


CLIPS = [latent(i) for i in range(COUNT)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    write_latents(folder, CLIPS, **MADE_WITH)
    return folder


@pytest.fixture
def copy(cache, tmp_path):
    return shutil.copytree(cache, tmp_path / "copy")


def test_round_trip_is_exact_to_float16(cache):
    latents = Latents(cache, codec_hash="c0ffee", text={"encoder": "bytes"})
    assert len(latents) == COUNT and len(list(cache.glob("latents-*-of-*.array_record"))) > 2
    for i in range(COUNT):
        wanted, found = latent(i), latents[i]
        assert tuple(latents.sizes[i]) == (*wanted.mean_thwc.shape[:3], len(wanted.text_LE))
        for name in ("mean_thwc", "std_thwc"):
            assert getattr(found, name).dtype == np.float32
            np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name).astype(np.float16))
        assert found.text_LE.dtype == wanted.text_LE.dtype
        as_stored = wanted.text_LE if i != 3 else wanted.text_LE.astype(np.float16)
        np.testing.assert_array_equal(found.text_LE, as_stored)
        assert (found.caption, found.fps, found.name) == (wanted.caption, wanted.fps, wanted.name)
    np.testing.assert_array_equal(latents.empty_text_LE, encode_bytes(""))


def test_sizes_need_no_record(copy):
    for shard in copy.glob("*.array_record"):
        shard.write_bytes(bytes(shard.stat().st_size))
    assert Latents(copy).sizes.shape == (COUNT, 4)


@pytest.mark.parametrize(
    "expect, message",
    [
        (dict(codec_hash="other"), "codec_hash should be 'other' and is 'c0ffee'"),
        (dict(text={"encoder": "t5"}), "text should be {'encoder': 't5'} and is {'encoder': 'bytes'}"),
        (dict(preprocessing_version=99), "preprocessing_version should be 99 and is 2"),
    ],
)
def test_a_cache_made_with_something_else_is_refused(cache, expect, message):
    with pytest.raises(DataError, match=message):
        Latents(cache, **expect)


def test_missing_and_truncated_files(copy):
    shard = sorted(copy.glob("*.array_record"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-100])
    with pytest.raises(
        DataError, match=f"{shard.name} is damaged: expected {len(data)} bytes, found {len(data) - 100}"
    ):
        Latents(copy)
    shard.unlink()
    with pytest.raises(DataError, match=f"{shard.name} is missing"):
        Latents(copy)
    shard.write_bytes(data)
    (copy / "sizes.npy").write_bytes((copy / "sizes.npy").read_bytes()[:-1])
    with pytest.raises(DataError, match="sizes.npy is damaged: expected sha256"):
        Latents(copy)
    (copy / "sizes.npy").unlink()
    with pytest.raises(DataError, match="sizes.npy is missing"):
        Latents(copy)


def test_a_manifest_is_the_sign_of_a_finished_encode(copy):
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text[:50])
    with pytest.raises(DataError, match="manifest.json is damaged"):
        Latents(copy)
    (copy / "manifest.json").write_text(
        json.dumps((other := {**json.loads(text), "kind": "clips"}) | {"crc32": seal(other)})
    )
    with pytest.raises(DataError, match="kind should be 'latents' and is 'clips'"):
        Latents(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(DataError, match="manifest.json is missing"):
        Latents(copy)


def test_no_damaged_byte_is_ever_read_as_data(copy):
    """Flip bytes all over a shard: each record is then either exact or a DataError, and some are errors."""
    shard = sorted(copy.glob("*.array_record"))[0]
    data = shard.read_bytes()
    inside = json.loads((copy / "manifest.json").read_text())["shards"][0]["records"]
    errors = 0
    used = np.flatnonzero(np.frombuffer(data, np.uint8))  # the rest pads the file to whole blocks
    for at in used[:: max(1, len(used) // 60)]:
        bad = bytearray(data)
        bad[at] ^= 0x55
        shard.write_bytes(bad)
        latents = Latents(copy)
        with pytest.raises(DataError, match="damaged: expected sha256"):
            latents.shards.verify()
        for i in range(inside):
            try:
                found = latents[i]
            except DataError as error:
                assert shard.name in str(error)
                errors += 1
            else:
                np.testing.assert_array_equal(found.mean_thwc, latent(i).mean_thwc.astype(np.float16))
    assert errors > 5


def test_an_interrupted_encode_resumes_to_the_same_bytes(cache, tmp_path):
    encoded = []

    def source(numbers, stop=COUNT):
        for i in numbers:
            if i == stop:
                raise RuntimeError("preempted")
            encoded.append(i)
            yield latent(i)

    with pytest.raises(RuntimeError, match="preempted"):
        write_latents(tmp_path, lambda numbers: source(numbers, 5), count=COUNT, **MADE_WITH)
    with pytest.raises(DataError, match="did not finish"):
        Latents(tmp_path)
    encoded.clear()
    write_latents(tmp_path, source, count=COUNT, **MADE_WITH)
    assert encoded[0] == 4
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in cache.iterdir()}


def test_a_clip_that_cannot_be_read_is_left_out_and_named(tmp_path):
    some = lambda numbers: (DataError(f"record {i} is corrupt") if i % 4 == 1 else latent(i) for i in numbers)
    manifest = write_latents(tmp_path, some, count=COUNT, **MADE_WITH)
    assert manifest["left_out"] == ["record 1 is corrupt", "record 5 is corrupt"]
    latents = Latents(tmp_path)
    assert [latents[i].name for i in range(len(latents))] == [f"a/{i}.mp4" for i in range(COUNT) if i % 4 != 1]


def test_a_cache_of_other_clips_is_not_taken_for_finished(tmp_path):
    write_latents(tmp_path, CLIPS, source="cats", **MADE_WITH)
    with pytest.raises(DataError, match="source='cats'; this one has source='dogs'"):
        write_latents(tmp_path, CLIPS, source="dogs", **MADE_WITH)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e5])
def test_what_float16_cannot_hold_is_refused(tmp_path, value):
    clip = latent(0)
    clip.mean_thwc[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=f"a/0.mp4: mean has the value {value}"):
        write_latents(tmp_path, [clip], **MADE_WITH)


def test_large_clips_are_encoded_as_they_are_read_and_not_all_held(monkeypatch):
    """Sizes alternate, and a damaged clip keeps its place; only as many clips are held as their bytes allow."""
    read, taken = [], []
    codec = types.SimpleNamespace(encode=lambda x: (x[:, :1, ::8, ::8, :].astype(np.float32), np.ones((len(x), 1))))
    captions = types.SimpleNamespace(encode=lambda texts: [encode_bytes(text) for text in texts])

    class Clips:
        def __getitem__(self, i):
            read.append(i)
            if i == 5:
                raise DataError("clip 5 is damaged")
            return Clip(np.full((5, 16, 16 + 8 * (i % 2), 3), i, np.uint8), f"clip {i}", 8.0, str(i))

    def made():
        for i, latent in enumerate(encode_clips(codec, captions, Clips(), range(20))):
            taken.append(len(read) - i)
            yield latent

    monkeypatch.setattr(encode, "WINDOW_BYTES", 4 * 5 * 16 * 16 * 3)
    for i, latent in enumerate(made()):
        if i == 5:
            assert isinstance(latent, DataError)
            continue
        assert (
            latent.name == str(i) and (latent.mean_thwc == i).all() and latent.mean_thwc.shape == (1, 2, 2 + i % 2, 3)
        )
    assert read == list(range(20)) and max(taken) <= 5  # where all would be 20

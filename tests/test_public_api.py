"""The Python face: what `import minisora_jax` offers, that it is documented, and that its examples run as printed."""

import doctest
import inspect

import pytest

import minisora_jax as ms

METHODS = [
    f"VideoPipeline.{name}"
    for name, member in inspect.getmembers(ms.VideoPipeline)
    if not name.startswith("_") and inspect.isroutine(member)
]
NAMES = [name for name in ms.__all__ if name != "configs"] + METHODS + ["configs.names", "configs.load"]
WITH_EXAMPLE = [n for n in NAMES if n not in ("VideoPipeline.sample", "VideoPipeline.decode", "VideoPipeline.grid")]
LONG = {"train", "train_codec"}


def member(name: str):
    value = ms
    for part in name.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_says_what_it_does(name):
    value = member(name)
    assert len((value.__doc__ or "").split()) >= 5
    if not inspect.isclass(value):
        signature = inspect.signature(value)
        untyped = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name != "self"]
        # **options and **sampling pass on what another documented function takes
        assert not [n for n in untyped if signature.parameters[n].kind is not inspect.Parameter.VAR_KEYWORD], untyped


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in WITH_EXAMPLE])
def test_its_example_runs_as_printed(name):
    value = member(name)
    examples = doctest.DocTestParser().get_doctest(inspect.getdoc(value) or "", {}, name, None, 0)
    assert examples.examples, f"{name} has no example"
    runner = doctest.DocTestRunner(verbose=False)
    output: list[str] = []
    runner.run(examples, out=output.append)
    assert not runner.failures, "".join(output)


def test_unknown_names_are_refused_and_listed():
    with pytest.raises(AttributeError, match="has no 'videopipeline'; it has Codec, Request, VideoPipeline"):
        ms.videopipeline  # noqa: B018
    assert set(ms.__all__) <= set(dir(ms))


def test_generate_upscales_what_the_raw_call_refuses():
    """96x96 in one pass is rubble to the eye and to the checker; in steps it shows what the caption says."""
    from minisora_jax.toy.checker import check

    pipeline = ms.VideoPipeline.load()
    prompt = "a large red circle moves left on a black background"
    request = ms.Request(prompt, (9, 96, 96), seed=1)
    with pytest.raises(ValueError, match="9x96x96 .* is more than the 17x64x64 .* pipeline.generate"):
        pipeline.sample_at_native_size([request], progress=False)
    [video] = pipeline.generate(request, steps=12, progress=False)
    verdict = check(video, prompt)
    assert video.shape == (9, 96, 96, 3) and verdict["colour"] and verdict["shape"]


def test_words_that_no_caption_of_training_has_are_named():
    words = ms.VideoPipeline.load().unknown_words
    assert words("a red e\u0301cran") == ["\u00e9cran"]  # an accent of its own
    assert words("a cat on a skateboard [2s] ein Hund, 猫") == ["cat", "skateboard", "ein", "hund", "猫"]
    assert words("a red circle grows on a black background [4s] a photo of a small cross") == []
    assert words("an orange sqare") == ["sqare"]


def test_what_is_printed_is_one_short_line(tmp_path):
    """The default of a dataclass prints all of its weights, hundreds of lines in a notebook."""
    import numpy as np

    from minisora_jax.generate.request import Given
    from minisora_jax.models.encoder import TextEncoder
    from minisora_jax.models.t5 import T5Config
    from minisora_jax.sources.base import Media

    pipeline, clip = ms.VideoPipeline.load(), ms.open_clips("shapes:train:2")[0]
    latents = ms.open_latents(ms.encode("shapes:train:2", tmp_path / "latents", progress=False))
    given = Given(np.zeros((5, 6, 6, 16), np.float32), np.zeros((5, 3, 3), bool))
    weights = {"params": {"w": np.zeros((1000, 1000), np.float32)}}
    for value, words in [
        (pipeline, [pipeline.hash, "M parameters", "known_size=17x64x64", pipeline.codec.hash]),
        (pipeline.codec, [pipeline.codec.hash, "2.9 M parameters", "4x8x8"]),
        (TextEncoder(T5Config(), weights, "cafe"), ["cafe", "1.0 M parameters"]),
        (clip, [clip.name, "x".join(map(str, clip.size_THW)), clip.caption]),
        (latents[0], [clip.caption, "x16"]),
        (Media("a", "", bytes(5000)), ["'a'"]),
        (ms.Request("a red circle", (17, 48, 48), given=given), ["a red circle", "5x6x6x16"]),
    ]:
        shown = repr(value)
        assert len(shown) < 300 and "\n" not in shown and all(word in shown for word in words), shown

"""Scaled rotary positions: frequencies of the references, sharpness, and the models and pipelines that have them."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minisora_jax.bundled import MODEL
from minisora_jax.commands.options import load_pipeline
from minisora_jax.config import build
from minisora_jax.data.packing import PackConfig
from minisora_jax.data.rows import Segment, pack_segments
from minisora_jax.generate import VideoPipeline
from minisora_jax.generate.extrapolation import parse_rope, spelled
from minisora_jax.io.model_dir import export_model
from minisora_jax.models.dit import DiT, DiTConfig, abstract_params
from minisora_jax.models.layers import Attention
from minisora_jax.models.rope import axis_widths, rope_angles
from minisora_jax.models.rope_scaling import METHODS, RopeScaling

CASES = json.loads(Path("tests/parity/cases/rope_scaling.json").read_text())["cases"]
LONGER = {"factors": (2.0, 1.0, 1.0), "trained": (5, 4, 4)}
SMALL = DiTConfig(latent_channels=4, width=48, depth=1, heads=1, text_width=64, text_depth=0, dtype="float32")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['method']}-{case['width']}")
def test_frequencies_and_sharpness_are_those_of_the_references(case):
    scaling = RopeScaling(case["method"], (case["factor"], 1.0, 1.0), (case["trained"], 1, 1))
    np.testing.assert_allclose(scaling.frequencies(0, case["width"]), case["frequencies"], rtol=1e-6)
    np.testing.assert_allclose(scaling.sharpness("temporal"), case["attention"] ** 2, rtol=1e-6)


def test_abf_is_a_larger_base_and_the_ratio_of_logarithms():
    scaling = RopeScaling("abf:500000", (1.0, 4.0, 1.0), (5, 4096, 1))  # "temporal" and "spatial" by themselves
    np.testing.assert_allclose(scaling.frequencies(1, 128), 500_000.0 ** (-np.arange(64) / 64), rtol=1e-12)
    np.testing.assert_allclose(scaling.sharpness("spatial"), math.log(16384) / math.log(4096), rtol=1e-12)
    assert scaling.sharpness("temporal") == 1.0


@pytest.mark.parametrize(("width", "trained", "k"), [(16, 13, 2), (24, 5, 1)])  # CogVideoX's; period 6.28 above 5
def test_riflex_finds_the_pair_that_turns_about_once(width, trained, k):
    factors, lengths = (2.0, 1.0, 1.0), (trained, 1, 1)
    named, found = (RopeScaling(m, factors, lengths).frequencies(0, width) for m in (f"riflex:{k}", "riflex"))
    np.testing.assert_array_equal(named, found)
    assert np.sum(found != 10_000.0 ** (-np.arange(0, width, 2) / width)) == 1


@pytest.mark.parametrize("method", METHODS)
def test_only_the_axes_that_are_longer_turn_otherwise(method):
    position = jnp.asarray(np.random.default_rng(0).integers(0, 9, (1, 7, 3)))
    plain, scaled = rope_angles(position, 64), rope_angles(position, 64, RopeScaling(method, **LONGER))
    t = axis_widths(64, 3)[0] // 2
    np.testing.assert_array_equal(plain[..., t:], scaled[..., t:])
    assert (method == "none") == bool(np.array_equal(plain[..., :t], scaled[..., :t]))
    np.testing.assert_allclose(
        scaled[0, :, :t], position[0, :, :1] * RopeScaling(method, **LONGER).frequencies(0, 2 * t), rtol=1e-5
    )


def test_sharpness_is_a_factor_on_the_logits():
    rng = np.random.default_rng(0)
    x, segment = jnp.asarray(rng.standard_normal((1, 6, 8)), jnp.float32), jnp.ones((1, 6), jnp.int32)
    layer = Attention(1, "none", impl="reference", sharpness=1.7)
    params = layer.init(jax.random.key(0), x, segment)
    weights = {name: np.asarray(part["kernel"], np.float64).reshape(8, 8) for name, part in params["params"].items()}
    q, k, v = (np.asarray(x[0], np.float64) @ weights[name] for name in "qkv")
    logits = 1.7 * q @ k.T / np.sqrt(8)
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) @ v @ weights["out"]
    np.testing.assert_allclose(layer.apply(params, x, segment)[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_scaling": "rope"}, "must be one of"),
        ({"rope_scaling": "riflex:x"}, "is no number"),
        ({"rope_scaling": "riflex:1.5"}, "must be one of"),
        ({"rope_scaling": "linear", "rope_factors": (0.5, 1.0, 1.0)}, "at least 1"),
        ({"rope_scaling": "yarn", "rope_factors": (2.0, 1.0, 1.0)}, "needs rope_trained"),
        ({"rope_scaling": "linear", "rope": False}, "no rotary positions"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        build(DiTConfig, settings)


@pytest.mark.slow
def test_a_model_puts_places_and_sizes_onto_the_grid_of_training():
    """With linear scaling, a clip twice as long at half the spacing of frames is what the unscaled model is told."""
    rng = np.random.default_rng(0)
    scaled = dataclasses.replace(SMALL, rope_scaling="linear", rope_factors=(2.0, 1.0, 1.0))
    tokens, text = rng.standard_normal((24, SMALL.token_width)).astype(np.float32), np.ones((3, 1), np.int32)
    clip = lambda spacing: Segment(tokens, np.zeros(24, bool), (6, 2, 2), text, 8.0, spacing=(spacing, 1.0, 1.0))
    whole, half = (pack_segments([[clip(spacing)]], PackConfig(24, 64, 1, 1)) for spacing in (1.0, 0.5))
    draw = lambda x: (0.2 * rng.standard_normal(x.shape)).astype(np.float32)
    params, time = jax.tree.map(draw, abstract_params(SMALL)), np.full((1, 24), 0.5, np.float32)
    out = jax.jit(lambda config, batch: DiT(config).apply(params, tokens[None], time, batch), static_argnums=0)
    np.testing.assert_allclose(out(scaled, whole), out(SMALL, half), atol=1e-4)
    assert not np.allclose(out(SMALL, whole), out(scaled, whole), atol=1e-2)


def test_factors_follow_from_the_size_and_a_record_names_them():
    assert parse_rope("riflex:2=2,1,1.5") == ("riflex:2", (2.0, 1.0, 1.5)) and parse_rope("yarn") == ("yarn", None)
    with pytest.raises(ValueError, match="must be METHOD or METHOD=T,Y,X"):
        parse_rope("yarn=2")
    pipeline = load_pipeline(rope="yarn", size_THW=(33, 48, 128))
    assert pipeline.config.rope_factors == (1.8, 1.0, 2.0) and pipeline.config.rope_trained == (5, 4, 4)
    assert pipeline.known_size == (33, 64, 128) and pipeline.sizes_up_to((33, 48, 128)) == [(33, 48, 128)]
    again = load_pipeline(rope=spelled(pipeline.config))
    assert (again.config, again.window, again.sides) == (pipeline.config, pipeline.window, pipeline.sides)
    with pytest.raises(ValueError, match="needs factors where no size is asked for"):
        dataclasses.replace(pipeline, config=DiTConfig()).extrapolated("yarn")
    with pytest.raises(ValueError, match="leave --rope out"):
        pipeline.extrapolated("linear", (65, 48, 48))


def test_a_model_with_scaling_is_exported_and_loaded_as_any_other(tmp_path):
    config = json.loads((MODEL / "config.json").read_text())
    pipeline = VideoPipeline.load().extrapolated("yarn", (33, 48, 48))
    config |= {"dit": dataclasses.asdict(pipeline.config), "latent_size": [9, 8, 8]}
    export_model(tmp_path / "model", pipeline.params, config)
    loaded = VideoPipeline.load(tmp_path / "model")
    assert loaded.config == pipeline.config and loaded.known_size == (33, 64, 64)

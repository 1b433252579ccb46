"""LPIPS against the `lpips` package, a codec's other losses against Open-Sora 2.0's. Fixtures: parity/make_losses.py.

Open-Sora's own file (opensora/models/vae/losses.py at 7ad6a96) gave the fixture's numbers within 2e-7.
"""

import dataclasses
import json
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent / "parity"))
from random_weights import draw, draw_input  # noqa: E402

from minisora_jax.cli import main  # noqa: E402
from minisora_jax.models.perceptual import LPIPS, frame_distances  # noqa: E402
from minisora_jax.training import codec_losses as losses  # noqa: E402
from minisora_jax.training.codec_losses import AdversarialConfig, PerceptualConfig  # noqa: E402

FIXTURES = Path(__file__).parent / "parity/fixtures"


@pytest.fixture(scope="module")
def published():
    """The names and shapes of the package's whole state, and each tensor that counts once, drawn by name."""
    with safe_open(FIXTURES / "lpips.safetensors", framework="numpy") as file:
        shapes = json.loads(file.metadata()["published"])
    tensors = {name: draw(name, tuple(shape)) for name, shape in shapes.items() if not name.startswith("scaling_layer")}
    return {name: np.abs(x) if name.startswith("lin") else x for name, x in tensors.items()}


@pytest.fixture(scope="module")
def lpips(published, tmp_path_factory):
    """Imported from the package's own layout, which has each head twice: the first name counts."""
    folder = tmp_path_factory.mktemp("lpips")
    heads = {f"lins.{i}.model.1.weight": published[f"lin{i}.model.1.weight"] for i in range(5)}
    scaling = {f"scaling_layer.{x}": np.zeros((1, 3, 1, 1), np.float32) for x in ("shift", "scale")}
    save_file(published | heads | scaling, folder / "lpips.safetensors")
    assert main(["import", "lpips", str(folder / "lpips.safetensors"), f"--out={folder / 'ours'}"]) == 0
    return LPIPS.load(folder / "ours")


@pytest.mark.parametrize("size", ["16x16", pytest.param("33x48", marks=pytest.mark.slow)])
def test_distances_and_gradients_are_the_packages(lpips, size, parity):
    expected = load_file(FIXTURES / "lpips.safetensors")
    a, b = (draw_input(f"{x} {size}", (2, 3, *map(int, size.split("x")))).clip(-1, 1) for x in "ab")
    frames = lambda x: jnp.asarray(np.moveaxis(x, 1, -1))[:, None]

    @jax.jit
    def both(params, a, b):
        each, pull = jax.vjp(lambda b: frame_distances(lpips.config, params, a, b), b)
        return each, pull(jnp.ones_like(each))[0]

    each, gradient = both(lpips.params, frames(a), frames(b))
    parity("LPIPS", "forward", each, expected[f"distance {size}"], size)
    parity("LPIPS", "gradient", gradient[:, 0], np.moveaxis(expected[f"gradient {size}"], 1, -1), size)


def test_torchvisions_file_and_the_heads_are_read_side_by_side(lpips, published, tmp_path):
    features = {f"features.{k.split('.', 2)[2]}": v for k, v in published.items() if k.startswith("net.")}
    save_file(features | {"classifier.0.weight": np.ones((2, 2), np.float32)}, tmp_path / "vgg16.safetensors")
    heads = {k: v for k, v in published.items() if k.startswith("lin") and not k.startswith("lins")}
    assert main(["import", "lpips", str(tmp_path), f"--out={tmp_path / 'ours'}"]) == 2  # without heads it is no LPIPS
    save_file(heads, tmp_path / "vgg.safetensors")
    assert main(["import", "lpips", str(tmp_path), f"--out={tmp_path / 'ours'}"]) == 0
    jax.tree.map(np.testing.assert_array_equal, LPIPS.load(tmp_path / "ours").params, lpips.params)


def test_equal_frames_are_no_distance_apart_and_black_ones_have_a_gradient(lpips):
    small = dataclasses.replace(lpips.config, widths=lpips.config.widths[:1], depths=(1,))
    kernels = {"stage0_conv0": lpips.params["params"]["stage0_conv0"], "head0": lpips.params["params"]["head0"]}
    black = jax.tree.map(np.zeros_like, kernels)  # all features are zero, where a root has no derivative
    y = jnp.zeros((1, 1, 4, 4, 3))
    for params in (kernels, black):
        f = lambda y, params=params: frame_distances(small, {"params": params}, y * 0, y)[0]
        value, gradient = jax.value_and_grad(f)(y)
        assert value == 0 and np.all(np.isfinite(gradient))
    frames = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    assert lpips.distance(frames, frames) == 0 < lpips.distance(frames, 255 - frames)


class Critic(nn.Module):
    """The fixture's discriminator: one convolution with a stride of 2."""

    @nn.compact
    def __call__(self, x_BTHWC):
        kernel = self.param("kernel", nn.initializers.zeros, (3, 4, 4, 3, 1))
        return convolved(x_BTHWC, kernel, (2, 2, 2), ((0, 0),) * 3)


@dataclasses.dataclass(frozen=True)
class OfCritic(AdversarialConfig):
    discriminator = Critic()


def convolved(x_BTHWC, kernel, strides, pads):
    layout = ("NDHWC", "DHWIO", "NDHWC")
    return jax.lax.conv_general_dilated(x_BTHWC, kernel, strides, pads, dimension_numbers=layout)


def test_the_terms_are_open_soras(parity):
    """It sums over the numbers of a frame where ours are means. So its terms are ours times their number."""
    draw_last = lambda name, shape: jnp.asarray(np.moveaxis(draw_input(name, shape), 1, -1))
    kernel_of = lambda name, shape: jnp.asarray(draw_input(name, shape).transpose(2, 3, 4, 1, 0) / 8)
    expected = {k: float(v[0]) for k, v in load_file(FIXTURES / "codec_losses.safetensors").items()}
    video, hidden = draw_last("video", (2, 3, 5, 8, 12)).clip(-1, 1), draw_last("hidden", (2, 4, 5, 8, 12))
    mean, logvar = (draw_last(name, (2, 4, 2, 2, 3)) for name in ("mean", "logvar"))
    critic = {"params": {"kernel": kernel_of("critic", (1, 3, 3, 4, 4))}}
    decoded = lambda kernel: convolved(hidden, kernel, (1, 1, 1), ((2, 0), (1, 1), (1, 1)))
    y, at_last = jax.vjp(decoded, kernel_of("last kernel", (3, 4, 3, 3, 3)))
    rebuild = lambda y: losses.reconstruction(video, y, 0, 0.0, PerceptualConfig(), None)
    _, terms = losses.against(OfCritic(weight=0.5), critic, video, y, rebuild, lambda g: at_last(g)[0])
    ours = {name: float(jnp.mean(v)) for name, v in terms.items()}
    pixels, latents = 3 * 8 * 12, 4 * 2 * 3
    ours |= {"l1": ours["l1"] * pixels, "adaptive_weight": ours["adaptive_weight"] * pixels}
    ours |= {"kl": float(jnp.mean(losses.divergence(mean, logvar))) * latents}
    ours["weighted generator"] = ours["adaptive_weight"] * ours["generator"]
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, rel=1e-5), name
        parity("codec losses", "forward", ours[name], value, name)

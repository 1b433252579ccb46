"""The Frechet distance of two sets of videos, in features of a named extractor (Heusel et al. 2017, arXiv:1706.08500).

    |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))         m, C: mean and covariance of the features

The distance is FVD (Unterthiner et al. 2018, arXiv:1812.01717) only with the I3D of that paper, and FID only with the
Inception of the FID paper. So the result names the extractor and its file's sha256, and says neither FVD nor FID.

    random            a fixed random convolution network, for comparing your own runs only
    i3d:FILE.pt       a TorchScript I3D that takes (B, 3, T, H, W) in 0..255, as StyleGAN-V's (needs torch)
    inception:FILE.pt a TorchScript Inception that takes (B, 3, H, W) uint8; features of all frames (needs torch)
    FILE.py:FUNCTION  frames uint8 (T, H, W, 3) -> features (d,) or (n, d)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from minisora_jax.io.records import sha256
from minisora_jax.io.user_function import load_function

LEAST = 2  # feature vectors that a covariance needs


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A named function from a video to feature vectors."""

    name: str  # "random-0", or the file's name and the beginning of its sha256
    features: Callable[[np.ndarray], np.ndarray]  # uint8 (T, H, W, 3) -> (n, d)


def frechet(generated: Iterable[np.ndarray], reference: Iterable[np.ndarray], extractor: Extractor) -> float:
    """The distance between two sets of videos, each uint8 (T, H, W, 3) of any size."""
    return distance(*(moments(videos, extractor) for videos in (generated, reference)))


def moments(videos: Iterable[np.ndarray], extractor: Extractor) -> tuple[np.ndarray, np.ndarray]:
    """(mean (d,), covariance (d, d)) of the features of the videos, both float64; ValueError for fewer than 2."""
    return gaussian([extractor.features(v) for v in videos])


def gaussian(features: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(mean (d,), covariance (d, d)), both float64, of the features (d,) or (n, d) of each video.

    Raises:
        ValueError: there are fewer than 2 feature vectors.
    """
    vectors = [np.atleast_2d(np.asarray(f, np.float64)) for f in features]
    if sum(map(len, vectors)) < LEAST:
        raise ValueError(f"{len(vectors)} videos are too few for a Frechet distance: give at least {LEAST}")
    rows = np.concatenate(vectors)
    return rows.mean(0), np.cov(rows, rowvar=False).reshape(rows.shape[1], -1)


def distance(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
    """The distance between two Gaussians, each (mean, covariance)."""
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    root_a = _root(cov_a)
    # tr (C C')^(1/2) = tr (C^(1/2) C' C^(1/2))^(1/2), and the second form is symmetric.
    cross = np.trace(_root(root_a @ cov_b @ root_a))
    return float(np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross)


def _root(symmetric: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh((symmetric + symmetric.T) / 2)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


# ---- Extractors


def open_extractor(spec: str) -> Extractor:
    """The extractor of a name of the module's docstring.

    Raises:
        ValueError: the name has another form.
        FileNotFoundError: the file is missing.
    """
    if spec == "random":
        return Extractor("random-0", random_features)
    kind, _, path = spec.partition(":")
    if kind in ("i3d", "inception"):
        return Extractor(f"{kind}:{Path(path).name}:{_hash(path)}", _torchscript(kind, path))
    file, separator, _ = spec.rpartition(":")
    if not separator:
        raise ValueError(f"--extractor {spec!r} must be random, i3d:FILE.pt, inception:FILE.pt or FILE.py:FUNCTION")
    return Extractor(f"{Path(spec).name}:{_hash(file)}", load_function(spec))


def _hash(path: str) -> str:
    if not Path(path).is_file():
        raise FileNotFoundError(f"the extractor {path} does not exist: nothing is downloaded, so give a local file")
    return sha256(Path(path))[:16]


def _torchscript(kind: str, path: str) -> Callable:
    try:
        import torch
    except ImportError as error:
        raise ValueError(f"{kind}:{path} is TorchScript, which needs PyTorch: pip install torch") from error
    network = torch.jit.load(path, map_location="cpu").eval()

    @torch.no_grad()
    def features(frames_THWC: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(np.ascontiguousarray(frames_THWC.transpose(3, 0, 1, 2)))
        if kind == "i3d":
            return network(x[None].float(), rescale=True, resize=True, return_features=True).numpy()
        return network(x.transpose(0, 1), return_features=True).numpy()

    return features


def random_features(frames_THWC: np.ndarray) -> np.ndarray:
    """Features (64,) of a fixed random network: three strided convolutions with ReLU, then mean and deviation."""
    kernels = _random_kernels()
    return np.asarray(_random_network(kernels, jnp.asarray(frames_THWC, jnp.float32)[None] / 127.5 - 1.0))[0]


def _random_kernels() -> list[jax.Array]:
    rng, kernels = np.random.default_rng(0), []
    for fan_in, fan_out in ((3, 16), (16, 32), (32, 32)):
        kernels.append(rng.standard_normal((3, 3, 3, fan_in, fan_out)).astype(np.float32) / np.sqrt(27 * fan_in / 2))
    return [jnp.asarray(kernel) for kernel in kernels]


@jax.jit
def _random_network(kernels: list[jax.Array], x_BTHWC: jax.Array) -> jax.Array:
    for kernel, stride in zip(kernels, ((1, 2, 2), (2, 2, 2), (2, 2, 2))):
        x_BTHWC = jax.nn.relu(
            jax.lax.conv_general_dilated(x_BTHWC, kernel, stride, "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))
        )
    return jnp.concatenate([x_BTHWC.mean((1, 2, 3)), x_BTHWC.std((1, 2, 3))], axis=-1)

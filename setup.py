"""Package metadata. Dependencies live here; pyproject.toml only names the build system and the tools."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Puts configs/ into the package, so that `--config=NAME` works after a plain installation."""

    def run(self):
        super().run()
        if not self.editable_mode:
            self.copy_tree("configs", f"{self.build_lib}/minisora_jax/bundled/configs")


setup(
    name="minisora_jax",
    version="0.2.0",
    description="An open Sora in JAX: patch-n-pack video diffusion from a laptop CPU to TPU pods",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["minisora_jax", "minisora_jax.*"]),
    include_package_data=False,  # only what package_data names: bundled/ has folders of weights, which are no packages
    package_data={"minisora_jax": ["bundled/**/*", "ui/play.*", "py.typed"]},
    cmdclass={"build_py": BuildWithConfigs},
    install_requires=[
        "jax>=0.11.1",
        "flax>=0.12.12",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.12",
        "grain>=0.2.18",
        "array-record>=0.8",
        "ml-collections>=1.1",
        "einops>=0.8",
        "numpy>=2.1",
        "av>=15",
        "diffrax>=0.7.2",
        "pillow>=11",
        "dm-pix>=0.4.4",
        "matplotlib>=3.9",
        "scipy>=1.14",
        "tensorboardX>=2.6",
        "tqdm>=4.66",
        "fsspec>=2025.3",
        "filelock>=3.16",  # jax asks for it to keep compiled programs within a limit
    ],
    extras_require={
        "tfds": ["tensorflow-datasets>=4.9.10", "importlib_resources>=6"],  # 4.9.10 imports the second unasked
        "hf": ["pyarrow>=20", "huggingface_hub>=1"],
        "cloud": ["gcsfs>=2025.3", "s3fs>=2025.3"],
        "text": ["transformers>=5"],
        # jax[tpu] 0.12.0.1 asks for libtpu 0.0.50, whose compiler takes up to half more memory (docs/benchmarks.md).
        "tpu": ["libtpu>=0.0.52", "requests", "tokamax>=0.0.17"],
        "curate": [
            "opencv-python-headless>=4.12",
            "scenedetect-headless>=0.7.1",
            "imagehash>=4.3.2",
            "rapidocr>=3.10",
            "onnxruntime>=1.22",
        ],
        "beam": ["apache-beam>=2.71"],
        "worlds": ["gymnasium>=1.2", "vizdoom>=1.3.2"],
        "ui": ["gradio>=6"],
        "cuda": ["jax[cuda13]>=0.11.1"],
    },
    entry_points={"console_scripts": ["minisora = minisora_jax.cli:main"]},
)

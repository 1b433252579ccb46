# minisora for hosts with NVIDIA GPUs (docker run --gpus all); CUDA comes with the Python packages, the driver with the host.
#
#   docker build -f launch/docker/gpu.Dockerfile -t minisora:gpu .
#   docker run --rm -v $PWD/runs:/runs minisora:gpu minisora demo --out /runs/demo
#
# Run by us: linted by hadolint in CI, and what it copies exists (tests/test_launch.py). Not run by us: built.
FROM python:3.12-slim

WORKDIR /minisora
COPY pyproject.toml setup.py README.md LICENSE ./
COPY minisora_jax minisora_jax
COPY configs configs
COPY launch launch
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[cuda]"
# jax brings CUDA itself; the host's driver is mounted by the NVIDIA container toolkit.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility,video
CMD ["minisora", "--help"]

# minisora for TPU hosts (GKE, or docker on a TPU VM with --privileged --net=host).
#
#   docker build -f launch/docker/tpu.Dockerfile -t minisora:tpu .
#   docker run --rm -v $PWD/runs:/runs minisora:tpu minisora demo --out /runs/demo
#
# Run by us: linted by hadolint in CI, and what it copies exists (tests/test_launch.py). Not run by us: built.
FROM python:3.12-slim

WORKDIR /minisora
COPY pyproject.toml setup.py README.md LICENSE ./
COPY minisora_jax minisora_jax
COPY configs configs
COPY launch launch
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[tpu]"
ENV JAX_PLATFORMS=tpu,cpu
CMD ["minisora", "--help"]

# minisora for any host, to try things on.
#
#   docker build -f launch/docker/cpu.Dockerfile -t minisora:cpu .
#   docker run --rm -v $PWD/runs:/runs minisora:cpu minisora demo --out /runs/demo
#
# Run by us: linted by hadolint in CI, and what it copies exists (tests/test_launch.py). Not run by us: built.
FROM python:3.12-slim

WORKDIR /minisora
COPY pyproject.toml setup.py README.md LICENSE ./
COPY minisora_jax minisora_jax
COPY configs configs
COPY launch launch
RUN pip install --no-cache-dir .
ENV JAX_PLATFORMS=cpu
CMD ["minisora", "--help"]

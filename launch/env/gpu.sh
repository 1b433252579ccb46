#!/usr/bin/env bash
# XLA and NCCL settings for training on NVIDIA GPUs:   source launch/env/gpu.sh && minisora train ...
#
# Run by us: the flags were taken by jaxlib 0.12.0.1, which refuses unknown ones. Not run by us: a training on GPUs, so what
# each is worth here has not been measured; leave them out and compare.

# The order of instructions hides what takes long on the network.
xla="--xla_gpu_enable_latency_hiding_scheduler=true"
# Collectives of one turn of the loop over layers run while its neighbour computes.
xla+=" --xla_gpu_enable_pipelined_all_gather=true"
xla+=" --xla_gpu_enable_pipelined_reduce_scatter=true"
xla+=" --xla_gpu_enable_pipelined_all_reduce=true"
# Two turns of a loop with two buffers: no copies, and the next weights arrive meanwhile.
xla+=" --xla_gpu_enable_while_loop_double_buffering=true"
# Small collectives are sent together, up to 128 MiB.
xla+=" --xla_gpu_all_gather_combine_threshold_bytes=134217728"
xla+=" --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728"
xla+=" --xla_gpu_all_reduce_combine_threshold_bytes=134217728"
export XLA_FLAGS="$xla ${XLA_FLAGS:-}" # the last of two settings of a flag holds: yours
unset xla

# JAX takes this share of a GPU's memory at the start; what is left is NCCL's and the driver's.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
# Only what went wrong; INFO to see which network NCCL chose.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# A restart compiles nothing anew. On a cluster, name a folder that all nodes share.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/minisora/compiled}"

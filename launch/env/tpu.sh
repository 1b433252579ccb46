#!/usr/bin/env bash
# XLA flags for training on TPUs:   source launch/env/tpu.sh && minisora train ...
#
# Run by us: the flags were taken by libtpu 0.0.52's compiler (v5e:2x2, ahead of time; it refuses unknown ones). Not run by
# us: a training on a TPU, so what each is worth here has not been measured; leave them out and compare.

# All-gathers of fsdp weights, and the ring's permutes, run while the layer before computes.
libtpu="--xla_enable_async_all_gather=true"
libtpu+=" --xla_enable_async_collective_permute=true"
# The same for the exchanges of Ulysses attention.
libtpu+=" --xla_tpu_enable_async_all_to_all=true"
# Collectives are cut into steps that are fused with matrix products, all-gathers among them.
libtpu+=" --xla_tpu_enable_async_collective_fusion=true"
libtpu+=" --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"
libtpu+=" --xla_tpu_enable_async_collective_fusion_multiple_steps=true"
libtpu+=" --xla_tpu_overlap_compute_collective_tc=true"
# The order of instructions hides what takes long on the network.
libtpu+=" --xla_tpu_enable_latency_hiding_scheduler=true"
# Gradients' all-reduces over the data axis, also of different sizes, run while the backward pass goes on.
libtpu+=" --xla_tpu_enable_data_parallel_all_reduce_opt=true"
libtpu+=" --xla_tpu_data_parallel_opt_different_sized_ops=true"
export LIBTPU_INIT_ARGS="$libtpu ${LIBTPU_INIT_ARGS:-}" # the last of two settings of a flag holds: yours
unset libtpu

# A restart compiles nothing anew. On a pod, name a folder that outlives the host.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/minisora/compiled}"
# Every host of a slice joins the others (minisora_jax/parallel/processes.py); on a single host this changes nothing.
export MINISORA_DISTRIBUTED="${MINISORA_DISTRIBUTED:-auto}"

"""What a run needs on a pod: compiled for TPUs without one (`pip install libtpu`), estimated for GPUs.

examples:
  minisora plan --topology v5p:4x4x4 --preset wan2.1-t2v-14b --clip 60s@1080p --mesh ring=16,ulysses=4
  minisora plan --topology v5e:16x16 --preset wan2.1-t2v-14b --clip 60s@1080p --search 1
  minisora plan --topology v5e:1x1 --preset wan2.1-t2v-1.3b --clip 5s@832x480 --fps 16 --lora rank=32
  minisora plan --topology v6e:4x4 --preset wan2.1-t2v-1.3b --clip 5s@480p --rows 16 --mesh fsdp=16 --sample
  minisora plan --topology h100:64 --preset wan2.1-t2v-1.3b --clip 200k --search 5
  minisora plan --topology v5p:2x2x1 --config=dit_tiny:data=data/latents --clip 8k --largest
  minisora plan --topology v5e:8x8 --config=t2v:size=1b,stage=480p,data=data/480p --clip 5s@832x480
  minisora plan --topology v6e:4x4 --config=vae_4x8x8:lpips=models/lpips
  minisora plan --topology v5e:4x4 --preset wan2.1-vae --sample --clip 60s@1920x1088 --mesh ring=16

--clip is SECONDS@HEIGHTp, SECONDS@WIDTHxHEIGHT or a number of tokens (8k, 16.8M). The real train step (or, with
--sample, a guided step of Heun's sampler) is compiled by the TPU's own compiler: memory, and which collectives run
along which axis while something else is computed, are facts. FLOPs are counted from shapes. Times and the MFU bound
are a model, made of the chips' peaks, which are printed. A codec's config takes no --clip: its crops are its own. With
--sample, and for a published codec, the step is that of its streaming decoder, one latent frame of --clip.
"""

from __future__ import annotations

TAKES_CONFIG = True
KEEPS_PROGRAMS = False  # it says how long compiling takes


def add_arguments(parser):
    parser.add_argument("--topology", required=True, help="v5p:4x4x4, v5e:16x16, v6e:4x4*2 (two slices), h100:64, ...")
    parser.add_argument("--preset", help="a published transformer or codec (`minisora import --help` names them)")
    parser.add_argument("--clip", help="60s@1080p, 5s@832x480 or a number of tokens such as 16.8M")
    parser.add_argument("--fps", type=float, default=24.0, help="of the clip (default: 24)")
    parser.add_argument("--codec", default="wan2.1-vae", help="the codec that turns pixels into tokens")
    parser.add_argument("--clips", type=int, default=0, help="clips of a row (default: those that fill the config's)")
    parser.add_argument(
        "--rows", type=int, default=0, help="rows (crops) of a batch, over all chips (default: the config's, or 1)"
    )
    parser.add_argument(
        "--mesh", default="", help="such as ring=16,ulysses=4; what is left goes to data (default: the config's)"
    )
    parser.add_argument(
        "--remat", choices=("none", "matmuls", "attention", "full", "host"), help="default: the config's, or full"
    )
    parser.add_argument("--attention", default="splash", help="the kernel to compile (default: splash)")
    parser.add_argument("--sample", action="store_true", help="a sampling step, and not a train step")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "int8", "nf4"),
        help="of the weights, with --sample; of a codec's arithmetic",
    )
    parser.add_argument("--lora", metavar="rank=N,...", help="train adapters only, as `minisora train --lora` does")
    parser.add_argument("--search", type=int, default=0, metavar="N", help="rank all meshes, and compile the N best")
    parser.add_argument(
        "--largest", action="store_true", help="find the longest clip that fits, by compiling twice more"
    )
    parser.usage = "minisora plan --topology POD (--preset NAME | --config=FILE.py) [--clip CLIP] [flags]"


def run(args, config_flags):
    import os

    # Nothing may touch a device of this machine: the compiler for the pod is all that is wanted.
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    import jax

    jax.config.update("jax_platforms", "cpu")
    from minisora_jax.plan.codec import codec_of
    from minisora_jax.plan.hardware import Topology

    topology = Topology.parse(args.topology)
    if task := codec_of(args.preset, config_flags):
        _plan_codec(args, task, topology)
    else:
        _plan_transformer(args, config_flags, topology)


def _plan_codec(args, task, topology):
    import dataclasses

    from minisora_jax.plan.codec import plan_decoding, plan_training
    from minisora_jax.plan.workload import clip_size, configured_mesh

    for name in ("clips", "remat", "lora", "search", "largest"):
        if getattr(args, name):
            raise ValueError(f"--{name} is of transformers, and this is a codec: leave it out")
    if args.sample != bool(args.clip) or (args.preset and not args.sample):
        raise ValueError(
            "a codec is planned by --config=FILE.py alone, a train step of its own crops (--config.crop_THW), or with "
            "--sample --clip=60s@1080p, a step of its decoder; a published codec (--preset) has the latter only"
        )
    if args.dtype in ("int8", "nf4"):
        raise ValueError(f"--dtype {args.dtype} is of a transformer's weights, and this is a codec: take bfloat16")
    vae = dataclasses.replace(task.vae, dtype=args.dtype or task.vae.dtype)
    mesh = configured_mesh(args.mesh, task.run.mesh, topology.chips)
    if args.sample:
        size_THW = clip_size(args.clip, args.fps, vae.time_factor, (vae.space_factor, vae.space_factor))
        plan_decoding(vae, size_THW, mesh, topology, args.attention)
    else:
        plan_training(dataclasses.replace(task, vae=vae, batch=args.rows or task.batch), mesh, topology, args.attention)


def _plan_transformer(args, config_flags, topology):
    import dataclasses

    from minisora_jax.models.lora import LoraConfig, lora_settings
    from minisora_jax.plan.compiled import Workload
    from minisora_jax.plan.report import compile_and_print, print_largest, print_search
    from minisora_jax.plan.workload import clip_tokens, configured_mesh, parameter_count, task_of

    if not args.clip:
        raise ValueError("--clip is missing: 60s@1080p, 5s@832x480 (width x height) or a number of tokens such as 8k")
    task = task_of(args.preset, config_flags, args.remat, args.attention)
    if args.lora is not None:
        task = dataclasses.replace(task, lora=LoraConfig(**lora_settings(args.lora)))
    tokens, frames, what = clip_tokens(args.clip, args.fps, args.codec, task.dit.patch)
    text = task.dit.caption_tokens or 512
    clips, rows = args.clips or max(task.pack.tokens // tokens, 1), args.rows or task.pack.rows or 1
    work = Workload(task, tokens, clips, rows, text, args.sample, args.dtype or "float32", frames)
    print(
        f"{args.preset or 'model'}: {parameter_count(task) / 1e9:.2f} B parameters; a clip of {what}: {tokens:,} tokens"
    )
    mesh = configured_mesh(args.mesh, task.run.mesh, topology.chips)
    if args.search or not topology.is_tpu:
        best = print_search(work, topology, parameter_count(task), max(args.search, 5), default=mesh)
        if not topology.is_tpu:
            return
        for tried, other, _ in best[: args.search]:
            compile_and_print(tried, other, topology)
        return
    compiled = compile_and_print(work, mesh, topology)
    if args.largest:
        print_largest(work, mesh, topology, compiled)

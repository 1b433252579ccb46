"""Measure train steps over contexts, meshes, kernels, remat policies and ways to batch; write a table and plots.

examples:
  minisora study --out=study --contexts 2k,4k,8k --meshes "ring=8 ulysses=8 ring=4,ulysses=2" --devices 8
  minisora study --out=study --contexts 4k --clips 1,16 --batching packed,padded,bucketed --mixed
  minisora study --out=study --topology v5p:2x2x2 --preset wan2.1-t2v-1.3b --contexts 128k,512k --meshes ring=8

On this machine's devices (--devices 8 makes 8 of a CPU) steps are run and timed. With --topology they are compiled for
that TPU pod, and times are modelled: the table says which. Writes results.csv, README.md and PNGs under --out.
"""

from __future__ import annotations

TAKES_CONFIG = True
KEEPS_PROGRAMS = False  # it says how long compiling takes


def add_arguments(parser):
    parser.add_argument("--out", required=True, help="the folder for results.csv, README.md and the plots")
    parser.add_argument("--contexts", default="1k,2k", help="tokens of a row, such as 2k,4k,1M (default: 1k,2k)")
    parser.add_argument("--meshes", default="", help='such as "ring=8 ring=4,ulysses=2" (default: data takes all)')
    parser.add_argument("--clips", default="1", help="clips of a row, such as 1,16 (default: 1)")
    parser.add_argument(
        "--mixed", action="store_true", help="rows of one video and many images in place of equal clips"
    )
    parser.add_argument("--batching", default="packed", help="of packed, padded, bucketed (default: packed)")
    parser.add_argument("--attention", default="", help="kernels, such as blockwise,reference (default: the best here)")
    parser.add_argument("--remat", default="none", help="of none, matmuls, attention, full (default: none)")
    parser.add_argument("--rows", type=int, default=0, help="packed rows a step (default: as many as the mesh divides)")
    parser.add_argument("--repeats", type=int, default=3, help="steps timed of each case, of which the median counts")
    parser.add_argument("--peak", type=float, default=None, help="TFLOP/s of a device, for the MFU")
    parser.add_argument("--devices", type=int, default=0, help="devices to make of this machine's CPU")
    parser.add_argument("--topology", default="", help="compile for this TPU pod, and run nothing")
    parser.add_argument("--preset", help="a published transformer; without it and --config, a small one")
    parser.usage = "minisora study --out=DIR [--contexts ...] [--meshes ...] [--topology POD] [flags]"


def run(args, config_flags):
    import itertools
    import os
    from pathlib import Path

    import jax

    if args.topology:
        os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
        jax.config.update("jax_platforms", "cpu")
    if args.devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.devices)
    from minisora_jax.models.dit import DiTConfig
    from minisora_jax.plan import study
    from minisora_jax.plan.hardware import Topology
    from minisora_jax.plan.workload import mesh_of, task_of, token_count
    from minisora_jax.training.diffusion_task import DiffusionTask

    topology = Topology.parse(args.topology) if args.topology else None
    chips = topology.chips if topology else len(jax.devices())
    if args.preset or config_flags:
        task = task_of(args.preset, config_flags, None, "auto")
    else:
        task = DiffusionTask(DiTConfig(width=256, depth=2, heads=8, text_width=64, text_depth=0, dtype="float32"))
    batching = args.batching.split(",")
    if unknown := set(batching) - set(study.BATCHING):
        raise ValueError(f"--batching={args.batching}: {unknown.pop()!r} must be of {', '.join(study.BATCHING)}")
    if topology and batching != ["packed"]:
        raise ValueError("--topology compiles packed rows only: leave out --batching")
    attention = args.attention or ("splash" if topology else "auto")
    cases = [
        study.Case(token_count(context), int(clips), way, args.mixed, impl, remat, mesh_of(mesh, chips))
        for mesh, impl, remat, way, clips, context in itertools.product(
            args.meshes.split() or [""],
            attention.split(","),
            args.remat.split(","),
            batching,
            args.clips.split(","),
            args.contexts.split(","),
        )
    ]
    rows = args.rows or max(c.mesh.data * c.mesh.fsdp for c in cases)
    peak = args.peak and args.peak * 1e12
    where = (
        f"compiled for {args.topology}" if topology else f"measured on {chips} {jax.devices()[0].device_kind} devices"
    )
    results = []
    for result in study.run(task, cases, rows=rows, topology=topology, repeats=args.repeats, peak=peak):
        results.append(result)  # and write what there is: a study may take hours
        study.write(results, Path(args.out), f"Train steps {where}")
    print(f"{len(results)} cases in {args.out}/results.csv, README.md beside it")

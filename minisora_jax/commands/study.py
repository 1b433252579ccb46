"""Measure train steps over contexts, meshes, kernels, remat policies and ways to batch; write a table and plots.
With --loss: train a grid of small models, fit the law of their losses, and say what a larger training will reach.

examples:
  minisora study --out=study --contexts 2k,4k,8k --meshes "ring=8 ulysses=8 ring=4,ulysses=2" --devices 8
  minisora study --out=study --contexts 4k --clips 1,16 --batching packed,padded,bucketed --mixed
  minisora study --out=study --topology v5p:2x2x2 --preset wan2.1-t2v-1.3b --contexts 128k,512k --meshes ring=8

  minisora study --loss --out=laws --config=dit_tiny:data=data/latents --config.data.held_out=data/held-out \\
      --widths 64,128,192 --budgets 1e12,4e12,16e12 --check 4
  minisora study --loss --out=rates --config=dit_tiny:data=data/latents --config.data.held_out=data/held-out \\
      --widths 64,192 --tokens 2M --rates 1e-3,2e-3,4e-3,8e-3

On this machine's devices (--devices 8 makes 8 of a CPU) steps are run and timed. With --topology they are compiled for
that TPU pod, and times are modelled: the table says which. Writes results.csv, README.md and PNGs under --out.

A study of losses trains with muP, so the learning rate of one width serves all. It fits L = E + A / N^a + B / D^b, of N
parameters that a token passes and D tokens, and gives the best N for a budget. --check 4 writes down the loss that the
law predicts at 4 times the largest budget, then trains that model and compares. The same command goes on after a stop.
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
    parser.add_argument(
        "--rows",
        default="",
        help="packed rows a step (default: as many as the mesh divides); with --loss several, such as 4,8 (default: "
        "the config's)",
    )
    parser.add_argument("--repeats", type=int, default=3, help="steps timed of each case, of which the median counts")
    parser.add_argument("--peak", type=float, default=None, help="TFLOP/s of a device, for the MFU")
    parser.add_argument("--devices", type=int, default=0, help="devices to make of this machine's CPU")
    parser.add_argument("--topology", default="", help="compile for this TPU pod, and run nothing")
    parser.add_argument("--preset", help="a published transformer; without it and --config, a small one")
    group = parser.add_argument_group("losses")
    group.add_argument("--loss", action="store_true", help="study losses; needs --config with data.held_out")
    group.add_argument("--widths", default="", help="of the transformer, such as 64,128,192 (default: the config's)")
    group.add_argument("--budgets", default="", help="FLOPs of a training, such as 1e12,4e12")
    group.add_argument("--tokens", default="", help="tokens of a training, such as 1M,4M, in place of --budgets")
    group.add_argument("--rates", default="", help="learning rates, such as 1e-3,2e-3 (default: the config's)")
    group.add_argument(
        "--check", type=float, default=0.0, metavar="TIMES", help="predict, then train, at so many largest budgets"
    )
    parser.usage = (
        "minisora study --out=DIR [--contexts ...] [--meshes ...] [--topology POD] [flags]\n"
        "       minisora study --loss --out=DIR --config=NAME:data=DIR --config.data.held_out=DIR [--widths ...] "
        "[--budgets ...] [--rates ...] [--check 4]"
    )


def run(args, config_flags):
    if args.loss:
        return _study_losses(args, config_flags)
    if given := [name for name in ("widths", "budgets", "tokens", "rates", "check") if getattr(args, name)]:
        raise ValueError(f"--{given[0]} belongs to a study of losses: add --loss")
    return _study_steps(args, config_flags)


def _study_losses(args, config_flags):
    from pathlib import Path

    from minisora_jax.parallel.programs import keep_compiled_programs
    from minisora_jax.plan import loss_report
    from minisora_jax.plan.loss_findings import conclude
    from minisora_jax.plan.loss_study import LossStudy
    from minisora_jax.plan.workload import configured_task, token_count

    if given := [name for name in ("topology", "preset", "devices", "mixed") if getattr(args, name)]:
        raise ValueError(f"--{given[0]} belongs to a study of steps, and not to --loss")
    if args.check < 0:
        raise ValueError(f"--check={args.check:g} must be above 0: the FLOPs to predict, in budgets of the largest")
    keep_compiled_programs()
    task = configured_task(config_flags)
    study = LossStudy(task, Path(args.out))
    cells = study.grid(
        _numbers(args.widths, "widths", int) or [task.dit.width],
        _numbers(args.rates, "rates", float) or [task.run.optim.learning_rate],
        _numbers(args.rows, "rows", int) or [study.task.pack.rows],
        budgets=_numbers(args.budgets, "budgets", float),
        tokens=_numbers(args.tokens, "tokens", token_count),
    )
    for found in conclude(study, cells, args.check):  # and write what there is: a study may take days
        loss_report.write(found, study, f"Losses on {Path(task.data.path).name}")
    print(f"{len(cells)} trainings in {args.out}/results.csv, README.md beside it")


def _numbers(text, flag, kind):
    """The numbers of "1e-3,2e-3"; [] of ""."""
    try:
        numbers = [kind(part) for part in text.split(",") if part]
    except ValueError as error:
        raise ValueError(f"--{flag}={text} must be numbers with commas between them") from error
    if any(number <= 0 for number in numbers):
        raise ValueError(f"--{flag}={text}: each must be above 0")
    return numbers


def _study_steps(args, config_flags):
    import itertools
    import os
    from pathlib import Path

    import jax

    if args.topology:
        os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
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
    rows = sum(_numbers(args.rows, "rows", int)[:1]) or max(c.mesh.data * c.mesh.fsdp for c in cases)
    peak = args.peak and args.peak * 1e12
    where = (
        f"compiled for {args.topology}" if topology else f"measured on {chips} {jax.devices()[0].device_kind} devices"
    )
    results = []
    for result in study.run(task, cases, rows=rows, topology=topology, repeats=args.repeats, peak=peak):
        results.append(result)  # and write what there is: a study may take hours
        study.write(results, Path(args.out), f"Train steps {where}")
    print(f"{len(results)} cases in {args.out}/results.csv, README.md beside it")

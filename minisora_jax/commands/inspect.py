"""Look into a data set, a latent cache, a run, a model, or how a config packs its clips: a table, and a picture.

examples:
  minisora inspect data/clips                       # a prepared data set: sizes, captions, a contact sheet
  minisora inspect data/latents --verify            # a latent cache, each shard against its hash
  minisora inspect runs/model                       # a run: steps, loss, where its time went
  minisora inspect runs/model/export                # a model: parameters by module, its config
  minisora inspect --config=dit_tiny:data=data/latents     # rows of clips: fill, balance, a picture

The picture goes to --out (default inspect.png).
"""

from __future__ import annotations

from pathlib import Path

TAKES_CONFIG = True
STEPS = 100  # of a plan that its report is over
ROWS = 8  # drawn


def add_arguments(parser):
    parser.add_argument("what", nargs="?", help="a directory: a data set, a cache, a run, or a model")
    parser.add_argument("--out", default="inspect.png", help="the picture (default inspect.png)")
    parser.add_argument("--verify", action="store_true", help="read every byte of a data set against its sha256")
    parser.add_argument(
        "--codec", default=None, help="shows packed clips' frames (default: the bundled one, if it fits)"
    )
    parser.usage = "minisora inspect DIRECTORY | --config=FILE.py[:arg=value,...]  [--out=PNG] [--verify]"


def run(args, config_flags):
    out = Path(args.out)
    if bool(args.what) == bool(config_flags):
        raise ValueError("name one thing: a directory, or --config=FILE.py for how it packs its clips")
    if config_flags:
        _packing(config_flags, args.codec, out)
        return
    where = Path(args.what)
    if (where / "manifest.json").exists() or (where / "progress.jsonl").exists():
        _data(where, args.verify, out)
    elif (where / "model.safetensors").exists():
        from minisora_jax.inspection.models import model_facts

        _print(str(where), model_facts(where))
    elif (where / "checkpoints").is_dir():
        from minisora_jax.inspection.models import draw_run, held_out_losses, metrics, run_facts

        _print(str(where), run_facts(where))
        if rows := metrics(where):
            draw_run(out, rows, held_out_losses(where))
            print(f"\n{out}: loss, gradient and time")
    else:
        raise FileNotFoundError(
            f"{where} has no manifest.json (a data set, a cache), model.safetensors (a model) or checkpoints/ (a run)"
        )


def _data(where: Path, verify: bool, out: Path) -> None:
    from minisora_jax.data.latents import Latents
    from minisora_jax.inspection.datasets import action_facts, draw_clips, draw_sizes, facts_of
    from minisora_jax.io.json_files import read_json
    from minisora_jax.io.records import Shards
    from minisora_jax.sources.clips import Records

    path = where / "manifest.json"
    kind = read_json(path).get("kind") if path.exists() else "clips"
    shards = Shards(where, kind, {})
    clips = Records(where) if kind == "clips" else Latents(where, preprocessing_version=None)
    _print(f"{where}: {kind}", facts_of(shards) + action_facts(clips))
    if verify:
        shards.verify(progress=True)
        print("\nevery shard is what its sha256 says")
    if isinstance(clips, Records):
        draw_clips(out, clips)
    else:
        draw_sizes(out, shards.sizes)
    print(f"\n{out}: {'some of its clips' if kind == 'clips' else 'its sizes'}")


def _packing(config_flags: list[str], codec_path: str | None, out: Path) -> None:
    from minisora_jax.bundled import CODEC
    from minisora_jax.config import build, read_config
    from minisora_jax.data.latents import open_latents
    from minisora_jax.inspection.packs import draw_rows, packing_report
    from minisora_jax.models.codec import Codec
    from minisora_jax.training.clip_plan import pack_plan, padded_sizes, with_row_size
    from minisora_jax.training.diffusion_task import DiffusionTask

    config = read_config(config_flags, DiffusionTask, "dit_tiny:data=data/latents")
    task = build(DiffusionTask, {k: v for k, v in config.items() if k != "prompts"})
    latents = open_latents(task.data.path)
    task = with_row_size(task, latents)
    plan, sizes = pack_plan(task, latents), padded_sizes(task, latents)
    report = packing_report(plan, sizes, task.dit, range(min(STEPS, task.run.steps)))
    percent = lambda name: f"{report[name]:.1%}"
    _print(
        f"{task.data.path}: rows of {task.pack.tokens:,} tokens, {plan.per_step} a step",
        [
            ("looked at", f"{report['steps']} steps, {report['rows']} rows"),
            ("clips of a row", f"{report['clips_per_row']:.1f}"),
            ("fill", f"{percent('fill')} of video tokens, {percent('text_fill')} of caption tokens"),
            ("straggler", f"{report['straggler']:.3f}: the costliest row of a step over its mean row"),
            ("useful FLOPs", f"{percent('useful_flops')} of a dense program's, all slots and all pairs of a row"),
        ],
    )
    codec = Codec.load(codec_path or CODEC)
    fits = codec.latents == latents.codec_hash
    drawn = []
    for row in plan.rows(0)[:ROWS]:
        clips = [latents[int(i)] for i in row]
        frames = [codec.decode(c.mean_thwc[None, :1])[0, 0] if fits else None for c in clips]
        grids = [tuple(n // p for n, p in zip(c.mean_thwc.shape, task.dit.patch)) for c in clips]
        drawn.append([(grid, "x".join(map(str, grid)), frame) for grid, frame in zip(grids, frames)])
    title = (
        f"{len(drawn)} rows of the first step; {percent('fill')} of the slots of {report['steps']} steps hold tokens"
    )
    draw_rows(out, drawn, task.pack, title)
    print(f"\n{out}: rows of the first step")


def _print(title: str, lines: list[tuple[str, str]]) -> None:
    wide = max(len(name) for name, _ in lines) + 2
    print(title)
    for name, value in lines:
        print(f"  {name:<{wide}}{value}")

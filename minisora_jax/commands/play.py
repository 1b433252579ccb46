"""A world to walk in: the frames that follow from what you press, made as you go, in the browser.

examples:
  minisora play --model=runs/home/export --codec=runs/home-codec/export            # on http://localhost:7861
  minisora play --model=runs/home/export --codec=runs/home-codec/export --start=data/home/heldout
  minisora play --model=runs/home/export --codec=runs/home-codec/export --actions 'move forward*8, turn left*4' \\
      --out walk.mp4                                                               # no browser: a video

The model was trained by `minisora train` on clips with actions, frame after frame (dit.causal or times.causal), as
configs/world_doom.py is. Arrows or WASD walk and turn, Q and E step sideways, digits are the other actions, and every
action has a button. Words may be written while you walk. Each visitor has a walk of their own.

--actions is a list of an action's name and how many times it is done: 'turn left*4'. What is done at once is joined by
" + ". Beside the video is a record of how it was made.

There is no password: --host 0.0.0.0 opens the world to everybody who can reach this machine.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from minisora_jax.commands import options
from minisora_jax.config import how_to_install

if TYPE_CHECKING:
    import numpy as np

    from minisora_jax.generate.world import Player, World
    from minisora_jax.ui.visitors import Beginning

MOST_ACTIONS = 100_000  # of a script
MOST_PLACES = 64


def add_arguments(parser):
    parser.add_argument("--model", required=True, help="a model that `minisora train` exported, of causal frames")
    parser.add_argument("--codec", default=None, help="its codec (default: the bundled one)")
    parser.add_argument("--start", default=None, metavar="CLIPS", help="begin with clips of this data set, one a seed")
    parser.add_argument("--seed", type=int, default=0, help="of the first walk; the next ones count up (default 0)")
    group = parser.add_argument_group("sampling")
    group.add_argument("--steps", type=int, default=4, help="sampler steps a frame (default 4)")
    group.add_argument("--sampler", default="euler", choices=options.SAMPLERS, help="(default euler)")
    group.add_argument("--window", type=int, default=32, help="latent frames that a new one sees (default 32)")
    group.add_argument("--sinks", type=int, default=0, help="of these, the first of the walk, which stay (default 0)")
    group.add_argument("--past-time", type=float, default=0.05, help="noise on the past, 0 to below 1 (default 0.05)")
    group.add_argument("--guidance", type=float, default=1.0, help="of caption and actions (default 1: none)")
    page = parser.add_argument_group("in the browser")
    page.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: this machine alone)")
    page.add_argument("--port", type=int, default=7861, help="(default 7861)")
    page.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="a further name of the page")
    page.add_argument("--visitors", type=int, default=4, help="walks at one time (default 4)")
    video = parser.add_argument_group("without a browser")
    video.add_argument("--actions", default=None, metavar="SCRIPT", help="such as 'move forward*8, turn left*4'")
    video.add_argument("--caption", default=None, help="words for the walk (default: those of training's first clip)")
    video.add_argument("--out", default="walk.mp4", help="the video: .mp4, .webm, .gif or a folder (default walk.mp4)")
    video.add_argument("--upscale", type=int, default=4, help="repeat each pixel in the file (default 4)")


def run(args, _):
    if not 1 <= args.visitors <= MOST_PLACES:
        raise ValueError(f"--visitors {args.visitors} must be from 1 to {MOST_PLACES}")
    if args.actions is None:
        if not importlib.util.find_spec("gradio"):
            raise ImportError(f"the page needs gradio: {how_to_install('ui')}; --actions writes a video without it")
        from minisora_jax.ui.server import require_free

        require_free(args.host, args.port)  # before anything is read
    from minisora_jax.generate.streaming import StreamConfig
    from minisora_jax.generate.world import World

    names = ("steps", "sampler", "window", "sinks", "past_time", "guidance")
    settings = StreamConfig(**{name: getattr(args, name) for name in names})
    world = World.load(args.model, args.codec, settings)
    player = world.player(args.seed)
    script = read_script(args.actions, world.actions) if args.actions is not None else []
    begin = _beginning(args.start, world) if args.start else None
    if args.actions is not None:
        return _write(args, player, script, begin)
    from minisora_jax.ui.play import serve

    print("compiling the world ...", flush=True)
    if begin:
        begin(player, args.seed)
    for _ in range(2):  # the first frame and a later one
        player.step(world.actions[0] if world.actions else None)
    serve(world, begin, args.host, args.port, args.allow_host, seed=args.seed, most=args.visitors)


def read_script(text: str, actions: tuple[str, ...]) -> list[str | None]:
    """The actions of 'move forward*8, turn left': a name, or several joined by " + ", as often as its number says.

    Raises:
        ValueError: The script is none, or it names another action.
    """
    script: list[str | None] = []
    for part in text.split(","):
        match = re.fullmatch(r"(.*?)(?:\s*\*\s*(\d{1,6}))?", part.strip(), re.DOTALL)
        name, times = match.groups() if match else (part, None)
        names = [one.strip() for one in name.split(" + ")]
        if unknown := [one for one in names if one not in actions]:
            example = f"'{actions[-1]}*8, {actions[0]}'" if actions else "'turn left*8'"
            raise ValueError(
                f"--actions: {unknown[0]!r:.100} is no action of this world; those are "
                f"{', '.join(actions) or 'none'}. A script is NAME*TIMES, ..., such as {example}"
            )
        script += [" + ".join(names)] * int(times or 1)
    if not 1 <= len(script) <= MOST_ACTIONS:
        raise ValueError(f"--actions: {len(script)} actions; a script has 1 to {MOST_ACTIONS}")
    return script


def _beginning(clips: str, world: World) -> Beginning:
    """Shows a player the first frames of a clip, as many as it sees; the seed says of which clip."""
    from minisora_jax.sources.clips import open_clips

    records, factor = open_clips(clips), world.codec.config.time_factor
    names = tuple(getattr(records, "actions", ()))
    if names and names != world.actions:
        raise ValueError(
            f"--start {clips} has the actions {', '.join(names)}, and the world {', '.join(world.actions) or 'none'}"
        )
    if not len(records):
        raise ValueError(f"--start {clips} has no clips")

    def begin(player: Player, seed: int) -> np.ndarray:
        """Show the clip of this seed; its last frame that was shown."""
        clip = records[seed % len(records)]
        frames = 1 + factor * min((len(clip.frames_THWC) - 1) // factor, world.settings.window - 1)
        actions = clip.actions_TA[:frames] if clip.actions_TA is not None and world.actions else None
        player.show(clip.frames_THWC[:frames], actions)
        return clip.frames_THWC[frames - 1]

    return begin


def _write(args, player: Player, script: list[str | None], begin: Beginning | None) -> None:
    """The video of a script, and its record beside it."""
    from minisora_jax import __version__
    from minisora_jax.io.atomic import write_text
    from minisora_jax.io.model_dir import model_hash
    from minisora_jax.media.video_writer import VideoWriter

    path, world, count = Path(args.out), player.world, 0
    player.caption = world.caption if args.caption is None else args.caption
    record = {
        "minisora": __version__,
        "walk": {"actions": args.actions, "caption": player.caption, "seed": args.seed, "start": args.start},
        "stream": dataclasses.asdict(world.settings),
        "model": {
            "model": args.model,
            "codec": args.codec,
            "hash": model_hash(args.model),
            "codec_hash": world.codec.hash,
        },
        "size": list(world.size_HW),
        "fps": world.fps,
        "upscale": args.upscale,
    }
    with VideoWriter(path, world.fps, upscale=args.upscale, note=json.dumps(record)) as writer:
        if begin:
            writer.write(begin(player, args.seed)[None])
            count += 1
        for action in script:
            frames_THWC = player.step(action)
            writer.write(frames_THWC)
            count += len(frames_THWC)
    write_text(path.with_name(path.name + ".json"), json.dumps(record | {"frames": count}, indent=1) + "\n")
    print(f"{path}: {count} frames, {count / world.fps:.1f} s")

"""Tune the bundled model by a reward: objects that bounce shall move evenly (docs/fine-tune.md).

    uv run python docs/bouncing.py clips my_prompts         # captions with clips, three quarters of them of bouncing
    uv run python docs/bouncing.py check fast fast:runs/bouncing/export           # before and after

`reward` is what the run maximises: the checker's verdicts, and how even the speed is between the walls. `check`
measures held-out captions with other seeds, and other motions.
"""

import json
import sys
from pathlib import Path

import numpy as np

from minisora_jax.evaluation.frames import bounce
from minisora_jax.evaluation.heldout import clips, requests
from minisora_jax.generate import VideoPipeline
from minisora_jax.media.contact_sheet import contact_sheet
from minisora_jax.media.video_writer import write_video
from minisora_jax.toy import grammar, scenes, shapes
from minisora_jax.toy.checker import check_all, observe, verdict_on

SIZE, LARGER, BOUNCING, OTHERS, HELD_OUT = (17, 32, 32), (17, 48, 48), 96, 32, 128


def reward(frames: np.ndarray, caption: str) -> float:
    """The share of right attributes, and for bouncing from 0 to 1 for how even its speed is."""
    seen = observe(frames, len(grammar.parse_caption(caption)[0]))
    right = float(np.mean(list(verdict_on(seen, caption).values())))
    spread = bounce(seen[0]) if seen and grammar.PHRASES["bounce"] in caption else None
    return right + (0.0 if spread is None else max(0.0, 1.0 - spread))


def write_clips(folder: Path) -> None:
    folder.mkdir(parents=True)
    for bouncing, count in ((True, BOUNCING), (False, OTHERS)):
        found = 0
        for number in range(100_000):
            scene = scenes.sample_scene(number, "train", SIZE)
            if (scene.objects[0].motion == "bounce") == bouncing and found < count:
                write_video(folder / f"{bouncing:d}-{found:03}.mp4", shapes.render(scene), grammar.FPS)
                (folder / f"{bouncing:d}-{found:03}.txt").write_text(grammar.caption(scene) + "\n")
                found += 1


def up_or_down(videos: list) -> float:
    """The share of the objects' way that is up or down: what the reward does not know."""
    ways = [
        np.abs(np.diff(o.path_T2, axis=0)).sum(0) for v in videos for o in observe(getattr(v, "frames_THWC", v))[:1]
    ]
    return float(np.mean([way[1] / max(way.sum(), 1e-6) for way in ways]))


def check(models: list[str]) -> None:
    """Print scores on held-out captions of each model, or base:adapter, and draw its bouncing objects."""
    for name in models:
        model, *loras = name.split(":", 1)
        pipeline = VideoPipeline.load(model, loras=loras)
        for kind, size, suits in (
            ("bouncing", SIZE, lambda motion: motion == "bounce"),
            ("bouncing", LARGER, lambda motion: motion == "bounce"),
            ("other motions", LARGER, lambda motion: motion != "bounce"),
        ):
            truth = clips(HELD_OUT, size, suits=suits)
            videos = pipeline.generate(requests(truth), progress=False)
            hits, _, errors = check_all(videos, [c.caption for c in truth])
            scores = {attribute: round(float(np.mean(verdict)), 3) for attribute, verdict in hits.items()}
            if kind == "bouncing":
                spreads = [s for v in videos for o in observe(v) if (s := bounce(o)) is not None]
                scores |= {"speed_spread": round(float(np.median(spreads)), 3), "turn_back": len(spreads)}
                scores |= {"up_or_down": round(up_or_down(videos), 3), "of_true_clips": round(up_or_down(truth), 3)}
            print(f"{name}, {HELD_OUT} of {kind}, {size[1]} pixels:", json.dumps(scores), flush=True)
            rows = [(v, c.caption + (f"   WRONG: {e}" if e else "")) for v, c, e in zip(videos, truth, errors)]
            label = f"{kind} {size[1]} {'tuned' if loras else 'before'}".replace(" ", "-")
            contact_sheet(Path(f"{label}.png"), rows[:12])


if __name__ == "__main__":
    {"clips": lambda at: write_clips(Path(at[0])), "check": check}[sys.argv[1]](sys.argv[2:])

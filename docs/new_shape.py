"""Teach the bundled model a shape that it never saw, by a LoRA (docs/fine-tune.md): write the clips, check the result.

    uv run python docs/new_shape.py clips my_bars          # 32 clips of bars with their captions
    uv run python docs/new_shape.py check runs/bar/export  # bars in combinations that no clip has, and the old shapes

The bundled model's world has circles, squares, triangles and crosses. Here it gets a fifth shape: a bar.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from minisora_jax.generate import Request, VideoPipeline
from minisora_jax.media.contact_sheet import contact_sheet
from minisora_jax.media.video_writer import write_video
from minisora_jax.toy import checker, grammar, scenes, shapes

WORD, CLIPS, BARS, OLD = "bar", 32, 48, 96
_distance, _parse_caption = shapes.distance, grammar.parse_caption


def distance(shape, dx, dy, r):
    """The world's distances, and that of a bar: a lying rectangle."""
    return np.maximum(np.abs(dx) - 1.2 * r, np.abs(dy) - 0.45 * r) if shape == WORD else _distance(shape, dx, dy, r)


def parsed(text):
    """What a caption of the grammar says; a caption with a bar has one object."""
    objects, background, still = _parse_caption(text.replace(f" {WORD} ", f" {grammar.SHAPES[0]} "))
    if f" {WORD} " in text:
        objects = [dataclasses.replace(objects[0], shape=WORD)]
    return objects, background, still


def with_bars() -> None:
    """Make drawing, captions and checker of this process know bars."""
    shapes.distance = checker.distance = distance
    scenes.SHAPES = checker.SHAPES = (*grammar.SHAPES, WORD)
    checker.parse_caption = parsed
    checker._UNIT_AREA[WORD] = checker._unit_area(WORD)


def bars(start: int, count: int, avoid: set) -> list:
    """Scenes of one bar, from number `start` on, whose (colour, motion) is not in `avoid`."""
    found, number = [], start
    while len(found) < count:
        scene, number = scenes.sample_scene(number), number + 1
        [thing, *others] = scene.objects
        if thing.shape == WORD and not others and (thing.colour, thing.motion) not in avoid:
            found.append(scene)
    return found


def training_scenes() -> list:
    return bars(0, CLIPS, set())


def write_clips(folder: Path) -> None:
    folder.mkdir(parents=True)
    for i, scene in enumerate(training_scenes()):
        write_video(folder / f"bar-{i:02}.mp4", shapes.render(scene), grammar.FPS)
        (folder / f"bar-{i:02}.txt").write_text(grammar.caption(scene) + "\n")


def check(adapter: str) -> None:
    """Print the checker's shares of right videos, with the adapter and without it, and draw some of them."""
    seen = {(o.colour, o.motion) for scene in training_scenes() for o in scene.objects}
    new = bars(10_000, BARS, seen)
    old = [scenes.sample_scene(i, "heldout") for i in range(3 * OLD)]
    old = [scene for scene in old if WORD not in {o.shape for o in scene.objects}][:OLD]
    for name, loras in (("with", [adapter]), ("without", [])):
        pipeline = VideoPipeline.load(loras=loras)
        for kind, chosen in (("bars", new), ("old shapes", old)):
            requests = [Request(grammar.caption(s), s.size_THW, seed=i) for i, s in enumerate(chosen)]
            videos = pipeline.generate(requests, progress=False)
            hits, _, errors = checker.check_all(videos, [r.prompt for r in requests])
            right = {attribute: round(float(np.mean(verdicts)), 3) for attribute, verdicts in hits.items()}
            print(f"{len(chosen)} {kind}, {name} the adapter:", json.dumps(right), flush=True)
            rows = [(v, r.prompt + (f"   WRONG: {e}" if e else "")) for v, r, e in zip(videos, requests, errors)]
            contact_sheet(Path(f"{kind.replace(' ', '-')}-{name}.png"), rows[:16])


if __name__ == "__main__":
    with_bars()
    {"clips": lambda at: write_clips(Path(at)), "check": check}[sys.argv[1]](sys.argv[2])

"""Teach the bundled model a motion and a texture by two adapters, and use both at once (docs/fine-tune.md).

    uv run python docs/motion_and_texture.py clips my    # 16 clips of a motion, their frames, 8 images of a texture
    uv run python docs/motion_and_texture.py check --lora runs/motion/export --lora runs/texture/export

In the bundled model's world shapes have one colour, and none zigzags. Here they may zigzag, and may be dipped: the
lower half is white.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from minisora_jax.generate import Request, VideoPipeline
from minisora_jax.media.contact_sheet import contact_sheet
from minisora_jax.media.video_writer import write_video
from minisora_jax.toy import checker, grammar, scenes, shapes

MOTION, PHRASE, TEXTURE = "zigzag", "zigzags", "dipped"
CLIPS, IMAGES, FRAMES, LEGS = 16, 8, 17, 4
MOVED = ("left", "right", "up", "down", "down-left", "up-right")
WHITE = np.array(grammar.COLOURS["white"], np.float32)
COLOURS = [colour for colour in grammar.COLOURS if colour != "white"]
_motion, _parse_caption = checker._motion, grammar.parse_caption


# ---- Drawing


def zigzag_scene(rng: np.random.Generator, avoid: set = frozenset()) -> grammar.Scene:
    """A shape that crosses the frame to the right as it goes down and up. Its (colour, shape) is not in `avoid`."""
    pick = lambda options: scenes.choose(rng, options)
    W, H = 64, 64
    colour, shape = pick([(c, s) for c in COLOURS for s in grammar.SHAPES if (c, s) not in avoid])
    radius = grammar.RADIUS[""] * min(H, W)
    along, time = rng.uniform(0.9, 1.0) * (W - 2 * radius - 2), np.linspace(0, 1, FRAMES)
    across = rng.uniform(0.6, 0.7) * (H - 2 * radius - 2)
    wave = 1 - np.abs(LEGS * time % 2 - 1)
    x = rng.uniform(radius + 1, W - radius - 1 - along) + along * time
    y = rng.uniform(radius + 1, H - radius - 1 - across) + across * wave
    thing = grammar.Object(colour, shape, MOTION, "", "", x, y, np.full(FRAMES, radius))
    return grammar.Scene((FRAMES, H, W), (thing,), pick([*grammar.BACKGROUNDS, "checkered"]))


def plain_scenes(start: int, count: int, split: str, keep=lambda scene: True) -> list:
    found, number = [], start
    while len(found) < count:
        scene, number = scenes.sample_scene(number, split), number + 1
        if keep(scene):
            found.append(scene)
    return found


def render(scene: grammar.Scene, dipped: bool = False) -> np.ndarray:
    frames = shapes.render(scene).astype(np.float32)
    for thing in scene.objects if dipped else ():
        y, x = np.mgrid[0 : scene.size_THW[1], 0 : scene.size_THW[2]] + 0.5
        dx, dy = x[None] - thing.x_T[:, None, None], y[None] - thing.y_T[:, None, None]
        cover = np.clip(0.5 - shapes.distance(thing.shape, dx, dy, thing.radius_T[:, None, None]), 0, 1)
        below = (cover * np.clip(0.5 + dy, 0, 1))[..., None]
        frames += below * (WHITE - np.array(grammar.COLOURS[thing.colour], np.float32))
    return np.round(frames.clip(0, 255)).astype(np.uint8)


def moved(image_HWC: np.ndarray, way: tuple[int, int]) -> np.ndarray | None:
    """A clip in which what stands before a plain background goes to one side: pixels of the image, shifted.

    None if the background is not plain, or there is no room to move.
    """
    H, W, _ = image_HWC.shape
    ground = image_HWC[0, 0].astype(np.float32)
    far = np.abs(image_HWC - ground).max(-1) > 24
    if far[[0, -1]].any() or far[:, [0, -1]].any():
        return None
    starts, ends = [], []
    for axis, toward in ((0, way[1]), (1, way[0])):  # from the one edge of the frame to the other
        on = np.flatnonzero(far.any(1 - axis))
        low, high = 1 - on[0], (H, W)[axis] - 2 - on[-1]
        starts.append({1: low, 0: 0, -1: high}[toward])
        ends.append({1: high, 0: 0, -1: low}[toward])
        if toward and high - low < 8:
            return None
    shifts = np.linspace(starts, ends, FRAMES)
    shifted = [ndimage.shift(image_HWC - ground, (*s, 0), order=1) + ground for s in shifts]
    return np.round(np.stack(shifted).clip(0, 255)).astype(np.uint8)


def caption(scene: grammar.Scene, dipped: bool = False) -> str:
    text, colour = grammar.caption(scene), scene.objects[0].colour
    if not dipped:
        return text
    return text.replace(f"an {colour} ", f"a {colour} ").replace(f" {colour} ", f" {TEXTURE} {colour} ")


# ---- Checking


def zigzags(track_n2: np.ndarray, width: int) -> bool:
    """Whether a path goes to the right, and turns back at least twice as it goes up and down."""
    y, turns, way, last = track_n2[:, 1], 0, 0, track_n2[0, 1]
    for value in y:  # a turn counts once it has gone back by 0.06 of the frame
        if way == 0 and abs(value - last) > 0.06 * width:
            way, last = np.sign(value - last), value
        elif way and (value - last) * way > 0:
            last = value
        elif way and (last - value) * way > 0.06 * width:
            turns, way, last = turns + 1, -way, value
    return turns >= 2 and track_n2[-1, 0] - track_n2[0, 0] > 0.25 * width


def motion(x, cover, path, area_T, visible_T, wall):
    """The world's motions, and the zigzag."""
    if visible_T.sum() > 6 and zigzags(path[visible_T], min(x.shape[1:3])):
        return MOTION, bool(not visible_T.all())
    return _motion(x, cover, path, area_T, visible_T, wall)


def undipped(frames: np.ndarray) -> tuple[np.ndarray, float]:
    """(frames whose white has the colour of the shape, the share of white in its lower half minus that above)."""
    x = frames.astype(np.float32)
    nearest = checker.palette_distances(x).argmin(-1)
    colour, white = int(np.bincount(nearest.ravel(), minlength=99)[: len(COLOURS)].argmax()), len(COLOURS)
    background = checker.plain_background(x, nearest)
    way = WHITE - background
    cover = np.clip((x - background) @ way / (way @ way), 0, 1)
    off_line = np.linalg.norm(x - background - cover[..., None] * way, axis=-1)
    pale = (off_line < 60) & (cover > 0.15) & (nearest != colour)
    undone = x + np.where(pale, cover, 0)[..., None] * (checker.PALETTE[colour] - WHITE)
    scores = []
    for here in nearest:
        on = np.flatnonzero((here == colour) | (here == white))
        if len(on) > 8:
            y, is_white = on // here.shape[1], here.ravel()[on] == white
            below = y > y.mean()
            scores.append(is_white[below].mean() - is_white[~below].mean())
    return undone.clip(0, 255).astype(np.uint8), float(np.median(scores)) if scores else 0.0


def check(frames: np.ndarray, text: str) -> dict:
    """The verdicts of the world's checker, and "texture": dipped if the caption says so, and plain if not."""
    wanted = f" {TEXTURE} " in text
    plain, dipped = undipped(frames)
    verdict = checker.check(plain if wanted else frames, text.replace(f" {TEXTURE} ", " "))
    return verdict | {"texture": (dipped > 0.5) == wanted}


def parsed(text: str) -> tuple:
    """What a caption of the grammar says, with the motion among its phrases."""
    objects, background, still = _parse_caption(text.replace(f" {PHRASE} ", f" {grammar.PHRASES['bounce']} "))
    if f" {PHRASE} " in text:
        objects = [dataclasses.replace(objects[0], motion=MOTION)]
    return objects, background, still


def with_zigzags() -> None:
    """Make captions and checker of this process know the motion."""
    grammar.PHRASES[MOTION] = PHRASE
    checker._motion, checker.parse_caption = motion, parsed


# ---- The two commands


def training_scenes() -> tuple[list, list]:
    """(scenes of the motion, scenes of the images of the texture)."""
    rng = np.random.default_rng(0)
    still = lambda scene: scene.size_THW == (1, 64, 64) and scene.objects[0].colour in COLOURS
    return [zigzag_scene(rng) for _ in range(CLIPS)], plain_scenes(200_000, IMAGES, "train", still)


def write_clips(folder: Path) -> None:
    """Write motion/ (clips), frames/ (four frames of each clip as images) and texture/ (images), with captions."""
    moving, still = training_scenes()
    for name in ("motion", "frames", "texture"):
        (folder / name).mkdir(parents=True)

    def write(path: Path, frames: np.ndarray, text: str) -> None:
        if len(frames) == 1:
            Image.fromarray(frames[0]).save(path.with_suffix(".png"))
        else:
            write_video(path.with_suffix(".mp4"), frames, grammar.FPS)
        path.with_suffix(".txt").write_text(text + "\n")

    for i, scene in enumerate(moving):
        frames = render(scene)
        write(folder / f"motion/{i:02}", frames, caption(scene))
        photo = dataclasses.replace(scene, size_THW=(1, *scene.size_THW[1:]))
        for k in range(0, FRAMES, 5):
            write(folder / f"frames/{i:02}-{k:02}", frames[k : k + 1], caption(photo))
    for i, scene in enumerate(still):
        image = render(scene, dipped=True)
        write(folder / f"texture/{i}-image", image, caption(scene, dipped=True))
        # Latent frames after the first have another code, of four frames. So each image becomes clips too, in which it
        # stands still, or moves (as in Dreamix: Molad et al. 2023, arXiv:2302.01329).
        for way in ("still", *MOVED):
            if (frames := moved(image[0], grammar.DIRECTIONS.get(way, (0, 0)))) is not None:
                thing = dataclasses.replace(scene.objects[0], motion=way)
                clip = dataclasses.replace(scene, size_THW=frames.shape[:3], objects=(thing,))
                write(folder / f"texture/{i}-{way}", frames, caption(clip, dipped=True))


def held_out(count: int) -> dict[str, list]:
    """Sets of (caption, size): what no training clip has."""
    rng = np.random.default_rng(1)
    moving, still = training_scenes()
    seen = {(s.objects[0].colour, s.objects[0].shape) for s in (*moving, *still)}
    new = [zigzag_scene(rng, seen) for _ in range(count)]
    one = lambda scene: (
        [scene.size_THW[1:], len(scene.objects), scene.wall] == [(64, 64), 1, None]
        and scene.objects[0].colour in COLOURS
        and scene.size_THW[0] > 1
    )
    old = plain_scenes(0, count, "heldout", one)
    return {
        "old": [(caption(s), s.size_THW) for s in plain_scenes(0, 2 * count, "heldout")],
        "motion": [(caption(s), s.size_THW) for s in new],
        "texture": [(caption(s, True), s.size_THW) for s in old],
        "both": [(caption(s, True), s.size_THW) for s in new],
    }


def check_all(loras: list[str], kinds: list[str], count: int, out: str) -> None:
    """Print the shares of right videos with some adapters, and draw some of them."""
    pipeline = VideoPipeline.load(loras=loras)
    for kind in kinds:
        wanted = held_out(count)[kind]
        requests = [Request(text, size, seed=i) for i, (text, size) in enumerate(wanted)]
        videos = pipeline.generate(requests, progress=False)
        verdicts = [check(video, r.prompt) for video, r in zip(videos, requests)]
        names = sorted({name for v in verdicts for name in v})
        shares = {n: round(float(np.mean([v[n] for v in verdicts if n in v])), 3) for n in names}
        shares["all"] = round(float(np.mean([all(v.values()) for v in verdicts])), 3)
        print(f"{len(videos)} {kind}, adapters {loras}:", json.dumps(shares), flush=True)
        wrong = [", ".join(n for n, good in v.items() if not good) for v in verdicts]
        rows = [(v, r.prompt + (f"   WRONG: {w}" if w else "")) for v, r, w in zip(videos, requests, wrong)]
        contact_sheet(Path(out) / f"{kind}-{len(loras)}.png", rows[:8])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=("clips", "check"))
    parser.add_argument("folder", nargs="?", default="my")
    parser.add_argument("--lora", action="append", default=[])
    parser.add_argument("--kind", action="append", choices=("old", "motion", "texture", "both"))
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--out", default=".")
    flags = parser.parse_args()
    with_zigzags()
    if flags.command == "clips":
        write_clips(Path(flags.folder))
    else:
        check_all(flags.lora, flags.kind or ["old", "motion", "texture", "both"], flags.count, flags.out)

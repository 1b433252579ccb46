"""How well a world follows its environment: frames after the same actions, beside repeating the last frame.

    clip of the environment   f0 f1 ... fc | fc+1 ... fT     with the action that led to each frame
    next frame                after f0 ... fi, the frame after action i + 1, for every i (teacher-forced)
    rollout                   after f0 ... fc, all further frames on the world's own frames

PSNR is the mean over clips, at each number of frames ahead. "codec" is that of the true frames through the codec, which
is the most that a world of this codec reaches. "still" repeats the last known frame. With a probe (action_probe.py) the
share of rollout frames whose action it reads is told, beside the share of true frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minisora_jax.evaluation.frames import psnr
from minisora_jax.generate.world import World
from minisora_jax.types import Clip

Probe = Callable[[np.ndarray], np.ndarray]  # frames (T, H, W, 3) -> the action that led to each but the first (T - 1,)


def evaluate_world(
    world: World,
    clips: Sequence[Clip],
    *,
    context: int = 16,
    ahead: Sequence[int] = (1, 8, 32),
    seed: int = 0,
    probe: Probe | None = None,
    progress: Callable[[int], Any] = lambda done: None,
) -> tuple[dict[str, Any], list[tuple[np.ndarray, str]]]:
    """(measures, rows of a contact sheet: of each clip its true frames above those of the rollout).

    Args:
        world: Of a codec with one latent frame for each frame.
        clips: Clips of the environment.
        context: Frames that a rollout begins with.
        ahead: Frames ahead at which PSNR is told.
        seed: Of the noise; clip i is made with seed + i.
        probe: Reads actions off frames.
        progress: Called with the number of finished clips.

    Raises:
        ValueError: The codec's latent frames have several frames, or no clip is long enough.
    """
    if (factor := world.codec.config.time_factor) != 1:
        raise ValueError(f"a latent frame of this codec has {factor} frames; a world is measured frame by frame")
    clips = [clip for clip in clips if clip.actions_TA is not None and len(clip.frames_THWC) > context]
    if not clips:
        raise ValueError(f"no clip has actions and more than context={context} frames")
    curves: list[dict[str, list[float]]] = []
    rows, read = [], {"true": [], "world": []}
    for i, clip in enumerate(clips):
        frames, actions_TA = clip.frames_THWC, np.asarray(clip.actions_TA)
        true, made = frames[context:], rollout(world, clip, context, seed + i)
        whole = {
            "next_world": (frames[context:], next_frames(world, clip, seed + i)[context - 1 :]),
            "next_still": (frames[context:], frames[context - 1 : -1]),
            "world": (true, made),
            "still": (true, np.broadcast_to(frames[context - 1], true.shape)),
            "codec": (true, world.codec.decode(world.codec.encode(frames[None])[0])[0][context:]),
        }
        curves.append({k: [psnr(a[None], b[None]) for a, b in zip(*pair)] for k, pair in whole.items()})
        if probe:
            wanted = actions_TA[context:].argmax(1)
            for name, shown in (("true", true), ("world", made)):
                read[name].append(probe(np.concatenate([frames[context - 1 : context], shown])) == wanted)
        rows.append((np.concatenate([true, made], axis=1), f"{clip.name}: true above, made below, {len(true)} frames"))
        progress(i + 1)
    report: dict[str, Any] = {"clips": len(clips), "context": context}
    for name in ("next_world", "next_still"):
        report[f"{name}_psnr"] = _mean([x for curve in curves for x in curve[name]])
    for name in ("world", "still", "codec"):
        at = lambda n, name=name: [curve[name][n - 1] for curve in curves if len(curve[name]) >= n]
        report |= {f"{name}_psnr_{n}": _mean(values) for n in ahead if (values := at(n))}
    if probe:
        report |= {f"actions_read_{name}": _mean(np.concatenate(hits)) for name, hits in read.items()}
    return report, rows


def rollout(world: World, clip: Clip, context: int, seed: int) -> np.ndarray:
    """The frames after the first `context` ones of a clip, by its actions: uint8 (T - context, H, W, 3)."""
    actions_TA: Any = clip.actions_TA
    player = world.player(seed)
    player.caption = clip.caption
    player.show(clip.frames_THWC[:context], actions_TA[:context])
    return np.concatenate([player.step(action_A) for action_A in actions_TA[context:]])


def next_frames(world: World, clip: Clip, seed: int) -> np.ndarray:
    """Frame i + 1 after the true frames up to i, for every i: uint8 (T - 1, H, W, 3)."""
    actions_TA: Any = clip.actions_TA
    player, made = world.player(seed), []
    player.caption = clip.caption
    player.show(clip.frames_THWC[:1])
    for i, action_A in enumerate(actions_TA[1:], start=1):
        made.append(player.step(action_A))
        player.undo()
        player.show(clip.frames_THWC[i : i + 1], actions_TA[i : i + 1])
    return np.concatenate(made)


def _mean(values: Any) -> float:
    return round(float(np.mean(values)), 4)

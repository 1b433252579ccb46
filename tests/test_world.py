"""A world from an environment's clips to pictures that follow from actions, and how it is measured."""

import dataclasses
import json

import numpy as np
import pytest

from minisora_jax.cli import main
from minisora_jax.evaluation.action_probe import train_probe
from minisora_jax.evaluation.frames import psnr
from minisora_jax.evaluation.worlds import evaluate_world, next_frames, rollout
from minisora_jax.generate.streaming import StreamConfig
from minisora_jax.generate.world import World
from minisora_jax.sources.clips import open_clips
from minisora_jax.types import Clip

NAMES = ("stay", "left", "right")


def walk(seed: int, frames: int = 9, side: int = 16) -> Clip:
    """A bright bar that an action moves by two columns."""
    rng, at = np.random.default_rng(seed), side // 2
    pictures, actions = np.full((frames, side, side, 3), 40, np.uint8), np.zeros((frames, 3), np.float32)
    for i in range(frames):
        if i:
            action = int(rng.integers(3))
            actions[i, action] = 1
            at = (at + 2 * (0, -1, 1)[action]) % side
        pictures[i, :, at : at + 2] = (230, 220, 90)
    return Clip(pictures, "a bar", 8.0, f"walk/{seed}", actions)


def minisora(*argv):
    assert main([str(a) for a in argv]) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A codec, a latent cache with actions and a world, of a few steps each."""
    at = tmp_path_factory.mktemp("world")
    (at / "walks").mkdir()
    lines, size = [], dict(width=16, height=16)
    for i in range(8):
        clip = walk(i)
        write_video(at / f"walks/{i}.mkv", clip.frames_THWC, size)
        lines.append({"file": f"{i}.mkv", "names": NAMES, "actions": np.asarray(clip.actions_TA).tolist()})
    (at / "walks/actions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    minisora("prepare", at / "walks", at / "clips", "--no-captions", "--cell", 16)
    codec = ["vae.base=32", "vae.multipliers=(1,2)", "vae.time_down=(False,)", "crop_THW=(1,16,16)", "batch=8"]
    keys = [f"--config.{x}" for x in codec]
    minisora("train-vae", f"--config=vae_frames:data={at / 'clips'},steps=2", f"--workdir={at / 'codec'}", *keys)
    own = ["--codec", at / "codec/export"]
    minisora("encode", at / "clips", at / "latents", *own)
    small = ["dit.width=64", "dit.depth=1", "dit.heads=2", "run.log_every=1", "run.mesh.data=1", "run.mesh.ring=8"]
    config = f"--config=world_doom:data={at / 'latents'},actions=3,steps=2,rows=1"
    minisora("train", config, *(f"--config.{x}" for x in small), f"--workdir={at / 'run'}", *own)
    return at


def write_video(path, frames, size):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = size["width"], size["height"], "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.slow
def test_a_world_is_made_and_walked_through(folder):
    world = World.load(folder / "run/export", folder / "codec/export", StreamConfig(steps=2))
    assert world.actions == NAMES and world.size_HW == (16, 16) and world.fps == 8.0
    assert world.settings.window == 8  # one less than the clips of training have
    player, other = world.player(3), world.player(3)
    made = np.concatenate([player.step(name) for name in (None, "left", "right", "left + right")])
    assert made.shape == (4, 16, 16, 3) and made.dtype == np.uint8
    again = np.concatenate([other.step(action) for action in (None, [0, 1, 0], [0, 0, 1], [0, 1, 1])])
    np.testing.assert_array_equal(made, again)
    player.reset(3)
    np.testing.assert_array_equal(player.step(), made[:1])
    with pytest.raises(ValueError, match="'jump' is no action of this world; those are stay, left, right"):
        player.step("jump")
    with pytest.raises(ValueError, match="an action has 3 finite numbers"):
        player.step([1.0, np.nan, 0.0])
    with pytest.raises(ValueError, match="16, 16"):
        player.show(np.zeros((2, 8, 8, 3), np.uint8))

    clip = open_clips(str(folder / "clips"))[0]
    report, rows = evaluate_world(world, [clip], context=4, ahead=(1, 4))
    made = rollout(world, clip, 4, 0)
    assert rows[0][0].shape == (5, 32, 16, 3)
    assert report["world_psnr_4"] == round(psnr(made[3:4], clip.frames_THWC[7:8]), 4)
    assert report["still_psnr_1"] == round(psnr(clip.frames_THWC[3:4], clip.frames_THWC[4:5]), 4)
    minisora(
        *("eval", "world", "--model", folder / "run/export", "--codec", folder / "codec/export"),
        *("--data", folder / "clips", "--count", 2, "--context", 4, "--out", folder / "eval"),
    )
    assert json.loads((folder / "eval/world.json").read_text())["clips"] == 2 and (folder / "eval/world.png").exists()


@pytest.mark.slow
def test_next_frames_are_those_after_the_true_ones(folder):
    """Undoing a made frame and showing the true one is a stream that was shown the true frames alone."""
    world = World.load(folder / "run/export", folder / "codec/export", StreamConfig(steps=1, past_time=0.0))
    clip = open_clips(str(folder / "clips"))[1]
    made, fresh = next_frames(world, clip, 0), world.player(0)
    fresh.show(clip.frames_THWC[:5], np.asarray(clip.actions_TA)[:5])
    np.testing.assert_allclose(made[4].astype(int), fresh.step(np.asarray(clip.actions_TA)[5])[0], atol=1)


def test_actions_that_do_not_fit_the_model_are_said(tmp_path, capsys):
    config = ["--config.dit.width=64", "--config.dit.depth=1", "--config.dit.heads=2"]
    minisora("encode", "shapes:train:4", tmp_path / "latents")
    keys = [f"--config=world_doom:data={tmp_path / 'latents'},actions=3,steps=2,rows=1", *config]
    assert main(["train", *keys, f"--workdir={tmp_path / 'run'}"])
    assert "dit.action_width=4, and the latent cache has 0 actions (none)" in capsys.readouterr().err


@pytest.mark.slow
def test_the_probe_reads_actions():
    read, clip = train_probe([walk(i, 17) for i in range(30)], steps=150, batch=16), walk(99, 33)
    assert (read(clip.frames_THWC) == np.asarray(clip.actions_TA)[1:].argmax(1)).mean() > 0.95
    with pytest.raises(ValueError, match="no clip has actions"):
        train_probe([dataclasses.replace(clip, actions_TA=None)])

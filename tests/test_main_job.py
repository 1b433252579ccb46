"""The main job from the command line, on a folder of files: clips in, a trained model, videos out."""

import json

import numpy as np
import pytest

from minisora_jax.cli import main
from minisora_jax.media.video import read_clip_frames
from minisora_jax.media.video_writer import write_video
from minisora_jax.toy.shapes import Shapes


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A working directory with a folder of 36 captioned clips of three sizes, and three broken ones."""
    directory = tmp_path_factory.mktemp("project")
    folder = directory / "my_clips"
    folder.mkdir()
    captions = []
    sizes = [(9, 32, 48), (5, 48, 32), (1, 48, 48)]
    for i in range(36):
        clip = Shapes("train", 36, size_THW=sizes[i % 3])[i]
        name = f"{i:02}.{'png' if len(clip.frames_THWC) == 1 else 'mp4'}"
        write_video(folder / name, clip.frames_THWC, clip.fps)
        captions.append(json.dumps({"file": name, "caption": clip.caption}))
    (folder / "captions.jsonl").write_text("\n".join(captions))
    (folder / "notes.mp4").write_text("not a video")
    whole = next(folder.glob("0*.mp4")).read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "cut.txt").write_text("half a clip")
    (folder / "mute.png").write_bytes((next(folder.glob("*.png"))).read_bytes())
    return directory


def minisora(*argv):
    assert main([str(a) for a in argv]) == 0


@pytest.mark.slow
def test_from_a_folder_of_clips_to_videos(project, capsys):
    clips, latents = project / "clips", project / "latents"
    minisora("prepare", project / "my_clips", clips)
    out = capsys.readouterr().out
    skipped = [json.loads(line)["name"] for line in (clips / "skipped.jsonl").read_text().splitlines()]
    assert sorted(skipped) == ["cut.mp4", "mute.png", "notes.mp4"] and "36" in out

    codec, model = project / "codec", project / "model"
    small = ["vae.base=4", "vae.multipliers=(1,1,2)", "vae.latent_channels=4", "batch=8"]
    flags = [f"--config.{s}" for s in (*small, "run.log_every=2", "run.save_every=4", "run.sample_every=4")]
    minisora("train-vae", f"--config=configs/vae_tiny.py:data={clips},steps=4", *flags, f"--workdir={codec}")
    assert list((codec / "samples").glob("reconstruction_0000004.gif"))

    minisora("encode", clips, latents, f"--codec={codec / 'export'}")
    small = ["dit.latent_channels=4", "dit.width=64", "dit.depth=1", "dit.heads=2", "dit.text_width=64"]
    small += ["pack.tokens=48", "pack.text_tokens=384", "run.log_every=2", "run.save_every=4", "run.sample_every=4"]
    options = [f"--codec={codec / 'export'}", f"--workdir={model}"]
    minisora(
        "train", f"--config=configs/dit_tiny.py:data={latents},steps=4", *[f"--config.{s}" for s in small], *options
    )
    rows = [json.loads(line) for line in (model / "metrics.jsonl").read_text().splitlines()]
    wanted = {"loss", "tokens_per_s", "useful_flops_per_s", "hardware_flops_per_s", "padding_share", "learning_rate"}
    assert [r["step"] for r in rows] == [2, 4] and all(wanted <= r.keys() and np.isfinite(r["loss"]) for r in rows)
    assert (model / "samples" / "step_0000004.png").exists() and list((model / "tensorboard").iterdir())

    exports = [f"--model={model / 'export'}", f"--codec={codec / 'export'}"]
    capsys.readouterr()
    minisora("generate", "anything", "--size=32x48", "--frames=5", "--steps=2", *exports, f"--out={project / 'out'}")
    video, sheet = capsys.readouterr().out.splitlines()
    assert read_clip_frames(video)[0].shape == (5, 128, 192, 3) and sheet.endswith("contact-sheet.png")

    minisora("eval", "codec", f"--codec={codec / 'export'}", f"--data={clips}", f"--out={project / 'eval'}")
    scores = json.loads((project / "eval" / "codec.json").read_text())
    assert scores["clips"] == 36 and 3 < scores["psnr"] < 60

    # What cannot be trained on is said at once: too few clips, or a cache of another codec.
    few = [f"--config=configs/dit_tiny.py:data={latents},rows=64", f"--workdir={project / 'few'}", *options[:1]]
    assert main(["train", *few, *[f"--config.{s}" for s in small]]) == 2
    assert "of the 64 rows of a step" in capsys.readouterr().err

    assert main(["train", f"--config=configs/dit_tiny.py:data={latents}", f"--workdir={project / 'other'}"]) == 2
    assert "codec" in capsys.readouterr().err

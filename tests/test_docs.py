"""Every command that the README and the guides print: its flags exist, and the cheap ones run as printed."""

import argparse
import importlib
import keyword
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minisora_jax.cli import EXAMPLE, VERBS
from minisora_jax.commands.generate import _jobs
from minisora_jax.config import build, read_config
from minisora_jax.media.video_writer import write_video
from minisora_jax.toy.shapes import Shapes
from minisora_jax.training.codec_task import CodecTask
from minisora_jax.training.diffusion_task import DiffusionTask

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "launch" / "README.md",
         ROOT / "minisora_jax" / "bundled" / "README.md"]  # fmt: skip
TASKS = {"train": DiffusionTask, "train-vae": CodecTask}


def commands(text: str) -> list[str]:
    """The lines of code blocks, and the code within sentences, that call minisora; broken lines are joined."""
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"^ {4,}((?:uv run [^\n]*?)?minisora [^\n]*)", text, re.M)
    return blocks + re.findall(r"`((?:uv run )?minisora [^`\n]*)`", text)


def argv_of(command: str) -> list[str]:
    """The words after `minisora`, without a comment."""
    words = shlex.split(command.split(" && ")[0], comments=True)
    return words[words.index("minisora") + 1 :]


SHOWN = [(path.name, command) for path in PAGES for command in commands(path.read_text(encoding="utf-8"))]
SHOWN += [("--help", line.strip()) for line in EXAMPLE.splitlines() if line.startswith("  minisora ")]


def test_enough_commands_are_found():
    assert len(SHOWN) > 100 and {name for name, _ in SHOWN} >= {"README.md", "own-clips.md", "tutorial.md", "--help"}


@pytest.mark.parametrize("page, command", SHOWN, ids=[f"{page}-{i}" for i, (page, _) in enumerate(SHOWN)])
def test_its_flags_exist(page, command):
    verb, *argv = argv_of(command)
    if verb in ("VERB", "--help", "--version") or not argv:  # a mention
        return
    assert verb in VERBS, command
    module = verb.replace("-", "_") + ("_" if keyword.iskeyword(verb) else "")
    module = importlib.import_module(f"minisora_jax.commands.{module}")
    parser = argparse.ArgumentParser(prog=command, exit_on_error=False)
    module.add_arguments(parser)
    for action in parser._actions:  # a sentence may leave out what is not its point
        action.required = False
    args, rest = parser.parse_known_args([word for word in argv if word not in ("...", "--config=...")])
    assert all(word.startswith("--config") and getattr(module, "TAKES_CONFIG", False) for word in rest), (command, rest)
    if verb in TASKS and any(word.startswith("--config=") and "my_config" not in word for word in rest):
        values = read_config(rest, TASKS[verb], "dit_tiny:data=data/latents")
        values.pop("prompts", None)
        build(TASKS[verb], values)
    if verb == "generate" and args.prompts:
        assert _jobs(args)


def test_a_model_is_trained_with_the_codec_of_its_latents():
    """Where a page encodes with a codec of its own, it trains with it, too."""
    pages = {page: [argv_of(c) for p, c in SHOWN if p == page] for page, _ in SHOWN}
    for page, lines in pages.items():
        for words in (line for line in lines if line[0] == "train" and any("data=data/latents" in w for w in line)):
            if any(line[0] == "encode" and any("--codec=runs/codec" in w for w in line) for line in lines):
                assert any(word.startswith("--codec") for word in words), (page, words)


# ---- The cheap ones, run as printed

CHEAP = ("generate", "inspect", "demo", "prepare")
DEAR = ("--model", "--batch", "--reproduce", "--expand", "--guide-model", "2048", "--curate", "tfds:", "gs:", "/nfs")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with the files that the guides speak of."""
    folder = tmp_path_factory.mktemp("user")
    shapes = Shapes("train", 20, size_THW=(17, 48, 48))
    (folder / "my_clips").mkdir()
    for i in range(8):
        write_video(folder / "my_clips" / f"{i}.mp4", shapes[i].frames_THWC, 8)
        (folder / "my_clips" / f"{i}.txt").write_text(shapes[i].caption)
    shutil.copytree(folder / "my_clips", folder / "my_films")
    write_video(folder / "cat.mp4", shapes[0].frames_THWC, 8)
    write_video(folder / "dog.mp4", shapes[1].frames_THWC, 8)
    for name in ("cat.png", "a.png", "b.png"):
        write_video(folder / name, shapes[2].frames_THWC[:1], 8)
    mask = np.zeros((1, 48, 48, 3), np.uint8)
    mask[:, :, 24:] = 255
    write_video(folder / "mask.png", mask, 8)
    return folder


def run_as_printed(command: str, folder: Path) -> subprocess.CompletedProcess:
    bin_folder = folder / ".bin"
    bin_folder.mkdir(exist_ok=True)
    launcher = bin_folder / "minisora"
    launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m minisora_jax.cli "$@"\n')
    launcher.chmod(0o755)
    env = os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = command.removeprefix("uv run ")
    return subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=900)


def cheap_commands() -> list[str]:
    shown = [c for page, c in SHOWN if page in ("README.md", "tutorial.md", "index.md")]
    cheap = [c for c in shown if argv_of(c)[0] in CHEAP and not any(dear in c for dear in DEAR)]
    return list(dict.fromkeys(c for c in cheap if "..." not in c or '"..." ' in c))


@pytest.mark.slow
def test_the_cheap_ones_run_as_printed(checkout):
    ran = 0
    for command in cheap_commands():
        argv = argv_of(command)
        if argv[0] == "inspect" or any(word.startswith("runs/") for word in argv):
            continue  # of a run that the page trains first
        done = run_as_printed(command, checkout)
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
        ran += 1
    assert ran >= 10


@pytest.mark.slow
def test_the_recipe_of_own_clips_runs_as_printed(checkout):
    """docs/own-clips.md from the first line to the last, with tiny models and 2 steps."""
    recipe = commands((ROOT / "docs" / "own-clips.md").read_text(encoding="utf-8"))[:6]
    assert [argv_of(c)[0] for c in recipe] == ["prepare", "train-vae", "encode", "train", "generate", "eval"]
    small = {
        "train-vae": " --config.run.steps=2 --config.vae.base=4 --config.run.sample_every=2",
        "train": " --config.run.steps=2 --config.dit.width=64 --config.dit.depth=1 --config.dit.heads=1"
        " --config.run.sample_every=2",
        "generate": " --steps 2",
    }
    for command in recipe:
        done = run_as_printed(command + small.get(argv_of(command)[0], ""), checkout)
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
    assert list((checkout / "runs" / "model" / "samples").glob("*.png"))

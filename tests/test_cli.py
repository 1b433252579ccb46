"""The command line teaches, fails in sentences, and costs nothing before there is work."""

import subprocess
import sys
import time

import pytest

from minisora_jax.cli import VERBS, main


def test_help_is_quick_and_imports_no_jax():
    script = "import sys; from minisora_jax.cli import main; main(['--help']); print('jax' in sys.modules)"
    since = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert time.perf_counter() - since < 1.0
    assert out.rstrip().endswith("False") and all(verb in out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_shows_an_example(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"  minisora {verb}" in out and ("example" in out)


def test_importing_everything_touches_no_device():
    script = """
import importlib, pkgutil
import minisora_jax
for module in pkgutil.walk_packages(minisora_jax.__path__, "minisora_jax."):
    try:
        importlib.import_module(module.name)
    except ImportError as error:  # an extra that is not installed
        assert "uv sync --extra " in str(error), error
from jax._src import xla_bridge
print(len(list(pkgutil.walk_packages(minisora_jax.__path__))) > 8, dict(xla_bridge._backends))
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "True {}"


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["generate"], "no prompt given; for example"),
        (["generate", "x", "--size", "large"], "--size 'large' must be HEIGHTxWIDTH in pixels, such as 48x64"),
        (["generate", "x", "--frames", "16"], "frames=16 must be 1 + 4*k; use 13 or 17"),
        (["generate", "x", "--size", "8x48"], "size=8x48: this model makes 16 pixels a side and more"),
        (
            ["generate", "x", "--sampler", "unipc", "--eta", "1"],
            "eta=1.0 is for the samplers ddim, ddpm, sde, consistency: unipc is deterministic",
        ),
        (["generate", "x", "--guidance-interval", "half"], "--guidance-interval 'half' must be LOW-HIGH in times"),
        (["eval", "model", "--guidance-interval", "0.8-0.2"], "guidance interval 0.8-0.2 must be two rising times"),
        (
            ["generate", "x", "--mesh", "rings=2"],
            "mesh 'rings=2': 'rings=2' must be AXIS=SIZE with an axis of data, fsdp, ring",
        ),
        (["generate", "x", "--guide-model", "/nowhere"], "/nowhere is not an exported model"),
        (["generate", "x", "--model", "/nowhere"], "/nowhere is not an exported model: model.safetensors is missing"),
        (["generate", "x", "--text-encoder", "m"], "--text-encoder=m: the model reads bytes, not features"),
        (["generate", "--batch", "/nowhere/jobs"], "FileNotFoundError: /nowhere/jobs: No such file"),
        (["generate", "x", "--expand", "/nowhere/model"], "/nowhere/model"),
        (["encode", "nowhere", "out"], "run `minisora prepare CLIPS_FOLDER nowhere` first"),
        (["train", "--workdir", "w"], "no --config=NAME given; for example --config=dit_tiny"),
        (["train", "--workdir", "w", "--init", "/nowhere"], "/nowhere is not an exported model"),
        (["import", "umt5-small", "/x", "--out", "o", "--tokenizer", "/y"], "--tokenizer=/y has no tokenizer: no tok"),
        (["train-vae", "--workdir", "w", "--config=configs/vae_tiny.py:x=1"], "config argument 'x=1': give data="),
    ],
)
def test_what_a_user_can_mend_is_said_in_a_sentence(argv, sentence, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error


def test_the_choices_are_those_of_the_code():
    from minisora_jax.commands.options import GUIDANCE_SCHEDULES, SAMPLERS, TIME_SCHEDULES
    from minisora_jax.diffusion import guidance, sampler, time

    assert GUIDANCE_SCHEDULES == tuple(guidance.SCHEDULES)
    assert SAMPLERS == sampler.SAMPLER_NAMES and TIME_SCHEDULES == tuple(time.TIME_SCHEDULES)


def test_unknown_verbs_and_flags_are_refused(capsys):
    for argv in (["fly"], ["demo", "--speed=3"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "unknown verb 'fly'; the verbs are demo" in error and "--speed=3" in error


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m minisora_jax.cli train --list-config | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.startswith("--config.dit.") and not done.stderr


@pytest.mark.slow
def test_the_demo_makes_eight_motions_with_records(tmp_path, capsys):
    """It says of each what a checker found, and makes again what it did not find right."""
    from minisora_jax.commands.demo import held_out_prompts
    from minisora_jax.jobs.output import read_record
    from minisora_jax.toy.grammar import held_out, parse_caption

    assert main(["demo", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    first = [parse_caption(prompt)[0][0] for prompt in held_out_prompts(8, 0)]
    assert len({o.motion for o in first}) == 8 and all(held_out(o.triple) for o in first)
    records = [read_record(tmp_path / f"{i}.mp4") for i in range(8)]
    assert [r["job"]["prompt"] for r in records] == held_out_prompts(8, 0)
    assert all(r["size"] == [48, 48] and r["job"].get("seed", 0) % 8 == i for i, r in enumerate(records))
    again = [i for i, r in enumerate(records) if r["job"].get("seed", 0) != i]
    assert [i for i in range(8) if "; try " in out.splitlines()[i]] == again
    assert out.count(" NO") - 1 <= 2  # one is in the explanation

"""Two processes make the videos of one, to the bit: prompts, a picture as an input, and a batch that goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

LAUNCHER = Path(__file__).parent.parent / "launch" / "local_cpu.py"
VERB = ["-c", "import sys; from minisora_jax.cli import main; sys.exit(main())", "generate"]
MESH = ["--mesh", "data=2,ring=2", "--steps", "2"]
RED, BLUE = "a red circle moves left on a black background", "a blue square grows on a grey background"


def generated(out: Path, *flags: object, processes: int) -> dict[str, str]:
    """{file: hash of its pixels} of a run on 4 devices of one process, or of two."""
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false", "PYTHONPATH": str(LAUNCHER.parent.parent)}
    if processes == 1:
        environment["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
        start = [sys.executable]
    else:
        start = [sys.executable, LAUNCHER, "-n", processes, "--devices", 2, "--timeout", 300, "--", sys.executable]
    command = list(map(str, [*start, *VERB, *flags, *MESH, "--out", out]))
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.name: json.loads(path.read_text())["pixels"] for path in out.glob("*.mp4.json")}


@pytest.mark.slow
def test_two_processes_make_the_videos_of_one(tmp_path):
    picture = tmp_path / "first.png"
    Image.fromarray(np.full((48, 48, 3), (10, 10, 10), np.uint8)).save(picture)
    flags = RED, BLUE, "--frames", 5, "--image", picture
    one, two = (generated(tmp_path / str(n), *flags, processes=n) for n in (1, 2))
    assert len(one) == 2 and one == two
    assert sorted(p.name for p in (tmp_path / "1").iterdir()) == sorted(p.name for p in (tmp_path / "2").iterdir())


@pytest.mark.slow
def test_a_batch_of_two_processes_goes_on(tmp_path):
    jobs, out = tmp_path / "jobs.jsonl", tmp_path / "out"
    lines = [json.dumps({"prompt": prompt, "frames": 5, "size": [32, 32]}) for prompt in (RED, BLUE)]
    jobs.write_text("\n".join([*lines, "no job"]))
    first = json.dumps({"number": 0, "job": json.loads(lines[0]), "file": "gone.mp4"})
    out.mkdir()
    (out / "manifest.jsonl").write_text(first + "\n")  # its file is gone, so it is made again
    with pytest.raises(AssertionError, match="2 made, 1 failed, 0 made before"):  # exit code 1, for the failed line
        generated(out, "--batch", jobs, "--batch-size", 1, processes=2)
    made = [line for line in map(json.loads, (out / "manifest.jsonl").read_text().splitlines()) if "pixels" in line]
    assert [line["number"] for line in made] == [0, 1] and all((out / line["file"]).is_file() for line in made)
    with pytest.raises(AssertionError, match="0 made, 1 failed, 2 made before"):
        generated(out, "--batch", jobs, "--batch-size", 1, processes=2)

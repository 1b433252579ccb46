"""A window of a training is traced, and xprof opens the trace."""

import dataclasses
import json
import subprocess
import sys

import pytest
from train_tiny import make_cache, task

from minisora_jax.data.latents import Latents
from minisora_jax.training.diffusion_task import train_diffusion
from minisora_jax.training.profiler import profile_window

STEPS_OF = """
import json, sys
from xprof.convert.raw_to_tool_data import xspace_to_tool_data
data, _ = xspace_to_tool_data(sys.argv[1:], "trace_viewer", {})
events = json.loads(data)["traceEvents"]
steps = sorted(int(e["args"]["step_num"]) for e in events if "step_num" in e.get("args", {}))
print(json.dumps([steps, sum("dot" in e.get("name", "") for e in events)]))
"""


@pytest.mark.parametrize("text", ["20", "5:4", "0:3", "a:b", "1:2:3"])
def test_what_is_no_window_is_said(text):
    with pytest.raises(ValueError, match=r"run\.profile=.* such as 20:23"):
        profile_window(text)


@pytest.mark.slow
def test_xprof_opens_the_trace_of_a_window(tmp_path):
    pytest.importorskip("xprof")
    make_cache(tmp_path / "latents")
    traced = lambda steps, window: dataclasses.replace(
        task(steps), run=dataclasses.replace(task(steps).run, profile=window)
    )
    config = lambda window: {"run": {"profile": window}}
    train_diffusion(traced(6, ""), tmp_path / "run", Latents(tmp_path / "latents"), config(""), {})
    assert not (tmp_path / "run" / "profile").exists()
    # The run goes on, now with a trace, which is no other config.
    train_diffusion(traced(12, "8:10"), tmp_path / "run", Latents(tmp_path / "latents"), config("8:10"), {})
    [trace] = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    done = subprocess.run([sys.executable, "-c", STEPS_OF, trace], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    steps, products = json.loads(done.stdout.splitlines()[-1])
    assert steps == [8, 9, 10] and products > 0

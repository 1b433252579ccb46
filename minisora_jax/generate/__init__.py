"""From a request to pixels: requests, tasks over them, the pipeline that runs tasks, and the packed sampler.

    pipeline = VideoPipeline.load()
    [video] = pipeline.generate("a red circle moves left on a black background")

Read in this order: request.py (what is asked), tasks.py (each task is a few lines over requests with other conditioning
masks), runner.py (tasks run together), native.py (the model and codec at the sizes of their training), sampling.py.
"""

from minisora_jax.generate.pipeline import VideoPipeline
from minisora_jax.generate.request import Given, Request
from minisora_jax.generate.runner import run_tasks

__all__ = ["Given", "Request", "VideoPipeline", "run_tasks"]

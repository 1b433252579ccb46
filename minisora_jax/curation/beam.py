"""The tasks of `prepare` on Apache Beam (`pip install minisora_jax[beam]`): one machine, or Dataflow, Flink, Spark.

Beam spreads the tasks over machines, runs again those that fail, and waits; what a task does and writes is the same as
in a local run, to the byte. The options are Beam's own, such as `--runner=FlinkRunner --flink_master=HOST:8081`. The
workers need this package and, at the same paths, the output's file system (and the source's).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from minisora_jax.curation.workers import Worker

log = logging.getLogger("minisora")


def run_on_beam(
    job: Callable[..., None], tasks: Iterable[tuple], options: list[str], timeout: float | None, title: str = "prepare"
) -> None:
    """job(worker, *task) for all tasks, each worker with a process of its own that may crash or hang."""
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ImportError(f"running on Beam needs apache-beam: pip install 'minisora_jax[beam]' ({error})") from error

    class Call(beam.DoFn):
        def __init__(self, job, timeout):
            self.job, self.timeout = job, timeout

        def setup(self):
            self.worker = Worker(self.timeout)

        def process(self, task):
            self.job(self.worker, *task)

        def teardown(self):
            self.worker.close()

    tasks = list(tasks)
    log.info("%s: %d tasks on Beam %s", title, len(tasks), " ".join(options) or "(here, by the DirectRunner)")
    with beam.Pipeline(options=PipelineOptions(options)) as pipeline:
        _ = (
            pipeline
            | "tasks" >> beam.Create(tasks)
            | "spread" >> beam.Reshuffle()
            | "work" >> beam.ParDo(Call(job, timeout))
        )

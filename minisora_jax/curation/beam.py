"""Run the tasks of `prepare` on Apache Beam (`uv sync --extra beam`): one machine, or Dataflow, Flink, Spark.

Beam spreads the tasks over machines and retries failed ones. Each task writes the same bytes as in a local run. The
options are Beam's own, such as `--runner=FlinkRunner --flink_master=HOST:8081`. The workers need this package and, at
the same paths, the file systems of the output and of the source.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from minisora_jax.config import how_to_install
from minisora_jax.curation.workers import Worker

log = logging.getLogger("minisora")


def run_on_beam(
    job: Callable[..., None], tasks: Iterable[tuple], options: list[str], timeout: float | None, title: str = "prepare"
) -> None:
    """Call job(worker, *task) for all tasks and wait. Each Beam worker has a process of its own that may crash or hang.

    Args:
        options: command-line options of Beam; [] for the local DirectRunner.
        timeout: seconds of silence after which a process is killed; None for no limit.
        title: the name of the run in the log.

    Raises:
        ImportError: Apache Beam is missing.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ImportError(f"running on Beam needs apache-beam: {how_to_install('beam')} ({error})") from error

    class Call(beam.DoFn):
        def __init__(self, job: Callable[..., None], timeout: float | None):
            self.job, self.timeout = job, timeout

        def setup(self) -> None:
            self.worker = Worker(self.timeout)

        def process(self, task: tuple) -> None:
            self.job(self.worker, *task)

        def teardown(self) -> None:
            self.worker.close()

    tasks = list(tasks)
    log.info("%s: %d tasks on Beam %s", title, len(tasks), " ".join(options) or "(the local DirectRunner)")
    with beam.Pipeline(options=PipelineOptions(options)) as pipeline:
        _ = (
            pipeline
            | "tasks" >> beam.Create(tasks)
            | "spread" >> beam.Reshuffle()
            | "work" >> beam.ParDo(Call(job, timeout))
        )

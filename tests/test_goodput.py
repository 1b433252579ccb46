"""A run's steps reach ML Goodput, whose own calculator reads them. Cloud Logging is a list here."""

import functools
import importlib
import sys

import pytest
from train_tiny import make_cache, train_with


class Entries:
    """Takes and gives entries as the package's logger does, within this process."""

    kept: list[dict] = []

    def __init__(self, *_, **__):
        pass

    def write_cloud_logging_entry(self, entry):
        self.kept.append(entry)

    def read_cloud_logging_entries(self, start_time=None, end_time=None, last_entry_info=None):
        return list(self.kept), None

    def flush(self):
        pass


train = functools.partial(train_with, goodput="runs")


@pytest.mark.slow
def test_the_packages_calculator_reads_a_run_and_what_went_on_after_it(tmp_path, monkeypatch):
    pytest.importorskip("ml_goodput_measurement")
    goodput = importlib.import_module("ml_goodput_measurement.src.goodput")
    monkeypatch.setattr(goodput, "_CloudLogger", Entries)
    Entries.kept.clear()
    make_cache(tmp_path / "latents")
    for steps in (4, 8):
        train(tmp_path / "latents", tmp_path / "job", steps)
    counts = [entry["step_count"] for entry in Entries.kept if "step_count" in entry]
    assert counts == list(range(8))  # from 0 there, and a run that goes on repeats none
    assert sum("job_start_time" in entry for entry in Entries.kept) == 2
    assert {entry["job_name"] for entry in Entries.kept} == {"job"}
    calculator = goodput.GoodputCalculator("job", "runs", Entries(), cache_dir=str(tmp_path))
    share, lost, last = calculator.get_job_goodput(include_badput_breakdown=True)
    assert 0 < share < 100 and last == 7 and lost  # both in per cent


def test_a_missing_package_is_named_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_goodput_measurement", None)
    make_cache(tmp_path / "latents")
    with pytest.raises(ImportError, match="pip install ml-goodput-measurement"):
        train(tmp_path / "latents", tmp_path / "job", 1)

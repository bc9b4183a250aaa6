"""How often a worker group reports."""

import pytest
import torch

from elfs_ray.stages import worker_group
from elfs_ray.stages.worker_group import ReportPacer


@pytest.fixture
def clock(monkeypatch):
    """The seconds that have passed, to be set."""
    passed = [0.0]
    monkeypatch.setattr(worker_group.time, "monotonic", lambda: passed[0])
    return passed


@pytest.mark.parametrize(
    ("epoch_s", "report_s", "reported"),
    [(10.0, 1.0, [0, 1, 2, 3, 4, 5, 6, 7]), (2.0, 0.4, [0, 2, 4, 6]), (1.0, 0.5, [0, 5])],
)
def test_reports_take_a_tenth_of_the_time_at_most(clock, epoch_s, report_s, reported):
    pacer = ReportPacer(1, torch.device("cpu"))
    epochs, training_s, reporting_s = [], 0.0, 0.0
    for epoch in range(8):
        clock[0] += epoch_s
        training_s += epoch_s
        if pacer.is_due():
            epochs.append(epoch)
            with pacer.reporting():
                clock[0] += report_s
                reporting_s += report_s
    assert epochs == reported
    assert reporting_s - report_s <= 0.1 * (training_s + reporting_s)

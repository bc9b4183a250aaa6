"""How often a worker group reports."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import distributed
from torch.multiprocessing import spawn

from elfs_ray.stages import worker_group
from elfs_ray.stages.worker_group import ReportPacer


@pytest.fixture
def clock(monkeypatch):
    """The seconds that have passed, to be set."""
    passed = [0.0]
    monkeypatch.setattr(worker_group, "time", SimpleNamespace(monotonic=lambda: passed[0]))
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


def test_one_slow_report_leaves_no_more_than_a_minute_without(clock):
    pacer = ReportPacer(1, torch.device("cpu"))
    with pacer.reporting():
        clock[0] += 100.0
    clock[0] += worker_group.MAX_UNREPORTED_S - 1
    assert not pacer.is_due()
    clock[0] += 1
    assert pacer.is_due()


def _ask(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    pacer = ReportPacer(2, torch.device("cpu"))
    answers = []
    for slow_rank in (0, 1):
        pacer._cost_s = 1e6 if rank == slow_rank else 0.0
        answers.append(pacer.is_due())
    Path(folder, str(rank)).write_text(str(answers))
    distributed.destroy_process_group()


def test_workers_whose_reports_took_unequal_times_agree(tmp_path):
    spawn(_ask, args=(str(tmp_path),), nprocs=2)
    assert [Path(tmp_path, str(rank)).read_text() for rank in range(2)] == ["[False, True]"] * 2

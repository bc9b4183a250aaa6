"""How often a worker group reports an epoch with its checkpoint, and which checkpoint it resumes from."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray.train
import torch
from torch import distributed
from torch.multiprocessing import spawn

from elfs_ray.stages.training import checkpoints
from elfs_ray.stages.training.checkpoints import CheckpointReporter
from elfs_ray.stages.training.group_member import GroupMember


class Reports:
    """Stands in for Ray Train and the clock: holds the states of reported epochs; a report takes `report_s`."""

    def __init__(self, report_s: float):
        self.now_s, self.report_s, self.states = 0.0, report_s, {}

    def take(self, metrics, checkpoint=None):
        self.now_s += self.report_s
        with checkpoint.as_directory() as folder:
            self.states[metrics["epoch"]] = torch.load(Path(folder, checkpoints.STATE_FILE))


@pytest.fixture
def make_reports(monkeypatch):
    def make(report_s: float) -> Reports:
        reports = Reports(report_s)
        monkeypatch.setattr(checkpoints, "time", SimpleNamespace(monotonic=lambda: reports.now_s))
        monkeypatch.setattr(ray.train, "report", reports.take)
        return reports

    return make


@pytest.mark.parametrize(
    ("epoch_s", "report_s", "reported"),
    [(40.0, 1.0, [0, 1, 2, 3, 4, 5, 6, 7]), (8.0, 0.5, [0, 3, 6, 7]), (10.0, 1.0, [0, 4, 7])],
)
def test_reports_take_at_most_3_percent_of_the_time_and_keep_the_last(make_reports, epoch_s, report_s, reported):
    reports = make_reports(report_s)
    reporter = CheckpointReporter("", GroupMember(0, 1, torch.device("cpu")))
    for epoch in range(8):
        reports.now_s += epoch_s
        reporter.end_epoch({"epoch": epoch}, lambda: {"next": epoch + 1}, is_last=epoch == 7)  # noqa: B023
    assert reports.states == {epoch: {"next": epoch + 1} for epoch in reported}
    assert (len(reported) - 2) * report_s <= 0.03 * reports.now_s  # but for the latest and the one at the end


def test_after_a_slow_report_the_next_comes_within_a_minute(make_reports):
    reports = make_reports(100.0)
    reporter = CheckpointReporter("", GroupMember(0, 1, torch.device("cpu")))
    for epoch, passed_s in enumerate([0.0, checkpoints.MAX_UNREPORTED_S - 1, 1.0]):
        reports.now_s += passed_s
        reporter.end_epoch({"epoch": epoch}, dict, is_last=False)
    assert list(reports.states) == [0, 2]


@pytest.fixture
def make_checkpoint(tmp_path, monkeypatch):
    """Return a function that writes a checkpoint as a group of `num_workers` workers does."""
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)

    def make(name: str, num_workers: int, state: dict) -> Path:
        folder = tmp_path / name

        def copy(metrics, checkpoint):
            with checkpoint.as_directory() as files:
                shutil.copytree(files, folder, dirs_exist_ok=True)

        monkeypatch.setattr(ray.train, "report", copy)
        for rank in range(num_workers):
            reporter = CheckpointReporter("", GroupMember(rank, num_workers, torch.device("cpu")))
            reporter.save_within_epoch({}, lambda: state, {"rank": rank})
        return folder

    return make


def test_without_ray_the_last_checkpoint_alone_is_kept(tmp_path):
    member = GroupMember(0, 1, torch.device("cpu"), is_in_ray_train=False)
    reporter = CheckpointReporter(str(tmp_path), member)
    (tmp_path / checkpoints.SNAPSHOT_FILE).write_text("Ray Train's list")
    (tmp_path / "result.json").write_text("what TEMI writes beside them")
    for epoch in range(3):
        reporter.end_epoch({}, lambda: {"next": epoch + 1}, is_last=True)  # noqa: B023
        assert checkpoints.load_checkpoint(str(tmp_path), member)["next"] == epoch + 1
        folder, other = sorted(path.name for path in tmp_path.iterdir())
        assert folder.startswith("checkpoint_") and other == "result.json"


def loaded_by(folder: Path, num_workers: int) -> list[dict]:
    device = torch.device("cpu")
    return [
        checkpoints.load_checkpoint(str(folder), GroupMember(rank, num_workers, device)) for rank in range(num_workers)
    ]


@pytest.mark.parametrize(("num_workers", "parts"), [(3, [[0], [1], [2]]), (2, [[0, 2], [1]]), (4, [[0], [1], [2], []])])
def test_parts_saved_within_an_epoch_are_dealt_out(tmp_path, make_checkpoint, num_workers, parts):
    make_checkpoint("checkpoint_1", 3, {"next_step": 7})
    states = loaded_by(tmp_path, num_workers)
    assert [state["next_step"] for state in states] == [7] * num_workers
    assert [[part["rank"] for part in state[checkpoints.PARTS]] for state in states] == parts


@pytest.mark.parametrize("file", [checkpoints.STATE_FILE, checkpoints.part_file(1)])
@pytest.mark.parametrize("is_missing", [True, False])
def test_a_checkpoint_that_lacks_a_part_is_passed_over(tmp_path, make_checkpoint, file, is_missing):
    make_checkpoint("checkpoint_1", 2, {"next_step": 7})
    path = make_checkpoint("checkpoint_2", 2, {"next_step": 9}) / file
    assert loaded_by(tmp_path, 2)[0]["next_step"] == 9
    if is_missing:
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2)
    assert [state["next_step"] for state in loaded_by(tmp_path, 2)] == [7, 7]


def _end_epochs(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    answers = []
    ray.train.report = lambda metrics, checkpoint=None: answers.append((metrics, checkpoint is not None))
    reporter = CheckpointReporter("", GroupMember(rank, 2, torch.device("cpu")))
    for epoch, slow_rank in enumerate((0, 1)):
        reporter._cost_s = 1e6 if rank == slow_rank else 0.0
        reporter.end_epoch({"epoch": epoch}, dict, is_last=False)
    Path(folder, str(rank)).write_text(str(answers))
    distributed.destroy_process_group()


@pytest.mark.slow
def test_workers_agree_when_to_report_and_rank_0_alone_saves(tmp_path):
    spawn(_end_epochs, args=(str(tmp_path),), nprocs=2)
    answers = [Path(tmp_path, str(rank)).read_text() for rank in range(2)]
    assert answers == ["[({'epoch': 1}, True)]", "[({'epoch': 1}, False)]"]

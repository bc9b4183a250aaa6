"""A group of workers: which errors a retry may repair, which are final, and what a lost node takes away."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from torch import distributed

from elfs_ray.runtime.resources import Request
from elfs_ray.stages.training import worker_group
from elfs_ray.stages.training.group_member import GroupMember
from elfs_ray.stages.training.worker_group import WorkerGroup, run_workers
from elfs_ray.storage import filesystem


@dataclass(frozen=True)
class Job:
    """A folder for marks, and references to nothing."""

    marks: Path
    data: list = field(default_factory=list)


def group(folder: Path, max_failures: int) -> WorkerGroup:
    request = Request("train", "train.num_workers", "worker", fewest=1, most=1, cpus=1, gpus=0)
    return WorkerGroup(str(folder), "group", request, max_failures)


def write_torn(path: Path) -> bytes:
    """Write the first half of a Parquet file. Returns the whole file."""
    pq.write_table(pa.table({"sample_id": range(10_000)}), path)
    whole = path.read_bytes()
    os.truncate(path, len(whole) // 2)
    return whole


def mark(job: Job) -> None:
    (job.marks / f"try-{len(list(job.marks.glob('try-*')))}").touch()


@pytest.fixture
def alone(monkeypatch) -> None:
    """Let this process be the only worker of a group."""
    member = GroupMember(0, 1, torch.device("cpu"))
    monkeypatch.setattr(GroupMember, "current", classmethod(lambda cls: member))


@pytest.mark.slow
def test_a_torn_read_uses_a_retry(ray_cluster, tmp_path):
    path = tmp_path / "rows.parquet"
    whole = write_torn(path)

    def work(job: Job) -> None:
        mark(job)
        try:
            (job.marks / "rows").write_text(str(filesystem.read_table(str(path)).num_rows))
        except pa.ArrowInvalid:
            path.write_bytes(whole)
            raise

    run_workers(group(tmp_path, max_failures=1), work, lambda: Job(tmp_path))
    assert (tmp_path / "rows").read_text() == "10000"
    assert len(list(tmp_path.glob("try-*"))) == 2


@pytest.mark.slow
def test_a_damaged_file_ends_training_after_its_retries_and_is_named(ray_cluster, tmp_path):
    path = tmp_path / "rows.parquet"
    write_torn(path)

    def work(job: Job) -> None:
        mark(job)
        filesystem.num_rows(str(path))

    with pytest.raises(RuntimeError, match=rf"gave up after 1 retries: .*{path} cannot be read: Parquet magic bytes"):
        run_workers(group(tmp_path, max_failures=1), work, lambda: Job(tmp_path))
    assert len(list(tmp_path.glob("try-*"))) == 2


@pytest.mark.slow
def test_any_other_value_error_ends_training_at_once(ray_cluster, tmp_path):
    def work(job: Job) -> None:
        mark(job)
        raise ValueError("sample_id 7 has no image")

    with pytest.raises(RuntimeError, match="training stopped: sample_id 7 has no image"):
        run_workers(group(tmp_path, max_failures=-1), work, lambda: Job(tmp_path))
    assert len(list(tmp_path.glob("try-*"))) == 1


@pytest.mark.parametrize(
    ("error", "is_final"),
    [(FloatingPointError, True), (ValueError, True), (pa.ArrowInvalid, False), (OSError, False)],
)
def test_a_restarted_group_does_no_work_after_a_final_error(alone, monkeypatch, tmp_path, error, is_final):
    monkeypatch.setattr(ray, "get", lambda references: [])
    tries = []

    def work(job: Job) -> None:
        tries.append(job)
        raise error("loss is nan at epoch 0")

    loop_config = {"group": group(tmp_path, max_failures=1), "worker": work, "job": Job(tmp_path)}
    with pytest.raises(error):
        worker_group._work(loop_config)
    written = tmp_path / worker_group.FAILURE_FILE
    assert written.exists() == is_final
    if is_final:
        assert written.read_text() == "loss is nan at epoch 0"
        worker_group._work(loop_config)
    assert len(tries) == 1


def test_a_group_whose_data_is_lost_leaves_before_it_works(alone, monkeypatch, tmp_path):
    def get_lost(references: list) -> list:
        raise ray.exceptions.ObjectReconstructionFailedError("00", None, "")

    monkeypatch.setattr(ray, "get", get_lost)
    loop_config = {"group": group(tmp_path, max_failures=1), "worker": mark, "job": Job(tmp_path)}
    assert worker_group._work(loop_config) == worker_group.LOST
    assert not list(tmp_path.glob("try-*"))


def test_a_group_whose_data_is_lost_on_another_node_leaves_too(monkeypatch, tmp_path):
    """The other worker's share of the sum says that it has lost what this one has."""
    member = GroupMember(0, 2, torch.device("cpu"))
    monkeypatch.setattr(GroupMember, "current", classmethod(lambda cls: member))
    monkeypatch.setattr(distributed, "all_reduce", lambda sums: sums.add_(1))
    monkeypatch.setattr(ray, "get", lambda references: ["read"])
    loop_config = {"group": group(tmp_path, max_failures=1), "worker": mark, "job": Job(tmp_path)}
    assert worker_group._work(loop_config) == worker_group.LOST
    assert not list(tmp_path.glob("try-*"))

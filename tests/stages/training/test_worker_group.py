"""A group of workers: which errors a retry may repair, which are final, and what a lost node takes away."""

import dataclasses
import os
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from torch import distributed

from elfs_ray.runtime.resources import Request
from elfs_ray.stages.training import ray_train
from elfs_ray.stages.training.checkpoints import CheckpointReporter, load_checkpoint
from elfs_ray.stages.training.group_member import GroupMember
from elfs_ray.stages.training.worker_group import FAILURE_FILE, WorkerGroup, run_workers
from elfs_ray.storage import filesystem
from tests.in_process import without_ray


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
        ray_train._work(loop_config)
    written = tmp_path / FAILURE_FILE
    assert written.exists() == is_final
    if is_final:
        assert written.read_text() == "loss is nan at epoch 0"
        ray_train._work(loop_config)
    assert len(tries) == 1


def test_a_group_whose_data_is_lost_leaves_before_it_works(alone, monkeypatch, tmp_path):
    def get_lost(references: list) -> list:
        raise ray.exceptions.ObjectReconstructionFailedError("00", None, "")

    monkeypatch.setattr(ray, "get", get_lost)
    loop_config = {"group": group(tmp_path, max_failures=1), "worker": mark, "job": Job(tmp_path)}
    assert ray_train._work(loop_config) == ray_train.LOST
    assert not list(tmp_path.glob("try-*"))


def test_a_group_whose_data_is_lost_on_another_node_leaves_too(monkeypatch, tmp_path):
    """The other worker's share of the sum says that it has lost what this one has."""
    member = GroupMember(0, 2, torch.device("cpu"))
    monkeypatch.setattr(GroupMember, "current", classmethod(lambda cls: member))
    monkeypatch.setattr(distributed, "all_reduce", lambda sums: sums.add_(1))
    monkeypatch.setattr(ray, "get", lambda references: ["read"])
    loop_config = {"group": group(tmp_path, max_failures=1), "worker": mark, "job": Job(tmp_path)}
    assert ray_train._work(loop_config) == ray_train.LOST
    assert not list(tmp_path.glob("try-*"))


def fail(job: Job) -> None:
    mark(job)
    raise [OSError, ValueError, FloatingPointError, pa.ArrowInvalid, MemoryError][int(job.marks.name)]("no more")


@pytest.mark.parametrize(("number", "tries"), [(0, 3), (1, 1), (2, 1), (3, 3), (4, 3)])
def test_without_ray_only_what_may_pass_is_tried_again(tmp_path, monkeypatch, number, tries):
    marks = tmp_path / str(number)
    marks.mkdir()
    message = "gave up after 2 retries: no more" if tries > 1 else "training stopped: no more"
    with without_ray(monkeypatch, tmp_path), pytest.raises(RuntimeError, match=message):
        run_workers(group(tmp_path, max_failures=2), fail, lambda: Job(marks))
    assert len(list(marks.glob("try-*"))) == tries


def test_without_ray_a_worker_has_the_cpus_as_threads_and_leaves_torch_as_it_was(tmp_path, monkeypatch):
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    four = dataclasses.replace(group(tmp_path, 0), request=dataclasses.replace(group(tmp_path, 0).request, cpus=4))
    seen = []
    with without_ray(monkeypatch, tmp_path):
        run_workers(four, lambda job: seen.append((torch.get_num_threads(), torch.rand(1))), lambda: Job(tmp_path))
    assert [number for number, _ in seen] == [4] and torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.slow
def test_ray_train_and_one_process_go_on_from_each_others_checkpoints(ray_cluster, tmp_path, monkeypatch):
    of_group = group(tmp_path, max_failures=0)

    def work(job: Job) -> None:
        member = GroupMember.current()
        seen = (load_checkpoint(of_group.checkpoints, member) or {"seen": []})["seen"]
        seen.append("Ray Train" if member.is_in_ray_train else "here")
        CheckpointReporter(of_group.checkpoints, member).end_epoch({}, lambda: {"seen": seen}, is_last=True)
        (job.marks / "seen").write_text(", ".join(seen))
        raise ValueError("stopped")

    for turn in range(4):
        with without_ray(monkeypatch, tmp_path) if turn % 2 else nullcontext(), pytest.raises(RuntimeError):
            run_workers(of_group, work, lambda: Job(tmp_path))
    assert (tmp_path / "seen").read_text() == "Ray Train, here, Ray Train, here"

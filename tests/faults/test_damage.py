"""Damaged run directories are refused, and replaced with on_change=rerun; a damaged table is never a result."""

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from elfs_ray.commands import main
from elfs_ray.config import ConfigError
from elfs_ray.pipeline.plan import check
from elfs_ray.pipeline.runner import run as run_pipeline
from elfs_ray.storage.run_dir import RunDir
from tests.faults.chaos import Fault, Run
from tests.faults.chaos_places import Place
from tests.small_run import YAML, config_of, overrides
from tests.tables import contents


def select(arguments: list[str]) -> int:
    """Run `elfs-ray select` in this process; return its exit code."""
    return main(["select", "--preset=cifar10", *arguments])


TABLES = ("index", "embeddings", "proxy_images", "rejected", "clusters", "dynamics", "scores", "coreset")
STAGES = ("index", "embed", "cluster", "train", "select", "report")
HOLDER = (
    "import sys, time; from elfs_ray.storage.run_lock import RunLock\n"
    "with RunLock(sys.argv[1], print): print('held', flush=True); time.sleep(250)"
)


@pytest.fixture(scope="module")
def pool(small_run) -> Path:
    return small_run.pool


@pytest.fixture(scope="module")
def finished(small_run) -> Path:
    return small_run.run_dir


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """Return a copy of the finished run, to be damaged."""
    return shutil.copytree(finished, tmp_path / "run")


def refusal(pool: Path, run_dir: Path, *more: str) -> str:
    """Return the message with which a run is refused. Nothing in the run directory may change."""
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    with pytest.raises(ConfigError) as caught:
        run_pipeline(config_of(pool, run_dir, *more))
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before
    return str(caught.value)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("index/part-*.parquet", "index: index has 1 files of "),
        ("embeddings", "embed: embeddings has 0 files"),
        ("embeddings/part-000000000064-*.parquet", "embed: embeddings has 3 files"),
        ("proxy_images/part-000000000000-*.parquet", "embed: proxy_images has 3 files"),
        ("rejected", "embed: rejected has 0 files"),
        ("clusters/centroids.parquet", "cluster: clusters has 4 files"),
        ("clusters/pseudo_labels", "cluster: clusters has 1 files"),
        ("dynamics/epoch=001", "train: dynamics has 4 files"),
        ("scores", "select: scores has 0 files"),
        ("coreset.txt", "select: coreset.txt has 0 files"),
        ("report.html", "report: report.html has 0 files"),
    ],
)
def test_a_stage_whose_tables_are_gone_is_refused(pool, copy, lost, message):
    for path in copy.glob(lost):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused = refusal(pool, copy)
    stage = message.partition(":")[0]
    replaced = ", ".join(STAGES[STAGES.index(stage) :])
    assert f"{copy} was made with another config, or is damaged:\n  {message}" in refused
    assert f"on_change=rerun to replace {replaced}, which deletes there: " in refused and lost.split("/")[0] in refused


def test_a_truncated_table_is_refused(pool, copy):
    (path,) = (copy / "coreset").glob("*.parquet")
    os.truncate(path, 100)
    assert "select: coreset has 1 files of 100 bytes, 1 of " in refusal(pool, copy)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"stage": "embed"}', "cut", "changed"])
@pytest.mark.parametrize("marker", ["_SUCCESS.json", "_STARTED.json"])
def test_a_marker_that_cannot_be_read_is_refused_by_name(pool, copy, content, marker, capsys):
    path = copy / "embed" / marker
    whole = path.read_bytes()
    changes = {"cut": whole[: len(whole) // 2], "changed": whole.replace(b'"pixels"', b'"pixels "')}
    path.write_bytes(changes[content] if isinstance(content, str) else content)
    message = refusal(pool, copy)
    assert f"{path} cannot be read: " in message and "Restore it, or " in message and "delete " in message
    assert select(["--dry-run", *overrides(pool, copy)]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("stage", STAGES)
def test_tables_without_a_marker_are_not_a_result(pool, copy, stage):
    """Somebody may delete a stage's folder, to run the stage again with another config."""
    if stage == "index":
        for marker in (copy / "index").glob("_*.json"):
            marker.unlink()
    else:
        shutil.rmtree(copy / stage)
    plan = {planned.stage.name: planned for planned in _plan(pool, copy)}
    if stage == "report":
        assert plan[stage].action == "run", "its files are overwritten as a whole"
    else:
        assert plan[stage].action == "rerun" and "no marker says how it was made" in plan[stage].differences[0]
        assert f"  {stage}: " in refusal(pool, copy)


def _plan(pool: Path, run_dir: Path):
    return check(config_of(pool, run_dir, "on_change=rerun"), RunDir(run_dir))


@pytest.mark.slow
def test_rerun_repairs_damaged_stages_to_the_same_bytes(ray_cluster, pool, finished, copy, capsys):
    """Damage every stage at once, and leave a file as a killed writer does."""
    for lost in ("index/part-*", "embeddings/part-000000000064-*", "dynamics/epoch=001/*", "coreset.txt"):
        (path,) = copy.glob(lost)
        path.unlink()
    (copy / "clusters" / "centroids.parquet").write_bytes(b"half")
    os.truncate(next((copy / "proxy_images").glob("part-000000000128-*")), 200)
    half_written = copy / "embeddings" / f"part-000000000064-000000000127.parquet.{'0' * 32}.tmp"
    half_written.write_bytes(b"half")
    message = refusal(pool, copy)
    assert message.count(" were written") == 6 and message.count("made from another") == 5
    run_pipeline(config_of(pool, copy, "on_change=rerun"))
    assert contents(copy, *TABLES) == contents(finished, *TABLES)
    assert (copy / "coreset.txt").read_bytes() == (finished / "coreset.txt").read_bytes()
    said = capsys.readouterr().err
    assert "deleted 1 half-written file of a killed run" in said and not half_written.exists()
    assert "embed     reruns and replaces embeddings, proxy_images, rejected, embed" in said
    assert not (copy / "_LOCK.json").exists()
    assert all(planned.action == "done" for planned in _plan(pool, copy))


@pytest.mark.slow
def test_a_stage_made_from_replaced_tables_is_refused(ray_cluster, pool, finished, tmp_path):
    """Although its config has not changed, its result may: the pool may have changed in between."""
    pool_then = shutil.copytree(pool, tmp_path / "pool")
    run_dir = tmp_path / "run"
    run_pipeline(config_of(pool_then, run_dir, "until=cluster"))
    next((run_dir / "embeddings").glob("part-000000000064-*")).unlink()
    (changed,) = pool_then.rglob("100.png")
    whole = changed.read_bytes()
    changed.write_bytes(b"")
    run_pipeline(config_of(pool_then, run_dir, "until=embed", "on_change=rerun"))
    assert "cluster: made from another embed" in refusal(pool_then, run_dir)
    # Once they are deleted by hand, as the message says, on_change is not needed.
    changed.write_bytes(whole)
    for folder in ("embed", "embeddings", "proxy_images", "rejected", "cluster", "clusters"):
        shutil.rmtree(run_dir / folder)
    run_pipeline(config_of(pool_then, run_dir, "until=cluster"))
    tables = ("embeddings", "proxy_images", "clusters")
    assert contents(run_dir, *tables) == contents(finished, *tables)


@pytest.mark.slow
def test_a_damaged_proxy_image_is_made_again_as_the_message_says(ray_cluster, pool, finished, tmp_path):
    run_dir = tmp_path / "run"
    run_pipeline(config_of(pool, run_dir, "until=cluster"))
    path = run_dir / "proxy_images" / "part-000000000064-000000000127.parquet"
    data = path.read_bytes()
    start = data.index(b"IHDR")
    path.write_bytes(data[:start] + b"XXXX" + data[start + 4 :])
    with pytest.raises(
        Exception, match=f"in {path} cannot be decoded: .*Delete that file and run the same command with on_ch"
    ):
        run_pipeline(config_of(pool, run_dir, "until=train"))
    path.unlink()
    run_pipeline(config_of(pool, run_dir, "until=train", "on_change=rerun"))
    assert contents(run_dir, "proxy_images", "dynamics") == contents(finished, "proxy_images", "dynamics")


def test_one_driver_at_a_time(pool, copy, capsys):
    """Refuse a second driver that would write. A finished run and a dry run need no lock."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(copy)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert select(["--dry-run", *overrides(pool, copy)]) == 0
        assert select(overrides(pool, copy)) == 0
        (copy / "report.html").unlink()
        message = refusal(pool, copy, "on_change=rerun")
        assert f"{copy} is being written by another driver: pid {holder.pid} of " in message
        assert select(overrides(pool, copy, "on_change=rerun")) == 2
    finally:
        holder.kill()
        holder.wait()
    capsys.readouterr()
    assert select(overrides(pool, copy, "on_change=rerun")) == 0
    said = capsys.readouterr().err
    assert f"is gone (pid {holder.pid} of " in said and "watching" not in said, (
        "it does not wait for the lock to expire"
    )
    assert (copy / "report.html").exists()


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """Yield a file system of 64 KiB; skip the test for users who cannot mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a file system that is small")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_repeatedly_changes_no_byte(ray_cluster, pool, finished, small_disk, capsys):
    """Run the same command on a growing disk: it fails with a clear message, stage after stage, and resumes."""
    stopped_in = set()
    for kilobytes in (64, 110, 170, 260, 400, 600, 900, 1400, 2200, 4000, 8000, 16_000):
        remount(small_disk, f"size={kilobytes}k")
        code = select(overrides(pool, small_disk / "run", "train.max_failures=0"))
        said = capsys.readouterr().err
        if code == 0:
            break
        assert code in (1, 2) and "No space left on device" in said, said
        assert "Traceback" not in said, said
        incomplete = (stage for stage in STAGES if not (small_disk / "run" / stage / "_SUCCESS.json").exists())
        stopped_in.add(next(incomplete, "end"))
    assert code == 0 and len(stopped_in) >= 3, stopped_in
    assert contents(small_disk / "run", *TABLES) == contents(finished, *TABLES)


def test_a_directory_that_cannot_be_written_is_refused_before_any_work(ray_cluster, pool, copy, small_disk):
    remount(small_disk, "size=16m,ro")
    message = "cannot be written: .*Read-only file system.*give another run_dir"
    with pytest.raises(ConfigError, match=message):
        run_pipeline(config_of(pool, small_disk / "run"))
    remount(small_disk, "rw")
    shutil.copytree(copy, small_disk / "run")
    remount(small_disk, "ro")
    run_pipeline(config_of(pool, small_disk / "run"))
    assert select(["--dry-run", *overrides(pool, small_disk / "run")]) == 0


@pytest.mark.slow
def test_six_kinds_of_faults_in_one_run_change_no_byte(finished, pool, small_disk):
    """Like chaos.py, but at the beginning of each stage, so that every strike hits."""
    remount(small_disk, "size=32m")
    address = ray.get_runtime_context().gcs_address
    place = Place(str(small_disk), small_disk.parent, disk=small_disk)
    faults = [
        Fault("sigkill", "index", 0),
        Fault("actor", "embed", 0),
        Fault("full disk", "cluster", 0),
        Fault("ctrl-c", "train", 0),
        Fault("train worker", "train", 0),
        Fault("sigterm", "select", 0),
    ]
    settings = [*overrides(pool, small_disk / "struck"), f"ray_address={address}"]
    struck = Run(place, "struck", settings, random.Random(0), yaml=YAML)
    try:
        for fault in faults:
            struck.strike(fault, seconds=0)
        struck.finish(faults)
    finally:
        struck.end()
    assert [fault.kind for fault in faults if not fault.hit] == []
    assert contents(small_disk / "struck", *TABLES) == contents(finished, *TABLES)

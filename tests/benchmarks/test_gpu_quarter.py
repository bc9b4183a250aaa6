"""benchmarks/gpu_quarter.py in small: every part runs on CPUs, and one that is killed repeats nothing that was done."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_quarter.py"
MOST_CPU_S = 120  # of --quick: a minute of two cores
# What a part writes in the middle of its work.
HALFWAY = {
    "encoder": "run/pretrain/_STARTED.json",
    "clusters": "run/cluster/_STARTED.json",
    "proxy": "run/dynamics/epoch=000/*.parquet",
    "pruned_90": "judged/trials/*.json",
    "pruned_70": "judged/trials/*.json",
}
# An encoder that does not exist stands for a library that is not installed.
WITHOUT_POOL = """
import dataclasses, sys
from pathlib import Path
import gpu_quarter as quarter

folder = Path(sys.argv[1])
settings = quarter.QUICK | {"sizes": dataclasses.replace(quarter.QUICK["sizes"], encoder="timm/no_such_encoder")}
work = quarter.Work(folder / "missing.parquet", folder / "test.parquet", folder, **settings)
quarter.run_parts(work, ["encoder", "clusters", "rates"])
"""
# What depends on the machine and its load.
RATES = ("seconds", "images_per_s")
PARTS = ["tests", "encoder", "clusters", "proxy", "pruned_90", "pruned_70", "rates"]


def command(folder: Path) -> list[str]:
    return [sys.executable, str(SCRIPT), "--quick", "--minutes", "20", "--folder", str(folder)]


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the line of each part, without what depends on the machine."""
    path = folder / "results.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert len({line["part"] for line in lines}) == len(lines)
    return {line["part"]: {name: line[name] for name in line if name not in RATES} for line in lines}


def finished_files(folder: Path) -> dict[Path, int]:
    """Return the markers of complete stages and the results of trainings, with the times when they were written."""
    paths = [*folder.rglob("_SUCCESS.json"), *folder.glob("judged/trials/*.json")]
    return {path: path.stat().st_mtime_ns for path in paths}


def wait_until(is_met: Callable[[], bool], process: subprocess.Popen) -> None:
    while not is_met():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)


def kill_in(part: str, folder: Path, log: Path) -> None:
    """Start the command and kill it, with all that it has started, in the middle of this part."""
    before = set(folder.glob(HALFWAY.get(part, "*")))
    with (
        log.open("wb") as sink,
        subprocess.Popen(command(folder), stdout=sink, stderr=sink, start_new_session=True) as process,
    ):
        wait_until(lambda: f"{part}: ? s predicted" in log.read_text(), process)
        wait_until(lambda: part not in HALFWAY or not before.issuperset(folder.glob(HALFWAY[part])), process)
        os.killpg(process.pid, signal.SIGKILL)


def cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    start_s = cpu_seconds_of_children()
    ended = subprocess.run(command(folder), capture_output=True, text=True, timeout=1200)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert cpu_seconds_of_children() - start_s < MOST_CPU_S
    return folder


def test_every_part_leaves_a_line(undisturbed):
    lines = results(undisturbed)
    assert list(lines) == PARTS
    assert lines["tests"] == {"part": "tests", "predicted_s": None, "exit_code": 0}
    assert sum(lines["clusters"]["sizes"]) == 1000
    for part, figure in (("encoder", "nearest_10_right"), ("clusters", "pseudo_labels_right")):
        assert 0.1 < lines[part][figure] < 1
    assert set(lines["pruned_70"]["accuracies"]) >= {"full", "random", "elfs"}


def test_a_run_killed_in_every_part_repeats_nothing_that_was_finished(undisturbed, tmp_path):
    folder, finished = tmp_path / "killed", {}
    for number, part in enumerate(PARTS):
        kill_in(part, folder, tmp_path / f"{part}.log")
        assert list(results(folder)) == PARTS[:number]
        finished |= finished_files(folder)
    ended = subprocess.run(command(folder), capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    killed, whole = results(folder), results(undisturbed)
    for part in PARTS[:-1]:  # the last one has rates alone
        assert killed[part] == whole[part]
    assert killed["rates"].keys() == whole["rates"].keys()
    begun = [line for log in tmp_path.glob("*.log") for line in log.read_text().splitlines() if "s predicted" in line]
    assert len(begun) == 2 * len(PARTS) - 1  # a part is begun in the run that it is killed in, and in the next


def test_a_part_that_fails_leaves_its_error_and_ends_no_other(tmp_path):
    """There is no pool, so that nothing but the rates can be measured; these are of one thread's size."""
    command = [sys.executable, "-c", WITHOUT_POOL, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=SCRIPT.parent)
    assert ended.returncode == 1 and "clusters: left out, as encoder failed" in ended.stderr, ended.stderr[-3000:]
    encoder, rates = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert "missing.parquet" in encoder["error"] and rates["part"] == "rates"
    assert rates["training_images_s"] > 0
    assert "timm/no_such_encoder" in rates["errors"]["encoder"]

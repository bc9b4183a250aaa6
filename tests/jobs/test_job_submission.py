"""Submit jobs with `ray job submit` to a head that `ray start` made; follow, stop and resubmit them."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from elfs_ray.config import load_config
from elfs_ray.pipeline.runner import run
from elfs_ray.presets import preset
from elfs_ray.storage.run_dir import RunDir
from tests.tables import contents, digit_images, png

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TABLES = ("index", "rejected", "embeddings", "proxy_images", "clusters", "dynamics", "scores", "coreset")
PORT_OPTIONS = (
    *("--port", "--dashboard-port", "--dashboard-agent-listen-port", "--dashboard-agent-grpc-port"),
    *("--metrics-export-port", "--runtime-env-agent-port", "--ray-client-server-port"),
)


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """Yield the address of the job server of a head with 2 CPUs, the session's token and no copy of elfs_ray."""
    folder = tempfile.mkdtemp(prefix="er-", dir="/tmp")
    ports = free_ports(len(PORT_OPTIONS))
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={folder}"]
    command += ["--object-store-memory=300000000", "--min-worker-port=0", "--max-worker-port=0"]
    command += [f"{option}={port}" for option, port in zip(PORT_OPTIONS, ports, strict=True)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{BIN}:{environment['PATH']}"
    log = Path(folder) / "start.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, env=environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True, cwd=folder
        )
    address = f"http://127.0.0.1:{ports[1]}"
    try:
        wait_for(lambda: ray_job("list", address=address).returncode == 0, 90, log.read_text)
        yield address
    finally:
        end_processes_of(folder, process)
        shutil.rmtree(folder, ignore_errors=True)


def end_processes_of(folder: str, head_process: subprocess.Popen) -> None:
    """End a Ray by the process that started it, then whatever else still has its folder on its command line."""
    head_process.terminate()
    try:
        head_process.wait(30)
    except subprocess.TimeoutExpired:
        head_process.kill()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if folder.encode() in path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue


def wait_for(condition, timeout_s: float, describe=lambda: "") -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, describe()
        time.sleep(0.2)


def ray_job(*arguments: str, address: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [str(BIN / "ray"), "job", arguments[0], "--address", address, *arguments[1:]]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=cwd)


@pytest.fixture(scope="module")
def overrides(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("pool")
    images, _ = digit_images(200)
    for number, image in enumerate(images):
        (folder / f"{number:03d}.png").write_bytes(png(image))
    return [
        *(f"pool.uri={folder}", "budget=0.25", "embed.encoder=pixels", "embed.image_size=8"),
        *("embed.proxy_image_size=8", "cluster.method=kmeans", "cluster.num_clusters=10", "train.network=small_cnn"),
        *("train.epochs=300", "train.batch_size=32", "train.augmentation=crop", "train.crop_padding=1"),
        *("train.num_workers=1", "train.cpus_per_worker=1", "select.method=double_end", "select.hard_fraction=0.2"),
    ]


def test_a_submitted_job_runs_the_code_that_came_with_it(head):
    result = ray_job(
        "submit",
        "--working-dir",
        ".",
        "--",
        "python",
        "-c",
        "import elfs_ray; print(elfs_ray.__file__)",
        address=head,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "/working_dir_files/_ray_pkg_" in result.stdout


def test_a_stopped_and_resubmitted_job_equals_an_undisturbed_run(head, ray_cluster, overrides, tmp_path):
    entrypoint = ["--working-dir", ".", "--", "python", "jobs/cifar10.py", *overrides, f"run_dir={tmp_path / 'run'}"]
    submitted = ray_job("submit", "--no-wait", "--submission-id", "first", *entrypoint, address=head)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr

    command = [str(BIN / "ray"), "job", "logs", "--address", head, "--follow", "first"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as follower:
        lines = []
        for line in follower.stdout:
            lines.append(line)
            if "cluster   complete" in line:
                break
        assert "cluster   complete" in lines[-1], "".join(lines)
        assert any(line.startswith("index ") for line in lines)
        wait_for(lambda: list((tmp_path / "run").glob("dynamics/epoch=001/*.parquet")), 120, lambda: "".join(lines))
        stopped = ray_job("stop", "first", address=head)
        assert stopped.returncode == 0 and "was stopped" in stopped.stdout, stopped.stdout + stopped.stderr
        follower.terminate()
    assert "Job 'first' was stopped" in ray_job("status", "first", address=head).stdout
    assert RunDir(tmp_path / "run").success_marker("train") is None

    finished = ray_job("submit", "--submission-id", "second", *entrypoint, address=head)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert (
        "cluster   complete, skipped" in finished.stdout and "train     was started before, resumes" in finished.stdout
    )
    assert f"coreset  {tmp_path / 'run' / 'coreset.txt'}" in finished.stdout

    run(load_config(preset("cifar10"), [*overrides, f"run_dir={tmp_path / 'undisturbed'}"]))
    assert contents(tmp_path / "run", *TABLES) == contents(tmp_path / "undisturbed", *TABLES)

"""A Ray that cannot be started or joined ends a job in one message that says what to do, within seconds."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from elfs_ray.runtime.cluster import WORKER_ENVIRONMENT, _starts_cluster

CONNECT = """
import sys
from elfs_ray.cli import report_errors
from elfs_ray.runtime.cluster import connect, find_devices

sys.exit(report_errors(lambda: find_devices(None) if sys.argv[1] == "dry" else connect(sys.argv[1] or None)))
"""


def connect(address: str, *, before: str = "", **env: str) -> str:
    """Connect in a new process, after shell commands that change its environment; return its one message."""
    command = f'{before} exec "$0" "$@"'
    ray = dict.fromkeys(("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"), "")
    full = {name: value for name, value in (os.environ | ray | env).items() if value}
    job = ["bash", "-c", command, sys.executable, "-c", CONNECT, address]
    end = subprocess.run(job, capture_output=True, text=True, timeout=100, env=full, cwd=Path(__file__).parents[2])
    assert end.returncode == 2 and end.stderr.startswith("error: ") and end.stderr.count("\n") == 1, end.stderr
    return end.stderr


@pytest.mark.parametrize(
    ("name", "folder"), [("TMPDIR", "/tmp/" + "x" * 90), ("RAY_TMPDIR", "/proc/none"), ("TMPDIR", "/dev/null/x")]
)
def test_a_folder_that_ray_cannot_use_is_refused_with_what_to_set(name, folder):
    others = dict.fromkeys({"TMPDIR", "RAY_TMPDIR"} - {name}, "")
    try:
        before = f"mkdir -p {folder};" if folder.startswith("/tmp/") else ""
        assert "set HOME, or RAY_TMPDIR=/tmp" in connect("local", before=before, **{name: folder}, **others)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_a_home_that_cannot_be_written_is_refused_with_what_to_set():
    message = connect("local", HOME="/proc/none")
    assert "/proc/none" in message and "needs a HOME that can be written" in message


@pytest.mark.parametrize("address", ["", "dry", "given"])
def test_an_address_where_nothing_listens_is_refused_at_once(address):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{unused.getsockname()[1]}"
        message = connect(place) if address == "given" else connect(address, RAY_ADDRESS=place)
    key = "ray_address" if address == "given" else "RAY_ADDRESS"
    assert f"no Ray cluster answers at {key}={place}: " in message and "give ray_address=local" in message


def test_workers_alone_get_the_environment_of_workers(ray_cluster):
    def environment() -> dict[str, str]:
        return dict(os.environ)

    of_worker = ray.get(ray.remote(environment).remote())
    assert {name: of_worker.get(name) for name in WORKER_ENVIRONMENT} == WORKER_ENVIRONMENT
    assert "MKL_NUM_THREADS" not in os.environ


@pytest.mark.parametrize(
    ("address", "variable", "starts"),
    [("local", "10.0.0.1:6379", True), ("10.0.0.1:6379", "", False), (None, "10.0.0.1:6379", False), (None, "", True)],
)
def test_a_ray_is_started_where_no_address_is_given(tmp_path, monkeypatch, address, variable, starts):
    monkeypatch.setenv("RAY_ADDRESS", variable)
    assert _starts_cluster(address, str(tmp_path)) == starts


def test_a_ray_that_was_started_on_this_machine_is_joined(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as cluster:
        (tmp_path / "ray_current_cluster").write_text(f"127.0.0.1:{cluster.getsockname()[1]}")
        assert not _starts_cluster(None, str(tmp_path))
    assert _starts_cluster(None, str(tmp_path))  # it was killed, and Ray still has its address

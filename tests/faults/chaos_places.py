"""Set up the places of chaos.py's runs: a pool of digits, three nodes on this machine, a small disk, a bucket."""

import contextlib
import os
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.faults.chaos_strikes import NODE, STRIKES

DISK_BYTES = 96 << 20
OTHER_NODES = 2


@dataclass(frozen=True)
class Place:
    """The folder or bucket of some runs' directories, and what strikes can reach there (see Rig)."""

    root: str
    logs: Path
    cluster: Any = None
    nodes: list[Any] = field(default_factory=list)
    disk: Path | None = None
    store: subprocess.Popen | None = None

    def kinds(self) -> list[str]:
        """Return the kinds of strikes that have a target here."""
        missing = {
            "node": self.cluster is None,
            "full disk": self.disk is None,
            "silent store": self.store is None,
        }
        return [kind for kind in STRIKES if not missing.get(kind, False)]


def write_pool(folder: Path, num_images: int) -> Path:
    """Write digits to four Parquet files, with a broken image in each, and return their folder."""
    from jobs.quickstart import write_digits

    write_digits(folder)
    images = pq.read_table(folder / "pool.parquet")["image"].to_pylist()[:num_images]
    (folder / "pool").mkdir()
    for part in range(4):
        table = pa.table({"image": [*images[part::4], b"broken"]})
        pq.write_table(table, folder / "pool" / f"{part}.parquet")
    return folder / "pool"


@contextlib.contextmanager
def three_nodes(folder: Path) -> Iterator[tuple[Any, list[Any]]]:
    """Start a head and two nodes on this machine, with a token that no other Ray shares."""
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "dashboard_port": 0})
    try:
        yield cluster, [cluster.add_node(**NODE) for _ in range(OTHER_NODES)]
    finally:
        cluster.shutdown()


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Yield a folder for the runs, and whether it is a separate disk, which can be filled without harm."""
    place = folder / "runs"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
    is_mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield place, is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(place)], check=True)


@contextlib.contextmanager
def bucket(folder: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """Yield a bucket on an S3 server, and the server's process."""
    from tests.s3 import start_server

    process, server = start_server(folder / "s3.log")
    try:
        yield server.make_bucket(), process
    finally:
        process.kill()
        process.wait()

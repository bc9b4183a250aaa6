"""An S3 server for the tests, in another process, with a new bucket for each test."""

import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pyarrow import fs

SERVER = Path(__file__).with_name("s3_server.py")
PORTS = range(20_000, 30_000)  # below the ephemeral ports, which Linux gives to outgoing connections


def environment() -> dict[str, str]:
    """Return the address of the future server and credentials for it.

    They must be in os.environ before Ray starts, which passes them on to its workers.
    """
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def free_port() -> int:
    """Return a port on which nothing listens."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


@dataclass(frozen=True)
class S3Server:
    """A running server at `endpoint`."""

    endpoint: str

    def fail(self, kind: str, count: int, method: str | None = None, key: str = "") -> None:
        """Make the next `count` requests fail that have this method and `key` in their path (see s3_server.py)."""
        fault = {"kind": kind, "count": count, "key": key, **({"method": method} if method else {})}
        urllib.request.urlopen(self.endpoint + "/_faults", data=json.dumps(fault).encode(), timeout=10).close()

    def fail_no_more(self) -> None:
        """Cancel the remaining faults."""
        self.fail("none", 0)

    def num_requests(self) -> int:
        """Return the number of requests so far."""
        with urllib.request.urlopen(self.endpoint + "/_requests", timeout=10) as response:
            return sum(json.load(response).values())

    def make_bucket(self) -> str:
        """Return a new empty bucket, as s3://<bucket>."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        scheme, _, address = self.endpoint.partition("://")
        store = fs.S3FileSystem(endpoint_override=address, scheme=scheme, allow_bucket_creation=True)
        store.create_dir(name)
        return f"s3://{name}"


def start_server(log: Path) -> tuple[subprocess.Popen, S3Server]:
    """Start a server at AWS_ENDPOINT_URL and return it once it answers; its output goes to the file `log`."""
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    with log.open("wb") as sink:
        command = [sys.executable, str(SERVER), endpoint.rpartition(":")[2]]
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)
    server = S3Server(endpoint)
    deadline = time.monotonic() + 60
    while True:
        try:
            server.num_requests()
            return process, server
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise RuntimeError(f"the S3 server did not start: {log.read_text()}") from error
            time.sleep(0.05)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory) -> Iterator[S3Server]:
    """Start an S3 server for the session."""
    process, server = start_server(tmp_path_factory.mktemp("s3") / "server.log")
    yield server
    process.terminate()
    process.wait(20)


@pytest.fixture
def s3_bucket(s3_server: S3Server) -> str:
    """Return a new empty bucket, as s3://<bucket>."""
    return s3_server.make_bucket()

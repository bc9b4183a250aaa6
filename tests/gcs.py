"""A Google Cloud Storage server for the tests, in another process, with a new bucket for each test."""

import json
import os
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator

import pytest

from tests.s3 import free_port

MAIN = "import sys; from gcp_storage_emulator.__main__ import main; sys.exit(main(sys.argv[1:]))"


def environment() -> dict[str, str]:
    """Return the address of the future server, for os.environ, before anything opens a bucket."""
    return {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{free_port()}"}


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory) -> Iterator[str]:
    """Start a server for the session; yield its address."""
    address = os.environ["STORAGE_EMULATOR_HOST"]
    options = ["start", "--host=127.0.0.1", f"--port={address.rpartition(':')[2]}", "--in-memory"]
    log = tmp_path_factory.mktemp("gcs") / "server.log"
    with log.open("wb") as sink:
        process = subprocess.Popen([sys.executable, "-c", MAIN, *options], stdout=sink, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 60
    while b"All services started" not in log.read_bytes():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    yield address
    process.terminate()
    process.wait(20)


@pytest.fixture
def gcs_bucket(gcs_server: str) -> str:
    """Return a new empty bucket, as gs://<bucket>."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    request = urllib.request.Request(
        f"{gcs_server}/storage/v1/b?project=test",
        data=json.dumps({"name": name}).encode(),
        headers={"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request, timeout=10).close()
    return f"gs://{name}"

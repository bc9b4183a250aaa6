"""Start an S3 server for measurements: moto in a separate process, which keeps objects in memory.

It implements the protocol but is no fast store: one Python process answers a few hundred requests a second, and takes
CPU time from what is being measured.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from elfs_ray.storage import filesystem


def environment(port: int) -> dict[str, str]:
    """Return the variables by which Ray's workers find the server. They must be set before Ray starts."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "benchmark",
        "AWS_SECRET_ACCESS_KEY": "benchmark",
        "AWS_REGION": "us-east-1",
    }


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@contextlib.contextmanager
def s3_server(port: int, bucket: str) -> Iterator[str]:
    """Start a server with one bucket, set os.environ, and yield s3://<bucket>. Stop the server at the end."""
    os.environ |= environment(port)
    command = [sys.executable, "-m", "moto.server", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        import boto3

        boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).create_bucket(Bucket=bucket)
        yield f"s3://{bucket}"
    finally:
        process.terminate()
        process.wait()


def copy(folder: Path, uri: str) -> None:
    """Copy the files of a folder to a URI, except those that exist there with the same size."""
    existing = {info.base_name: info.size for info in filesystem.list_files(uri)}
    for path in sorted(folder.iterdir()):
        if existing.get(path.name) != path.stat().st_size:
            filesystem.write_bytes(filesystem.join(uri, path.name), path.read_bytes())

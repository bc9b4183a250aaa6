"""Downloads from a server of this machine: broken off, gone on, without ranges, of another file."""

import dataclasses
import hashlib
import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from elfs_ray.datasets import download as download_module
from elfs_ray.datasets.download import download
from elfs_ray.datasets.prepare import prepare
from elfs_ray.datasets.published import BENCHMARKS, Archive, Benchmark, SourceError
from tests.datasets.layouts import BUILD

DATA = np.random.default_rng(0).bytes(3 << 20)


@dataclass
class Server:
    """Serves `data`. breaks: after how many bytes of an answer its connections end, one after the other."""

    data: bytes = DATA
    knows_ranges: bool = True
    breaks: list[int] = field(default_factory=list)
    status: int = 200
    ranges: list[str | None] = field(default_factory=list)
    url: str = ""

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range")
        self.ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.knows_ranges else 0
        status = self.status if self.status != 200 else 416 if start >= len(self.data) else 206 if start else 200
        body = self.data[start:] if status in (200, 206) else b""
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body[: self.breaks.pop(0)] if self.breaks else body)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            state.answer(self)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        state.url = f"http://127.0.0.1:{running.server_port}/cifar-10-binary.tar.gz"
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield state
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(download_module, "PAUSES_S", (0.0, 0.0))


def benchmark_of(server: Server, data: bytes = DATA) -> Benchmark:
    archive = Archive("cifar-10-binary.tar.gz", hashlib.md5(data).hexdigest(), server.url)
    return dataclasses.replace(BENCHMARKS["cifar10"], archives=(archive,))


def test_an_archive_is_downloaded_once(server, tmp_path):
    path = download(benchmark_of(server), tmp_path)
    assert path.read_bytes() == DATA and list(tmp_path.iterdir()) == [path]
    assert download(benchmark_of(server), tmp_path) == path and server.ranges == [None]


def test_a_download_that_breaks_off_goes_on_from_there(server, tmp_path):
    server.breaks = [1 << 20, 1 << 19]
    assert download(benchmark_of(server), tmp_path).read_bytes() == DATA
    assert server.ranges == [None, f"bytes={1 << 20}-", f"bytes={(1 << 20) + (1 << 19)}-"]


def test_a_download_that_an_earlier_command_began_goes_on(server, tmp_path):
    (tmp_path / "cifar-10-binary.tar.gz.part").write_bytes(DATA[:1000])
    assert download(benchmark_of(server), tmp_path).read_bytes() == DATA
    assert server.ranges == ["bytes=1000-"]
    (tmp_path / "cifar-10-binary.tar.gz").rename(tmp_path / "cifar-10-binary.tar.gz.part")
    assert download(benchmark_of(server), tmp_path).read_bytes() == DATA, "whole, and not yet under its name"


def test_a_server_that_knows_no_ranges_sends_all_again(server, tmp_path):
    server.knows_ranges, server.breaks = False, [1 << 20]
    assert download(benchmark_of(server), tmp_path).read_bytes() == DATA


def test_another_file_than_published_is_deleted_and_asked_for(server, tmp_path):
    server.data = DATA[:-1] + b"x" + b"longer"
    with pytest.raises(SourceError, match="cut short, damaged or another file"):
        download(benchmark_of(server), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("status", "num_requests"), [(404, 1), (503, 3)])
def test_a_server_that_has_nothing_is_named_with_the_owners_page(server, tmp_path, status, num_requests):
    server.status = status
    with pytest.raises(SourceError, match="cannot be downloaded") as error:
        download(benchmark_of(server), tmp_path)
    assert server.url in str(error.value) and BENCHMARKS["cifar10"].page in str(error.value)
    assert len(server.ranges) == num_requests and not any(path.suffix == ".gz" for path in tmp_path.iterdir())


def test_a_connection_that_always_breaks_keeps_what_came(server, tmp_path):
    server.breaks = [1000, 1000, 1000]
    with pytest.raises(SourceError, match="cannot be downloaded"):
        download(benchmark_of(server), tmp_path)
    assert (tmp_path / "cifar-10-binary.tar.gz.part").read_bytes() == DATA[:3000]


def test_what_its_owner_does_not_give_to_anybody_is_asked_for(tmp_path):
    with pytest.raises(SourceError, match=r"image-net\.org.*after signing in"):
        prepare(BENCHMARKS["imagenet"], "download", tmp_path / "pools" / "imagenet")
    assert not list(tmp_path.rglob("*imagenet*"))


def test_source_download_ends_in_a_pool_and_keeps_the_archive(server, tmp_path):
    built = BUILD["cifar10"]("cifar10", tmp_path / "published")
    server.data = built.archive.read_bytes()
    archives = (dataclasses.replace(built.benchmark.archives[0], url=server.url),)
    prepare(dataclasses.replace(built.benchmark, archives=archives), "download", tmp_path / "pools" / "cifar10")
    found = {path.name for path in Path(tmp_path / "pools").iterdir()}
    assert found == {"cifar10", "cifar-10-binary.tar.gz"}

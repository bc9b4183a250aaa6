"""Where the archives come from: source=download, from a server of this machine."""

import dataclasses
import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from elfs_ray.datasets.benchmarks import BENCHMARKS, Benchmark, SourceError
from elfs_ray.datasets.prepare import prepare
from tests.datasets.layouts import BUILD, Built


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def cifar10(tmp_path) -> Iterator[Built]:
    """A small CIFAR10 whose archive is served from its folder."""
    built = BUILD["cifar10"]("cifar10", tmp_path / "published")
    handler = functools.partial(Handler, directory=str(built.archive.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/{built.archive.name}"
        archives = (dataclasses.replace(built.benchmark.archives[0], url=url),)
        yield dataclasses.replace(built, benchmark=dataclasses.replace(built.benchmark, archives=archives))
        server.shutdown()
        thread.join()


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def download(benchmark: Benchmark, tmp_path: Path) -> set[str]:
    """Prepare it by a download; return what lies in the folder of pools then."""
    prepare(benchmark, "download", tmp_path / "pools" / benchmark.name)
    return names_in(tmp_path / "pools")


def test_a_download_ends_in_a_pool_and_keeps_the_archive(cifar10, tmp_path):
    assert download(cifar10.benchmark, tmp_path) == {"cifar10", "cifar-10-python.tar.gz"}
    assert names_in(tmp_path / "pools" / "cifar10") == {"train", "test", "dataset.json"}


def test_an_archive_that_is_there_is_not_downloaded_again(cifar10, tmp_path):
    (tmp_path / "pools").mkdir()
    cifar10.archive.rename(tmp_path / "pools" / cifar10.archive.name)  # the server no longer has it
    assert download(cifar10.benchmark, tmp_path) == {"cifar10", "cifar-10-python.tar.gz"}


def test_a_download_that_fails_names_address_and_page_and_leaves_nothing(cifar10, tmp_path):
    whole = cifar10.archive.read_bytes()
    for data in (None, whole[:1000], whole[:-1] + b"x"):
        cifar10.archive.unlink()
        if data is not None:
            cifar10.archive.write_bytes(data)
        with pytest.raises(SourceError, match="cannot be downloaded") as error:
            download(cifar10.benchmark, tmp_path)
        assert cifar10.benchmark.archives[0].url in str(error.value)
        assert cifar10.benchmark.page in str(error.value)
        assert not names_in(tmp_path / "pools")
        cifar10.archive.write_bytes(whole)
    assert download(cifar10.benchmark, tmp_path) == {"cifar10", "cifar-10-python.tar.gz"}


def test_imagenet_is_not_downloaded_as_its_owner_wants_a_login(tmp_path):
    with pytest.raises(SourceError, match=r"image-net\.org.*after signing in"):
        download(BENCHMARKS["imagenet"], tmp_path)
    assert not list(tmp_path.iterdir())

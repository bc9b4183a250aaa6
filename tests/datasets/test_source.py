"""Download archives from a server on this machine, and compare what is known of them with torchvision."""

import dataclasses
import functools
import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from elfs_ray.datasets import readers
from elfs_ray.datasets.benchmarks import BENCHMARKS, Benchmark, SourceError
from elfs_ray.datasets.prepare import prepare
from tests.datasets.layouts import ARCHIVE_META, BUILD, Built


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def cifar10(tmp_path) -> Iterator[Built]:
    """Yield a small CIFAR10 whose archive is served over HTTP."""
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
    """Prepare a benchmark by a download and return the names in the folder of pools."""
    prepare(benchmark, "download", tmp_path / "pools" / benchmark.name)
    return names_in(tmp_path / "pools")


def test_a_download_ends_in_a_pool_and_keeps_the_archive(cifar10, tmp_path):
    assert download(cifar10.benchmark, tmp_path) == {"cifar10", "cifar-10-python.tar.gz"}
    assert names_in(tmp_path / "pools" / "cifar10") == {"train", "test", "dataset.json"}


def test_an_existing_archive_is_not_downloaded_again(cifar10, tmp_path):
    (tmp_path / "pools").mkdir()
    cifar10.archive.rename(tmp_path / "pools" / cifar10.archive.name)  # the server no longer has it
    assert download(cifar10.benchmark, tmp_path) == {"cifar10", "cifar-10-python.tar.gz"}


def test_a_failed_download_names_address_and_page_and_leaves_nothing(cifar10, tmp_path):
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


def test_imagenet_cannot_be_downloaded_without_a_login(tmp_path):
    with pytest.raises(SourceError, match=r"image-net\.org.*after signing in"):
        download(BENCHMARKS["imagenet"], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_archives_and_folders_are_those_that_torchvision_knows(name):
    (archive,) = BENCHMARKS[name].archives
    dataset = getattr(readers, name.upper())
    assert (archive.name, archive.md5, archive.url) == (dataset.filename, dataset.tgz_md5, dataset.url)
    assert BENCHMARKS[name].folders == (dataset.base_folder,)


def test_imagenets_archives_are_those_that_torchvision_knows():
    archives = {(archive.name, archive.md5) for archive in BENCHMARKS["imagenet"].archives}
    assert archives == {ARCHIVE_META[key] for key in ("devkit", "train", "val")}


def test_torchvision_is_not_imported_before_an_archive_is_opened():
    """`elfs-ray prepare --help` and --dry-run must not wait for it."""
    heavy = "{'ray', 'torch', 'torchvision'}"
    script = f"import sys, elfs_ray.datasets.prepare; print(sorted({heavy}.intersection(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, check=True)
    assert result.stdout == "[]\n"

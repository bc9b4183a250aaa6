"""Prepare the five benchmarks: from archives in their published layouts to pools."""

import dataclasses
import fcntl
import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from elfs_ray.datasets.benchmarks import BENCHMARKS, SourceError, Split
from elfs_ray.datasets.prepare import Facts, find_finished, prepare
from elfs_ray.pool.listing import PoolColumns, find_units, list_unit, read_images
from tests.datasets.layouts import BUILD, Built

ARCHIVES = os.environ.get("ELFS_RAY_ARCHIVES")  # a folder with some of the owners' archives


@pytest.fixture(scope="module", params=BUILD)
def built(request, tmp_path_factory) -> Built:
    return BUILD[request.param](request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def cifar10(tmp_path) -> Built:
    return BUILD["cifar10"]("cifar10", tmp_path / "published")


def pool_of(folder: Path) -> list[tuple[bytes, int]]:
    """Return every image file and its label, as the pipeline reads a pool."""
    columns = PoolColumns(label="label")
    tables = [list_unit(unit, columns) for unit in find_units(str(folder))]
    uris = [uri for table in tables for uri in table["uri"].to_pylist()]
    labels = [label for table in tables for label in table["label"].to_pylist()]
    return list(zip(read_images(uris, columns), labels, strict=True))


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.parquet")}


def test_an_archive_becomes_pools_with_every_pixel_and_label(built, tmp_path):
    facts = prepare(built.benchmark, str(built.archive), tmp_path / "pool")
    for split, expected in built.images.items():
        rows = pool_of(tmp_path / "pool" / split)
        assert [label for _, label in rows] == [label for _, label in expected]
        for (data, _), (image, _) in zip(rows, expected, strict=True):
            if isinstance(image, bytes):
                assert data == image
            else:
                np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), image)
        (path, *_) = (tmp_path / "pool" / split).iterdir()
        assert json.loads(pq.read_schema(path).metadata[b"label_names"]) == facts.label_names
    assert len(facts.label_names) == built.benchmark.num_classes
    assert {path.name for path in (tmp_path / "pool").iterdir()} == {*built.images, "dataset.json"}


def test_an_unpacked_folder_gives_the_same_bytes_as_its_archive(built, tmp_path):
    prepare(built.benchmark, str(built.archive), tmp_path / "a")
    prepare(built.benchmark, str(built.folder), tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b") != {}
    if built.folder.name in built.benchmark.folders:
        prepare(built.benchmark, str(built.folder.parent), tmp_path / "c")
        assert tree(tmp_path / "c") == tree(tmp_path / "a")


def test_a_damaged_archive_is_refused_and_leaves_nothing(built, tmp_path):
    paths = [built.archive] if built.archive.is_file() else sorted(built.archive.iterdir())
    for number, path in enumerate(paths):
        source = tmp_path / f"source{number}"
        source.mkdir()
        for other in paths:
            data = other.read_bytes()
            (source / other.name).write_bytes(data[: len(data) // 2] if other == path else data)
        with pytest.raises(SourceError, match="cut short, damaged or another file") as error:
            prepare(built.benchmark, str(source), tmp_path / "pool")
        assert path.name in str(error.value) and built.benchmark.page in str(error.value)
        assert sorted(tmp_path.glob("pool*")) == []


def test_a_missing_source_is_refused_with_the_page_that_has_it(built, tmp_path):
    for source in (tmp_path / "none", tmp_path):
        with pytest.raises(SourceError, match=r"does not exist|has no") as error:
            prepare(built.benchmark, str(source), tmp_path / "pool")
        assert built.benchmark.page in str(error.value)
        assert built.benchmark.archives[0].name in str(error.value)
        assert not list(tmp_path.iterdir())


def test_a_folder_with_other_counts_than_published_is_refused(built, tmp_path):
    known = built.benchmark.splits
    more = dataclasses.replace(known["train"], num_images=known["train"].num_images + 1)
    uneven = Split(known["test"].num_images, known["test"].fewest_of_class + 1, 99)
    for splits, message in (
        (known | {"train": more}, rf"train in .* has {known['train'].num_images:,} images; there must be"),
        (known | {"test": uneven}, r"test in .* images of a class; there must be"),
    ):
        with pytest.raises(SourceError, match=message):
            prepare(dataclasses.replace(built.benchmark, splits=splits), str(built.folder), tmp_path / "pool")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["cinic10", "imagenet"])
def test_an_extra_or_an_empty_class_folder_is_refused(name, tmp_path):
    built = BUILD[name](name, tmp_path / "published")
    extra = built.folder / "train" / "zzz"
    extra.mkdir()
    with pytest.raises(SourceError, match="has no complete train"):
        prepare(built.benchmark, str(built.folder), tmp_path / "pool")
    shutil.copy(next((built.folder / "train").rglob("*.[pJ]*")), extra)
    with pytest.raises(SourceError, match=f"classes; there must be {built.benchmark.num_classes}"):
        prepare(built.benchmark, str(built.folder), tmp_path / "pool")


@pytest.mark.parametrize(("name", "file"), [("cifar10", "test_batch"), ("cifar100", "meta"), ("stl10", "test_X.bin")])
def test_a_changed_or_missing_file_of_a_folder_is_refused(name, file, tmp_path):
    built = BUILD[name](name, tmp_path / "published")
    path = built.folder / file
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    with pytest.raises(SourceError, match="is missing, cut short or not the published one"):
        prepare(built.benchmark, str(built.folder), tmp_path / "pool")
    path.unlink()
    with pytest.raises(SourceError, match="is missing, cut short or not the published one"):
        prepare(built.benchmark, str(built.folder), tmp_path / "pool")


class Trap:
    """An object whose pickle makes a folder when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["archive", "folder"])
def test_a_pickle_that_was_not_published_is_never_read(form, cifar10, tmp_path):
    (cifar10.folder / "data_batch_1").write_bytes(pickle.dumps(Trap(tmp_path / "trap")))
    with tarfile.open(cifar10.archive, "w:gz") as archive:
        archive.add(cifar10.folder, cifar10.folder.name)
    with pytest.raises(SourceError, match="cut short"):
        prepare(cifar10.benchmark, str(getattr(cifar10, form)), tmp_path / "pool")
    assert not (tmp_path / "trap").exists()


def test_an_archive_for_imagenet_is_unpacked_outside_its_folder(tmp_path):
    built = BUILD["imagenet"]("imagenet", tmp_path / "published")
    before = sorted(built.archive.iterdir())
    prepare(built.benchmark, str(built.archive), tmp_path / "pool")
    assert sorted(built.archive.iterdir()) == before and not any(path.is_symlink() for path in before)


def test_an_interrupted_command_resumes_and_gives_the_same_bytes(built, tmp_path):
    """Interrupt it while it unpacks, then in its second split: what was complete is not made again."""
    prepare(built.benchmark, str(built.archive), tmp_path / "undisturbed")
    part = tmp_path / "pool.part"

    def stop(*_):
        raise KeyboardInterrupt

    *archives, last = built.benchmark.archives
    archives.append(dataclasses.replace(last, unpack=stop))
    with pytest.raises(KeyboardInterrupt):
        prepare(dataclasses.replace(built.benchmark, archives=tuple(archives)), str(built.archive), tmp_path / "pool")
    assert not (part / "unpacked").exists() and (part / "unpacked.part").exists()
    second = dataclasses.replace(
        built.benchmark,
        open_split=lambda root, split: built.benchmark.open_split(root, split) if split == "train" else stop(),
    )
    with pytest.raises(KeyboardInterrupt):
        prepare(second, str(built.archive), tmp_path / "pool")
    assert not (tmp_path / "pool").exists()
    kept = {path: path.stat().st_mtime_ns for path in (part / "train").iterdir()}
    unpacked = {path: path.stat().st_mtime_ns for path in (part / "unpacked").rglob("*")}
    assert kept and unpacked
    with pytest.raises(KeyboardInterrupt):
        prepare(second, str(built.archive), tmp_path / "pool")
    assert {path: path.stat().st_mtime_ns for path in (part / "train").iterdir()} == kept
    assert {path: path.stat().st_mtime_ns for path in (part / "unpacked").rglob("*")} == unpacked
    prepare(built.benchmark, str(built.archive), tmp_path / "pool")
    assert tree(tmp_path / "pool") == tree(tmp_path / "undisturbed")
    assert {path.name for path in (tmp_path / "pool").iterdir()} == {*built.images, "dataset.json"}
    assert not part.exists()


def test_a_command_with_another_source_starts_over(cifar10, tmp_path):
    part = tmp_path / "pool.part"
    (part / "train").mkdir(parents=True)
    (part / "train" / "train-00000.parquet").write_bytes(b"of another source")
    known = {"images": 1, "images_of_class": [1], "files": {"train-00000.parquet": 17}}
    (part / "unpacked").mkdir()
    Facts("cifar10", {"folder": "/elsewhere"}, ["a"], {"train": known}).write(part)
    prepare(cifar10.benchmark, str(cifar10.archive), tmp_path / "pool")
    assert len(pool_of(tmp_path / "pool" / "train")) == 200


def test_finished_pools_are_kept_and_damaged_ones_are_refused(cifar10, tmp_path):
    out = tmp_path / "pool"
    prepare(cifar10.benchmark, str(cifar10.archive), out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    shutil.rmtree(cifar10.archive.parent)
    prepare(cifar10.benchmark, str(cifar10.archive), out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times
    path = next((out / "test").iterdir())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SourceError, match="missing or damaged"):
        find_finished(cifar10.benchmark, out)
    with pytest.raises(SourceError, match="holds something other than stl10"):
        find_finished(BENCHMARKS["stl10"], out)
    (out / "dataset.json").unlink()
    with pytest.raises(SourceError, match="holds something other than cifar10"):
        prepare(cifar10.benchmark, str(cifar10.archive), out)


def test_a_second_process_is_kept_out(cifar10, tmp_path):
    part = tmp_path / "pool.part"
    part.mkdir()
    with (part / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(SourceError, match="another process writes"):
            prepare(cifar10.benchmark, str(cifar10.archive), tmp_path / "pool")
    prepare(cifar10.benchmark, str(cifar10.archive), tmp_path / "pool")


def test_a_large_split_is_divided_into_files_and_row_groups(cifar10, tmp_path, monkeypatch):
    from elfs_ray.datasets import pool_writer

    monkeypatch.setattr(pool_writer, "GROUP_ROWS", 7)
    monkeypatch.setattr(pool_writer, "FILE_BYTES", 20_000)
    facts = prepare(cifar10.benchmark, str(cifar10.archive), tmp_path / "pool")
    files = sorted((tmp_path / "pool" / "train").iterdir())
    assert [path.name for path in files] == [f"train-{number:05d}.parquet" for number in range(len(files))]
    assert len(files) > 5 and list(facts.splits["train"]["files"]) == [path.name for path in files]
    assert [label for _, label in pool_of(tmp_path / "pool" / "train")] == [
        label for _, label in cifar10.images["train"]
    ]


@pytest.mark.skipif(ARCHIVES is None, reason="ELFS_RAY_ARCHIVES names no folder with the owners' archives")
@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_published_archives_are_read_completely(name, tmp_path):
    benchmark = BENCHMARKS[name]
    if not all((Path(str(ARCHIVES)) / archive.name).is_file() for archive in benchmark.archives):
        pytest.skip(f"{ARCHIVES} does not hold {benchmark.archives}")
    facts = prepare(benchmark, str(ARCHIVES), tmp_path / "pool")
    assert {split: written["images"] for split, written in facts.splits.items()} == {
        split: known.num_images for split, known in benchmark.splits.items()
    }

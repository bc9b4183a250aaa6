"""The five benchmarks, from archives in their published layouts to pools."""

import dataclasses
import fcntl
import hashlib
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from elfs_ray.datasets import prepare as prepare_module
from elfs_ray.datasets.prepare import Facts, find_finished, prepare
from elfs_ray.datasets.published import BENCHMARKS, Archive, SourceError, Split
from elfs_ray.pool.listing import PoolColumns, find_units, list_unit, read_images
from tests.datasets.layouts import BUILD, Built, write_folder, write_tar

ARCHIVES = os.environ.get("ELFS_RAY_ARCHIVES")  # a folder with some of the archives as they are published


@pytest.fixture(scope="module", params=BUILD)
def built(request, tmp_path_factory) -> Built:
    return BUILD[request.param](request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def cifar10(tmp_path) -> Built:
    return BUILD["cifar10"]("cifar10", tmp_path / "published")


def pool_of(folder: Path) -> list[tuple[bytes, int]]:
    """Every image file and its label, as the pipeline reads a pool."""
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
        found = pool_of(tmp_path / "pool" / split)
        assert [label for _, label in found] == [label for _, label in expected]
        for (data, _), (image, _) in zip(found, expected, strict=True):
            if isinstance(image, bytes):
                assert data == image
            else:
                np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), image)
        (path, *_) = (tmp_path / "pool" / split).iterdir()
        assert json.loads(pq.read_schema(path).metadata[b"label_names"]) == facts.label_names
    assert len(facts.label_names) == built.benchmark.num_classes
    assert {path.name for path in (tmp_path / "pool").iterdir()} == {*built.images, "dataset.json"}


def test_a_folder_that_was_unpacked_gives_the_same_bytes(built, tmp_path):
    prepare(built.benchmark, str(built.archive), tmp_path / "a")
    prepare(built.benchmark, str(built.folder), tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b") != {}
    if built.folder.name == built.benchmark.folder:
        prepare(built.benchmark, str(built.folder.parent), tmp_path / "c")
        assert tree(tmp_path / "c") == tree(tmp_path / "a")


def test_an_archive_that_is_cut_short_or_another_is_refused_and_leaves_nothing(built, tmp_path):
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


def test_a_source_that_is_not_there_is_asked_for_with_the_address_of_its_page(built, tmp_path):
    for source in (tmp_path / "none", tmp_path):
        with pytest.raises(SourceError, match=r"does not exist|has no|names 0 classes|0 images") as error:
            prepare(built.benchmark, str(source), tmp_path / "pool")
        assert built.benchmark.page in str(error.value)
        assert built.benchmark.archives[0].name in str(error.value)
        assert not (tmp_path / "pool").exists()


def test_a_folder_with_other_counts_than_published_is_refused(built, tmp_path):
    known = built.benchmark.splits
    more = dataclasses.replace(known["train"], num_images=known["train"].num_images + 1)
    with pytest.raises(SourceError, match=f"train has {known['train'].num_images:,} images, published were"):
        prepare(dataclasses.replace(built.benchmark, splits=known | {"train": more}), str(built.folder), tmp_path / "a")
    uneven = Split(known["test"].num_images, known["test"].fewest_of_class + 1, 99)
    with pytest.raises(SourceError, match="images of a class, published were"):
        prepare(
            dataclasses.replace(built.benchmark, splits=known | {"test": uneven}), str(built.folder), tmp_path / "b"
        )
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    assert not (tmp_path / "b.part" / "test").exists()


@pytest.mark.parametrize(
    ("name", "needed"), [("test_batch.bin", "no multiple of a record"), ("batches.meta.txt", "names 6 classes")]
)
def test_a_file_of_a_folder_that_is_cut_short_is_refused(cifar10, tmp_path, name, needed):
    path = cifar10.folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 5 // 9])
    with pytest.raises(SourceError, match=needed):
        prepare(cifar10.benchmark, str(cifar10.folder), tmp_path / "pool")
    path.unlink()
    with pytest.raises(SourceError, match=f"has no {name}"):
        prepare(cifar10.benchmark, str(cifar10.folder), tmp_path / "pool")


def test_a_changed_pixel_of_stl10s_folder_is_told_by_the_md5_of_its_files(tmp_path):
    built = BUILD["stl10"]("stl10", tmp_path / "published")
    path = built.folder / "test_X.bin"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(SourceError, match=r"test_X\.bin has another MD5"):
        prepare(built.benchmark, str(built.folder), tmp_path / "pool")


def test_a_label_that_is_no_class_is_refused(cifar10, tmp_path):
    path = cifar10.folder / "test_batch.bin"
    path.write_bytes(b"\x0a" + path.read_bytes()[1:])
    with pytest.raises(SourceError, match="label 10 is none of 10 classes"):
        prepare(cifar10.benchmark, str(cifar10.folder), tmp_path / "pool")


class Trap:
    """A pickle that would make a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["archive", "folder", "folder around it"])
def test_pickles_are_refused_unread_with_a_hint_at_the_binary_version(tmp_path, form):
    import pickle

    known = BENCHMARKS["cifar10"]
    files = {f"data_batch_{number}": pickle.dumps(Trap(tmp_path / "trap")) for number in range(1, 6)}
    archive = tmp_path / "cifar-10-python.tar.gz"
    md5 = write_tar(archive, files, f"{known.pickled_folder}/")
    write_folder(tmp_path / known.pickled_folder, files)
    benchmark = dataclasses.replace(known, pickled=Archive(archive.name, md5))
    source = {"archive": archive, "folder": tmp_path / known.pickled_folder}.get(form, tmp_path)
    with pytest.raises(SourceError, match="Python pickles, which can run code and are not read") as error:
        prepare(benchmark, str(source), tmp_path / "pool")
    assert "cifar-10-binary.tar.gz" in str(error.value) and "source=download" in str(error.value)
    assert not (tmp_path / "trap").exists()


def test_links_and_paths_out_of_an_archive_are_passed_over(cifar10, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"\0" * 3073)
    folder = cifar10.benchmark.folder
    files = {path.name: path.read_bytes() for path in cifar10.folder.iterdir() if path.name != "test_batch.bin"}
    path = tmp_path / "hostile.tar.gz"
    write_tar(path, files, f"{folder}/")
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            member = tarfile.TarInfo(f"{folder}/test_batch.bin")
            member.type, member.linkname = kind, str(secret)
            archive.addfile(member)
        for name in (f"/{folder}/test_batch.bin", "../test_batch.bin", f"{folder}/../{folder}/test_batch.bin"):
            member = tarfile.TarInfo(name)
            member.size = 3073
            archive.addfile(member, io.BytesIO(secret.read_bytes()))
    archives = (Archive(path.name, hashlib.md5(path.read_bytes()).hexdigest(), "x"),)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SourceError, match=r"has no test_batch\.bin"):
        prepare(dataclasses.replace(cifar10.benchmark, archives=archives), str(path), tmp_path / "pool")
    left = {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "pool.part")}
    assert left == before and not (tmp_path / "pool").exists()


def test_an_interrupted_command_goes_on_and_gives_the_bytes_of_an_undisturbed_one(built, tmp_path, monkeypatch):
    prepare(built.benchmark, str(built.archive), tmp_path / "undisturbed")
    open_whole = prepare_module.OPEN[built.benchmark.name]

    def open_and_stop(benchmark, given):
        contents = open_whole(benchmark, given)

        def read(split):
            images = list(contents.read(split))
            yield from images if split == "train" else images[:3]
            if split != "train":
                raise KeyboardInterrupt

        return dataclasses.replace(contents, read=read)

    monkeypatch.setitem(prepare_module.OPEN, built.benchmark.name, open_and_stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(built.benchmark, str(built.archive), tmp_path / "pool")
    assert not (tmp_path / "pool").exists()
    train = sorted((tmp_path / "pool.part" / "train").iterdir())
    times = [path.stat().st_mtime_ns for path in train]
    monkeypatch.undo()
    prepare(built.benchmark, str(built.archive), tmp_path / "pool")
    assert tree(tmp_path / "pool") == tree(tmp_path / "undisturbed")
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "pool" / "train").iterdir())] == times
    assert not (tmp_path / "pool.part").exists()


def test_a_command_with_another_source_begins_anew(cifar10, tmp_path):
    part = tmp_path / "pool.part"
    (part / "train").mkdir(parents=True)
    (part / "train" / "train-00000.parquet").write_bytes(b"of another source")
    known = {"images": 1, "images_of_class": [1], "files": {"train-00000.parquet": 17}}
    Facts("cifar10", {"folder": "/elsewhere"}, ["a"], {"train": known}).write(part)
    prepare(cifar10.benchmark, str(cifar10.archive), tmp_path / "pool")
    assert len(pool_of(tmp_path / "pool" / "train")) == 200


def test_what_is_finished_is_not_written_again_and_damage_to_it_is_told(cifar10, tmp_path):
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
    with pytest.raises(SourceError, match="holds something else than stl10"):
        find_finished(BENCHMARKS["stl10"], out)
    (out / "dataset.json").unlink()
    with pytest.raises(SourceError, match="holds something else than cifar10"):
        prepare(cifar10.benchmark, str(cifar10.archive), out)


def test_a_second_process_is_kept_out(cifar10, tmp_path):
    part = tmp_path / "pool.part"
    part.mkdir()
    with (part / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(SourceError, match="another process writes"):
            prepare(cifar10.benchmark, str(cifar10.archive), tmp_path / "pool")
    prepare(cifar10.benchmark, str(cifar10.archive), tmp_path / "pool")


def test_a_large_split_is_cut_into_files_and_groups(cifar10, tmp_path, monkeypatch):
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
def test_the_archives_as_they_are_published_are_read_whole(name, tmp_path):
    known = BENCHMARKS[name]
    if not all((Path(str(ARCHIVES)) / archive.name).is_file() for archive in known.archives):
        pytest.skip(f"{ARCHIVES} has not {known.archives}")
    facts = prepare(known, str(ARCHIVES), tmp_path / "pool")
    assert {split: figures["images"] for split, figures in facts.splits.items()} == {
        split: published.num_images for split, published in known.splits.items()
    }

"""Atomic writes, the same bytes for the same table, and files with names of any characters."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from elfs_ray.storage import filesystem


@pytest.fixture(params=["local", "s3", "gcs"])
def root(request, tmp_path) -> str:
    """Return a folder on disk, and one in each kind of bucket."""
    return str(tmp_path) if request.param == "local" else request.getfixturevalue(f"{request.param}_bucket") + "/root"


def table(num_rows: int) -> pa.Table:
    ids = np.arange(num_rows)
    return pa.table({"sample_id": ids, "uri": [f"/pool/{i}.png" for i in ids], "score": np.sqrt(ids)})


def test_a_file_is_read_back_and_its_folders_are_made(root):
    uri = filesystem.join(root, "a", "b", "file.bin")
    assert not filesystem.exists(uri)
    filesystem.write_bytes(uri, b"\x00content")
    assert filesystem.read_bytes(uri) == b"\x00content"
    filesystem.write_bytes(uri, b"other")
    assert filesystem.read_bytes(uri) == b"other"


@pytest.mark.parametrize("opened", [filesystem.open_atomic, filesystem.open_atomic_on_disk])
def test_a_writer_that_fails_leaves_the_old_file_and_nothing_new(root, opened):
    new, old = filesystem.join(root, "new"), filesystem.join(root, "old")
    filesystem.write_bytes(old, b"before")
    for uri in (new, old):
        with pytest.raises(RuntimeError, match="half-way"), opened(uri) as sink:
            sink.write(b"half")
            raise RuntimeError("half-way")
    assert [info.base_name for info in filesystem.list_files(root)] == ["old"]
    assert filesystem.read_bytes(old) == b"before"


@pytest.mark.parametrize("num_bytes", [0, 1, 6 << 20])
def test_a_file_gathered_on_disk_is_read_back(root, num_bytes):
    uri, data = filesystem.join(root, "a", "file.bin"), os.urandom(num_bytes)
    with filesystem.open_atomic_on_disk(uri) as sink:
        sink.write(data[: num_bytes // 2])
        sink.write(data[num_bytes // 2 :])
    assert filesystem.read_bytes(uri) == data


def test_a_writer_that_is_killed_leaves_no_file_of_that_name(tmp_path):
    script = (
        "import os, signal, sys; from elfs_ray.storage import filesystem\n"
        "with filesystem.open_atomic(sys.argv[1]) as sink:\n"
        "    sink.write(b'half'); sink.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    uri = str(tmp_path / "part.parquet")
    killed = subprocess.run([sys.executable, "-c", script, uri], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert not any(name.endswith(".parquet") for name in os.listdir(tmp_path))


def test_a_table_gives_the_same_bytes_in_any_chunks(tmp_path):
    whole = table(70_000)
    chunked = pa.concat_tables([whole.slice(start, 777) for start in range(0, len(whole), 777)])
    for name, rows in (("whole", whole), ("again", table(70_000)), ("chunked", chunked)):
        filesystem.write_table(str(tmp_path / name), rows)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "again").read_bytes() == (tmp_path / "chunked").read_bytes()


def test_a_table_is_read_whole_by_columns_and_by_footer(root):
    uri = filesystem.join(root, "epoch=003", "part.parquet")
    filesystem.write_table(uri, table(100))
    assert filesystem.read_table(uri).equals(table(100)), "a folder named like a partition adds no column"
    assert filesystem.read_table(uri, ["score"]).column_names == ["score"]
    assert filesystem.num_rows(uri) == 100
    assert filesystem.read_schema(uri).names == ["sample_id", "uri", "score"]


def test_a_range_of_rows_is_read_across_row_groups_with_both_ends(root):
    uri = filesystem.join(root, "part.parquet")
    filesystem.write_table(uri, table(2 * filesystem.ROWS_PER_GROUP + 10))
    first, last = filesystem.ROWS_PER_GROUP - 2, filesystem.ROWS_PER_GROUP + 1
    rows = filesystem.read_range(uri, "sample_id", first, last)
    assert rows.equals(table(2 * filesystem.ROWS_PER_GROUP + 10).slice(first, 4))
    assert filesystem.read_range(uri, "sample_id", 10**9, 2 * 10**9).num_rows == 0


def test_listings_are_sorted_and_tell_files_from_folders(root):
    for name in ("b.txt", "a.txt", "sub/c.txt", "Z.txt", "sub/deep/d.txt"):
        filesystem.write_bytes(filesystem.join(root, name), b"x")

    def names(infos) -> list[str]:
        return [info.path.removeprefix(root.split("://")[-1] + "/") for info in infos]

    assert names(filesystem.list_files(root)) == ["Z.txt", "a.txt", "b.txt"]
    assert names(filesystem.list_files(root, recursive=True)) == [
        *("Z.txt", "a.txt", "b.txt"),
        *("sub/c.txt", "sub/deep/d.txt"),
    ]
    assert names(filesystem.list_dirs(root)) == ["sub"]
    assert filesystem.list_files(filesystem.join(root, "none")) == []
    assert filesystem.is_dir(filesystem.join(root, "sub")) and not filesystem.is_dir(filesystem.join(root, "a.txt"))


def test_delete_removes_files_and_folders_and_nothing_else(root):
    for name in ("a", "sub/b", "sub/deep/c", "subway"):
        filesystem.write_bytes(filesystem.join(root, name), b"x")
    for name in ("sub", "a", "never_there"):
        filesystem.delete(filesystem.join(root, name))
    assert [info.base_name for info in filesystem.list_files(root, recursive=True)] == ["subway"]


@pytest.mark.parametrize("name", ["a b", "ünïcödé 猫", "a#b", "a?b=c", "100%25", "line\nbreak", "a+b&c", "~", "-"])
def test_a_name_of_any_characters_names_one_file(root, name):
    if root.startswith("s3://") and "\n" in name:
        pytest.skip("the server of the tests knows no names with line breaks")
    uri = filesystem.join(root, name, f"{name}.bin")
    filesystem.write_bytes(uri, name.encode())
    assert filesystem.read_bytes(uri) == name.encode()
    (info,) = filesystem.list_files(filesystem.join(root, name))
    assert info.base_name == f"{name}.bin"


def test_an_absolute_path_stays_the_same_in_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    uri = filesystem.absolute("runs/first/")
    assert uri == str(tmp_path / "runs/first")
    filesystem.write_bytes(filesystem.join("file://" + uri, "x"), b"1")
    assert (tmp_path / "runs/first/x").read_bytes() == b"1"
    assert filesystem.absolute("s3://bucket/run/") == "s3://bucket/run"


@pytest.mark.parametrize("uri", ["file:{}", "file://{}", "FILE://localhost{}", "file:///{}/", "{}/x/.."])
def test_every_spelling_of_a_local_place_is_one_path(tmp_path, uri):
    place = tmp_path / "a b"
    spelled = uri.format(place.as_uri().removeprefix("file://") if "file" in uri.lower() else place)
    assert filesystem.absolute(spelled) == str(place)
    filesystem.write_bytes(filesystem.join(spelled, "ä.bin"), b"1")
    assert (place / "ä.bin").read_bytes() == b"1"


@pytest.mark.parametrize("name", ["a:b", "2024:01/x", "C:/x", "folder/s3:/x", "./s3:/x"])
def test_a_colon_alone_makes_no_uri(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert filesystem.absolute(name) == os.path.join(tmp_path, os.path.normpath(name))


def test_schemes_are_read_in_either_case(s3_bucket):
    filesystem.write_bytes(f"{s3_bucket}/a", b"1")
    assert filesystem.read_bytes(s3_bucket.replace("s3://", "S3://") + "/a") == b"1"
    assert filesystem.absolute("GS://Bucket/A//") == "gs://Bucket/A"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        *(
            (f"{scheme}/b/r", f"give {scheme.lower()}//b/r, or ./{scheme}/b/r")
            for scheme in ("s3:", "S3:", "gs:", "gcs:")
        ),
        ("s3:b/r", "give s3://b/r"),
        ("http:/b/r", "give http://b/r"),
        ("file:r", "give file:///r"),
        ("file://data/r", "names the machine 'data'"),
        ("/data/\udcff", r"b'/data/\xff' is not UTF-8, which paths must be: rename it"),
        ("s3://b/pool/../run", "mean nothing in a bucket"),
        ("gs://b/./run", "mean nothing in a bucket"),
    ],
)
def test_a_uri_that_would_become_another_place_is_refused(uri, message):
    for function in (filesystem.absolute, filesystem.exists):
        with pytest.raises(ValueError, match=re.escape(message)):
            function(uri)


def test_a_place_is_within_a_folder_by_whatever_way_it_is_named(tmp_path):
    pool = tmp_path / "pool"
    (pool / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(pool)
    (tmp_path / "deep").symlink_to(pool / "deep")
    for folder in (pool, tmp_path / "link", f"file:{pool}", f"{pool}/"):
        for place in (pool, pool / "new/run", tmp_path / "link/run", tmp_path / "deep/run", f"file://{pool}/run"):
            assert filesystem.is_within(str(place), str(folder)), (place, folder)
        for place in (tmp_path, tmp_path / "pool-run", f"{pool}/../run", "s3://pool/run"):
            assert not filesystem.is_within(str(place), str(folder)), (place, folder)
    assert filesystem.is_within("gcs://b/pool/run", "GS://b/pool/") and filesystem.is_within("/run", "/")
    assert not filesystem.is_within("s3://b/pool-run", "s3://b/pool")


def test_an_unknown_scheme_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'ftp://host/pool' cannot be opened.*s3://bucket/path or gs://bucket/path"):
        filesystem.exists("ftp://host/pool")


def test_a_name_that_is_not_utf8_is_an_error_that_shows_it(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.jpg", "wb"):
        pass
    with pytest.raises(ValueError, match=r"caf\\xe9.jpg.*not UTF-8.*rename it"):
        filesystem.list_files(str(tmp_path))


@pytest.mark.parametrize("first_and_end", [(0, 1), (65_535, 65_537), (65_536, 131_072), (131_000, 131_082), (5, 5)])
def test_a_slice_of_rows_equals_that_of_the_whole_table(root, first_and_end):
    uri = filesystem.join(root, "part.parquet")
    whole = table(2 * filesystem.ROWS_PER_GROUP + 10)
    filesystem.write_table(uri, whole)
    first, end = first_and_end
    assert filesystem.read_slice(uri, first, end).equals(whole.slice(first, end - first))


def test_a_slice_of_rows_reads_only_the_row_groups_that_hold_them(tmp_path):
    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    uri = str(tmp_path / "part.parquet")
    noise = np.random.default_rng(0).integers(0, 2**62, 10 * filesystem.ROWS_PER_GROUP)
    filesystem.write_table(uri, pa.table({"noise": noise}))
    before = bytes_read()
    filesystem.read_slice(uri, 5 * filesystem.ROWS_PER_GROUP, 6 * filesystem.ROWS_PER_GROUP)
    assert bytes_read() - before < 0.2 * noise.nbytes

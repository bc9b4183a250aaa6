"""List pools in folders: links, loops, dangling links, special files, folders of a bucket."""

import os
import socket
import threading
import tracemalloc
from pathlib import Path

import pytest

from elfs_ray.pool import files
from elfs_ray.pool.folder import Folder
from elfs_ray.pool.images import BadImage
from elfs_ray.pool.listing import PoolColumns, count_unit, find_units, list_unit, read_images
from elfs_ray.storage import filesystem
from tests.pool.reading import listed


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def names(pool: Path) -> list[str]:
    """Return the samples of a pool, relative to it, in order."""
    uris, _ = listed(pool)
    return [uri.removeprefix(f"{pool}/") for uri in uris]


@pytest.mark.parametrize("target", ["..", ".", "../..", "../../.."])
def test_a_link_to_a_folder_that_contains_it_adds_no_sample(tmp_path, target):
    pool = tmp_path / "data" / "pool"
    write(pool, "a/1.png", "b/2.png", "b/deep/3.png")
    expected = names(pool)
    (pool / "a" / "loop").symlink_to(target)
    (pool / "b" / "deep" / "loop").symlink_to(target)
    assert names(pool) == expected == ["a/1.png", "b/2.png", "b/deep/3.png"]


def test_folders_that_link_to_each_other_are_listed_twice(tmp_path):
    pool = tmp_path / "pool"
    write(pool, "a/1.png", "b/2.png")
    (pool / "a" / "x").symlink_to("../b")
    (pool / "b" / "y").symlink_to("../a")
    assert names(pool) == ["a/1.png", "a/x/2.png", "b/2.png", "b/y/1.png"]


def test_links_from_a_linked_folder_back_to_the_pool_are_skipped(tmp_path):
    write(tmp_path / "elsewhere", "photos/1.png", "other/2.png")
    (tmp_path / "elsewhere" / "photos" / "up").symlink_to("..")
    (tmp_path / "elsewhere" / "photos" / "back").symlink_to(tmp_path / "pool")
    write(tmp_path / "pool", "z/3.png")
    (tmp_path / "pool" / "a").symlink_to(tmp_path / "elsewhere" / "photos")
    assert names(tmp_path / "pool") == ["a/1.png", "z/3.png"]


def test_a_pool_named_by_a_link_skips_links_to_the_links_folder(tmp_path):
    write(tmp_path / "data" / "pool", "a/1.png")
    write(tmp_path / "home", "2.png")
    (tmp_path / "home" / "link").symlink_to(tmp_path / "data" / "pool")
    (tmp_path / "data" / "pool" / "a" / "home").symlink_to(tmp_path / "home")
    assert names(tmp_path / "home" / "link") == ["a/1.png"]
    assert names(tmp_path / "data" / "pool") == ["a/1.png", "a/home/2.png"]


def test_two_links_to_one_folder_list_it_twice(tmp_path):
    write(tmp_path / "elsewhere", "1.png", "deep/2.png")
    write(tmp_path / "pool", "c/3.png")
    for name in ("a", "b"):
        (tmp_path / "pool" / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "pool" / "c" / "4.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    expected = ["a/1.png", "a/deep/2.png", "b/1.png", "b/deep/2.png", "c/3.png", "c/4.png"]
    assert names(tmp_path / "pool") == expected
    (tmp_path / "link").symlink_to("pool")
    assert names(tmp_path / "link") == expected


def test_a_folder_of_loops_without_an_image_is_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(3):
            (tmp_path / name / f"loop{number}").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="holds no images"):
        find_units(str(tmp_path))


def test_a_dangling_link_is_a_sample_rejected_by_name(tmp_path):
    write(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a" / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "a" / "itself.png").symlink_to("itself.png")
    (tmp_path / "a" / "folder").symlink_to("nowhere")
    assert names(tmp_path) == ["a/1.png", "a/gone.png", "a/itself.png", "b/2.png"]
    reasons = read_images([f"{tmp_path}/a/{name}.png" for name in ("gone", "itself")], PoolColumns())
    for name, reason in zip(("gone", "itself"), reasons, strict=True):
        assert isinstance(reason, BadImage) and str(reason).startswith("cannot be read: ") and name in str(reason)


@pytest.mark.parametrize("name", ["gone.parquet", "gone.tar"])
def test_a_dangling_link_to_a_tar_or_parquet_file_is_refused(tmp_path, name):
    (tmp_path / name).symlink_to("nowhere")
    (unit,) = find_units(str(tmp_path))
    with pytest.raises((ValueError, OSError), match=name):
        list_unit(unit, PoolColumns())


def test_pipes_and_sockets_are_skipped(tmp_path):
    write(tmp_path, "1.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket.png"))
        assert names(tmp_path) == ["1.png"]


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.jpg", "wb"):
        pass
    with pytest.raises(ValueError, match=r"caf\\xe9.jpg.*not UTF-8.*rename it"):
        find_units(str(tmp_path))


def test_units_are_found_and_counted_without_holding_names(tmp_path):
    for number in range(5000):
        (tmp_path / f"{number:05d}.png").touch()
    find_units(str(tmp_path))
    tracemalloc.start()
    (unit,) = find_units(str(tmp_path))
    assert count_unit(unit, PoolColumns()) == 5000
    assert tracemalloc.get_traced_memory()[1] < 100 << 10
    tracemalloc.stop()


def test_a_folder_of_a_bucket_is_listed_once_to_find_its_units(s3_server, s3_bucket):
    for name in ("a/1.png", "b/deep/2.png", "_hidden/3.png", "b/.thumbs/4.png", "5.png"):
        filesystem.write_bytes(f"{s3_bucket}/{name}", b"x")
    before = s3_server.num_requests()
    units = find_units(s3_bucket)
    # Two requests each to see that it exists and that it is a folder, one for dataset.json, the listing.
    assert s3_server.num_requests() - before <= 7
    assert [(unit.uri, unit.recursive) for unit in units] == [
        *((s3_bucket, False), (f"{s3_bucket}/a", True), (f"{s3_bucket}/b", True))
    ]
    assert [list_unit(unit, PoolColumns())["uri"].to_pylist() for unit in units] == [
        *([f"{s3_bucket}/5.png"], [f"{s3_bucket}/a/1.png"], [f"{s3_bucket}/b/deep/2.png"])
    ]


@pytest.mark.parametrize("kind", ["s3", "gcs"])
def test_entries_of_a_bucket_folder_exclude_those_below_it(request, kind):
    root = request.getfixturevalue(f"{kind}_bucket") + "/pool"
    for name in ("1.png", "_a.png", "a/2.png", "a/b/3.png", ".c/4.png", "_c/5.png"):
        filesystem.write_bytes(f"{root}/{name}", b"x")
    folder = Folder(root)
    assert sorted(folder.entries()) == [("1.png", False), ("_a.png", False), ("a", True)]
    assert sorted(folder.child("a").entries()) == [("2.png", False), ("b", True)]
    assert sorted(folder.walk()) == ["1.png", "_a.png", "a/2.png", "a/b/3.png"]


def test_some_files_are_read_at_once_and_yielded_in_turn(monkeypatch):
    all_are_reading = threading.Barrier(files.READ_AHEAD, timeout=20)

    def read(uri: str) -> bytes:
        all_are_reading.wait()
        return uri.encode()

    monkeypatch.setattr(files, "read_file", read)
    uris = [f"/pool/{number}.png" for number in range(2 * files.READ_AHEAD)]
    assert list(read_images(uris, PoolColumns())) == [uri.encode() for uri in uris]

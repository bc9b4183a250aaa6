"""Comparing a pool with what was listed before."""

import os

import numpy as np
import pytest

from elfs_ray.pool.changes import UNKNOWN, Changes, Inventory, Records, compare, key_of, version_of
from elfs_ray.pool.files import Unit
from elfs_ray.pool.folder import inventory_of_folder, versions_of
from elfs_ray.pool.listing import PoolColumns, Remarks, list_unit


def records(files: dict[str, tuple[int, int]], gone: str = "", lost: str = "") -> Records:
    """Return records of files, named by a letter, with their (version, rows); those that are gone, and lost."""
    versions, rows = zip(*files.values(), strict=True)
    inventory = Inventory.of(map(ord, files), versions, rows)
    marks = (np.isin(list(files), list(letters)) for letters in (gone + lost, lost))
    return Records(inventory, np.cumsum(rows) - rows, *marks)


def listed(files: list[tuple[str, int, int]]) -> Inventory:
    names, versions, rows = zip(*files, strict=True) if files else ((), (), ())
    return Inventory.of(map(ord, names), versions, rows)


def letters(files: list[tuple[str, int, int]], changes: Changes) -> str:
    return "".join(name for (name, _, _), is_new in zip(files, changes.is_new, strict=True) if is_new)


@pytest.mark.parametrize(
    ("now", "gone", "described", "new"),
    [
        ([("a", 1, 1), ("b", 2, 1), ("c", 3, 5)], "", "no change", ""),
        ([("c", 3, 5), ("d", 1, 7), ("a", 1, 1)], "", "7 new, 1 gone", "d"),
        ([("a", 1, 1), ("b", 2, 1), ("c", 4, 6)], "", "6 changed", "c"),
        ([("a", 1, 1), ("b", UNKNOWN, 1), ("c", 3, 5)], "", "no change", ""),
        ([("a", 1, 1), ("b", 2, 1), ("c", 3, 5)], "c", "5 back", ""),
        ([("a", 1, 1), ("b", 2, 1), ("c", 4, 5)], "c", "5 new", "c"),
        ([("a", 1, 1), ("a", 1, 1), ("b", 2, 1), ("c", 3, 5)], "", "1 new", "a"),
        ([], "", "7 gone", ""),
    ],
)
def test_changes_are_counted_in_images(now, gone, described, new):
    changes = compare(records({"a": (1, 1), "b": (2, 1), "c": (3, 5)}, gone), listed(now))
    assert changes.describe() == described and letters(now, changes) == new
    assert changes.num_present == sum(rows for _, _, rows in now)
    assert changes.num_listed == 7 - 5 * len(gone) and bool(changes) == (described != "no change")


def test_unknown_versions_compare_uris_alone():
    before = records({"a": (UNKNOWN, 1), "b": (UNKNOWN, 1)})
    assert compare(before, listed([("a", 5, 1), ("c", 6, 1)])).describe() == "1 new, 1 gone"


def test_a_file_that_was_gone_before_it_was_embedded_is_new():
    before = records({"a": (1, 1), "b": (2, 1)}, lost="b")
    now = [("a", 1, 1), ("b", 2, 1)]
    changes = compare(before, listed(now))
    assert changes.describe() == "1 new" and letters(now, changes) == "b" and changes.is_gone.tolist() == [False, True]


def test_a_version_is_one_of_size_and_time():
    assert len({version_of(size, time) for size in range(50) for time in range(50)}) == 2500
    assert UNKNOWN not in {version_of(0, 0), version_of(1, 1)}


def test_the_inventory_of_a_folder_is_that_of_its_listing(tmp_path):
    for name in ("b/2.png", "1.png", "b/note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "missing.png").symlink_to("nowhere")
    inventory = inventory_of_folder(Unit("folder", str(tmp_path)), Remarks())
    table = list_unit(Unit("folder", str(tmp_path)), PoolColumns())
    versions = dict(zip(map(key_of, table["uri"].to_pylist()), table["version"].to_pylist(), strict=True))
    assert versions == dict(zip(inventory.keys.tolist(), inventory.versions.tolist(), strict=True))
    assert versions[key_of(f"{tmp_path}/missing.png")] == UNKNOWN
    before = versions_of([f"{tmp_path}/b/2.png", f"{tmp_path}/1.png"])
    assert before == [versions[key_of(f"{tmp_path}/b/2.png")], versions[key_of(f"{tmp_path}/1.png")]]
    os.utime(tmp_path / "1.png", ns=(5, 5))
    after = versions_of([f"{tmp_path}/b/2.png", f"{tmp_path}/1.png"])
    assert after[0] == before[0] and after[1] != before[1]


def test_versions_in_a_bucket_come_from_its_listing(s3_server, s3_bucket):
    from elfs_ray.storage import filesystem

    for name in ("1.png", "a/2.png", "a/3.tar"):
        filesystem.write_bytes(f"{s3_bucket}/{name}", name.encode())
    table = list_unit(Unit("folder", s3_bucket), PoolColumns())
    assert UNKNOWN not in table["version"].to_pylist() and len(set(table["version"].to_pylist())) == 2
    before = s3_server.num_requests()
    versions = versions_of([f"{s3_bucket}/1.png", f"{s3_bucket}/a/2.png", f"{s3_bucket}/a/3.tar"])
    assert s3_server.num_requests() - before == 2  # a listing of each folder
    assert versions[:2] == table["version"].to_pylist()

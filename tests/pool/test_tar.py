"""Read the members of a tar: neighbours in one request, each with its own bytes or its own reason."""

import io
import tarfile
from pathlib import Path

import pytest

from elfs_ray.pool import tar
from elfs_ray.pool.images import BadImage
from elfs_ray.pool.listing import PoolColumns, find_units, list_unit
from elfs_ray.storage import schema

MEMBERS = {f"{number}.jpg": bytes([number]) * (500 + 300 * number) for number in range(5)}


@pytest.fixture
def uris(tmp_path) -> list[str]:
    with tarfile.open(tmp_path / "pool.tar", "w") as archive:
        for name, data in MEMBERS.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    (unit,) = find_units(str(tmp_path), "webdataset")
    return list_unit(unit, PoolColumns())[schema.URI].to_pylist()


def read(uris: list[str]) -> list[bytes | BadImage]:
    return list(tar.read_tar_members(uris[0].partition("#")[0], uris))


@pytest.mark.parametrize(("span_bytes", "num_spans"), [(4 << 20, 1), (2000, 4), (1, 5)])
def test_members_are_read_together_as_far_as_a_span_reaches(uris, monkeypatch, span_bytes, num_spans):
    monkeypatch.setattr(tar, "SPAN_BYTES", span_bytes)
    assert len(list(tar._spans(uris))) == num_spans
    assert read(uris) == list(MEMBERS.values())
    assert read(uris[::-1]) == list(MEMBERS.values())[::-1]
    assert read([uris[3], uris[3], uris[0]]) == [MEMBERS["3.jpg"]] * 2 + [MEMBERS["0.jpg"]]


def test_of_a_tar_that_was_cut_since_it_was_listed_the_whole_members_are_read(uris, tmp_path):
    path = Path(tmp_path, "pool.tar")
    path.write_bytes(path.read_bytes()[: 3 * 1024 + 700])
    first, second, third, *others = read(uris)
    assert [first, second] == [MEMBERS["0.jpg"], MEMBERS["1.jpg"]]
    assert isinstance(third, BadImage) and "is cut short: it has " in str(third)
    assert [str(other).rpartition(": ")[2] for other in others] == [
        f"it has 0 of the image's {len(MEMBERS[name])} bytes" for name in ("3.jpg", "4.jpg")
    ]

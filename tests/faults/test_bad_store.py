"""Pools in a store, or on a disk, that fails: its images are not rejected for what is no fault of theirs."""

import errno
import io
import os
import resource
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elfs_ray.pool.files import rejection
from elfs_ray.pool.images import BadImage
from elfs_ray.pool.listing import PoolColumns, find_units, list_unit, read_images
from elfs_ray.storage import filesystem

IMAGES = [os.urandom(900) for _ in range(3)]


def read(uris: list[str]) -> list[bytes | str]:
    return [str(data) if isinstance(data, BadImage) else data for data in read_images(uris, PoolColumns())]


@pytest.fixture(params=["folder", "parquet", "tar"])
def pool(request, s3_bucket) -> tuple[str, list[str]]:
    """A word in the names of the objects that hold the images, and the images' uris."""
    buffer = io.BytesIO()
    if request.param == "parquet":
        pq.write_table(pa.table({"image": IMAGES}), buffer)
        filesystem.write_bytes(f"{s3_bucket}/pool/part.parquet", buffer.getvalue())
    elif request.param == "tar":
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for number, data in enumerate(IMAGES):
                member = tarfile.TarInfo(f"{number}.png")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        filesystem.write_bytes(f"{s3_bucket}/pool/part.tar", buffer.getvalue())
    else:
        for number, data in enumerate(IMAGES):
            filesystem.write_bytes(f"{s3_bucket}/pool/part{number}.png", data)
    tables = [list_unit(unit, PoolColumns()) for unit in find_units(f"{s3_bucket}/pool")]
    return "part", [uri for table in tables for uri in table["uri"].to_pylist()]


def test_a_store_that_refuses_ends_the_reading_and_rejects_no_image(s3_server, pool):
    word, uris = pool
    for method in ("GET", "HEAD"):
        s3_server.fail("403", 20, method=method, key=word)
    with pytest.raises(OSError, match=r"ACCESS_DENIED|refuses access"):
        read(uris)
    s3_server.fail_no_more()
    assert read(uris) == IMAGES


@pytest.mark.parametrize("kind", ["503", "reset", "slow"])
def test_a_store_that_is_busy_or_slow_is_waited_for(s3_server, pool, kind):
    word, uris = pool
    s3_server.fail(kind, 1 if kind == "slow" else 2, method="GET", key=word)
    assert read(uris) == IMAGES


def test_an_object_that_is_gone_is_rejected(pool, s3_bucket):
    _, uris = pool
    filesystem.delete(f"{s3_bucket}/pool")
    assert len(read(uris)) == 3 and all(reason.startswith("cannot be read: ") for reason in read(uris))


def test_too_many_open_files_reject_no_image(tmp_path):
    (tmp_path / "a.png").write_bytes(IMAGES[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, hard))
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                held.append(open("/dev/null"))  # noqa: SIM115
        with pytest.raises(OSError, match="Too many open files"):
            read([str(tmp_path / "a.png")])
    finally:
        for file in held:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert read([str(tmp_path / "a.png")]) == IMAGES[:1]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOMEM, errno.ETIMEDOUT, errno.ENOTCONN])
def test_an_error_of_the_disk_is_no_reason_to_reject(number):
    with pytest.raises(OSError):
        rejection(OSError(number, os.strerror(number)), "/pool/a.png")


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP])
def test_an_error_of_the_file_is(number):
    assert os.strerror(number) in str(rejection(OSError(number, os.strerror(number)), "/pool/a.png"))

"""A store or a disk that fails rejects no image: the images can be read once it works again."""

import errno
import io
import os
import resource
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elfs_ray.pool.files import rejection
from elfs_ray.storage import filesystem
from tests.pool.reading import listed, read

IMAGES = [os.urandom(900) for _ in range(3)]


@pytest.fixture(params=["folder", "parquet", "tar"])
def pool(request, s3_bucket) -> tuple[str, list[str]]:
    """Return a word in the names of the objects that hold the images, and the images' uris."""
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
    return "part", listed(f"{s3_bucket}/pool")[0]


def test_a_store_that_refuses_access_rejects_no_image(s3_server, pool):
    word, uris = pool
    for method in ("GET", "HEAD"):
        s3_server.fail("403", 20, method=method, key=word)
    with pytest.raises(OSError, match=r"ACCESS_DENIED|refuses access"):
        read(uris)
    s3_server.fail_no_more()
    assert read(uris) == IMAGES


@pytest.mark.parametrize("kind", ["503", "reset", pytest.param("slow", marks=pytest.mark.slow)])
def test_a_store_that_is_busy_or_slow_is_waited_for(s3_server, pool, kind):
    word, uris = pool
    s3_server.fail(kind, 1 if kind == "slow" else 2, method="GET", key=word)
    assert read(uris) == IMAGES


def test_a_missing_object_is_rejected(pool, s3_bucket):
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
def test_an_error_of_the_disk_rejects_no_image(number):
    with pytest.raises(OSError):
        rejection(OSError(number, os.strerror(number)), "/pool/a.png")


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP])
def test_an_error_of_the_file_rejects_its_image(number):
    assert os.strerror(number) in str(rejection(OSError(number, os.strerror(number)), "/pool/a.png"))

"""Object stores that fail, refuse and stall, behind a real S3 protocol; and credentials, which must not be shown."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elfs_ray.config import ConfigError, load_config
from elfs_ray.pool.images import BadImage
from elfs_ray.pool.listing import PoolColumns, find_units, list_unit, read_images
from elfs_ray.storage import filesystem

SECRET = "wJalrXUtnFEMI"
WITH_CREDENTIALS = (
    f"s3://AKIAEXAMPLE:{SECRET}@bucket/run",
    f"s3://{SECRET}@bucket",
    f"s3:/AKIAEXAMPLE:{SECRET}@bucket/run",
    f"s3://bucket/run?access_key=AKIAEXAMPLE&secret_key={SECRET}",
    f"gs://bucket/run?access_token={SECRET}",
    f"https://host/a.jpg?X-Amz-Credential={SECRET}",
    f"https://host/a.jpg?x=1&X-Goog-Signature={SECRET}",
    f"https://host/a.jpg?AWSAccessKeyId=AKIAEXAMPLE&Signature={SECRET}",
)


@pytest.mark.parametrize("kind", ["503", "500", "429", "reset", "cut"])
def test_a_read_and_a_write_outlast_a_transient_fault(s3_server, s3_bucket, kind):
    uri = filesystem.join(s3_bucket, "part.bin")
    if kind != "cut":
        s3_server.fail(kind, 1, method="PUT", key="part.bin")
    filesystem.write_bytes(uri, b"content" * 1000)
    s3_server.fail(kind, 1, method="GET", key="part.bin")
    assert filesystem.read_bytes(uri) == b"content" * 1000


def test_a_store_that_refuses_is_asked_once_and_the_message_helps(s3_server, s3_bucket):
    uri = filesystem.join(s3_bucket, "part.bin")
    before = s3_server.num_requests()
    s3_server.fail("403", 1, method="PUT", key="part.bin")
    with pytest.raises(PermissionError, match=rf"{uri}: the store refuses access.*AWS_ACCESS_KEY_ID"):
        filesystem.write_bytes(uri, b"content")
    assert s3_server.num_requests() == before + 1
    assert not filesystem.exists(uri)


def test_a_missing_bucket_or_object_is_an_error_without_retries(s3_server, s3_bucket):
    with pytest.raises(FileNotFoundError, match="no such bucket"):
        filesystem.write_bytes("s3://never-made/part.bin", b"content")
    before = s3_server.num_requests()
    with pytest.raises(FileNotFoundError):
        filesystem.read_bytes(filesystem.join(s3_bucket, "none"))
    assert s3_server.num_requests() <= before + 2


def test_a_writer_that_is_killed_leaves_no_object(s3_bucket):
    script = (
        "import os, signal, sys; from elfs_ray.storage import filesystem\n"
        "with filesystem.open_atomic(sys.argv[1]) as sink:\n"
        "    sink.write(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, filesystem.join(s3_bucket, "part.bin")], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert filesystem.list_files(s3_bucket, recursive=True) == []


def test_a_large_object_survives_a_round_trip_and_half_an_upload_is_none(s3_server, s3_bucket):
    data = os.urandom(24 << 20)  # three parts
    uri = filesystem.join(s3_bucket, "large.bin")
    s3_server.fail("403", 1, method="PUT", key="large.bin")
    with pytest.raises(PermissionError):
        filesystem.write_bytes(uri, data)
    assert not filesystem.exists(uri)
    filesystem.write_bytes(uri, data)
    assert filesystem.read_bytes(uri) == data


@pytest.mark.slow
def test_a_thousand_objects_cost_two_requests_to_list(s3_server, s3_bucket):
    uris = [filesystem.join(s3_bucket, "many", f"{number:04d}") for number in range(1001)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda uri: filesystem.write_bytes(uri, b"x"), uris))
    before = s3_server.num_requests()
    assert len(filesystem.list_files(filesystem.join(s3_bucket, "many"))) == 1001
    assert s3_server.num_requests() <= before + 2
    before = s3_server.num_requests()
    filesystem.delete(filesystem.join(s3_bucket, "many"))
    assert s3_server.num_requests() <= before + 10
    assert filesystem.list_files(filesystem.join(s3_bucket, "many")) == []


@pytest.mark.parametrize("kind", ["struct", "uri", "webdataset"])
def test_a_pool_in_a_bucket_holds_the_images_of_the_pool_on_disk(s3_bucket, digit_pools, kind):
    for folder in ("folder", kind):
        for path in sorted(digit_pools.uris[folder].rglob("*")):
            if path.is_file():
                name = path.relative_to(digit_pools.uris["folder"].parent).as_posix()
                filesystem.write_bytes(filesystem.join(s3_bucket, name), path.read_bytes())

    columns = PoolColumns(label="cls" if kind == "webdataset" else "label")

    def listed(root: str) -> tuple[list, list]:
        tables = pa.concat_tables(list_unit(unit, columns) for unit in find_units(root))
        return list(read_images(tables["uri"].to_pylist(), columns)), tables["label"].to_pylist()

    images, labels = listed(filesystem.join(s3_bucket, kind))
    assert (images, labels) == listed(str(digit_pools.uris[kind]))
    assert len(images) == 120 and not any(isinstance(image, BadImage) for image in images)


@pytest.mark.parametrize("uri", WITH_CREDENTIALS)
@pytest.mark.parametrize("key", ["run_dir", "pool.uri", "pool.url", "evaluate.test_uri", "train.epochs"])
def test_a_config_with_credentials_is_refused_without_showing_them(tmp_path, key, uri):
    for yaml in (None, tmp_path / "job.yaml"):
        overrides = [f"{key}={uri}"]
        if yaml:
            section, _, name = key.rpartition(".")
            yaml.write_text(f"{section}:\n  {name}: '{uri}'\n" if section else f"{name}: '{uri}'\n")
            overrides = []
        with pytest.raises(ConfigError, match=f"{key} is a URI with credentials.*environment") as caught:
            load_config(yaml, overrides)
        assert SECRET not in str(caught.value) and SECRET not in repr(caught.value.__cause__)


@pytest.mark.parametrize("uri", WITH_CREDENTIALS)
def test_credentials_in_a_pools_uris_are_refused_and_not_shown(tmp_path, uri):
    pq.write_table(pa.table({"uri": ["a.jpg", uri]}), tmp_path / "pool.parquet")
    (unit,) = find_units(str(tmp_path))
    with pytest.raises(ValueError, match=r"pool.parquet, row 1, column 'uri' is a URI with credentials") as caught:
        list_unit(unit, PoolColumns())
    assert SECRET not in str(caught.value)


def test_a_place_that_names_no_bucket_is_refused():
    for uri in ("s3://", "s3:///run", "gs://?x"):
        with pytest.raises(ValueError, match="no bucket is named"):
            filesystem.exists(uri)

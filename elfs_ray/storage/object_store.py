"""Object stores through pyarrow.fs: how a bucket is opened, what is tried again, and what a refusal means.

What fails for a while (5xx, throttling, lost connections) is tried again with growing pauses, for about a minute; a
refusal or a missing object is final. What a store needs to know comes from the environment alone, credentials included:
AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or an instance's role, AWS_ENDPOINT_URL, AWS_REGION;
GOOGLE_APPLICATION_CREDENTIALS or a service account, STORAGE_EMULATOR_HOST.
"""

import contextlib
import functools
import os
import posixpath
import random
import re
import time
from collections.abc import Callable
from datetime import timedelta
from typing import ParamSpec, TypeVar

import pyarrow as pa
from pyarrow import fs

BUCKET_SCHEMES = ("s3", "gs", "gcs")
MAX_ATTEMPTS = 10  # of each request; pauses double up to 20 s, half of that on average: a minute in all
CONNECT_TIMEOUT_S = 10
RETRY_TIME_LIMIT = timedelta(minutes=2)
UPLOAD_PAUSES_S = (1, 2, 4, 8, 16)
DEFAULT_REGION = "us-east-1"  # for stores at a custom endpoint, which know no regions

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TRANSIENT = re.compile(r"HTTP status (429|5\d\d)|SLOW_DOWN|THROTTL|NETWORK_CONN|SERVICE_UNAVAILABLE|INTERNAL_FAIL")
_REFUSED = re.compile(
    r"HTTP status 40[13]|ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE|EXPIRED|INVALID_CLIENT|PERMISSION_DENIED|"
    r"UNAUTHENTICATED"
)
_NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|bucket does not exist", re.IGNORECASE)

P = ParamSpec("P")
T = TypeVar("T")


@functools.lru_cache(maxsize=64)
def open_store(scheme: str, bucket: str) -> tuple[fs.FileSystem, str]:
    """Return the file system that holds a bucket, and the bucket's path in it.

    Raises ValueError for an invalid bucket name and for a scheme that pyarrow does not know.
    """
    if scheme in BUCKET_SCHEMES and not _BUCKET.fullmatch(bucket):
        raise ValueError(f"no bucket is named {bucket!r}")
    if scheme == "s3":
        return _open_s3(bucket), bucket
    if scheme in ("gs", "gcs"):
        return _open_gcs(), bucket
    try:
        return fs.FileSystem.from_uri(f"{scheme}://{bucket}")
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(str(error)) from error


def _open_s3(bucket: str) -> fs.S3FileSystem:
    scheme, address = _endpoint(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"))
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if address is None:
        # The bucket's region, which need not be the machine's.
        with contextlib.suppress(OSError):
            region = fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(
        region=region or DEFAULT_REGION,
        scheme=scheme,
        endpoint_override=address,
        connect_timeout=CONNECT_TIMEOUT_S,
        allow_delayed_open=True,  # small objects take one request
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=MAX_ATTEMPTS),
    )


def _open_gcs() -> fs.GcsFileSystem:
    scheme, address = _endpoint(os.environ.get("STORAGE_EMULATOR_HOST"))
    endpoint = {"anonymous": True, "scheme": scheme, "endpoint_override": address} if address else {}
    return fs.GcsFileSystem(retry_time_limit=RETRY_TIME_LIMIT, **endpoint)


def _endpoint(url: str | None) -> tuple[str | None, str | None]:
    """Return (scheme, host and port) of an endpoint."""
    if not url:
        return None, None
    scheme, separator, address = url.rstrip("/").rpartition("://")
    return (scheme if separator else "http"), address


def explained(function: Callable[P, T]) -> Callable[P, T]:
    """Make a function of a URI raise PermissionError or FileNotFoundError, with advice, for a store's refusal.

    Arrow's errors then name the file, too.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except pa.ArrowInvalid as error:
            uri = str(args[0])
            if posixpath.basename(uri) in str(error):
                raise
            raise pa.ArrowInvalid(f"{uri} cannot be read: {error}") from error
        except OSError as error:
            meaning = _meaning(str(args[0]), error)
            if meaning is None:
                raise
            raise meaning from error

    return call


def _meaning(uri: str, error: OSError) -> OSError | None:
    """Return the error of an object store in our words; None if it speaks for itself."""
    if "://" not in uri or isinstance(error, FileNotFoundError | PermissionError):
        return None
    if _REFUSED.search(str(error)):
        return PermissionError(
            f"{uri}: the store refuses access. It was not tried again. Every node needs credentials in its "
            f"environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role), with rights to this bucket: {error}"
        )
    if _NO_BUCKET.search(str(error)):
        return FileNotFoundError(f"{uri}: there is no such bucket; make it, or correct the name")
    return None


@explained
def upload(uri: str, data: pa.Buffer, store: fs.FileSystem, path: str) -> None:
    """Upload an object, again after transient faults that the store's client does not retry by itself."""
    for pause_s in (*UPLOAD_PAUSES_S, None):
        try:
            with store.open_output_stream(path) as sink:
                sink.write(data)
            return
        except OSError as error:
            if pause_s is None or not _TRANSIENT.search(str(error)):
                raise
        time.sleep(pause_s * random.uniform(0.5, 1))

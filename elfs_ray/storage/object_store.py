"""Open buckets through pyarrow.fs, retry transient errors, and explain refusals.

Transient errors (5xx, throttling, lost connections) are retried with growing pauses for about a minute; a refusal or a
missing object is final. Credentials and settings come from the environment only: AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY or an instance's role, AWS_ENDPOINT_URL, AWS_REGION; GOOGLE_APPLICATION_CREDENTIALS or a service
account, STORAGE_EMULATOR_HOST.
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
# For each request to S3. Pauses double up to 20 s, and are half of that on average: about a minute in all.
MAX_ATTEMPTS = 10
CONNECT_TIMEOUT_S = 10
RETRY_TIME_LIMIT = timedelta(minutes=2)
PAUSES_S = (1, 2, 4, 8, 16)  # between our attempts, where the client makes none
DEFAULT_REGION = "us-east-1"  # stores at a custom endpoint know no regions, but the client insists on one

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# pyarrow raises OSError for all of these; only its message has the store's status or error code.
_TRANSIENT = re.compile(r"HTTP status (429|5\d\d)|SLOW_DOWN|THROTTL|NETWORK_CONN|SERVICE_UNAVAILABLE|INTERNAL_FAIL")
# The client itself retries these, except in uploads, but not always a 429 whose error code it does not know.
_THROTTLED = re.compile(r"HTTP status 429")
_REFUSED = re.compile(
    r"HTTP status 40[13]|ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE|EXPIRED|INVALID_CLIENT|PERMISSION_DENIED|"
    r"UNAUTHENTICATED"
)
_NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|bucket does not exist", re.IGNORECASE)

P = ParamSpec("P")
T = TypeVar("T")


# A client looks up the bucket's region and keeps connections open, so each process has one for each bucket.
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
        # The bucket's region may differ from the machine's. Where it cannot be found out, AWS_REGION is the best guess.
        with contextlib.suppress(OSError):
            region = fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(
        region=region or DEFAULT_REGION,
        scheme=scheme,
        endpoint_override=address,
        connect_timeout=CONNECT_TIMEOUT_S,
        allow_delayed_open=True,  # a small object then takes one request instead of a multipart upload's three
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=MAX_ATTEMPTS),
    )


def _open_gcs() -> fs.GcsFileSystem:
    scheme, address = _endpoint(os.environ.get("STORAGE_EMULATOR_HOST"))
    endpoint = {"anonymous": True, "scheme": scheme, "endpoint_override": address} if address else {}
    return fs.GcsFileSystem(retry_time_limit=RETRY_TIME_LIMIT, **endpoint)


def _endpoint(url: str | None) -> tuple[str | None, str | None]:
    """Return (scheme, "host:port") of an endpoint's URL."""
    if not url:
        return None, None
    scheme, separator, address = url.rstrip("/").rpartition("://")
    return (scheme if separator else "http"), address


def explained(function: Callable[P, T], retry: re.Pattern[str] = _THROTTLED) -> Callable[P, T]:
    """Decorate a function of a URI so that it raises errors that name the URI and say what to do.

    A store's refusal becomes a PermissionError, a missing bucket a FileNotFoundError; Arrow's errors name the file.
    Errors that match `retry` are retried: the function must be one that may run twice.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return _retried(retry, function, *args, **kwargs)
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


def _retried(transient: re.Pattern[str], function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    for pause_s in PAUSES_S:
        try:
            return function(*args, **kwargs)
        except OSError as error:
            if not transient.search(str(error)):
                raise
        # A random pause, as many workers meet the same throttling at the same time and should not return together.
        time.sleep(pause_s * random.uniform(0.5, 1))
    return function(*args, **kwargs)


def _meaning(uri: str, error: OSError) -> OSError | None:
    """Return a clearer error for one of an object store; None if it is clear by itself."""
    if "://" not in uri or isinstance(error, FileNotFoundError | PermissionError):
        return None
    if _REFUSED.search(str(error)):
        return PermissionError(
            f"{uri}: the store refuses access, which was not retried. Every node needs credentials in its environment "
            f"(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role) with rights to this bucket: {error}"
        )
    if _NO_BUCKET.search(str(error)):
        return FileNotFoundError(f"{uri}: there is no such bucket; create it, or correct the name")
    return None


@functools.partial(explained, retry=_TRANSIENT)
def upload(uri: str, data: pa.Buffer, store: fs.FileSystem, path: str) -> None:
    """Upload an object; retry transient errors that the store's client does not retry by itself."""
    with store.open_output_stream(path) as sink:
        sink.write(data)

"""Downloads of what an owner lets anybody download: into a .part file, going on where it broke off, checked by MD5."""

import http.client
import time
import urllib.error
import urllib.request
from pathlib import Path

from elfs_ray.datasets.published import Archive, Benchmark, SourceError
from elfs_ray.datasets.source import check_md5, md5_of
from elfs_ray.runtime.progress import Progress, say

CHUNK_BYTES = 1 << 20
TIMEOUT_S = 30.0
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0)
NO_SUCH_RANGE = 416


def download(benchmark: Benchmark, folder: Path) -> Path:
    """The archive of a benchmark, in `folder`; downloaded unless it is there. Returns its path.

    What breaks off is tried again from where it ended, as is a download that an earlier command began. Raises
    SourceError for a set that has to be asked for, for a server that gives none, and for a file of another MD5.
    """
    if not benchmark.downloads:
        raise SourceError(f"{benchmark.name} cannot be downloaded without its owner's leave; {benchmark.needed()}")
    archive = benchmark.archives[0]
    path, part = folder / archive.name, folder / f"{archive.name}.part"
    if path.is_file() and md5_of(path) == archive.md5:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    say(f"downloading {archive.url} to {folder}")
    for pause_s in (*PAUSES_S, None):
        try:
            _fetch(archive, part)
            break
        except (OSError, http.client.HTTPException) as error:
            final = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if final or pause_s is None:
                raise SourceError(
                    f"{archive.url} cannot be downloaded: {error}. Get it by hand; {benchmark.needed()}"
                ) from error
            say(f"the download broke off: {error}; trying again in {pause_s:g} s")
            time.sleep(pause_s)
    try:
        check_md5(part, archive, benchmark)
    except SourceError:
        part.unlink()
        raise
    part.replace(path)
    return path


def _fetch(archive: Archive, part: Path) -> None:
    """Append what is missing of an archive to its part; all of it from a server that knows no ranges."""
    assert archive.url is not None
    there = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={there}-"} if there else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != NO_SUCH_RANGE:
            raise
        return  # the part is whole, or longer than the archive, which its MD5 tells
    with response:
        goes_on = response.status == http.client.PARTIAL_CONTENT
        length = int(response.headers.get("Content-Length", 0))
        with part.open("ab" if goes_on else "wb") as sink:
            _copy(response, sink, sink.tell() if goes_on else 0, length)


def _copy(response, sink, there: int, length: int) -> None:
    with Progress("download", (there + length) >> 20, "MiB", done=there >> 20) as progress:
        while chunk := response.read(CHUNK_BYTES):
            sink.write(chunk)
            progress.update(sink.tell() >> 20)
    if length and sink.tell() < there + length:
        raise ConnectionError(f"{sink.tell():,} of {there + length:,} bytes came")

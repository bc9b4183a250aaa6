"""Download the archives of a benchmark, check their MD5s and unpack them.

Importing this module takes seconds, as torchvision does: import it where an archive is opened.
"""

import http.client
import shutil
from pathlib import Path

from elfs_ray.datasets.benchmarks import Archive, Benchmark, SourceError
from elfs_ray.datasets.source import Source
from elfs_ray.methods.training import torchvision_compat  # noqa: F401  before torchvision
from elfs_ray.runtime.progress import say

# isort: split
from torchvision.datasets.utils import check_integrity, download_url


def unpack(benchmark: Benchmark, source: Source, root: Path) -> None:
    """Unpack the archives to `root` unless it exists; download them first where the source says so.

    `root` appears only when everything is unpacked; what an interrupted call left is removed. Disk: the archives'
    contents. Raises SourceError where a download fails, and for an archive that is not the published one.
    """
    if root.exists():
        return
    part = root.with_name(f"{root.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for archive, path in zip(benchmark.archives, source.archives, strict=True):
        # An archive whose download was finished by an earlier call is used again.
        if source.downloads and not check_integrity(path, archive.md5):
            _download(benchmark, archive, part)
            (part / archive.name).replace(path)
        say(f"checking and unpacking {path}")
        if not _unpack_published(archive, path, part):
            raise SourceError(
                f"{path} ({path.stat().st_size:,} bytes) does not have the MD5 of {archive.name}, {archive.md5}: it is "
                f"cut short, damaged or another file; give {benchmark.valid_sources}"
            )
    part.rename(root)


def _download(benchmark: Benchmark, archive: Archive, folder: Path) -> None:
    say(f"downloading {archive.url}")
    try:
        download_url(str(archive.url), folder, archive.name, archive.md5)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise SourceError(
            f"{archive.url} cannot be downloaded: {error}. Try again, or download it by hand and give "
            f"{benchmark.valid_sources}"
        ) from error


def _unpack_published(archive: Archive, path: Path, folder: Path) -> bool:
    """Unpack an archive if it has the published MD5. Return whether it had."""
    if archive.unpack is None:
        if not check_integrity(path, archive.md5):
            return False
        # filter="data" refuses members that would be written outside `folder`.
        shutil.unpack_archive(path, folder, "gztar", filter="data")
        return True
    # torchvision unpacks an archive into the folder where it lies. The user's folder may be read-only or hold other
    # files, so a link to the archive is put into ours. torchvision also checks the MD5: checking it here as well would
    # read 138 GB twice.
    link = folder / archive.name
    link.symlink_to(path)
    try:
        archive.unpack(str(folder))
    except RuntimeError:
        return False
    link.unlink()
    return True

"""Find what a user names as source, download it, check its MD5 and unpack it for torchvision."""

import http.client
import shutil
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets.utils import check_integrity, download_url

from elfs_ray.datasets.benchmarks import Archive, Benchmark, SourceError
from elfs_ray.runtime.progress import say

DOWNLOAD = "download"


@dataclass(frozen=True)
class Source:
    """Name an unpacked benchmark by the folder around it, or else its archives, which may have to be downloaded.

    identity: tells this source from another one, for a command that goes on after an interruption.
    """

    root: Path | None
    archives: tuple[Path, ...]
    identity: dict[str, str]
    downloads: bool = False


def find_source(benchmark: Benchmark, source: str, folder: Path) -> Source:
    """Return the folder or the archives that `source` names; with source=download, an archive to be in `folder`.

    Raises SourceError where nothing of the benchmark is there, and for a download that needs a login.
    """
    if source == DOWNLOAD:
        if any(archive.url is None for archive in benchmark.archives):
            raise SourceError(f"{benchmark.name} cannot be downloaded without a login; {benchmark.needed}")
        return _archives(benchmark, [folder / archive.name for archive in benchmark.archives], downloads=True)
    path = Path(source).expanduser().absolute()
    if not path.exists():
        raise SourceError(f"source={source} does not exist; {benchmark.needed}")
    if path.is_file() and len(benchmark.archives) == 1:
        return _archives(benchmark, [path])
    # torchvision wants the folder around the one that an archive unpacks to.
    for root in (path, path.parent) if path.name in benchmark.folders else (path,):
        if all((root / name).is_dir() for name in benchmark.folders):
            return Source(root, (), {"folder": str(root.resolve())})
    paths = [path / archive.name for archive in benchmark.archives]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise SourceError(f"source={source} has no {', '.join(missing)}; {benchmark.needed}")
    return _archives(benchmark, paths)


def unpack(benchmark: Benchmark, source: Source, root: Path) -> None:
    """Download the archives where the source says so, check them, and unpack them to `root` unless it is there.

    `root` appears when all is whole; what an interrupted call left is made again. Disk: the archives' contents. Raises
    SourceError where a download fails, and for an archive that is not the published one.
    """
    if root.exists():
        return
    part = root.with_name(f"{root.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for archive, path in zip(benchmark.archives, source.archives, strict=True):
        if source.downloads and not check_integrity(path, archive.md5):
            _download(benchmark, archive, part)
            (part / archive.name).replace(path)
        say(f"checking and unpacking {path}")
        if not _unpack_published(archive, path, part):
            raise SourceError(
                f"{path} ({path.stat().st_size:,} bytes) does not have the MD5 of {archive.name}, {archive.md5}: it is "
                f"cut short, damaged or another file; {benchmark.needed}"
            )
    part.rename(root)


def _download(benchmark: Benchmark, archive: Archive, folder: Path) -> None:
    say(f"downloading {archive.url}")
    try:
        download_url(str(archive.url), folder, archive.name, archive.md5)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise SourceError(
            f"{archive.url} cannot be downloaded: {error}. Try again, or get it by hand; {benchmark.needed}"
        ) from error


def _unpack_published(archive: Archive, path: Path, folder: Path) -> bool:
    """Unpack an archive unless its MD5 is another; return whether it was the published one."""
    if archive.unpack is None:
        if not check_integrity(path, archive.md5):
            return False
        shutil.unpack_archive(path, folder, "gztar", filter="data")
        return True
    # torchvision unpacks an archive into the folder where it lies. The user's may be read-only or hold other things, so
    # a link to the archive is put into ours. It checks the MD5, too: doing that here would read 138 GB once more.
    link = folder / archive.name
    link.symlink_to(path)
    try:
        archive.unpack(str(folder))
    except RuntimeError:
        return False
    link.unlink()
    return True


def _archives(benchmark: Benchmark, paths: list[Path], *, downloads: bool = False) -> Source:
    return Source(None, tuple(paths), {archive.name: archive.md5 for archive in benchmark.archives}, downloads)

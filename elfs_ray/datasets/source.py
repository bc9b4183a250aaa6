"""Find the folder or the archives that a user names as source."""

from dataclasses import dataclass
from pathlib import Path

from elfs_ray.datasets.benchmarks import Benchmark, SourceError

DOWNLOAD = "download"


@dataclass(frozen=True)
class Source:
    """An unpacked benchmark, by the folder around it, or else its archives, which may have to be downloaded.

    identity: what dataset.json records of the source; an interrupted command is resumed only with an equal one.
    """

    root: Path | None
    archives: tuple[Path, ...]
    identity: dict[str, str]
    downloads: bool = False


def find_source(benchmark: Benchmark, source: str, folder: Path) -> Source:
    """Return the folder or the archives that `source` names. source=download puts the archives into `folder`.

    Raises SourceError where nothing of the benchmark is there, and for a download that requires a login.
    """
    if source == DOWNLOAD:
        if any(archive.url is None for archive in benchmark.archives):
            raise SourceError(f"{benchmark.name} cannot be downloaded without a login; give {benchmark.valid_sources}")
        return _archives(benchmark, [folder / archive.name for archive in benchmark.archives], downloads=True)
    path = Path(source).expanduser().absolute()
    if not path.exists():
        raise SourceError(f"source={source} does not exist; give {benchmark.valid_sources}")
    if path.is_file() and len(benchmark.archives) == 1:
        return _archives(benchmark, [path])
    # torchvision reads the folder around the one that an archive unpacks to; users name either of them.
    for root in (path, path.parent) if path.name in benchmark.folders else (path,):
        if all((root / name).is_dir() for name in benchmark.folders):
            return Source(root, (), {"folder": str(root.resolve())})
    paths = [path / archive.name for archive in benchmark.archives]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise SourceError(f"source={source} has no {', '.join(missing)}; give {benchmark.valid_sources}")
    return _archives(benchmark, paths)


def _archives(benchmark: Benchmark, paths: list[Path], *, downloads: bool = False) -> Source:
    # Named by MD5s and not by paths: the same archives may lie elsewhere when the command is typed again.
    return Source(None, tuple(paths), {archive.name: archive.md5 for archive in benchmark.archives}, downloads)

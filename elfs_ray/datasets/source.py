"""What a person gives as source: an archive whose MD5 is checked, or the folder that it unpacks to; and its files.

Members of an archive are read in place. Only regular files whose path is looked for count: links, absolute paths and
paths with .. are passed over, and nothing is unpacked.
"""

import hashlib
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from elfs_ray.datasets.published import Archive, Benchmark, SourceError
from elfs_ray.runtime.progress import Progress

CHUNK_BYTES = 4 << 20
MAX_MEMBER_BYTES = 1 << 30  # the largest that is read, STL10's test_X.bin, has 221 MB


@dataclass(frozen=True)
class Source:
    """A tar (gzip) or a folder. identity: what tells it from another, for a run that goes on."""

    path: Path
    folder: str  # the name of the folder in an archive that its paths begin with
    needed: str
    identity: dict[str, str]

    def read(self, wanted: Callable[[str], object]) -> Iterator[tuple[str, bytes]]:
        """(path below the set's folder, bytes) of the files that are wanted, sorted by path.

        Memory: a file of a folder; all that is wanted of an archive, whose members come in any order. Raises
        SourceError where the source cannot be read, or has two files of one path.
        """
        return self._read_folder(wanted) if self.path.is_dir() else self._read_tar(wanted)

    def _read_folder(self, wanted: Callable[[str], object]) -> Iterator[tuple[str, bytes]]:
        with read_errors(self.path, self.needed):
            paths = ((path.relative_to(self.path).as_posix(), path) for path in self.path.rglob("*"))
            for name, path in sorted((name, path) for name, path in paths if wanted(name)):
                yield name, path.read_bytes()

    def _read_tar(self, wanted: Callable[[str], object]) -> Iterator[tuple[str, bytes]]:
        found: dict[str, bytes] = {}
        with read_errors(self.path, self.needed), tarfile.open(self.path, "r|gz") as archive:
            for member in archive:
                name = self._below_folder(member.name)
                if not member.isfile() or not wanted(name):
                    continue
                if name in found or member.size > MAX_MEMBER_BYTES:
                    raise SourceError(f"{self.path}: {member.name} is there twice or too large; {self.needed}")
                found[name] = read_member(archive, member)
        yield from sorted(found.items())

    def _below_folder(self, name: str) -> str:
        name = name.removeprefix("./")
        return name.removeprefix(f"{self.folder}/") if self.folder else name


def open_source(benchmark: Benchmark, given: Path) -> Source:
    """The source of a benchmark of one archive, which is checked. Raises SourceError for any other."""
    archive = benchmark.archives[0]
    if given.is_dir() and (given / archive.name).is_file():
        given = given / archive.name
    if given.is_file():
        check_md5(given, archive, benchmark)
        return Source(given, benchmark.folder, benchmark.needed(), {archive.name: archive.md5})
    if not given.is_dir():
        raise SourceError(f"source={given} does not exist; {benchmark.needed()}")
    folder = given / benchmark.folder if (given / benchmark.folder).is_dir() else given
    pickled = benchmark.pickled_folder
    if pickled and folder == given and (given.name == pickled or (given / pickled).exists()):
        raise SourceError(_of_pickles(given, benchmark))
    return Source(folder, benchmark.folder, benchmark.needed(), {"folder": str(folder.resolve())})


def check_md5(path: Path, archive: Archive, benchmark: Benchmark) -> None:
    """Raise SourceError for a file that is not the archive that was published."""
    found = md5_of(path)
    if benchmark.pickled and found == benchmark.pickled.md5:
        raise SourceError(_of_pickles(path, benchmark))
    if found != archive.md5:
        raise SourceError(
            f"{path} ({path.stat().st_size:,} bytes) has MD5 {found} and {archive.name} has {archive.md5}: it is cut "
            f"short, damaged or another file; {benchmark.needed()}"
        )


def md5_of(path: Path) -> str:
    """The MD5 of a file, in hexadecimal."""
    digest = hashlib.md5(usedforsecurity=False)
    with Progress("check", path.stat().st_size >> 20, "MiB") as progress, path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            progress.update(file.tell() >> 20)
    return digest.hexdigest()


def read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The bytes of a regular file in a tar. Raises tarfile.ReadError where the tar is cut short within it."""
    file = archive.extractfile(member)
    assert file is not None, member.name
    with file:
        data = file.read()
    if len(data) < member.size:
        raise tarfile.ReadError(f"{member.name} has {len(data):,} of {member.size:,} bytes")
    return data


@contextmanager
def read_errors(path: Path, needed: str) -> Iterator[None]:
    """Turn what reading raises into a SourceError that says what is needed."""
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise SourceError(f"{path} cannot be read: {error}; {needed}") from error


def _of_pickles(path: Path, benchmark: Benchmark) -> str:
    return f"{path} holds Python pickles, which can run code and are not read; {benchmark.needed()}"

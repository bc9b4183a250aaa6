"""Decide which files of a pool count as images, and read one: what all formats of pools share."""

import errno
import posixpath
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache

from PIL import Image

from elfs_ray.pool.images import BadImage, known_formats
from elfs_ray.storage import filesystem

HEIF_EXTENSIONS = (".heic", ".heics", ".heif", ".heifs", ".hif")
# Errors that concern the file itself, so that its image is rejected. None is among them because Arrow sets no errno for
# bytes that it cannot decode.
_FILE_ERRNOS = (
    None,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)
# pyarrow raises a plain OSError, often without an errno, for whatever an object store answers: only the text tells.
_STORE_ERROR = re.compile(r"AWS Error|google::cloud|HTTP status|curl", re.IGNORECASE)
UNIT_EXTENSION = {"parquet": ".parquet", "webdataset": ".tar"}
UNIT_NOUNS = {"folder": "folder", "parquet": "Parquet file", "webdataset": "tar"}
# What is passed over for another reason than its extension.
NO_EXTENSION, OTHER_EXTENSION = "no extension", "other extensions"
HIDDEN, HIDDEN_FOLDERS, SPECIAL = "hidden files", "hidden folders", "pipes, sockets and devices"
MAX_EXTENSION = 16  # characters; of longer ones, and of numbers, there may be as many as files
MAX_SHOWN = 12
MAX_WARNINGS = 20
READ_AHEAD = 16  # files
# The splits of a data set in the names of files and folders. A digit or a sign ends a word: test2017, val_00.tar.
_TRAINING = re.compile(r"(?<![a-z])train(ing)?(?![a-z])", re.IGNORECASE)
_HELD_OUT = re.compile(r"(?<![a-z])(test(ing)?|val(id(ation)?)?|dev|eval)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Unit:
    """A part of a pool that one worker lists by itself.

    recursive: whether a folder's subfolders belong to it.
    patterns: glob patterns of the names of a folder's files that belong to it; none for all files.
    """

    format: str
    uri: str
    recursive: bool = True
    patterns: tuple[str, ...] = ()


@dataclass
class Remarks:
    """Warnings and counts of a listing, besides its samples.

    passed_over: the number of files that it did not list, by extension or by another reason.
    warnings: what may be wrong with the files that it did list.
    training_folders, held_out_folders: of each, the first folder of images below a unit whose name is that of a split.
    """

    passed_over: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)
    training_folders: set[str] = field(default_factory=set)
    held_out_folders: set[str] = field(default_factory=set)

    def pass_over(self, name: str, kind: str = "") -> None:
        """Count a file that is not listed because of its extension; `kind` follows the extension."""
        extension = posixpath.splitext(name)[1].lower() or NO_EXTENSION
        is_rare = extension != NO_EXTENSION and (len(extension) > MAX_EXTENSION or extension[1:].isdecimal())
        self.passed_over[(OTHER_EXTENSION if is_rare else extension) + kind] += 1

    def add(self, other: "Remarks") -> None:
        """Add the remarks of another part of the pool."""
        self.passed_over.update(other.passed_over)
        self.warnings.extend(other.warnings)
        self.training_folders |= other.training_folders
        self.held_out_folders |= other.held_out_folders

    def shortened_warnings(self) -> list[str]:
        """Return the first warnings, and how many more there are."""
        num_more = len(self.warnings) - MAX_WARNINGS
        return [*self.warnings[:MAX_WARNINGS], *([f"{num_more:,} more warnings"] if num_more > 0 else [])]


def describe_passed_over(passed_over: Counter[str]) -> str:
    """Return what a listing passed over as text, the most frequent first; an empty text for nothing."""
    ranked = sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{number:,} {reason}" for reason, number in ranked]
    if len(shown) > MAX_SHOWN:
        shown[MAX_SHOWN:] = [f"{sum(number for _, number in ranked[MAX_SHOWN:]):,} others"]
    extensions = {reason.partition(" ")[0] for reason in passed_over}
    readable = [extension for extension in HEIF_EXTENSIONS if extension in extensions - image_extensions()]
    hint = f" (to read {' '.join(readable)}, install the extra heif: pip install pillow-heif)" if readable else ""
    return f"passed over {', '.join(shown)}{hint}" if shown else ""


@dataclass(frozen=True)
class PoolColumns:
    """The columns in which a pool keeps its images and labels.

    image: a Parquet column of bytes, of Hugging Face image structs or of uris; None takes `image`, else `uri`. For
        WebDataset the suffix of the members that are images, a glob pattern; None takes every known extension.
    label: a Parquet column of integers; "folder" for a folder tree, "cls" for WebDataset; None lists no labels.
    """

    image: str | None = None
    label: str | None = None


def is_hidden(name: str, is_dir: bool) -> bool:
    """Return whether a file or folder of this name is skipped."""
    # "_" hides folders, as in Hadoop and Arrow, but not files: cameras name images _DSC0001.JPG.
    return name.startswith((".", "_") if is_dir else ".")


def hidden_part(path: str) -> str | None:
    """Return the path of a file that is skipped, or of the first folder on its path that is; None if neither is."""
    names = path.split("/")
    depths = range(1, len(names) + 1)
    return next(
        ("/".join(names[:depth]) for depth in depths if is_hidden(names[depth - 1], is_dir=depth < len(names))), None
    )


def is_image(name: str) -> bool:
    """Return whether a file's name makes it an image."""
    return format_of_name(name) == "folder" and not is_hidden(name, is_dir=False)


def split_names(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the names that look like those of training data, and those that look like test or validation data."""
    names = list(names)
    training = [name for name in names if _TRAINING.search(name)]
    return training, [name for name in names if _HELD_OUT.search(name) and not _TRAINING.search(name)]


@lru_cache
def image_extensions() -> frozenset[str]:
    """Return the extensions of the images that the installed Pillow reads."""
    formats = {*known_formats(), "MPO"}  # which Pillow opens as JPEG
    return frozenset(extension for extension, name in Image.registered_extensions().items() if name in formats)


def format_of_name(name: str) -> str | None:
    """Return the pool format that a file of this name belongs to, None for other files."""
    extension = posixpath.splitext(name)[1].lower()
    if extension in image_extensions():
        return "folder"
    return next((pool_format for pool_format, known in UNIT_EXTENSION.items() if known == extension), None)


def read_file(uri: str) -> bytes | BadImage:
    """Return the bytes of a file, or why it cannot be read. Raises OSError where the file is not to blame."""
    try:
        return filesystem.read_bytes(uri)
    except (OSError, ValueError) as error:
        return rejection(error, uri)


def read_files(uris: Iterable[str]) -> Iterator[bytes | BadImage]:
    """Yield `read_file` of each uri in turn, while some of the next are being read. Memory: READ_AHEAD files."""
    # A store answers after tens of milliseconds, in which several images can be decoded.
    waiting: deque[Future[bytes | BadImage]] = deque()
    with ThreadPoolExecutor(READ_AHEAD) as threads:
        for uri in uris:
            if len(waiting) == READ_AHEAD:
                yield waiting.popleft().result()
            waiting.append(threads.submit(read_file, uri))
        while waiting:
            yield waiting.popleft().result()


def rejection(error: Exception, uri: str) -> BadImage:
    """Return the reason for rejecting what `uri` holds.

    Raises `error` again where the file is not to blame: a store that refuses or does not answer, a disk that fails, too
    many open files. A rejection is final, whereas these images can be read when the run is resumed.
    """
    # A missing file is final, in a store as on a disk.
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        # EACCES concerns one file on a disk, but on a store missing credentials, and with them every image.
        is_store_error = "://" in uri and (isinstance(error, PermissionError) or _STORE_ERROR.search(str(error)))
        if is_store_error or error.errno not in _FILE_ERRNOS:
            raise error
    return BadImage(f"cannot be read: {error}")

"""What all kinds of pools share: their parts, which files count as images, and reading one."""

import errno
import posixpath
import re
from dataclasses import dataclass

from elfs_ray.pool.images import BadImage
from elfs_ray.storage import filesystem

IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".webp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif"),
)
# What the system says of a file itself; Arrow gives no number for bytes that it cannot decode.
_OF_A_FILE = (
    None,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)
_OF_A_STORE = re.compile(r"AWS Error|google::cloud|HTTP status|curl", re.IGNORECASE)
UNIT_EXTENSION = {"parquet": ".parquet", "webdataset": ".tar"}


@dataclass(frozen=True)
class Unit:
    """A part of a pool that is listed by itself. recursive: of a folder, whether the folders below it belong to it."""

    format: str
    uri: str
    recursive: bool = True


@dataclass(frozen=True)
class PoolColumns:
    """Where a pool keeps its images and labels.

    image: Parquet column with bytes, a Hugging Face image struct or uris; None takes `image`, else `uri`.
    label: Parquet column of integers; for a folder tree "folder", for WebDataset "cls"; None lists no labels.
    """

    image: str | None = None
    label: str | None = None


def is_hidden(name: str, is_dir: bool) -> bool:
    """Return whether a name is skipped: with "." any, with "_" folders alone, as cameras name images _DSC0001.JPG."""
    return name.startswith((".", "_") if is_dir else ".")


def is_hidden_path(path: str) -> bool:
    """Return whether a file, or a folder that it is in, is skipped."""
    *folders, name = path.split("/")
    return is_hidden(name, is_dir=False) or any(is_hidden(folder, is_dir=True) for folder in folders)


def is_image(name: str) -> bool:
    """Return whether a file counts as an image, by its name."""
    return format_of_name(name) == "folder" and not is_hidden(name, is_dir=False)


def format_of_name(name: str) -> str | None:
    """Return the pool format that a file of this name belongs to, None for other files."""
    extension = posixpath.splitext(name)[1].lower()
    if extension in IMAGE_EXTENSIONS:
        return "folder"
    return next((form for form, known in UNIT_EXTENSION.items() if known == extension), None)


def read_file(uri: str) -> bytes | BadImage:
    """Return the bytes of a file, or why it cannot be read. Raises OSError where that is no fault of the file."""
    try:
        return filesystem.read_bytes(uri)
    except (OSError, ValueError) as error:
        return rejection(error, uri)


def rejection(error: Exception, uri: str) -> BadImage:
    """Return the reason for rejecting what `uri` holds.

    Raises `error` again where it says nothing of the file: a store that refuses or does not answer, a disk that fails,
    too many open files. Rejected images are rejected for good, and these can be read when the run goes on.
    """
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        is_of_the_store = "://" in uri and (isinstance(error, PermissionError) or _OF_A_STORE.search(str(error)))
        if is_of_the_store or error.errno not in _OF_A_FILE:
            raise error
    return BadImage(f"cannot be read: {error}")

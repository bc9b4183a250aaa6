"""Decide which files of a pool count as images, and read one: what all formats of pools share."""

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


@dataclass(frozen=True)
class Unit:
    """A part of a pool that one worker lists by itself. recursive: whether a folder's subfolders belong to it."""

    format: str
    uri: str
    recursive: bool = True


@dataclass(frozen=True)
class PoolColumns:
    """The columns in which a pool keeps its images and labels.

    image: a Parquet column of bytes, of Hugging Face image structs or of uris; None takes `image`, else `uri`.
    label: a Parquet column of integers; "folder" for a folder tree, "cls" for WebDataset; None lists no labels.
    """

    image: str | None = None
    label: str | None = None


def is_hidden(name: str, is_dir: bool) -> bool:
    """Return whether a file or folder of this name is skipped."""
    # "_" hides folders, as in Hadoop and Arrow, but not files: cameras name images _DSC0001.JPG.
    return name.startswith((".", "_") if is_dir else ".")


def is_hidden_path(path: str) -> bool:
    """Return whether a file is skipped, or a folder on its path."""
    *folders, name = path.split("/")
    return is_hidden(name, is_dir=False) or any(is_hidden(folder, is_dir=True) for folder in folders)


def is_image(name: str) -> bool:
    """Return whether a file's name makes it an image."""
    return format_of_name(name) == "folder" and not is_hidden(name, is_dir=False)


def format_of_name(name: str) -> str | None:
    """Return the pool format that a file of this name belongs to, None for other files."""
    extension = posixpath.splitext(name)[1].lower()
    if extension in IMAGE_EXTENSIONS:
        return "folder"
    return next((pool_format for pool_format, known in UNIT_EXTENSION.items() if known == extension), None)


def read_file(uri: str) -> bytes | BadImage:
    """Return the bytes of a file, or why it cannot be read. Raises OSError where the file is not to blame."""
    try:
        return filesystem.read_bytes(uri)
    except (OSError, ValueError) as error:
        return rejection(error, uri)


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

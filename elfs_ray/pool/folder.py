"""Pools in folders: walked name by name. A local folder is read in a stream, a bucket's folder from its listing.

What begins with "." is passed over, and folders that begin with "_". Links are followed: to files and to folders,
wherever they are, and a folder that two links lead to is there twice, as a copy of it would be. A link to a folder that
holds the link is passed over: it leads to nothing new, and has no end. A link that leads nowhere stays in the listing
as the file that it names, so that its image is rejected by name.
"""

import os
import posixpath
from collections.abc import Iterator
from functools import cached_property

import pyarrow as pa
from pyarrow import fs

from elfs_ray.pool.files import Unit, is_hidden, is_hidden_path, is_image
from elfs_ray.storage import filesystem, schema


class Folder:
    """A folder of a pool. What is hidden is not there.

    held_by: of a local one, the real paths of the folders that it was reached through: of each that a link leaves, and
    of itself, which is the last.
    """

    def __init__(self, uri: str, held_by: tuple[str, ...] | None = None):
        self.uri = uri
        store, self._path = filesystem.resolve(uri)
        self._is_local = isinstance(store, fs.LocalFileSystem)
        self._held_by = _holders(self._path) if held_by is None and self._is_local else held_by or ()

    def entries(self) -> Iterator[tuple[str, bool]]:
        """(name, whether it is a folder) of what lies directly in it, in no order; nothing where it does not exist.

        Memory: of a bucket the whole listing, about 1 KB a file (on gs:// of all files below it, too).
        Raises ValueError for a local name that is not UTF-8.
        """
        found = self._local_entries() if self._is_local else iter(self._listed)
        return ((name, is_dir) for name, is_dir in found if not is_hidden(name, is_dir))

    def child(self, name: str) -> "Folder":
        """A folder in it."""
        path = os.path.join(self._path, name)
        return Folder(filesystem.join(self.uri, name), _enter(self._held_by, path) if self._is_local else ())

    def walk(self) -> Iterator[str]:
        """The names, relative to it, of all files in it and below it, in no order. Memory: as `entries`."""
        if not self._is_local:
            for info in filesystem.list_files(self.uri, recursive=True):
                name = posixpath.relpath(info.path, self._path)
                if not is_hidden_path(name):
                    yield name
            return
        left = [("", self)]
        while left:
            prefix, folder = left.pop()
            for name, is_dir in folder.entries():
                if is_dir:
                    left.append((f"{prefix}{name}/", folder.child(name)))
                else:
                    yield prefix + name

    @cached_property
    def _listed(self) -> list[tuple[str, bool]]:
        return [(info.base_name, info.type == fs.FileType.Directory) for info in filesystem.list_folder(self.uri)]

    def _local_entries(self) -> Iterator[tuple[str, bool]]:
        try:
            scan = os.scandir(self._path)
        except FileNotFoundError:
            return
        with scan:
            for entry in scan:
                _refuse_other_than_utf8(entry.name)
                kind = _kind(entry)
                if kind is fs.FileType.Directory and entry.is_symlink() and self._is_held_by(entry.path):
                    continue
                if kind is not None:
                    yield entry.name, kind is fs.FileType.Directory

    def _is_held_by(self, link: str) -> bool:
        """Whether a link in it leads to a folder that holds it."""
        target = os.path.realpath(link).rstrip("/") + "/"
        return any(f"{holder}/".startswith(target) for holder in self._held_by)


def list_folder(unit: Unit, with_labels: bool) -> pa.Table:
    """List one folder as `pool.list_unit` does."""
    uris = [filesystem.join(unit.uri, name) for name in sorted(_images(unit))]
    labels = [posixpath.basename(posixpath.dirname(uri)) if with_labels else None for uri in uris]
    return pa.table({schema.URI: pa.array(uris, pa.string()), schema.LABEL: pa.array(labels, pa.string())})


def count_folder(unit: Unit) -> int:
    """The number of images in a folder. Memory: of a local one none that grows."""
    return sum(1 for _ in _images(unit))


def _images(unit: Unit) -> Iterator[str]:
    """The names of the images of a unit, relative to it, in no order."""
    folder = Folder(unit.uri)
    names = folder.walk() if unit.recursive else (name for name, is_dir in folder.entries() if not is_dir)
    return (name for name in names if is_image(posixpath.basename(name)))


def _holders(path: str) -> tuple[str, ...]:
    """`Folder`'s held_by of a local path."""
    held_by: tuple[str, ...] = ("/",)
    parts = path.strip("/").split("/")
    for end in range(len(parts)):
        held_by = _enter(held_by, "/" + "/".join(parts[: end + 1]))
    return held_by


def _enter(held_by: tuple[str, ...], path: str) -> tuple[str, ...]:
    """held_by of a folder at `path`, from that of the folder that it is in."""
    if os.path.islink(path):
        return *held_by, os.path.realpath(path)
    return *held_by[:-1], os.path.join(held_by[-1], os.path.basename(path))


def _kind(entry: os.DirEntry) -> fs.FileType | None:
    """Directory, or File also for a link that leads nowhere; None for a pipe, a socket or a device."""
    try:
        if entry.is_dir():
            return fs.FileType.Directory
        leads_nowhere = entry.is_symlink() and not os.path.exists(entry.path)
        return fs.FileType.File if entry.is_file() or leads_nowhere else None
    except OSError:  # a link to itself, or into a folder that may not be read: reading it says so
        return fs.FileType.File


def _refuse_other_than_utf8(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the name of {os.fsencode(name)!r} is not UTF-8, as names of files must be: rename it"
        ) from error

"""List pools in folders. A local folder is read as a stream, a folder of a bucket from its listing.

Names that begin with "." are skipped, and folders whose names begin with "_". Symlinks to files and folders are
followed, wherever they lead, and loops are skipped. A folder that is also reachable through a link is listed twice. A
link whose target is missing is listed as a file, so that its image is rejected by name.
"""

import os
import posixpath
from array import array
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import groupby
from pathlib import PurePath

import numpy as np
import pyarrow as pa
from pyarrow import fs

from elfs_ray.pool.changes import UNKNOWN, Inventory, key_of, version_of
from elfs_ray.pool.files import (
    HIDDEN,
    HIDDEN_FOLDERS,
    SPECIAL,
    Remarks,
    Unit,
    hidden_part,
    is_hidden,
    is_image,
    split_names,
)
from elfs_ray.storage import filesystem, schema


class Folder:
    """A folder of a pool, without its hidden files and folders."""

    def __init__(self, uri: str):
        self.uri = uri
        store, self._path = filesystem.resolve(uri)
        self._is_local = isinstance(store, fs.LocalFileSystem)
        self._infos: dict[str, fs.FileInfo] = {}  # of the files of a bucket that were yielded, by relative name

    def entries(self, remarks: Remarks | None = None) -> Iterator[tuple[str, bool]]:
        """Yield (name, whether it is a folder) of each direct entry, in no order; nothing if the folder does not exist.

        Counts in `remarks` what is hidden or neither a file nor a folder.

        Memory: constant for a local folder; for a bucket the whole listing, about 1 KB a file (on gs:// also of all
        files below it). Raises ValueError for a local name that is not UTF-8.
        """
        remarks = remarks or Remarks()
        for name, is_dir in self._local_entries(remarks) if self._is_local else self._listed:
            if not is_hidden(name, is_dir):
                yield name, is_dir
            else:
                remarks.passed_over[HIDDEN_FOLDERS if is_dir else HIDDEN] += 1

    def version(self, name: str) -> int:
        """Return the version (pool/changes.py) of a file that was yielded by its relative name.

        It is UNKNOWN for a file that cannot be reached, whose image will be rejected.
        """
        # The listing of a bucket has it; another request for each object would take hours.
        return version_of_file(filesystem.join(self.uri, name)) if self._is_local else _version(self._infos[name])

    def child(self, name: str) -> "Folder":
        """Return the subfolder of this name."""
        return Folder(filesystem.join(self.uri, name))

    def walk(self, remarks: Remarks | None = None) -> Iterator[str]:
        """Yield the relative names of all files in it and below it, in no order. Memory and remarks: as `entries`."""
        # A bucket has no folders: one recursive listing takes far fewer requests than a walk.
        if not self._is_local:
            yield from self._walk_bucket(remarks or Remarks())
            return
        pending = [("", self)]
        while pending:
            prefix, folder = pending.pop()
            for name, is_dir in folder.entries(remarks):
                if is_dir:
                    pending.append((f"{prefix}{name}/", folder.child(name)))
                else:
                    yield prefix + name

    def _walk_bucket(self, remarks: Remarks) -> Iterator[str]:
        hidden_folders = set()
        for info in filesystem.list_files(self.uri, recursive=True):
            name = posixpath.relpath(info.path, self._path)
            hidden = hidden_part(name)
            if hidden is None:
                self._infos[name] = info
                yield name
            elif hidden == name:
                remarks.passed_over[HIDDEN] += 1
            else:
                hidden_folders.add(hidden)
        if hidden_folders:
            remarks.passed_over[HIDDEN_FOLDERS] += len(hidden_folders)

    @cached_property
    def _listed(self) -> list[tuple[str, bool]]:
        infos = filesystem.list_folder(self.uri)
        self._infos = {info.base_name: info for info in infos}
        return [(info.base_name, info.type == fs.FileType.Directory) for info in infos]

    def _local_entries(self, remarks: Remarks) -> Iterator[tuple[str, bool]]:
        try:
            scan = os.scandir(self._path)
        except FileNotFoundError:
            return
        with scan:
            for entry in scan:
                _refuse_other_than_utf8(entry.name)
                kind = _kind(entry)
                if kind is fs.FileType.Directory and entry.is_symlink() and self._is_loop(entry.path):
                    continue
                if kind is None:
                    remarks.passed_over[SPECIAL] += 1
                else:
                    yield entry.name, kind is fs.FileType.Directory

    @cached_property
    def _real_ancestors(self) -> list[PurePath]:
        """Return the real paths of this folder and of every folder on the path by which it was reached."""
        path = PurePath(self._path)
        return [PurePath(os.path.realpath(folder)) for folder in (path, *path.parents)]

    def _is_loop(self, link: str) -> bool:
        """Return whether a link in this folder leads to a folder that contains it."""
        # Every folder on the path counts, not only those of this walk: each unit of a pool is walked by itself, and a
        # link out of the pool may lead to a link back into it.
        target = os.path.realpath(link)
        return any(ancestor.is_relative_to(target) for ancestor in self._real_ancestors)


def list_folder(unit: Unit, with_labels: bool, remarks: Remarks) -> pa.Table:
    """List one folder as `listing.list_unit` does."""
    folder = Folder(unit.uri)
    names = sorted(_images(folder, unit, remarks))
    uris = [filesystem.join(unit.uri, name) for name in names]
    labels = [posixpath.basename(posixpath.dirname(uri)) if with_labels else None for uri in uris]
    columns = {
        schema.URI: pa.array(uris, pa.string()),
        schema.LABEL: pa.array(labels, pa.string()),
        schema.VERSION: pa.array(map(folder.version, names), pa.uint64()),
    }
    return pa.table(columns)


def inventory_of_folder(unit: Unit, remarks: Remarks) -> Inventory:
    """Return the images of a folder, in no order. Memory: 24 bytes an image, and for a bucket its listing."""
    folder = Folder(unit.uri)
    keys, versions = array("Q"), array("Q")
    for name in _images(folder, unit, remarks):
        keys.append(key_of(filesystem.join(unit.uri, name)))
        versions.append(folder.version(name))
    return Inventory(np.array(keys, np.uint64), np.array(versions, np.uint64), np.ones(len(keys), np.int64))


def versions_of(uris: list[str]) -> list[int]:
    """Return the version of each of some files; UNKNOWN for one that cannot be reached.

    A bucket is asked for one listing of each folder that holds some of them.
    """
    versions: dict[str, int] = {}
    for parent, group in groupby(sorted(uris), key=posixpath.dirname):
        members = list(group)
        if filesystem.is_uri(parent):
            infos = {info.base_name: info for info in filesystem.list_files(parent)}
            versions |= {uri: _version(infos.get(posixpath.basename(uri))) for uri in members}
        else:
            versions |= {uri: version_of_file(uri) for uri in members}
    return [versions[uri] for uri in uris]


def version_of_file(path: str) -> int:
    """Return the version of a local file; UNKNOWN if it cannot be reached."""
    try:
        status = os.stat(path)
    except OSError:
        return UNKNOWN
    return version_of(status.st_size, status.st_mtime_ns)


def _version(info: fs.FileInfo | None) -> int:
    return UNKNOWN if info is None or info.mtime_ns is None else version_of(info.size, info.mtime_ns)


def count_folder(unit: Unit, remarks: Remarks) -> int:
    """Count the images in a folder. Memory: the names of its folders, and for a bucket as `Folder.entries`."""
    return sum(1 for _ in _images(Folder(unit.uri), unit, remarks))


def _images(folder: Folder, unit: Unit, remarks: Remarks) -> Iterator[str]:
    """Yield the relative names of the images of a unit, in no order."""
    # What no pattern matches, the user did not ask for.
    seen = None if unit.patterns else remarks
    names = folder.walk(seen) if unit.recursive else (name for name, is_dir in folder.entries(seen) if not is_dir)
    folders = set()
    for name in names:
        file_name = posixpath.basename(name)
        if unit.patterns and not any(fnmatchcase(file_name, pattern) for pattern in unit.patterns):
            continue
        if is_image(file_name):
            folders.add(name[: -len(file_name)])
            yield name
        else:
            remarks.pass_over(file_name)
    training, held_out = split_names(folders)
    remarks.training_folders.update(filesystem.join(unit.uri, name) for name in sorted(training)[:1])
    remarks.held_out_folders.update(filesystem.join(unit.uri, name) for name in sorted(held_out)[:1])


def _kind(entry: os.DirEntry) -> fs.FileType | None:
    """Return Directory or File; None for a pipe, a socket or a device, where reading could block forever."""
    try:
        if entry.is_dir():
            return fs.FileType.Directory
        # Listed, so that its image becomes a row of rejected/ instead of disappearing silently.
        is_dangling = entry.is_symlink() and not os.path.exists(entry.path)
        return fs.FileType.File if entry.is_file() or is_dangling else None
    except OSError:
        # A link to itself, or into a folder without permission: reading the file gives the reason for rejecting it.
        return fs.FileType.File


def _refuse_other_than_utf8(name: str) -> None:
    # Python reads such a name with surrogates, which neither an Arrow string nor coreset.txt can hold.
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the file name {os.fsencode(name)!r} is not UTF-8, as file names of a pool must be: rename it"
        ) from error

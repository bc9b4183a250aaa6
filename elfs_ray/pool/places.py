"""Find what pool.uri names: paths, glob patterns of paths, or a list of these."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from glob import escape, has_magic
from itertools import pairwise

from elfs_ray.pool.files import UNIT_EXTENSION, Remarks, format_of_name, image_extensions
from elfs_ray.pool.folder import Folder
from elfs_ray.storage import filesystem, schema


@dataclass
class Matches:
    """The files in one folder that pool.uri names, by patterns; `seen` counts them by extension."""

    patterns: list[str] = field(default_factory=list)
    seen: Remarks = field(default_factory=Remarks)

    @property
    def has_images(self) -> bool:
        return not image_extensions().isdisjoint(self.seen.passed_over)


@dataclass
class Places:
    """What pool.uri names: folders, the tars and Parquet files among the files, and all files by their folder."""

    folders: list[str] = field(default_factory=list)
    containers: list[str] = field(default_factory=list)
    matches: dict[str, Matches] = field(default_factory=dict)

    def add_file(self, uri: str, pattern: str) -> None:
        """Add a file that a pattern of names matches."""
        folder, _, name = uri.rpartition("/")
        matches = self.matches.setdefault(folder or "/", Matches())
        matches.seen.pass_over(name)
        if pattern not in matches.patterns:
            matches.patterns.append(pattern)
        if format_of_name(name) in UNIT_EXTENSION:
            self.containers.append(uri)


def find_places(pool_uri: str | list[str]) -> Places:
    """Return what pool.uri names. Raises ValueError for what does not exist, and for one image."""
    places = Places()
    for uri in [pool_uri] if isinstance(pool_uri, str) else pool_uri:
        root = filesystem.absolute(uri)
        if not filesystem.exists(root):
            if not (has_magic(root) and _add_matches(places, root)):
                raise ValueError(f"pool.uri={uri!r} does not exist: give a folder of images, Parquet files or tars")
        elif filesystem.is_dir(root):
            places.folders.append(root)
        elif format_of_name(root) == "folder":
            raise ValueError(f"pool.uri={uri!r} is one file: give the folder that holds the images")
        else:
            places.add_file(root, escape(filesystem.basename(root)))
    for root in places.folders:
        if filesystem.exists(filesystem.join(root, schema.DATASET_FILE)):
            raise ValueError(
                f"pool.uri={pool_uri!r} holds a benchmark's training and test images: give its subfolder train"
            )
    return places


def _add_matches(places: Places, pattern: str) -> bool:
    """Add what a glob pattern matches; return whether it matches anything."""
    parts = pattern.split("/")
    first = next(number for number, part in enumerate(parts) if has_magic(part))
    matched = False
    for uri, is_dir in _matches(Folder("/".join(parts[:first]) or "/"), parts[first:]):
        matched = True
        if is_dir:
            places.folders.append(uri)
        else:
            places.add_file(uri, parts[-1])
    return matched


def _matches(folder: Folder, parts: list[str]) -> Iterator[tuple[str, bool]]:
    """Yield (uri, whether it is a folder) of what a pattern matches below a folder; ** stands for any folders."""
    first, *rest = parts
    if first == "**":
        yield from _matches(folder, rest) if rest else [(folder.uri, True)]
        below = (folder.child(name) for name, is_dir in folder.entries() if is_dir)
        yield from (match for child in below for match in _matches(child, parts) if rest)
        return
    for name, is_dir in folder.entries():
        if fnmatchcase(name, first):
            if not rest:
                yield filesystem.join(folder.uri, name), is_dir
            elif is_dir:
                yield from _matches(folder.child(name), rest)


def refuse_overlaps(places: Places, pool_uri: str | list[str]) -> None:
    """Raise ValueError for a folder in another one that pool.uri names: its images would be listed twice."""
    folders = sorted(map(_real_folder, places.folders))
    parents = [_real_folder(uri) for uri, matches in places.matches.items() if matches.has_images]
    twice = [inner for outer, inner in pairwise(folders) if inner.startswith(outer)]
    twice += [parent for parent in parents if parent.startswith(tuple(folders))]
    if twice:
        raise ValueError(f"pool.uri={pool_uri!r} names {twice[0]} twice: give each folder once")


def _real_folder(uri: str) -> str:
    """Return a folder's uri with a slash at its end, without symbolic links."""
    return (uri if "://" in uri else os.path.realpath(uri)).rstrip("/") + "/"

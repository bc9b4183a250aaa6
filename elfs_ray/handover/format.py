"""Describe a format as one value. Add one by a module with a `FORMAT` and an entry in formats.py."""

from collections.abc import Callable
from dataclasses import dataclass

from elfs_ray.handover.coreset import Coreset


@dataclass(frozen=True)
class Format:
    """A format that a coreset can be written in.

    name     what --to takes
    target   the file or folder that it writes, where --out does not say
    meaning  what it is, in a few words
    write    (coreset, file or folder to write, root or None); see below for root
    takes_places  whether the tool opens the images by their places; if not, the format holds uris or the images
    root     what root is for; empty for a format that has no use for one
    """

    name: str
    target: str
    meaning: str
    write: Callable[[Coreset, str, str | None], None]
    takes_places: bool = True
    root: str = ""

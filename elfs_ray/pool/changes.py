"""Compare what a pool holds with what a run listed before: which files are new, gone, changed or back.

A file is known by its key, a hash of its uri, and by its version, a hash of its size and of the time of its last
change: two numbers of 64 bits. For an image within a Parquet file or tar, both are those of that file. An image that a
Parquet file names by its uri has no version, so only its uri is compared.

Two of n uris get one key by chance with a probability of n²/2⁶⁵: of ten million, 3 in a million.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Self

import numpy as np

UNKNOWN = 0
"""The version of what has none, or of what was listed before versions were recorded: it equals every other one."""
_BITS = (1 << 64) - 1


def key_of(uri: str) -> int:
    """Return the key of a uri, which may be of any length."""
    return int.from_bytes(blake2b(uri.encode(), digest_size=8).digest(), "little")


def version_of(size: int, mtime_ns: int) -> int:
    """Return the version of a file, which is never UNKNOWN."""
    # Products with odd numbers modulo 2^64 are one to one, and spread what differs over all bits.
    return ((size * 0x9E3779B97F4A7C15) ^ (mtime_ns * 0xC2B2AE3D27D4EB4F)) & _BITS or 1


@dataclass(frozen=True)
class Inventory:
    """The files of a pool, or its images where each is a file; three columns (n,).

    keys, versions: uint64. rows: int64, the number of images in each file. Memory: 24 bytes a file.
    """

    keys: np.ndarray
    versions: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, keys: Iterable[int], versions: Iterable[int], rows: Iterable[int]) -> Self:
        return cls(np.fromiter(keys, np.uint64), np.fromiter(versions, np.uint64), np.fromiter(rows, np.int64))

    @classmethod
    def concatenate(cls, parts: Sequence["Inventory"]) -> Self:
        """Return the files of all parts, in their order."""
        parts = [cls.of((), (), ()), *parts]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("keys", "versions", "rows")))

    def among(self, mask: np.ndarray) -> Self:
        """Return the files for which a mask (n,) bool is true."""
        return type(self)(self.keys[mask], self.versions[mask], self.rows[mask])

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class Records:
    """The files that a run has listed, each with its images' ids: first_ids[i] to first_ids[i] + rows[i] - 1.

    is_gone: (n,) bool, whether a file's images were marked as gone. is_lost: whether they were gone before they could
    be embedded, so that the file must be taken for a new one if it is back. Memory: 34 bytes a file.
    """

    files: Inventory
    first_ids: np.ndarray
    is_gone: np.ndarray
    is_lost: np.ndarray

    def __len__(self) -> int:
        return len(self.files)


@dataclass(frozen=True)
class Changes:
    """How a pool differs from the records of a run, in images, and which files make the difference.

    is_new: (files,) bool, of those listed now. is_gone: (records,) bool, of those that are not in the pool any more.
    num_listed: the number of images that were in the pool when it was last listed. num_present: that of those in it
    now. basis: says what the number of new images was estimated from; empty for an exact number.
    """

    num_new: int
    num_gone: int
    num_changed: int
    num_back: int
    num_listed: int
    num_present: int
    is_new: np.ndarray
    is_gone: np.ndarray
    basis: str = ""

    def __bool__(self) -> bool:
        return bool(self.num_new or self.num_gone or self.num_changed or self.num_back)

    @property
    def num_appended(self) -> int:
        """Return the number of images that get a new id."""
        return self.num_new + self.num_changed

    def describe(self) -> str:
        """Return the changes as text, such as "80 new, 3 gone, 1 changed"."""
        numbers = {"new": self.num_new, "gone": self.num_gone, "changed": self.num_changed, "back": self.num_back}
        about = "about " if self.basis else ""
        shown = [f"{about if word == 'new' else ''}{number:,} {word}" for word, number in numbers.items() if number]
        return ", ".join(shown) or "no change"


def compare(records: Records, listed: Inventory) -> Changes:
    """Return how the listed files differ from the recorded ones.

    A file matches a record of the same key and version, be it gone or not. What is left over matches by its key alone
    where one of the two versions is UNKNOWN. A uri may occur several times: then the first occurrence matches the first
    record, and so on. Time O(n log n), memory about 130 bytes a file.
    """
    is_new, is_left = np.ones(len(listed), bool), ~records.is_lost
    for exactly in (True, False):
        rows, recorded = np.flatnonzero(is_new), np.flatnonzero(is_left)
        keys, versions = listed.keys[rows], listed.versions[rows]
        recorded_keys, recorded_versions = records.files.keys[recorded], records.files.versions[recorded]
        if exactly:
            keys, recorded_keys = _joined(keys, versions), _joined(recorded_keys, recorded_versions)
        else:
            unknown = np.isin(recorded_keys, keys[versions == UNKNOWN]) | (recorded_versions == UNKNOWN)
            recorded, recorded_keys = recorded[unknown], recorded_keys[unknown]
        matches, recorded_matches = match(keys, recorded_keys)
        is_new[rows[matches]] = False
        is_left[recorded[recorded_matches]] = False
    is_gone = is_left | records.is_lost
    left = is_gone & ~records.is_gone
    is_changed = is_new & np.isin(listed.keys, records.files.keys[left])
    is_missing = left & ~np.isin(records.files.keys, listed.keys[is_new])
    return Changes(
        num_new=int(listed.rows[is_new & ~is_changed].sum()),
        num_gone=int(records.files.rows[is_missing].sum()),
        num_changed=int(listed.rows[is_changed].sum()),
        num_back=int(records.files.rows[records.is_gone & ~is_gone].sum()),
        num_listed=int(records.files.rows[~records.is_gone].sum()),
        num_present=int(records.files.rows[~is_gone].sum() + listed.rows[is_new].sum()),
        is_new=is_new,
        is_gone=is_gone,
    )


def match(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of equal keys (n,) uint64 in two arrays, in pairs; each position is in one pair at most.

    The first occurrence of a key in one array is paired with its first occurrence in the other, and so on.
    """
    places, others = (_joined(keys, _occurrence(keys)) for keys in (first, second))
    _, in_first, in_second = np.intersect1d(places, others, assume_unique=True, return_indices=True)
    return in_first, in_second


def _joined(keys: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return a number for each pair of numbers (n,) uint64; pairs with 0 keep the key."""
    return keys ^ (others * np.uint64(0xD6E8FEB86659FD93))


def _occurrence(keys: np.ndarray) -> np.ndarray:
    """Return how many times each key occurs before it, (n,) uint64."""
    order = np.argsort(keys, kind="stable")
    is_first = np.ones(len(keys), bool)
    is_first[1:] = keys[order][1:] != keys[order][:-1]
    positions = np.arange(len(keys))
    counts = np.empty(len(keys), np.uint64)
    counts[order] = positions - np.maximum.accumulate(np.where(is_first, positions, 0))
    return counts

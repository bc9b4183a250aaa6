"""List pools in uncompressed WebDataset tars, and read their members in place."""

import io
import posixpath
import re
import sys
import tarfile
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import BinaryIO, NoReturn, cast

import pyarrow as pa

from elfs_ray.pool.files import HIDDEN, MAX_SHOWN, PoolColumns, Remarks, Unit, hidden_part, is_image, rejection
from elfs_ray.pool.images import BadImage
from elfs_ray.storage import filesystem, schema

# Of zeros that writers put at the end: two blocks, and what fills the last record. More of them could be members.
MAX_END_BYTES = 2 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE
READ_AHEAD_BYTES = 1 << 20  # of a listing, which reads 512 bytes of header and seeks over each member
SPAN_BYTES = 4 << 20  # of members, which one request to a store reads
# The container ends at the first ".tar#": a member's name may contain another one.
MEMBER_URI = re.compile(
    r"(?P<container>.*?\.(?i:tar))#(?P<member>.*)\?offset=(?P<offset>\d+)&size=(?P<size>\d+)", re.DOTALL
)


def list_tar(unit: Unit, columns: PoolColumns, remarks: Remarks) -> pa.Table:
    """List one tar as `listing.list_unit` does. A sample's class is in the .cls member of the same key."""
    uris, keys, classes = [], [], {}
    suffixes: dict[str, str] = {}  # the first one of each key
    ambiguous, others = None, set()
    store, tar_path = filesystem.resolve(unit.uri)
    with store.open_input_file(tar_path) as raw:
        file = cast(BinaryIO, io.BufferedReader(_Seekable(raw), READ_AHEAD_BYTES))
        for member in _tar_members(unit.uri, file, raw.size(), remarks):
            path = posixpath.normpath(member.name)
            if hidden_part(path) is not None:
                remarks.passed_over[HIDDEN] += 1
                continue
            folder, name = posixpath.split(path)
            # WebDataset's rule: members with the same path up to the first "." of their name are one sample.
            stem, _, suffix = name.partition(".")
            suffix = suffix.lower()
            key = posixpath.join(folder, stem)
            if columns.label is not None and name.endswith(".cls"):
                classes[key] = _read_class(file, member, unit.uri)
            elif not _is_wanted(name, suffix, columns.image):
                remarks.pass_over(name, " members")
            elif member.issparse():
                remarks.passed_over["sparse files in tars"] += 1  # their bytes are not in one piece
            else:
                # A name that occurs twice is no fault: tars that were joined may share names.
                if columns.image is None and suffixes.setdefault(key, sys.intern(suffix)) != suffix:
                    ambiguous = ambiguous or key
                    others.add(suffix)
                uris.append(f"{unit.uri}#{member.name}?offset={member.offset_data}&size={member.size}")
                keys.append(key)
    if ambiguous is not None:
        _refuse_several_images(ambiguous, {*suffixes.values(), *others}, unit.uri)
    labels = pa.array([classes.get(key) for key in keys], pa.int32())
    try:
        return pa.table({schema.URI: pa.array(uris, pa.string()), schema.LABEL: labels})
    except UnicodeEncodeError as error:
        raise ValueError(f"the name of a member is not UTF-8, which names must be: rename {error.object!r}") from error


def _is_wanted(name: str, suffix: str, wanted: str | None) -> bool:
    """Return whether a member is an image of the pool; `wanted` is PoolColumns.image."""
    if wanted is None:
        return is_image(name)
    wanted = wanted.lower().removeprefix(".")
    # A suffix that is spelt out may be any, such as jpeg_image; a pattern would match labels and captions, too.
    return suffix == wanted or (is_image(name) and fnmatchcase(suffix, wanted))


def _refuse_several_images(key: str, suffixes: Iterable[str], uri: str) -> NoReturn:
    first, *others = sorted(suffixes)
    shown = ", ".join([first, *others[: MAX_SHOWN - 1], *(["…"] if len(others) >= MAX_SHOWN else [])])
    raise ValueError(
        f"{uri}: key {key!r} has several images; the suffixes of this tar are {shown}. One may be a mask of another: "
        f"give pool.image_column={first} (or another) to take the members with that suffix alone, or "
        "pool.image_column=* if each is a sample of its own."
    )


def read_tar_members(container: str, uris: list[str]) -> Iterator[bytes | BadImage]:
    """Yield the bytes of each member in turn, or why they cannot be read."""
    try:
        store, path = filesystem.resolve(container)
        file = store.open_input_file(path)
    except (OSError, ValueError) as error:
        yield from (rejection(error, container) for _ in uris)
        return
    with file:
        for members in _spans(uris):
            yield from _read_span(file, members, container)


class _Seekable(io.RawIOBase):
    """A pyarrow file as a raw Python stream, for io.BufferedReader to read ahead.

    As in any Python file, seeking beyond the end is allowed: tarfile does so in a truncated tar, and object stores
    would raise an error.
    """

    def __init__(self, file: pa.NativeFile):
        self._file, self._size = file, file.size()
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = (0, self._position, self._size)[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer) -> int:
        num_bytes = max(0, min(len(buffer), self._size - self._position))
        buffer[:num_bytes] = self._file.read_at(num_bytes, self._position) if num_bytes else b""
        self._position += num_bytes
        return num_bytes


def _tar_members(uri: str, file: BinaryIO, size: int, remarks: Remarks) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files of a tar of `size` bytes.

    tarfile ends at whatever is no header. Here, a tar ends where only zeros follow. Behind zeros it goes on, as in
    archives that were joined, and one that is cut short ends at its last header; `remarks` tells of both. Raises
    ValueError for a file that is not an uncompressed tar, and for a damaged header, behind which images would be lost.
    """
    with _open_tar(uri, file) as archive:
        while True:
            is_cut = False
            try:
                member = archive.next()
            except tarfile.ReadError as error:
                # A header is damaged or cut off behind one that extends it. A cut anywhere else is found below.
                member, is_cut = None, str(error) in ("empty header", "truncated header")
            if member is not None:
                # tarfile keeps all members, 400 bytes each, to resolve links, which are not followed here.
                archive.members.clear()  # type: ignore[attr-defined]
                if member.isfile():
                    yield member
                elif not member.isdir():
                    remarks.passed_over["links and devices in tars"] += 1
                continue
            offset = _skip_zeros(file, archive.offset)
            if is_cut or archive.offset >= size or (offset is not None and size - offset < tarfile.BLOCKSIZE):
                remarks.warnings.append(f"{uri} is cut short, or its end is not marked: images may be missing")
                return
            if offset is None:
                if size - archive.offset > MAX_END_BYTES:
                    remarks.warnings.append(
                        f"{uri} holds only zeros from offset {archive.offset:,} to its end at {size:,}, as where a "
                        "copy was broken off: images may be missing"
                    )
                return
            if offset == archive.offset:
                raise ValueError(
                    f"{uri} has a damaged header at offset {offset:,}, behind which {size - offset:,} bytes follow. "
                    "Repair it or move it out of the pool."
                )
            remarks.warnings.append(
                f"{uri} holds only zeros from offset {archive.offset:,} to {offset:,}, as where archives were joined; "
                "if it was not, images are missing"
            )
            archive.offset = offset


def _open_tar(uri: str, file: BinaryIO) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=file, mode="r:")
    except tarfile.ReadError as error:
        raise ValueError(
            f"{uri} cannot be read as an uncompressed tar: {error}. Repair it or move it out of the pool."
        ) from error


def _skip_zeros(file: BinaryIO, offset: int) -> int | None:
    """Return the offset of the first block from `offset` on that holds other bytes than zeros; None if none does."""
    file.seek(offset)
    while chunk := file.read(READ_AHEAD_BYTES):
        num_zeros = len(chunk) - len(chunk.lstrip(b"\0"))
        if num_zeros < len(chunk):
            return offset + num_zeros // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        offset += num_zeros
    return None


def _read_class(file: BinaryIO, member: tarfile.TarInfo, uri: str) -> int | None:
    """Return the class in a .cls member; None if the tar ends within it."""
    file.seek(member.offset_data)
    data = file.read(member.size)
    if len(data) < member.size:
        return None
    text = data.decode("ascii", "replace").strip()
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{uri}: {member.name} holds {text!r}; it must hold the class as an integer") from None


def _spans(uris: list[str]) -> Iterator[list[tuple[int, int]]]:
    """Yield the (offset, size) of each member, those together that follow each other within SPAN_BYTES."""
    span: list[tuple[int, int]] = []
    for uri in uris:
        match = MEMBER_URI.fullmatch(uri)
        assert match is not None, uri
        offset, size = int(match["offset"]), int(match["size"])
        if span and not (sum(span[-1]) <= offset and offset + size - span[0][0] <= SPAN_BYTES):
            yield span
            span = []
        span.append((offset, size))
    if span:
        yield span


def _read_span(file: pa.NativeFile, members: list[tuple[int, int]], container: str) -> Iterator[bytes | BadImage]:
    """Yield the bytes of members that lie together, which one request to a store reads."""
    # Not beyond the end of a tar that is cut short, where a store would answer with an error.
    start, end = members[0][0], min(sum(members[-1]), file.size())
    try:
        data = file.read_at(end - start, start) if end > start else b""
    except OSError as error:
        if len(members) == 1:
            yield rejection(error, container)
            return
        for one in members:  # one damaged place on a disk must not cost its neighbours
            yield from _read_span(file, [one], container)
        return
    for offset, size in members:
        member = data[offset - start : offset - start + size]
        is_whole = len(member) == size
        reason = f"{container} is cut short: it has {len(member)} of the image's {size} bytes"
        yield member if is_whole else BadImage(reason)

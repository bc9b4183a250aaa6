"""List pools in uncompressed WebDataset tars, and read their members in place."""

import io
import posixpath
import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, cast

import pyarrow as pa

from elfs_ray.pool.files import Unit, is_hidden_path, is_image, rejection
from elfs_ray.pool.images import BadImage
from elfs_ray.storage import filesystem, schema

READ_AHEAD_BYTES = 1 << 20  # of a listing, which reads 512 bytes of header and seeks over each member
# The container ends at the first ".tar#": a member's name may contain another one.
MEMBER_URI = re.compile(
    r"(?P<container>.*?\.(?i:tar))#(?P<member>.*)\?offset=(?P<offset>\d+)&size=(?P<size>\d+)", re.DOTALL
)


def list_tar(unit: Unit, with_labels: bool) -> pa.Table:
    """List one tar as `listing.list_unit` does. A sample's class is in the .cls member of the same key."""
    uris, keys, classes = [], [], {}
    store, tar_path = filesystem.resolve(unit.uri)
    with store.open_input_file(tar_path) as raw:
        file = cast(BinaryIO, io.BufferedReader(_Seekable(raw), READ_AHEAD_BYTES))
        for member in _tar_members(unit.uri, file):
            path = posixpath.normpath(member.name)
            if is_hidden_path(path):
                continue
            folder, name = posixpath.split(path)
            # WebDataset's rule: members with the same path up to the first "." of their name are one sample.
            key = posixpath.join(folder, name.partition(".")[0])
            if with_labels and name.endswith(".cls"):
                classes[key] = _read_class(file, member, unit.uri)
            elif is_image(name):
                uris.append(f"{unit.uri}#{member.name}?offset={member.offset_data}&size={member.size}")
                keys.append(key)
    labels = pa.array([classes.get(key) for key in keys], pa.int32())
    return pa.table({schema.URI: pa.array(uris, pa.string()), schema.LABEL: labels})


def read_tar_members(container: str, uris: list[str]) -> Iterator[bytes | BadImage]:
    """Yield the bytes of each member in turn, or why they cannot be read."""
    try:
        store, path = filesystem.resolve(container)
        file = store.open_input_file(path)
    except (OSError, ValueError) as error:
        yield from (rejection(error, container) for _ in uris)
        return
    with file:
        for uri in uris:
            match = MEMBER_URI.fullmatch(uri)
            assert match is not None, uri
            yield _read_tar_member(file, int(match["offset"]), int(match["size"]), container)


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


def _tar_members(uri: str, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files of a tar. A truncated tar ends at its last header, whose bytes may be incomplete."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                # tarfile keeps all members, 400 bytes each, to resolve links, which are not followed here.
                archive.members.clear()  # type: ignore[attr-defined]
                if member.isfile():
                    yield member
    except tarfile.ReadError as error:
        # In a truncated tar only the last members are rejected, when they are read. Other errors mean a compressed tar
        # or a file that is not a tar at all.
        if "unexpected end of data" not in str(error):
            raise ValueError(
                f"{uri} cannot be read as an uncompressed tar: {error}. Repair it or move it out of the pool."
            ) from error


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


def _read_tar_member(file: pa.NativeFile, offset: int, size: int, container: str) -> bytes | BadImage:
    num_available = max(0, min(size, file.size() - offset))
    if num_available < size:
        return BadImage(f"{container} is cut short: it has {num_available} of the image's {size} bytes")
    try:
        return file.read_at(size, offset)
    except OSError as error:
        return rejection(error, container)

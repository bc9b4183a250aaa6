"""Drop what a file holds beside its pixels: EXIF, comments, text, profiles.

Only EXIF's orientation changes what an image shows. But Pillow refuses whole images for metadata that are broken, large
or odd, and takes a text chunk of a PNG for a setting of its own if it has its name, as `interlace`. What cannot be
parsed here is left as it is, for Pillow to judge.
"""

import struct
import zlib
from typing import Any

from PIL import ExifTags, Image

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_EXIF = b"Exif\0\0"
# Markers of JPEG
_SOF0, _RST0, _EOI, _SOS, _COM, _FILL = 0xC0, 0xD0, 0xD9, 0xDA, 0xFE, 0xFF
_APP0, _APP1, _APP14, _APP15 = 0xE0, 0xE1, 0xEE, 0xEF
_PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT")
_PNG_CHECKED = (b"tRNS", b"sBIT", b"eXIf")
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_TRNS_BYTES = {0: 2, 2: 6}  # by colour type; in palettes up to 256, in others there is none
# The tags that say how the strips or tiles of an image become pixels, and which side is up. Fax and JPEG tables, the
# subsampling of YCbCr, and the bounds of samples are among them.
_TIFF_PIXELS = {
    *(256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 280, 281, 284, 292, 293, 317, 320, 322, 323, 324, 325),
    *(326, 327, 328, 332, 338, 339, 340, 341, 347, *range(512, 522), 529, 530, 531, 532, 50674),
}


def drop_metadata(data: bytes) -> tuple[bytes, bytes]:
    """Return an image file without the metadata on which Pillow may fail, and its EXIF data if they are dropped.

    Pillow reads no more than pixels and EXIF data of formats other than JPEG, PNG, TIFF and AVIF.
    """
    if data.startswith(b"\xff\xd8"):
        return _drop_from_jpeg(data)
    if data.startswith(PNG_SIGNATURE):
        return _drop_from_png(data)
    if data.startswith((b"II", b"MM")):
        return _drop_from_tiff(data), b""
    if data[4:8] == b"ftyp":
        # The orientation of an AVIF image is a property of its own, beside its EXIF data.
        boxes, pixels, rest = data.partition(b"mdat")
        return boxes.replace(b"Exif", b"skip") + pixels + rest, b""
    return data, b""


def orientation(exif: bytes) -> Any:
    """Return the orientation in EXIF data: 1 to 8, or anything in odd ones; 1 for data that cannot be read."""
    tags = Image.Exif()
    try:
        tags.load(exif)
        return tags.get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises many kinds
        return 1


def _drop_from_jpeg(data: bytes) -> tuple[bytes, bytes]:
    """Drop the segments before the pixels that libjpeg does not read."""
    kept, exif, position = [data[:2]], b"", 2
    # Ends at the pixels. Where no segment begins, Pillow and libjpeg search on, so what follows stays as it is.
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker, size = data[position + 1], 2 + int.from_bytes(data[position + 2 : position + 4])
        if marker == _FILL:
            position += 1
            continue
        if marker == _SOS or not _SOF0 <= marker <= _COM or _RST0 <= marker <= _EOI or position + size > len(data):
            break
        segment = data[position : position + size]
        position += size
        if marker == _APP1 and segment.startswith(_EXIF, 4):
            exif = exif or segment[4:]
        # Two of them say in which colours the pixels are.
        is_colour = segment.startswith((b"JFIF\0", b"Adobe"), 4) and size >= 18 - 2 * (marker == _APP14)
        if is_colour or not (_APP0 <= marker <= _APP15 or marker == _COM):
            kept.append(segment)
    return b"".join((*kept, data[position:])), exif


def _drop_from_png(data: bytes) -> tuple[bytes, bytes]:
    """Keep the chunks that make pixels. Of an animation this leaves the image that viewers without animation show."""
    kept, exif, position = [data[:8]], b"", 8
    while position + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        chunk, position = data[position : position + 12 + size], position + 12 + size
        if position > len(data):
            # Cut short: Pillow says so of pixels, and nobody misses the rest.
            return b"".join((*kept, chunk if kind in _PNG_PIXELS else _PNG_END)), exif
        is_whole = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:]) if kind in _PNG_CHECKED else True
        if kind in _PNG_PIXELS:
            if kind != b"PLTE" or data[25] == 3:  # elsewhere it is a hint for old screens
                kept.append(chunk)
        elif kind == b"eXIf" and is_whole:
            exif = _EXIF + chunk[8:-4]
        elif kind in (b"sBIT", b"tRNS"):
            if is_whole and (kind == b"sBIT" or size == _TRNS_BYTES.get(data[25], min(size, 256))):
                kept.append(chunk)
        elif kind == b"IEND" or not kind.isalpha():
            return b"".join((*kept, _PNG_END)), exif
    return b"".join((*kept, _PNG_END)), exif


def _drop_from_tiff(data: bytes) -> bytes:
    """Return a TIFF file with its first image alone and the tags that its pixels need; one without tags as it is."""
    order = "<" if data.startswith(b"II") else ">"
    count, entry, place, header = ("Q", "HHQ8s", "Q", 8) if 43 in data[2:4] else ("H", "HHL4s", "L", 4)
    size = struct.calcsize(order + entry)
    try:
        (first,) = struct.unpack_from(order + place, data, header)
        (num_tags,) = struct.unpack_from(order + count, data, first)
    except struct.error:
        return data
    start = first + struct.calcsize(order + count)
    tags = [data[at : at + size] for at in range(start, min(start + size * num_tags, len(data)), size)]
    kept = [tag for tag in tags if struct.unpack_from(order + "H", tag.ljust(2, b"\0"))[0] in _TIFF_PIXELS]
    # At the end, where it moves nothing that tags refer to.
    directory = struct.pack(order + count, len(kept)) + b"".join(kept) + struct.pack(order + place, 0)
    padding = b"\0" * (-len(data) % 8)
    new_first = struct.pack(order + place, len(data) + len(padding))
    return b"".join((data[:header], new_first, data[header + len(new_first) :], padding, directory))

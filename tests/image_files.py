"""Encode image files for tests."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def encode(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def grey_png(width: int, height: int, compressed_rows: bytes) -> bytes:
    """Return a grey PNG made by hand, whose header may claim more pixels than the file holds."""
    data = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    for kind, content in ((b"IHDR", header), (b"IDAT", compressed_rows), (b"IEND", b"")):
        data += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return data


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(samples: np.ndarray, bits: int, colour: int, *chunks: bytes) -> bytes:
    """Return a PNG of samples, (h, bytes a row) or (h, w[, bands]), with further chunks after its header."""
    width = samples.shape[1] * 8 // bits if bits < 8 else samples.shape[1]
    header = struct.pack(">IIBBBBB", width, len(samples), bits, colour, 0, 0, 0)
    big_endian = samples.astype(">u2") if bits == 16 else samples.astype(np.uint8)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in big_endian))
    parts = [png_chunk(b"IHDR", header), *chunks, png_chunk(b"IDAT", rows), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff_of(samples: np.ndarray, photometric: int, tags: dict[int, tuple[int, list[int]]] | None = None) -> bytes:
    """Return a TIFF of samples (h, w[, bands]), in their byte order; `tags` has (type, values) by tag.

    It is uncompressed unless tag 259 is 8.
    """
    height, width, *bands = samples.shape
    num_bands, bits, order = (bands or [1])[0], 8 * samples.itemsize, ">" if samples.dtype.str[0] == ">" else "<"
    entries = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [bits] * num_bands),
        259: (3, [1]),
        262: (3, [photometric]),
        277: (3, [num_bands]),
        278: (4, [height]),
        339: (3, [2 if samples.dtype.kind == "i" else 1] * num_bands),
        **(tags or {}),
    }
    planes = np.moveaxis(samples, -1, 0) if entries.get(284) == (3, [2]) else [samples]  # one band after another
    strips = [plane.tobytes() for plane in planes]
    if entries[259] == (3, [8]):
        strips = [zlib.compress(strip) for strip in strips]
    starts = [8 + sum(map(len, strips[:number])) for number in range(len(strips))]
    entries |= {273: (4, starts), 279: (4, [len(strip) for strip in strips])}
    pixels = b"".join(strips)
    pixels += b"\0" * (len(pixels) % 2)
    directory, values, start = b"", b"", 8 + len(pixels) + 2 + 12 * len(entries) + 4
    for tag, (kind, numbers) in sorted(entries.items()):
        value = b"".join(struct.pack(order + {1: "B", 2: "B", 3: "H", 4: "L", 7: "B"}[kind], n) for n in numbers)
        if len(value) > 4:
            place = struct.pack(order + "L", start + len(values))
            values += value + b"\0" * (len(value) % 2)
        else:
            place = value.ljust(4, b"\0")
        directory += struct.pack(order + "HHL", tag, kind, len(numbers)) + place
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "L", 8 + len(pixels))
    return head + pixels + struct.pack(order + "H", len(entries)) + directory + b"\0" * 4 + values

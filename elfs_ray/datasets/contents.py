"""What every layout yields: the names of the classes, and the images of a split one after the other."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Contents:
    """label_names: of class 0, 1, ...; read: (image file, label) of a split's images, always in the same order.

    identity: what tells the source from another one.
    """

    label_names: list[str]
    read: Callable[[str], Iterator[tuple[bytes, int]]]
    identity: dict[str, str]


def png(pixels: np.ndarray) -> bytes:
    """(h, w, 3) uint8 as a PNG, which keeps every pixel."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def lines_of(data: bytes) -> list[str]:
    """The lines of a text file that are not empty."""
    return [line.strip() for line in data.decode().splitlines() if line.strip()]

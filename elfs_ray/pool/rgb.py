"""Convert what Pillow decodes to 8-bit RGB on white, as viewers show it.

Samples of more than 8 bits are shown from black to white as their file declares them: by sBIT in PNG, MaxSampleValue or
the number of bits in TIFF, maxval in PPM, the precision in JPEG 2000. Where it declares nothing, and no sample reaches
a quarter of what they can hold (12 bits in 16, say, would all be black), the darkest is black and the brightest white.
"""

import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImagePalette, TiffImagePlugin

STRIP_PIXELS = 1 << 20  # converted at a time
FULL = 65535
OWN_RANGE = "shown in its own range"
# Tags of TIFF
_BITS, _COMPRESSION, _PHOTOMETRIC, _MAX_SAMPLE, _PLANAR, _COLOUR_MAP, _SAMPLE_FORMAT = 258, 259, 262, 281, 284, 320, 339
# Pillow decodes the upper byte of such samples. With the other byte order in its place, it decodes the lower byte.
_OTHER_BYTE = {
    f"{bands};16{order}": f"{bands};16{other}"
    for bands in ("RGB", "RGBA", "RGBX", "R", "G", "B", "A")
    for order, other in (("B", "L"), ("L", "B"), ("N", "B"))
} | {"LA;16B": "RGBA"}  # with two bytes a sample: R and G are a grey value, B and A its alpha

_BANDS = ("R", "G", "B", "A", "X", "C", "M", "Y", "K")

# Pillow knows 16-bit grey whose zero is white in little-endian files alone.
TiffImagePlugin.OPEN_INFO.setdefault((b"MM", 0, (1,), 1, (16,), ()), ("I;16B", "I;16B"))


class BadImage(ValueError):
    """An image that cannot be used. The message is the reason in rejected/."""


def to_rgb(image: ImageFile.ImageFile, data: bytes) -> Image.Image:
    """Decode an image opened from `data` to 8-bit RGB. Raises BadImage and errors of Pillow's.

    Its `info` holds nothing, or OWN_RANGE where its darkest sample is black and its brightest white.
    """
    if image.format in ("JPEG", "MPO"):  # there is nothing to mend, and no time to lose
        image.load()
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        rgb.info = {}
        return rgb
    rawmode, frame = _mend_tiles(image), _first_frame(image, data)
    if (image.mode == "LA" and _is_in_compressed_bands(image)) or (image.mode == "LAB" and _is_in_bands(image)):
        raise BadImage(f"Pillow reads {image.mode} stored band by band wrong; convert the image to RGB")
    is_deep = image.mode.startswith("I") or ";16" in rawmode
    declared = _declared_white(image, data) if is_deep else None
    _mend_palette(image)
    image.load()
    if image.format == "PNG" and image.mode == "L" and "transparency" in image.info:
        image.info["transparency"] *= 255 // (2 ** data[24] - 1)  # Pillow scales the samples of 2 and 4 bits alone
    rgb = _convert(image, data, rawmode, declared)
    rgb.info = {key: value for key, value in rgb.info.items() if key == OWN_RANGE}
    if frame is not None:
        # What the first frame of an animation leaves free is transparent; Pillow gives it the palette's first colour.
        canvas = Image.new("RGB", rgb.size, "white")
        canvas.paste(rgb.crop(frame), frame[:2])
        return canvas
    return rgb


def _convert(image: ImageFile.ImageFile, data: bytes, rawmode: str, declared: int | None) -> Image.Image:
    if ";16" in rawmode and not image.mode.startswith("I"):
        # What fills 16 bits is left to Pillow: its upper bytes are enough.
        is_dark = max(_highest(image, band) for band in image.getbands() if band in "RGBCMYK") < 64
        # Colours that are multiplied by alpha have been divided by it, and are bright even if both are dark.
        is_dark |= rawmode.startswith("RGBa") and _highest(image, "A") < 64
        if is_dark or declared or "transparency" in image.info:
            if rawmode not in _OTHER_BYTE or image.mode not in ("RGB", "RGBA") or _is_in_compressed_bands(image):
                raise BadImage(
                    f"8 of 16 bits are too few for these {image.mode} pixels, and Pillow reads no more of them; "
                    "convert the image to 8 bits"
                )
            return _scale_colours(image, _lower_bytes(image, data, rawmode), declared)
    # An RGB image can have a transparent colour, too, in its `info`.
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or (image.mode == "L" and _is_signed(image)):
        # Pillow's own convert would clip 16-bit values at 255 instead of scaling them.
        return _scale_grey(image, declared)
    if image.mode == "F":
        raise BadImage("floating-point pixels have no defined white; convert the image to 8 or 16 bits")
    if image.format in ("BMP", "DIB") and image.mode == "RGBA" and _highest(image, "A") == 0:
        return image.convert("RGB")  # a writer that knew of no alpha: Windows shows such files as opaque
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        return _by_strips(_put_on_white, image)
    return image.convert("RGB")


def _is_in_bands(image: ImageFile.ImageFile) -> bool:
    """Return whether the bands of a TIFF are stored one after another."""
    return isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_PLANAR) == 2


def _is_in_compressed_bands(image: ImageFile.ImageFile) -> bool:
    """Return whether libtiff decodes bands that are stored one after another, of which it gives the upper bytes."""
    return _is_in_bands(image) and image.tag_v2.get(_COMPRESSION, 1) != 1  # type: ignore[attr-defined]


def _highest(image: Image.Image, band: str) -> Any:
    return image.getchannel(band).getextrema()[1]


def _declared_white(image: ImageFile.ImageFile, data: bytes) -> int | None:
    """Return the value that is white in samples of more than 8 bits, None if the file does not say."""
    if image.format == "PNG":
        at = data.find(b"sBIT", 0, data.find(b"IDAT"))
        num_bands = data[at - 1] - (data[25] in (4, 6))  # without alpha
        bits = max(data[at + 4 : at + 4 + num_bands], default=0) if at > 0 else 0
        return 2**bits - 1 if 8 < bits <= 16 else None
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2.get(_BITS, (1,))[0]
        largest = np.max(image.tag_v2.get(_MAX_SAMPLE, 0))
        return int(largest) if largest > 255 else 2**bits - 1 if 8 < bits < 16 else None
    if image.format == "PPM":  # Pillow has scaled them
        return FULL if image.tile[0].codec_name.startswith("ppm") and _args(image.tile[0])[1] != FULL else None
    if image.format == "JPEG2000":  # here, too
        return FULL if data[data.find(b"\xff\x4f\xff\x51") + 42] & 127 != 15 else None
    return None


def _first_frame(image: ImageFile.ImageFile, data: bytes) -> tuple[int, int, int, int] | None:
    """Return the box that the first frame of an animation fills, None if it is the whole image."""
    frame = None
    if image.format == "GIF":
        frame = image.tile[0].extents
    elif image.format == "WEBP":
        at = 12
        while at + 24 <= len(data) and frame is None:
            kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
            if kind == b"ANMF":
                left, top, width, height = (
                    int.from_bytes(data[at + i : at + i + 3], "little") for i in (8, 11, 14, 17)
                )
                frame = (2 * left, 2 * top, 2 * left + width + 1, 2 * top + height + 1)
            at += 8 + size + size % 2
    return None if frame == (0, 0, *image.size) else frame


def _mend_tiles(image: ImageFile.ImageFile) -> str:
    """Correct how Pillow reads the bytes of 16-bit colours. Return the name it has for their layout, else ""."""
    if not image.tile:  # WebP
        return ""
    first = image.tile[0]
    if image.format == "PPM" and first.codec_name == "ppm" and first.args == ("RGB", FULL):
        image.tile = [first._replace(codec_name="raw", args=("RGB;16B", 0, 1))]  # Pillow's decoder would round
    elif isinstance(image, TiffImagePlugin.TiffImageFile) and _args(first)[0] in _BANDS and image.tag_v2[_BITS][0] > 8:
        if image.mode == "CMYK":
            raise BadImage("Pillow cannot read 16-bit CMYK stored band by band; convert the image to 8 bits")
        # Bands that are stored one after another: Pillow forgets that each sample has two bytes.
        suffix = ";16L" if image.tag_v2.prefix == b"II" else ";16B"
        image.tile = [_with_rawmode(tile, _args(tile)[0] + suffix) for tile in image.tile]
    return str(_args(image.tile[0])[0])


def _args(tile: ImageFile._Tile) -> tuple[Any, ...]:
    """Return how a tile is decoded: for most codecs, the layout of its bytes comes first."""
    return tile.args if isinstance(tile.args, tuple) and tile.args else (tile.args,)


def _with_rawmode(tile: ImageFile._Tile, rawmode: str) -> ImageFile._Tile:
    return tile._replace(args=(rawmode, *_args(tile)[1:]))


def _mend_palette(image: ImageFile.ImageFile) -> None:
    """Read a TIFF palette of 8-bit values, which should have 16 bits and would be black, as libtiff does."""
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.mode in ("P", "PA"):
        colours = image.tag_v2[_COLOUR_MAP]
        if max(colours) < 256:
            image.palette = ImagePalette.raw("RGB;L", bytes(colours))


def _is_signed(image: ImageFile.ImageFile) -> bool:
    return isinstance(image, TiffImagePlugin.TiffImageFile) and 2 in image.tag_v2.get(_SAMPLE_FORMAT, ())


def _lower_bytes(image: ImageFile.ImageFile, data: bytes, rawmode: str) -> Image.Image:
    """Decode the lower bytes of 16-bit colours."""
    lower = type(image)(io.BytesIO(data))
    _mend_tiles(lower)
    lower.tile = [_with_rawmode(tile, _OTHER_BYTE[_args(tile)[0]]) for tile in lower.tile]
    lower.load()
    if rawmode == "LA;16B":
        _, grey, _, alpha = lower.split()
        return Image.merge("RGBA", (grey, grey, grey, alpha))
    return lower


def _scale_colours(upper: Image.Image, lower: Image.Image, declared: int | None) -> Image.Image:
    """Return 16-bit RGB or RGBA, given the upper and lower bytes of its samples, as 8-bit RGB."""

    def samples(upper: Image.Image, lower: Image.Image) -> np.ndarray:
        return np.asarray(upper).astype(np.uint16) << 8 | np.asarray(lower)

    def convert(*strip: Image.Image) -> Image.Image:
        values = samples(*strip)
        pixels = _scale(values[..., :3], black, white)
        if upper.mode == "RGBA":
            return _put_on_white(Image.fromarray(np.dstack([pixels, _scale(values[..., 3:], 0, opaque)])))
        if key is not None:
            pixels[(values == key).all(axis=-1)] = 255
        return Image.fromarray(pixels)

    key = upper.info.get("transparency")
    extremes = [(v.min(axis=(0, 1)), v.max(axis=(0, 1))) for v in (samples(*strip) for strip in _strips(upper, lower))]
    lowest, highest = np.min([low for low, _ in extremes], axis=0), np.max([high for _, high in extremes], axis=0)
    black, white = _range(int(lowest[:3].min()), int(highest[:3].max()), declared, FULL)
    _, opaque = _range(0, int(highest[-1]), declared, FULL)
    return _by_strips(convert, upper, lower, own_range=not declared and white < FULL)


def _scale_grey(image: ImageFile.ImageFile, declared: int | None) -> Image.Image:
    """Return grey of more than 8 bits, or of signed samples, as 8-bit RGB."""

    def samples(strip: Image.Image) -> np.ndarray:
        values = np.asarray(strip)
        return values.view(np.int8) if image.mode == "L" else values

    def convert(strip: Image.Image) -> Image.Image:
        values = samples(strip)
        pixels = _scale(values, black, white)
        if zero_is_white:
            pixels = 255 - pixels
        if key is not None:
            pixels[values == key] = 255
        return Image.fromarray(pixels).convert("RGB")

    key = image.info.get("transparency")
    tags: Any = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    zero_is_white = tags.get(_PHOTOMETRIC) == 0
    full = 2 ** (tags[_BITS][0] - 1) - 1 if _is_signed(image) and tags[_BITS][0] <= 16 else FULL
    extremes = [(int(values.min()), int(values.max())) for values in (samples(strip) for (strip,) in _strips(image))]
    low, high = min(low for low, _ in extremes), max(high for _, high in extremes)
    if low < 0 or high > FULL:
        raise BadImage(f"{image.mode} pixels outside 0..65535 have no defined white; convert the image to 8 or 16 bits")
    black, white = _range(low, high, declared, full)
    return _by_strips(convert, image, own_range=not declared and white < full)


def _range(low: int, high: int, declared: int | None, full: int) -> tuple[int, int]:
    """Return the values that are black and white in samples from `low` to `high`, of at most `full`."""
    if declared:
        # Above what sBIT says, the samples have been scaled to all bits, as PNG wants it.
        return 0, declared if high <= declared else full
    is_own_range = full > 255 and low < high and 4 * high < full
    return (low, high) if is_own_range else (0, full)


def _scale(values: np.ndarray, black: int, white: int) -> np.ndarray:
    return ((values.astype(np.int32) - black) * 255 // (white - black)).astype(np.uint8)


def _put_on_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")  # the only mode that Pillow converts it to
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _by_strips(convert: Callable[..., Image.Image], *images: Image.Image, own_range: bool = False) -> Image.Image:
    """Return images of one size as one RGB image, by a function of their pixels."""
    converted = Image.new("RGB", images[0].size)
    top = 0
    for strips in _strips(*images):
        converted.paste(convert(*strips), (0, top))
        top += strips[0].height
    if own_range:
        converted.info[OWN_RANGE] = True
    return converted


def _strips(*images: Image.Image) -> Iterator[tuple[Image.Image, ...]]:
    """Yield the same rows of each image, some at a time to save memory."""
    width, height = images[0].size
    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        yield tuple(image.crop((0, top, width, min(top + rows, height))) for image in images)

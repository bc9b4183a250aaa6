"""Decode and resize images: bytes in, 8-bit RGB out, or a reason why not.

Greyscale, palette, CMYK, alpha and 16-bit images are all brought to 8-bit RGB; anything else raises `BadImage`
with a reason that a person can read in rejected/.
"""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
from PIL import Image, ImageOps

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
}
# What Pillow is allowed to try. It knows more, of which some are old and little tested, and EPS is run as a program.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")
LOSSLESS_MAX_SIZE = 64
MAX_PROXY_ASPECT = 4.0
STRIP_PIXELS = 1 << 20


class BadImage(ValueError):
    """An image that cannot be used; the message is the reason in rejected/."""


def decode_image(data: bytes, *, max_pixels: int, min_size: int = 1) -> Image.Image:
    """Decode an image file to 8-bit RGB, upright, its first frame if it has several.

    A JPEG much larger than `min_size` (pixels of its short side) is decoded at a half, quarter or eighth of its size,
    never below twice `min_size`. Transparent pixels are put on white; 16-bit grey is scaled to 8 bit. Raises BadImage.

    Memory, for each of at most `max_pixels` decoded pixels: 4 bytes of RGB, and while it is decoded 9 at most of any
    other kind of pixels or to turn it; but of a progressive JPEG 10, of AVIF 10, of WEBP 16, of JPEG 2000 25.
    """
    if not data:
        raise BadImage("empty file (0 bytes)")
    try:
        with _pillow_limit_and_warnings_off():
            image = Image.open(io.BytesIO(data), formats=_known_formats())
            width, height = image.size
            if width * height > max_pixels:
                raise BadImage(f"{width}x{height} pixels, more than embed.max_image_pixels={max_pixels}")
            image.draft(None, (2 * min_size, 2 * min_size))
            ImageOps.exif_transpose(image, in_place=True)  # without a copy where there is nothing to turn
            return _to_rgb(image)
    except BadImage:
        raise
    except Image.UnidentifiedImageError as error:
        raise BadImage(f"not an image that Pillow can read ({len(data)} bytes)") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and more on broken files
        raise BadImage(f"{type(error).__name__}: {error}") from error


@lru_cache
def _known_formats() -> tuple[str, ...]:
    """Return those of FORMATS that this build of Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def resize_center_crop(image: Image.Image, *, resize: int, crop: int, interpolation: str) -> np.ndarray:
    """Resize the short side to `resize` and cut the centre `crop` x `crop`, in one step: (crop, crop, 3) uint8.

    Only the part that is kept is resized, so an image of extreme shape costs no more than a square one.
    """
    width, height = image.size
    side = min(width, height) * crop / resize
    left, top = (width - side) / 2, (height - side) / 2
    if (width, height) != (crop, crop) or crop != resize:
        box = (max(left, 0.0), max(top, 0.0), min(left + side, width), min(top + side, height))
        image = image.resize((crop, crop), INTERPOLATIONS[interpolation], box=box)
    return np.asarray(image, dtype=np.uint8)


def encode_proxy_image(image: Image.Image, *, short_side: int, jpeg_quality: int) -> bytes:
    """Resize the short side to `short_side` and encode: PNG up to 64 pixels (lossless), JPEG above.

    The long side is cut about its centre to at most four times the short one.
    """
    width, height = image.size
    short = min(width, height)
    limit = short * MAX_PROXY_ASPECT
    box_width, box_height = min(width, limit), min(height, limit)
    left, top = (width - box_width) / 2, (height - box_height) / 2
    size = (round(box_width * short_side / short), round(box_height * short_side / short))
    if size != image.size:
        image = image.resize(
            size, Image.Resampling.BICUBIC, box=(left, top, left + box_width, top + box_height), reducing_gap=3.0
        )
    if short_side <= LOSSLESS_MAX_SIZE:
        return encode_png(image, compress_level=1)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=jpeg_quality)
    return buffer.getvalue()


def encode_png(image: Image.Image, *, compress_level: int = -1) -> bytes:
    """Encode an image as PNG, which keeps every pixel. compress_level: zlib's, 0 to 9, or -1 for its default."""
    buffer = io.BytesIO()
    # Pillow would add the original's colour profile, which can be a hundred times the pixels.
    image.save(buffer, "PNG", compress_level=compress_level, icc_profile=None)
    return buffer.getvalue()


def open_proxy_image(data: bytes) -> Image.Image:
    """Decode what `encode_proxy_image` wrote. Raises what Pillow raises of damaged bytes: OSError and others."""
    return Image.open(io.BytesIO(data), formats=("PNG", "JPEG")).convert("RGB")


def describe_bad_copy(sample_id: int, path: str, error: Exception) -> str:
    """Return what a person can do about a proxy image that cannot be decoded."""
    return (
        f"the proxy copy of sample_id {sample_id} in {path} cannot be decoded: {type(error).__name__}: {error}. Delete "
        "that file; the same command with on_change=rerun makes it again."
    )


def decode_proxy_image(data: bytes, size: int | None = None) -> np.ndarray:
    """Decode what `encode_proxy_image` wrote: (h, w, 3) uint8, or its centre square (size, size, 3)."""
    pixels = np.asarray(open_proxy_image(data), dtype=np.uint8)
    if size is None:
        return pixels
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@contextlib.contextmanager
def _pillow_limit_and_warnings_off() -> Iterator[None]:
    """Lift Pillow's limit of 179 million pixels, which would undercut max_pixels, and silence its warnings of EXIF."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith("I"):
        return _by_strips(image, _scale_grey)
    if image.mode == "F":
        raise BadImage("floating-point pixels have no known white; convert to 8 or 16 bit")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        return _by_strips(image, _put_on_white)
    return image.convert("RGB")


def _by_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert an image to RGB by a function of its pixels, some rows at a time to save memory."""
    width, height = image.size
    rows = max(1, STRIP_PIXELS // width)
    converted = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        converted.paste(convert(strip), (0, top))
    return converted


def _scale_grey(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit RGB."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise BadImage(f"{image.mode} pixels outside 0..65535 have no known white; convert to 8 or 16 bit")
    return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")


def _put_on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")

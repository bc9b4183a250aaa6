"""Decode, resize and encode images: bytes in, 8-bit RGB out, or the reason why not.

Greyscale, palette, CMYK, transparent and 16-bit images are converted to 8-bit RGB. Everything else raises `BadImage`,
whose message becomes the reason in rejected/. Other reasons come from files.py (a file that cannot be read), tar.py and
parquet_rows.py (a damaged container) and stages/embed/run.py (an unusable embedding).
"""

import contextlib
import io
import threading
import warnings
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from elfs_ray.pool.metadata import PNG_SIGNATURE, drop_metadata, orientation
from elfs_ray.pool.rgb import OWN_RANGE, BadImage, to_rgb

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
}
# The only formats that Pillow may try. It has decoders for others that are old and little tested, and runs EPS files as
# programs in Ghostscript: images of a pool need not be trustworthy.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")
# What turns an image upright, by its orientation in EXIF.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LOSSLESS_MAX_SIZE = 64  # pixels of the short side: small images, as CIFAR's, keep every pixel and still take few bytes
MAX_PROXY_ASPECT = 4.0


def decode_image(data: bytes, *, max_pixels: int, min_size: int = 1) -> Image.Image:
    """Decode the first frame of an image file to 8-bit RGB, upright.

    A JPEG whose short side is much longer than `min_size` pixels is decoded at a half, a quarter or an eighth of its
    size, but never below twice `min_size`. Transparent images are put on white, 16-bit grey is scaled to 8 bits. Raises
    BadImage, also for an image of more than `max_pixels`.

    Memory in bytes per decoded pixel: 4 for the RGB image. While decoding and turning it upright at most 9, but 10 for
    progressive JPEG and AVIF, 16 for WEBP, 18 for dark 16-bit colours and 25 for JPEG 2000.
    """
    if not data:
        raise BadImage("empty file (0 bytes)")
    try:
        with _pillow_limit_and_warnings_off:
            # Pillow takes text chunks of a PNG for settings; elsewhere metadata can do no more than make it fail. Other
            # formats lose theirs only then: it costs time and, for TIFF, as much memory as uncompressed pixels.
            if data.startswith(PNG_SIGNATURE):
                return _decode(*drop_metadata(data), max_pixels, min_size)
            try:
                return _decode(data, b"", max_pixels, min_size)
            except BadImage:
                raise
            except Exception:
                return _decode(*drop_metadata(data), max_pixels, min_size)
    except BadImage:
        raise
    # Pillow's decoders raise OSError, SyntaxError, struct.error and more on broken files.
    except Exception as error:
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _decode(data: bytes, exif: bytes, max_pixels: int, min_size: int) -> Image.Image:
    image = _open(data)
    image.info.pop("xmp", None)  # Pillow would turn a TIFF by it
    width, height = image.size
    # Only the header has been read: a bomb is refused before its pixels take memory.
    if width * height > max_pixels:
        raise BadImage(f"{width}x{height} pixels, more than embed.max_image_pixels={max_pixels}")
    # libjpeg scales while it decodes, which is much faster than decoding every pixel; twice the size leaves enough of
    # them for a good resize. Other formats ignore this.
    image.draft(None, (2 * min_size, 2 * min_size))
    exif = image.info.get("exif", exif)
    turn = TURNS.get(orientation(exif)) if exif else None
    rgb = to_rgb(image, data)
    return rgb if turn is None else rgb.transpose(turn)


def read_header(data: bytes) -> tuple[str, int, int]:
    """Return the format of an image file, as Pillow calls it, and its width and height in pixels when upright.

    Raises BadImage where the header cannot be read; the pixels are not read.
    """
    try:
        with _pillow_limit_and_warnings_off:
            try:
                image, exif = _open(data), b""
            except BadImage:
                raise
            except Exception:  # by its metadata, perhaps
                data, exif = drop_metadata(data)
                image = _open(data)
            exif = image.info.get("exif", exif)
            width, height = image.size
            swaps_sides = bool(exif) and orientation(exif) in (5, 6, 7, 8)
            return str(image.format), *((height, width) if swaps_sides else (width, height))
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _open(data: bytes) -> ImageFile.ImageFile:
    """Open an image by the format with whose signature it begins. Raises Pillow's error, which `Image.open` hides."""
    for name in known_formats():
        open_format, accept = Image.OPEN[name]
        accepted = accept is not None and accept(data[:16].ljust(16, b"\0"))
        if isinstance(accepted, str):  # this build of Pillow cannot decode it
            raise BadImage(accepted)
        if accepted:
            return open_format(io.BytesIO(data), "")
    raise BadImage(f"not an image that Pillow can read ({len(data)} bytes)")


@lru_cache
def known_formats() -> tuple[str, ...]:
    """Return the FORMATS that this build of Pillow supports, and HEIF where the extra heif is installed."""
    Image.init()  # Pillow registers most formats on demand
    with contextlib.suppress(ImportError):
        import pillow_heif

        # Without thumbnails, `draft` would decode one in place of the image. One thread, as for other formats.
        pillow_heif.register_heif_opener(thumbnails=False, decode_threads=1)
    return tuple(name for name in FORMATS if name in Image.OPEN)


def has_own_range(image: Image.Image) -> bool:
    """Return whether a decoded image did not say which of its samples is white, and the brightest one was taken."""
    return OWN_RANGE in image.info


def resize_center_crop(image: Image.Image, *, resize: int, crop: int, interpolation: str) -> np.ndarray:
    """Resize the short side to `resize` and crop the centre, in one step. Return (crop, crop, 3) uint8."""
    # Only the part that is kept is resized, so that an image of extreme shape costs no more than a square one.
    width, height = image.size
    side = min(width, height) * crop / resize
    left, top = (width - side) / 2, (height - side) / 2
    if (width, height) != (crop, crop) or crop != resize:
        # Rounding may put the box a hair outside the image, which Pillow refuses.
        box = (max(left, 0.0), max(top, 0.0), min(left + side, width), min(top + side, height))
        image = image.resize((crop, crop), INTERPOLATIONS[interpolation], box=box)
    return np.asarray(image, dtype=np.uint8)


def encode_proxy_image(image: Image.Image, *, short_side: int, jpeg_quality: int) -> bytes:
    """Resize the short side to `short_side` and encode: as lossless PNG up to 64 pixels, as JPEG above.

    The long side is cropped about its centre to at most four times the short one. Raises BadImage for an image that
    cannot be encoded.
    """
    try:
        return _encode_copy(image, short_side, jpeg_quality)
    except Exception as error:  # an encoder's limits, too little memory
        raise BadImage(f"its proxy image cannot be encoded: {type(error).__name__}: {error}") from error


def _encode_copy(image: Image.Image, short_side: int, jpeg_quality: int) -> bytes:
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
    """Encode an image as PNG, which is lossless. compress_level: zlib's, 0 to 9, or -1 for its default."""
    buffer = io.BytesIO()
    # Pillow would add the original's colour profile, which can take a hundred times the bytes of the pixels.
    image.save(buffer, "PNG", compress_level=compress_level, icc_profile=None)
    return buffer.getvalue()


def open_proxy_image(data: bytes) -> Image.Image:
    """Decode what `encode_proxy_image` wrote. Raises OSError and others of Pillow's errors for damaged bytes."""
    # Not by Image.open: of a copy of 32 pixels it takes a sixth of the time to find out which format this is.
    open_format = PngImageFile if data.startswith(PNG_SIGNATURE) else JpegImageFile
    image = open_format(io.BytesIO(data))
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy the pixels


def describe_bad_copy(sample_id: int, path: str, error: Exception) -> str:
    """Return the message for a proxy image that cannot be decoded."""
    return (
        f"the proxy image of sample_id {sample_id} in {path} cannot be decoded: {type(error).__name__}: {error}. "
        "Delete that file and run the same command with on_change=rerun, which makes it again."
    )


def decode_proxy_image(data: bytes, size: int | None = None) -> np.ndarray:
    """Decode what `encode_proxy_image` wrote. Return (h, w, 3) uint8, or its centre square (size, size, 3)."""
    pixels = np.asarray(open_proxy_image(data), dtype=np.uint8)
    if size is None:
        return pixels
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


class _PillowLimitAndWarningsOff:
    """A context that lifts Pillow's limit on pixels and silences its warnings; several threads may be in it at once."""

    # Pillow's limit of 179 million pixels would override a higher max_pixels. Its warnings, of damaged EXIF data and so
    # on, would fill the logs with images that are decoded nonetheless. Both hold for the process: the first thread that
    # enters changes them, and the last one that leaves restores them.
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._to_restore = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._num_inside:
                self._to_restore.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
                Image.MAX_IMAGE_PIXELS = None
                self._to_restore.enter_context(warnings.catch_warnings(action="ignore"))
            self._num_inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if not self._num_inside:
                self._to_restore.close()


_pillow_limit_and_warnings_off = _PillowLimitAndWarningsOff()

"""Decode images of every kind to the 8-bit RGB that Pillow gives, or to a reason; resize as Pillow does."""

import io
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from elfs_ray.pool import images, rgb
from elfs_ray.pool.images import BadImage, decode_image, decode_proxy_image, encode_proxy_image, resize_center_crop
from tests.image_files import encode, grey_png

NO_LIMIT = 10**9
FULL_SIZE = 10_000  # a min_size above every image here: nothing is decoded at a smaller scale
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


def decode(data: bytes, max_pixels: int = NO_LIMIT, min_size: int = FULL_SIZE) -> np.ndarray:
    image = decode_image(data, max_pixels=max_pixels, min_size=min_size)
    assert image.mode == "RGB"
    return np.asarray(image)


def mean_difference(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(float) - b).mean())


@pytest.mark.parametrize(
    ("form", "options"),
    [
        *(("PNG", {}), ("BMP", {}), ("TIFF", {"compression": "tiff_lzw"}), ("PPM", {})),
        *(("WEBP", {"lossless": True}), ("JPEG2000", {"irreversible": False})),
    ],
)
def test_lossless_formats_keep_every_pixel(photographs, form, options):
    small = photographs[0].resize((61, 40))
    np.testing.assert_array_equal(decode(encode(small, form, **options)), np.asarray(small))


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK"])
def test_other_modes_become_the_rgb_that_pillow_gives(photographs, mode):
    original = photographs[1].convert(mode)
    data = encode(original, "TIFF")
    np.testing.assert_array_equal(decode(data), np.asarray(original.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_look_like_the_photograph(photographs, mode):
    shown = np.asarray(photographs[0].convert("L").convert("RGB") if mode == "L" else photographs[0])
    assert mean_difference(decode(encode(photographs[0].convert(mode), "JPEG", quality=95)), shown) < 3


def test_transparent_pixels_are_put_on_white(photographs):
    rgb = np.asarray(photographs[0]).astype(float)
    alpha = np.tile(np.linspace(0, 255, rgb.shape[1]).round().astype(np.uint8), (rgb.shape[0], 1))
    share = alpha[..., None] / 255
    for mode in ("RGB", "L"):
        opaque = photographs[0].convert(mode)
        shown = np.asarray(opaque.convert("RGB"))
        original = opaque.copy()
        original.putalpha(Image.fromarray(alpha))
        np.testing.assert_allclose(decode(encode(original)), share * shown + (1 - share) * 255, atol=1)


def test_a_transparent_colour_is_white_in_palettes_and_rgb(photographs):
    palette = photographs[0].quantize(16)
    index = int(np.asarray(palette)[0, 0])
    expected = np.where((np.asarray(palette) == index)[..., None], np.uint8(255), np.asarray(palette.convert("RGB")))
    np.testing.assert_array_equal(decode(encode(palette, transparency=index)), expected)
    rgb = palette.convert("RGB")
    key = rgb.getpixel((0, 0))
    expected = np.where((np.asarray(rgb) == key).all(-1, keepdims=True), np.uint8(255), np.asarray(rgb))
    np.testing.assert_array_equal(decode(encode(rgb, transparency=key)), expected)


@pytest.mark.parametrize(
    ("dtype", "form"), [("<u2", "PNG"), ("<u2", "TIFF"), (">u2", "TIFF"), ("<i4", "TIFF"), ("<u2", "PPM")]
)
def test_16_bit_grey_is_scaled_to_8_bit(photographs, dtype, form):
    grey = np.asarray(photographs[0].convert("L"))
    original = Image.fromarray((grey.astype(np.int64) * 257).astype(dtype))
    np.testing.assert_array_equal(decode(encode(original, form)), np.repeat(grey[..., None], 3, axis=2))


def test_16_bit_rgb_keeps_its_upper_bits(photographs):
    pixels = np.asarray(photographs[0].resize((20, 10)))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels.astype(np.uint32) * 257)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in (
        (b"IHDR", struct.pack(">IIBBBBB", 20, 10, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ):
        data += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    np.testing.assert_array_equal(decode(data), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright_by_their_exif_data(photographs, orientation):
    small = photographs[0].resize((61, 40))
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode(encode(small, exif=exif)), UPRIGHT[orientation](np.asarray(small)))


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0\x01\0\0\0\x06"])
def test_broken_exif_gives_no_error_and_no_warning(photographs, exif):
    with warnings.catch_warnings(action="error"):
        assert decode(encode(photographs[0], "JPEG", exif=exif)).shape == (427, 640, 3)


def test_an_animation_is_its_first_frame(photographs):
    frames = [photograph.resize((64, 43)).quantize(200) for photograph in photographs]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50)
    np.testing.assert_array_equal(decode(data), np.asarray(frames[0].convert("RGB")))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda photo: b"", r"empty file \(0 bytes\)"),
        (lambda photo: b"<html>404 Not Found</html>", r"not an image that Pillow can read \(26 bytes\)"),
        (lambda photo: encode(photo)[:50_000], "OSError: .*truncated"),
        (lambda photo: encode(photo, "JPEG")[:20_000], "OSError: .*truncated"),
        (lambda photo: encode(photo.convert("F"), "TIFF"), "floating-point pixels have no defined white"),
        (lambda photo: encode(Image.fromarray(np.full((4, 4), -1, np.int32)), "TIFF"), r"outside 0\.\.65535"),
        (lambda photo: encode(Image.fromarray(np.full((4, 4), 65536, np.int32)), "TIFF"), r"outside 0\.\.65535"),
        (lambda photo: grey_png(200_000, 200_000, b""), "^200000x200000 pixels, more than embed.max_image_pixels="),
    ],
)
def test_unusable_images_give_a_reason(photographs, make, reason):
    with pytest.raises(BadImage, match=reason):
        decode(make(photographs[0]))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000"])
def test_damaged_bytes_give_an_image_or_a_reason(photographs, form):
    data = np.frombuffer(encode(photographs[0].resize((40, 27)), form), np.uint8)
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(60):
        broken = data[: rng.integers(1, len(data))] if rng.random() < 0.5 else data.copy()
        broken = broken.copy()
        broken[rng.integers(0, len(broken), 3)] = rng.integers(0, 256, 3)
        try:
            outcomes.add(decode(broken.tobytes(), max_pixels=10**6).ndim)
        except BadImage as error:
            assert str(error)
            outcomes.add("rejected")
    assert "rejected" in outcomes


def test_the_limit_on_pixels_is_exact(photographs):
    data = encode(photographs[0])
    assert decode(data, max_pixels=640 * 427).shape == (427, 640, 3)
    with pytest.raises(BadImage, match=f"640x427 pixels, more than embed.max_image_pixels={640 * 427 - 1}"):
        decode(data, max_pixels=640 * 427 - 1)


def test_pillows_limit_is_lifted_and_restored(photographs, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert decode(encode(photographs[0])).shape == (427, 640, 3)
    with pytest.raises(BadImage):
        decode(b"")
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_pillows_limit_is_lifted_until_the_last_thread_has_decoded(photographs, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with images._pillow_limit_and_warnings_off:
        assert decode(encode(photographs[0])).shape == (427, 640, 3)
        assert Image.MAX_IMAGE_PIXELS is None
    assert Image.MAX_IMAGE_PIXELS == 1000


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("min_size", [1, 8, 26, 27, 28, 53, 54, 106, 107, 213, 214, 300])
def test_large_jpegs_are_decoded_at_twice_the_requested_size_or_more(photographs, min_size, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photographs[0], "JPEG", exif=exif)
    image = decode_image(data, max_pixels=NO_LIMIT, min_size=min_size)
    short, long = sorted(image.size)
    assert short >= min(2 * min_size, 427)
    assert long <= max(4 * 2 * min_size, 80) * 640 / 427 + 1, "no more than needed, up to a factor of 2"


def test_decoding_smaller_hardly_changes_what_the_encoder_sees(photographs):
    data = encode(photographs[0], "JPEG", quality=95)
    for size in (32, 64):
        squares = [
            resize_center_crop(
                decode_image(data, max_pixels=NO_LIMIT, min_size=min_size),
                resize=size,
                crop=size,
                interpolation="bicubic",
            )
            for min_size in (size, FULL_SIZE)
        ]
        assert mean_difference(*squares) < 3


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "box"])
@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (224, 224), (32, 32), (40, 24)])
def test_resizing_and_cropping_in_one_step_is_pillows_resize_then_crop(photographs, resize, crop, interpolation):
    method = Image.Resampling[interpolation.upper()]
    square = photographs[0].crop((100, 0, 500, 400))
    left = (resize - crop) // 2
    expected = square.resize((resize, resize), method).crop((left, left, left + crop, left + crop))
    ours = resize_center_crop(square, resize=resize, crop=crop, interpolation=interpolation)
    np.testing.assert_allclose(ours.astype(int), np.asarray(expected, int), atol=1)

    for photo in (photographs[0], photographs[0].transpose(Image.Transpose.ROTATE_90)):
        scale = resize / 427
        resized = photo.resize((round(photo.width * scale), round(photo.height * scale)), method)
        left, top = round((resized.width - crop) / 2), round((resized.height - crop) / 2)
        expected = resized.crop((left, top, left + crop, top + crop))
        ours = resize_center_crop(photo, resize=resize, crop=crop, interpolation=interpolation)
        # Pillow's way rounds the long side and the corner: half a pixel at most.
        assert mean_difference(ours, np.asarray(expected)) < 6
        assert np.corrcoef(ours.ravel(), np.asarray(expected).ravel())[0, 1] > 0.97


@pytest.mark.parametrize("size", [(1, 1), (3000, 10), (10, 3000), (1, 500), (33, 32)])
def test_images_of_any_shape_are_cropped_and_encoded(photographs, size):
    image = photographs[0].resize(size)
    square = resize_center_crop(image, resize=32, crop=28, interpolation="bicubic")
    assert square.shape == (28, 28, 3)
    proxy = encode_proxy_image(image, short_side=32, jpeg_quality=92)
    width, height = Image.open(io.BytesIO(proxy)).size
    assert min(width, height) == 32 and max(width, height) <= 4 * 32
    assert decode_proxy_image(proxy, 32).shape == (32, 32, 3)


def test_an_image_of_the_right_size_is_not_resampled(photographs):
    image = photographs[0].resize((32, 32))
    np.testing.assert_array_equal(
        resize_center_crop(image, resize=32, crop=32, interpolation="bicubic"), np.asarray(image)
    )
    np.testing.assert_array_equal(
        decode_proxy_image(encode_proxy_image(image, short_side=32, jpeg_quality=92), 32), np.asarray(image)
    )


@pytest.mark.parametrize(("short_side", "form", "tolerance"), [(32, "PNG", 1.5), (64, "PNG", 1.5), (65, "JPEG", 4)])
def test_a_proxy_image_is_the_resized_image_lossless_when_small(photographs, short_side, form, tolerance):
    data = encode_proxy_image(photographs[0], short_side=short_side, jpeg_quality=92)
    proxy = Image.open(io.BytesIO(data))
    assert proxy.format == form and proxy.mode == "RGB"
    assert proxy.size == (round(640 * short_side / 427), short_side)
    expected = photographs[0].resize(proxy.size, Image.Resampling.BICUBIC)
    assert mean_difference(np.asarray(proxy), np.asarray(expected)) < tolerance
    left, top = (proxy.width - 20) // 2, (short_side - 20) // 2
    np.testing.assert_array_equal(decode_proxy_image(data, 20), np.asarray(proxy)[top : top + 20, left : left + 20])


def test_a_proxy_image_has_no_colour_profile(photographs):
    for mode in ("RGB", "CMYK"):
        image = decode_image(
            encode(photographs[0].convert(mode), "JPEG", icc_profile=b"p" * 50_000), max_pixels=NO_LIMIT
        )
        for short_side in (32, 96):
            copy = Image.open(io.BytesIO(encode_proxy_image(image, short_side=short_side, jpeg_quality=92)))
            assert "icc_profile" not in copy.info


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_conversion_to_rgb_in_strips_equals_conversion_at_once(photographs, monkeypatch, rows):
    monkeypatch.setattr(rgb, "STRIP_PIXELS", rows * 640)
    opaque = photographs[0].resize((640, 100))
    alpha = Image.linear_gradient("L").resize(opaque.size)
    transparent = opaque.copy()
    transparent.putalpha(alpha)
    white = Image.new("RGBA", opaque.size, "white")
    expected = Image.alpha_composite(white, transparent).convert("RGB")
    np.testing.assert_array_equal(decode(encode(transparent)), np.asarray(expected))
    deep = np.asarray(opaque.convert("L")).astype(np.uint16) * 257
    np.testing.assert_array_equal(decode(encode(Image.fromarray(deep)))[..., 1], deep // 257)


@pytest.mark.parametrize(
    ("mode", "form", "bytes_a_pixel"),
    [("RGB", "PNG", 6), ("RGBA", "PNG", 11), ("LA", "PNG", 11), ("CMYK", "JPEG", 10), ("I", "TIFF", 11)],
)
def test_decoding_takes_no_more_memory_than_documented(tmp_path, mode, form, bytes_a_pixel):
    """In a process of its own, whose peak is measured."""
    Image.new("RGB", (3000, 3000), "red").convert("L" if mode == "I" else mode).convert(mode).save(tmp_path / "x", form)
    script = (
        "import io, sys; from PIL import Image; from elfs_ray.pool.images import decode_image\n"
        "def peak(): return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])\n"
        "small = io.BytesIO(); Image.new(sys.argv[2], (9, 9)).save(small, sys.argv[3])\n"
        "decode_image(small.getvalue(), max_pixels=10**9); data = open(sys.argv[1], 'rb').read(); before = peak()\n"
        "decode_image(data, max_pixels=10**9, min_size=3000); print(peak() - before)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "x"), mode, form]
    kilobytes = int(subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout)
    assert kilobytes * 1024 < bytes_a_pixel * 3000 * 3000

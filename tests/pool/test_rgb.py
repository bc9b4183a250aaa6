"""Show images of every depth, sample type and transparency as viewers do. Each is a ramp from dark to bright."""

import struct

import numpy as np
import pytest
from PIL import Image, ImageChops

from elfs_ray.pool.images import BadImage, decode_image
from tests.image_files import encode, png_chunk, png_of, tiff_of

RAMP = np.tile(np.linspace(0, 255, 64).astype(np.uint16), (24, 1))
COLOURS = np.dstack([RAMP, RAMP[:, ::-1], RAMP // 2])
GREY, TRUECOLOUR, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 4, 6  # colour types of PNG
TWELVE_BITS = RAMP * 16  # to 4080


def decode(data: bytes) -> np.ndarray:
    return np.asarray(decode_image(data, max_pixels=10**6, min_size=10_000))


def assert_shows(data: bytes, expected: np.ndarray, tolerance: int = 1) -> None:
    expected = np.repeat(expected[..., None], 3, axis=2) if expected.ndim == 2 else expected
    np.testing.assert_allclose(decode(data).astype(int), expected.astype(int), atol=tolerance)


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2"])
def test_a_tiff_whose_zero_is_white_is_not_a_negative(dtype):
    scale = 257 if dtype.endswith("2") else 1
    assert_shows(tiff_of(((255 - RAMP) * scale).astype(dtype), photometric=0), RAMP)


@pytest.mark.parametrize("form", ["PNG", "TIFF little", "TIFF big", "PPM", "JPEG2000"])
def test_12_bits_in_16_are_shown_in_their_own_range(form):
    data = {
        "PNG": lambda: png_of(TWELVE_BITS, 16, GREY),
        "TIFF little": lambda: tiff_of(TWELVE_BITS.astype("<u2"), photometric=1),
        "TIFF big": lambda: tiff_of(TWELVE_BITS.astype(">u2"), photometric=1),
        "PPM": lambda: encode(Image.fromarray(TWELVE_BITS), "PPM"),
        "JPEG2000": lambda: encode(Image.fromarray(TWELVE_BITS), "JPEG2000", irreversible=False),
    }[form]()
    assert_shows(data, RAMP)


@pytest.mark.parametrize("bits", [9, 10, 12, 14])
@pytest.mark.parametrize("offset", [0, 100])
def test_the_darkest_sample_is_black_and_the_brightest_white(bits, offset):
    samples = offset + np.round(RAMP / 255 * (2**bits - 1 - offset)).astype(np.uint16)
    assert_shows(png_of(samples, 16, GREY), RAMP)


@pytest.mark.parametrize(
    "data",
    [
        png_of(COLOURS * 16, 16, TRUECOLOUR),
        png_of(np.dstack([COLOURS * 16, RAMP * 0 + 65535]), 16, COLOUR_ALPHA),
        tiff_of((COLOURS * 16).astype("<u2"), photometric=2),
        tiff_of((COLOURS * 16).astype(">u2"), photometric=2),
        tiff_of((COLOURS * 16).astype("<u2"), photometric=2, tags={284: (3, [2])}),
        b"P6 64 24 65535\n" + (COLOURS * 16).astype(">u2").tobytes(),
    ],
    ids=["PNG", "PNG with alpha", "TIFF little", "TIFF big", "TIFF by band", "PPM"],
)
def test_colours_of_12_bits_in_16_are_shown_in_their_own_range(data):
    assert_shows(data, COLOURS)


def test_grey_of_12_bits_with_alpha_is_shown_in_its_own_range():
    assert_shows(png_of(np.dstack([TWELVE_BITS, RAMP * 0 + 65535]), 16, GREY_ALPHA), RAMP)
    assert_shows(png_of(np.dstack([TWELVE_BITS, RAMP * 0]), 16, GREY_ALPHA), RAMP * 0 + 255)


@pytest.mark.parametrize(
    ("data", "white"),
    [
        (png_of(TWELVE_BITS // 2, 16, GREY, png_chunk(b"sBIT", b"\x0c")), 4095),
        (png_of(TWELVE_BITS // 2, 16, GREY, png_chunk(b"sBIT", b"\x10")), 65535),
        (png_of(TWELVE_BITS // 2 * 4, 16, GREY, png_chunk(b"sBIT", b"\x0c")), 65535),  # scaled to 16 bits, but dark
        (tiff_of((TWELVE_BITS // 2).astype("<u2"), 1, {281: (3, [4095])}), 4095),
        (tiff_of((TWELVE_BITS // 2).astype(">u2"), 1, {281: (3, [65535])}), 65535),
        (b"P5 64 24 4095\n" + (TWELVE_BITS // 2).astype(">u2").tobytes(), 4095),
    ],
    ids=["sBIT 12", "sBIT 16", "sBIT 12, scaled", "MaxSampleValue", "MaxSampleValue of 16 bits", "maxval"],
)
def test_a_declared_white_is_white_in_dark_images(data, white):
    samples = TWELVE_BITS.astype(int) // 2 * (4 if b"sBIT\x0c" in data and white == 65535 else 1)
    assert_shows(data, samples * 255 // white)


def test_declared_bits_of_colours_do_not_count_alpha():
    samples = np.dstack([COLOURS * 8, RAMP * 0 + 65535])
    data = png_of(samples, 16, COLOUR_ALPHA, png_chunk(b"sBIT", b"\x0c\x0c\x0c\x10"))
    assert_shows(data, COLOURS // 2)


def test_packed_12_bits_are_shown_from_0_to_4095():
    first, second = TWELVE_BITS[:, ::2], TWELVE_BITS[:, 1::2]
    packed = np.dstack([first >> 4, (first & 15) << 4 | second >> 8, second & 255]).astype(np.uint8).reshape(24, 96)
    assert_shows(tiff_of(packed, 1, {256: (4, [64]), 258: (3, [12])}), RAMP)


@pytest.mark.parametrize(("dtype", "scale"), [("i1", 127 / 255), ("<i2", 32767 / 255), ("<u4", 257)])
def test_the_largest_value_of_a_sample_type_is_white(dtype, scale):
    assert_shows(tiff_of((RAMP * scale).astype(dtype), 1), RAMP, tolerance=2)


def test_negative_samples_are_refused():
    with pytest.raises(BadImage, match="have no defined white"):
        decode(tiff_of((RAMP.astype(int) - 128).astype("i1"), 1))


def test_bright_16_bit_images_and_those_of_one_colour_are_not_stretched():
    assert_shows(png_of(RAMP // 2 * 257, 16, GREY), RAMP // 2)
    assert_shows(png_of(RAMP * 0 + 4095, 16, GREY), RAMP * 0 + 15)


@pytest.mark.parametrize("bits", [1, 2, 4, 16])
def test_a_transparent_grey_is_white_at_every_depth(bits):
    levels = np.tile(np.arange(2**bits), (4, 8)) if bits < 8 else np.tile(np.arange(64) * 1040, (4, 1))
    key = int(levels[0, len(levels[0]) // 3])
    groups = levels.reshape(4, -1, max(1, 8 // bits))
    packed = (groups << np.arange(8 - bits, -1, -bits)).sum(axis=-1) if bits < 8 else levels
    data = png_of(packed, bits, GREY, png_chunk(b"tRNS", struct.pack(">H", key)))
    assert_shows(data, np.where(levels == key, 255, levels.astype(int) * 255 // (2**bits - 1)))


def test_a_transparent_colour_of_16_bits_is_that_colour_alone():
    samples = COLOURS * 257
    samples[:, 0], samples[:, 1] = (100, 200, 300), (101, 200, 300)  # which share their upper bytes
    data = png_of(samples, 16, TRUECOLOUR, png_chunk(b"tRNS", struct.pack(">HHH", 100, 200, 300)))
    shown = decode(data)
    assert (shown[:, 0] == 255).all() and (shown[:, 1] <= 1).all()


@pytest.mark.parametrize(("extra", "shown"), [(0, 100), (1, 100 + 127), (2, 100 * 128 // 255 + 127)])
def test_a_second_band_of_grey_is_alpha_if_the_file_says_so(extra, shown):
    samples = np.dstack([np.full((4, 4), 100, np.uint8), np.full((4, 4), 128, np.uint8)])
    assert_shows(tiff_of(samples, 1, {338: (3, [extra])}), np.full((4, 4), shown))


@pytest.mark.parametrize("bits", [8, 16])
def test_bands_stored_one_after_another_are_put_together(bits):
    samples = COLOURS.astype("u1") if bits == 8 else (COLOURS * 257).astype("<u2")
    assert_shows(tiff_of(samples, 2, {284: (3, [2])}), COLOURS)


DEFLATE, PLANAR, PREMULTIPLIED = {259: (3, [8])}, {284: (3, [2])}, {338: (3, [1])}


@pytest.mark.parametrize("tags", [{}, DEFLATE, DEFLATE | PLANAR])
def test_cmyk_that_fills_16_bits_is_shown(tags):
    ink = np.dstack([255 - COLOURS, COLOURS[..., :1] * 0]).astype("<u2") * 257
    assert_shows(tiff_of(ink, 5, tags), COLOURS, tolerance=2)


@pytest.mark.parametrize(
    "data",
    [
        tiff_of((COLOURS * 16).astype("<u2"), 2, DEFLATE | PLANAR),
        tiff_of((COLOURS * 257).astype("<u2"), 2, DEFLATE | PLANAR | {281: (3, [4095] * 3)}),
        tiff_of(np.dstack([COLOURS, COLOURS[..., :1]]).astype("<u2") * 16, 5),
        tiff_of(np.dstack([COLOURS, COLOURS[..., :1]]).astype("<u2") * 257, 5, PLANAR),
        tiff_of(np.dstack([COLOURS, COLOURS[..., :1] * 0 + 255]).astype("<u2") * 16, 2, PREMULTIPLIED),
    ],
)
def test_colours_whose_lower_bytes_pillow_cannot_read_are_refused(data):
    with pytest.raises(BadImage, match="convert the image to 8 bits"):
        decode(data)


@pytest.mark.parametrize(
    "data",
    [
        tiff_of(COLOURS[..., :2].astype("u1"), 1, DEFLATE | PLANAR | {338: (3, [2])}),
        tiff_of(COLOURS.astype("u1"), 8, PLANAR),
        tiff_of(COLOURS.astype("u1"), 8, DEFLATE | PLANAR),
    ],
)
def test_bands_that_pillow_reads_wrong_are_refused(data):
    with pytest.raises(BadImage, match="convert the image to RGB"):
        decode(data)


@pytest.mark.parametrize("scale", [1, 257])
def test_a_colour_map_may_hold_8_or_16_bits(scale):
    colour_map = [level * scale for level in (*range(256), *range(255, -1, -1), *[40] * 256)]
    expected = np.dstack([RAMP, 255 - RAMP, RAMP * 0 + 40])
    assert_shows(tiff_of(RAMP.astype("u1"), 3, {320: (3, colour_map)}), expected)


def bmp(alpha: int) -> bytes:
    """Return a BMP whose header (version 4) declares alpha."""
    pixels = np.dstack([COLOURS[::-1, :, ::-1], RAMP * 0 + alpha]).astype(np.uint8).tobytes()
    head = struct.pack("<LllHHLLllLL", 108, 64, 24, 1, 32, 3, len(pixels), 2835, 2835, 0, 0)
    head = (head + struct.pack("<LLLL", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)).ljust(108, b"\0")
    return b"BM" + struct.pack("<LHHL", 122 + len(pixels), 0, 0, 122) + head + pixels


@pytest.mark.parametrize(("alpha", "share"), [(0, 1), (255, 1), (51, 0.2)])
def test_a_bmp_without_any_alpha_is_opaque(alpha, share):
    assert_shows(bmp(alpha), COLOURS * share + 255 * (1 - share))


def enlarged_gif(frame: Image.Image, **options) -> bytes:
    data = bytearray(encode(frame, "GIF", **options))
    struct.pack_into("<HH", data, 6, frame.width + 8, frame.height + 4)  # the screen, of which the frame is a part
    return bytes(data)


@pytest.mark.parametrize("options", [{}, {"transparency": 3}])
def test_what_the_first_frame_of_a_gif_leaves_free_is_white(photographs, options):
    frame = photographs[0].resize((40, 30)).quantize(16)
    shown = decode(enlarged_gif(frame, **options))
    expected = Image.new("RGB", (48, 34), "white")
    expected.paste(Image.fromarray(decode(encode(frame, "GIF", **options))))
    np.testing.assert_array_equal(shown, np.asarray(expected))


def test_what_the_first_frame_of_a_webp_leaves_free_is_white(photographs):
    frames = [photograph.resize((40, 30)) for photograph in photographs]
    data = bytearray(encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True))
    at = data.index(b"VP8X")
    data[at + 12 : at + 18] = (49).to_bytes(3, "little") + (39).to_bytes(3, "little")
    at = data.index(b"ANMF")
    data[at + 8 : at + 14] = (2).to_bytes(3, "little") + (3).to_bytes(3, "little")  # in steps of two pixels
    expected = Image.new("RGB", (50, 40), "white")
    expected.paste(frames[0], (4, 6))
    assert ImageChops.difference(Image.fromarray(decode(bytes(data))), expected).getbbox() is None

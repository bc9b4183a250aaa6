"""Metadata cost no image and change no pixel, whatever they hold."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from elfs_ray.pool.images import BadImage, decode_image, encode_proxy_image
from tests.image_files import encode, png_chunk, tiff_of

UPRIGHT = 6  # an orientation: turn by 90 degrees to the right
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
PHOTO = Image.fromarray(PIXELS)
TURNED = np.rot90(PIXELS, -1)


def decode(data: bytes) -> np.ndarray:
    image = decode_image(data, max_pixels=10**6, min_size=10_000)
    assert image.info == {}
    return np.asarray(image)


def exif(*entries: tuple[int, int, int, bytes], tail: bytes = b"", orientation: int = UPRIGHT) -> bytes:
    """Return EXIF data with an orientation, and further entries of (tag, type, count, value or place)."""
    ordered = sorted([(0x0112, 3, 1, struct.pack("<HH", orientation, 0)), *entries])
    body = b"".join(struct.pack("<HHL", *entry[:3]) + entry[3] for entry in ordered)
    return b"Exif\0\0II*\0" + struct.pack("<LH", 8, len(ordered)) + body + b"\0" * 4 + tail


TAIL = struct.pack("<L", 8 + 2 + 24 + 4)
ODD_EXIF = {
    "plain": exif(),
    "rational of zero": exif((0x011A, 10, 1, TAIL), tail=struct.pack("<ll", -1, 0)),
    "text for a number": exif((0x011A, 2, 4, b"72\0\0")),
    "number for text": exif((0x010F, 3, 1, b"\x07\0\0\0")),
    "no such type": exif((0x010F, 99, 1, b"\x07\0\0\0")),
    "beyond its end": exif((0x010F, 2, 1000, struct.pack("<L", 60_000))),
    "EXIF directory at nowhere": exif((0x8769, 4, 1, struct.pack("<L", 50_000))),
    "GPS directory of text": exif((0x8825, 2, 4, b"abc\0")),
    "float of no number": exif((0x011A, 11, 1, struct.pack("<f", np.nan))),
}


@pytest.mark.parametrize("name", ODD_EXIF)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_an_image_is_turned_upright_beside_odd_exif_tags(form, name):
    options = {"lossless": True} if form == "WEBP" else {}
    without = decode(encode(PHOTO, form, **options))
    data = encode(PHOTO, form, exif=ODD_EXIF[name], **options)
    np.testing.assert_array_equal(decode(data), np.rot90(without, -1))


def test_unreadable_exif_is_none():
    for data in (b"", b"x", b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\xff"):
        np.testing.assert_array_equal(decode(encode(PHOTO, exif=b"Exif\0\0" + data)), PIXELS)


@pytest.mark.parametrize("form", ["GIF", "PNG", "JPEG", "JPEG2000"])
@pytest.mark.parametrize("short_side", [32, 96])
def test_a_long_comment_does_not_reach_the_proxy_image(form, short_side):
    comment = b"c" * (70_000 if form in ("GIF", "PNG") else 60_000)
    if form == "PNG":
        data = png_with(png_chunk(b"tEXt", b"comment\0" + comment))
    else:
        data = encode(PHOTO, form, comment=comment)
    image = decode_image(data, max_pixels=10**6, min_size=10_000)
    copy = encode_proxy_image(image, short_side=short_side, jpeg_quality=92)
    assert b"ccc" not in copy and Image.open(io.BytesIO(copy)).size == (round(short_side * 4 / 3), short_side)


def png_with(*chunks: bytes, before_end: bytes = b"") -> bytes:
    """Return the photograph as PNG with chunks after its header, and others after its pixels."""
    whole = encode(PHOTO)
    return whole[:33] + b"".join(chunks) + whole[33:-12] + before_end + whole[-12:]


def packed(size: int) -> bytes:
    return zlib.compress(b"x" * size, 9)


CHUNKS = {
    "2 MB of compressed text": png_chunk(b"zTXt", b"workflow\0\0" + packed(2 << 20)),
    "2 MB of international text": png_chunk(b"iTXt", b"workflow\0\1\0\0\0" + packed(2 << 20)),
    "70 MB of text": b"".join(png_chunk(b"tEXt", b"key%d\0" % i + b"x" * (1 << 20)) for i in range(70)),
    "a profile of 2 MB": png_chunk(b"iCCP", b"profile\0\0" + packed(2 << 20)),
    "an unknown compression": png_chunk(b"zTXt", b"workflow\0\7" + packed(9)),
    "a false checksum": png_chunk(b"tEXt", b"key\0value")[:-1] + b"?",
    "a short gAMA": png_chunk(b"gAMA", b"\1"),
    "a short cHRM": png_chunk(b"cHRM", b"\1"),
    "a short pHYs": png_chunk(b"pHYs", b"\1"),
    "a short tRNS": png_chunk(b"tRNS", b"\1"),
    "a broken eXIf": png_chunk(b"eXIf", b"II*\0\xff"),
    "a frame of no animation": png_chunk(b"fcTL", b"\1" * 26),
    "a broken animation": png_chunk(b"acTL", b"\1"),
    **{
        f"text of the name {name}": png_chunk(b"tEXt", name.encode() + b"\0text")
        for name in ("interlace", "transparency", "bbox", "exif", "xmp", "icc_profile", "Raw profile type exif")
    },
}


@pytest.mark.parametrize("name", CHUNKS)
def test_no_chunk_but_those_of_pixels_matters_in_a_png(name):
    np.testing.assert_array_equal(decode(png_with(CHUNKS[name])), PIXELS)
    np.testing.assert_array_equal(decode(png_with(before_end=CHUNKS[name])), PIXELS)


@pytest.mark.parametrize("cut", [13, 500, 1015])
def test_a_png_cut_short_behind_its_pixels_is_whole(cut):
    np.testing.assert_array_equal(decode(png_with(before_end=png_chunk(b"tEXt", b"x" * 1000))[:-cut]), PIXELS)


def test_a_broken_palette_that_colours_do_not_use_costs_no_png():
    palette = png_chunk(b"PLTE", bytes(range(30)))[:-1] + b"\0"
    np.testing.assert_array_equal(decode(png_with(palette)), PIXELS)


def test_more_transparencies_than_a_palette_can_have_are_none():
    drawing = PHOTO.quantize(16)
    whole = encode(drawing)
    at = whole.index(b"IDAT") - 4
    shown = decode(whole[:at] + png_chunk(b"tRNS", bytes(300)) + whole[at:])
    np.testing.assert_array_equal(shown, np.asarray(drawing.convert("RGB")))


@pytest.mark.parametrize(
    "tags",
    [
        {282: (2, list(b"72\0\0")), 283: (2, list(b"72\0\0")), 296: (3, [3])},
        {700: (1, list(b'<x tiff:Orientation="6"/>'))},
        {34665: (4, [3]), 34853: (4, [2**32 - 1])},
        {34675: (7, [1] * 9), 270: (7, list(b"\xff\xfe\0"))},
    ],
    ids=["text for a number", "XMP that turns", "directories at nowhere", "broken profile"],
)
def test_no_tag_but_those_of_pixels_matters_in_a_tiff(tags):
    np.testing.assert_array_equal(decode(tiff_of(PIXELS, 2, tags)), PIXELS)
    np.testing.assert_array_equal(decode(tiff_of(PIXELS, 2, {**tags, 274: (3, [UPRIGHT])})), TURNED)


@pytest.mark.parametrize("marker", [0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE])
@pytest.mark.parametrize(
    "content",
    [b"", b"J", b"JFIF\0", b"Exif\0\0", b"FPXR\0", b"MPF\0", b"Adobe", b"ICC_PROFILE\0", b"Photoshop 3.0\x008BIM\4"],
)
def test_no_short_segment_costs_a_jpeg(marker, content):
    whole = encode(PHOTO, "JPEG")
    segment = bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content
    for at in (2, 20):  # before and after the first segment
        np.testing.assert_array_equal(decode(whole[:at] + segment + whole[at:]), decode(whole))


def test_broken_exif_costs_no_avif():
    data = encode(PHOTO, "AVIF", exif=b"Exif\0\0II*\0broken")
    np.testing.assert_array_equal(decode(data), decode(encode(PHOTO, "AVIF")))


@pytest.mark.parametrize(("form", "kept"), [("PNG", 20), ("JPEG", 100), ("GIF", 9), ("TIFF", 12), ("WEBP", 40)])
def test_what_begins_as_an_image_is_rejected_for_pillows_reason(form, kept):
    with pytest.raises(BadImage, match=r"^\w+Error: (?s:.)+"):
        decode(encode(PHOTO, form)[:kept])


texts = st.text(st.characters(codec="latin-1", exclude_characters="\0"), min_size=1, max_size=79)
contents = st.binary(max_size=300)
entries = st.tuples(st.integers(0, 0xFFFF), st.integers(0, 18), st.integers(0, 100), st.binary(min_size=4, max_size=4))
# Another orientation would turn the image.
random_exif = st.builds(
    lambda body, tail: exif(*body, tail=tail, orientation=1),
    st.lists(entries.filter(lambda entry: entry[0] != 0x0112), max_size=6),
    contents,
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(random_exif | contents.map(lambda data: b"Exif\0\0" + data), contents, texts, contents, st.booleans())
def test_random_metadata_change_no_pixel(exif_data, comment, key, text, at_end):
    """In a PNG, the text also takes the place of every ancillary chunk that Pillow reads."""
    info = PngImagePlugin.PngInfo()
    info.add_text(key, text)
    info.add_text(key, text, zip=True)
    info.add_itxt(key, text)
    for kind in (b"iCCP", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tIME", b"acTL", b"fcTL", b"zTXt", b"iTXt", b"prVt"):
        info.add(kind, text, after_idat=at_end)
    palette = PHOTO.quantize(16)
    for plain, data in (
        (encode(PHOTO), encode(PHOTO, pnginfo=info, exif=exif_data)),
        (encode(PHOTO, "JPEG"), encode(PHOTO, "JPEG", exif=exif_data, comment=comment, xmp=text)),
        (encode(palette, "GIF"), encode(palette, "GIF", comment=comment)),
        (encode(PHOTO, "WEBP"), encode(PHOTO, "WEBP", exif=exif_data, xmp=text, icc_profile=comment)),
        (tiff_of(PIXELS, 2), tiff_of(PIXELS, 2, tiff_tags(exif_data, comment, text))),
    ):
        np.testing.assert_array_equal(decode(data), decode(plain))


def tiff_tags(exif_data: bytes, comment: bytes, text: bytes) -> dict[int, tuple[int, list[int]]]:
    """Return tags of TIFF with these contents, as types that suit them and as types that do not."""
    values = {
        270: (2, comment),
        305: (7, text),
        700: (1, text),
        282: (2, comment),
        296: (3, b"\3"),
        34665: (4, comment),
    }
    values |= {34853: (1, text), 34675: (7, comment), 33723: (2, text), 65000: (7, exif_data)}
    return {tag: (kind, list(value)) for tag, (kind, value) in values.items() if value}

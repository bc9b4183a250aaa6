"""Malicious files: paths out of a tar, decompression bombs, formats that run programs, pickles."""

import io
import os
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, features

from elfs_ray.pool.images import BadImage, decode_image, encode_proxy_image, resize_center_crop
from tests.image_files import grey_png
from tests.pool.reading import listed, read

MAX_PIXELS = 25_000_000
SECRET = b"outside of the tar"


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", **fields: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(data))


def test_no_member_of_a_tar_leads_out_of_it(tmp_path):
    outside = tmp_path / "secret.png"
    outside.write_bytes(SECRET)
    names = ["../secret.png", "../../../../../../etc/hostname.png", str(outside), "a/../../secret.png", "//secret.png"]
    links = {tarfile.SYMTYPE: "sym", tarfile.LNKTYPE: "hard"}
    (tmp_path / "pool").mkdir()
    with tarfile.open(tmp_path / "pool" / "train.tar", "w") as archive:
        for number, name in enumerate(names):
            add(archive, name, b"bytes %d" % number)
        for kind, name in links.items():
            for target in ("../secret.png", str(outside), "/etc/passwd"):
                add(archive, f"{name}.png", type=kind, linkname=target)
        add(archive, "pipe.png", type=tarfile.FIFOTYPE)
        add(archive, "device.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
    before = sorted(tmp_path.rglob("*"))
    uris, _ = listed(tmp_path / "pool")
    assert read(uris) == [b"bytes 2", b"bytes 4"], "a name with .. is skipped, an absolute path is a mere name"
    assert sorted(tmp_path.rglob("*")) == before and outside.read_bytes() == SECRET


@pytest.mark.parametrize("size", [10**6, 2**40, 2**62])
def test_a_member_that_claims_to_exceed_its_tar_takes_no_memory(tmp_path, size):
    with tarfile.open(tmp_path / "train.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        add(archive, "first.png", b"first")
        header = tarfile.TarInfo("huge.png")
        header.size = size
        archive.fileobj.write(header.tobuf(tarfile.GNU_FORMAT))
    tracemalloc.start()
    first, *others = read(listed(tmp_path / "train.tar")[0])
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    assert first == b"first" and all("is cut short" in reason for reason in others)


def test_a_uri_cannot_name_bytes_outside_of_its_container(tmp_path):
    """A table of uris may come from somebody else."""
    (tmp_path / "x.tar").write_bytes(b"0123456789")
    pq.write_table(pa.table({"image": [b"row"]}), tmp_path / "x.parquet")
    tar, parquet = tmp_path / "x.tar", tmp_path / "x.parquet"
    uris = [f"{tar}#m?offset=0&size=99999999999999999999", f"{tar}#m?offset=99999999999999999999&size=1"]
    uris += [f"{tar}#m?offset=-1&size=5", f"{parquet}#row=99999999999999999999", f"{parquet}#row=-1"]
    assert all(isinstance(reason, str) for reason in read(uris))


# Decompression bombs. Each is small on disk and would be large in memory.


def png_of_zeros(width: int, height: int) -> bytes:
    """Return a valid grey PNG, compressed a thousandfold."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(b"\0" * (width + 1)) for _ in range(height)) + packer.flush()
    return grey_png(width, height, rows)


def bomb(form: str) -> bytes:
    """Return an image file of 12,000 x 12,000 pixels of one colour."""
    if form == "PNG":
        return png_of_zeros(12_000, 12_000)
    buffer = io.BytesIO()
    options = {"TIFF": {"compression": "tiff_deflate"}, "JPEG2000": {"irreversible": True}}.get(form, {})
    # Writing WebP takes long.
    image = Image.new("RGB", (6_000, 6_000)) if form == "WEBP" else Image.new("L", (12_000, 12_000))
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP"])
def test_a_bomb_is_refused_by_its_size_before_a_pixel_is_decoded(tmp_path, form):
    """Measure the peak memory of a separate process: the decoded pixels would take 108 to 576 MB."""
    (tmp_path / "bomb").write_bytes(bomb(form))
    script = (
        "import resource, sys; from elfs_ray.pool.images import BadImage, decode_image\n"
        "data = open(sys.argv[1], 'rb').read()\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "try: decode_image(data, max_pixels=25_000_000)\n"
        "except BadImage as error: print(error)\n"
        "print(peak() - before)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "bomb")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    reason, kilobytes = done.stdout.splitlines()
    assert reason.startswith(
        ("12000x12000 pixels, more than embed.max_image_pixels=25000000", "6000x6000 pixels, more")
    )
    assert int(kilobytes) < 100 << 10


def test_compressed_text_of_a_png_is_not_unpacked_without_limit():
    """Pillow unpacks a PNG's compressed comment and colour profile on opening."""
    packed = zlib.compress(b"\0" * (200 << 20), 9)
    whole = png_of_zeros(4, 4)
    for kind, content in ((b"zTXt", b"Comment\0\0" + packed), (b"iCCP", b"profile\0\0" + packed)):
        chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        tracemalloc.start()
        try:
            assert decode_image(whole[:33] + chunk + whole[33:], max_pixels=MAX_PIXELS).size == (4, 4)
        except BadImage as error:
            assert str(error)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
        tracemalloc.stop()


def test_only_the_first_of_many_frames_is_decoded():
    first = Image.new("P", (32, 32), 1)
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=[Image.new("P", (32, 32), i % 7) for i in range(300)])
    data = buffer.getvalue()
    tracemalloc.start()
    assert decode_image(data, max_pixels=32 * 32).size == (32, 32)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_an_image_of_extreme_shape_gives_a_small_proxy_image(photographs):
    for size in ((30_000, 10), (10, 30_000)):
        image = photographs[0].resize(size)
        assert resize_center_crop(image, resize=256, crop=224, interpolation="bicubic").shape == (224, 224, 3)
        proxy = Image.open(io.BytesIO(encode_proxy_image(image, short_side=64, jpeg_quality=92)))
        assert min(proxy.size) == 64 and max(proxy.size) <= 256


def test_formats_that_run_programs_or_are_obscure_are_rejected(tmp_path, monkeypatch):
    """Pillow passes EPS to Ghostscript. A program of that name is put on the path, and leaves a trace if it runs."""
    trace = tmp_path / "trace"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {trace}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    others = {"eps": eps}
    for form in ("PCX", "TGA", "ICO", "SGI", "DDS"):
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), "red").save(buffer, form)
        others[form] = buffer.getvalue()
    for data in others.values():
        with pytest.raises(BadImage, match="not an image that Pillow can read"):
            decode_image(data, max_pixels=10**6)
    assert not trace.exists()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "MPO"])
def test_the_formats_of_photographs_are_read(photographs, form):
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    buffer = io.BytesIO()
    options = {"save_all": True, "append_images": photographs[1:]} if form == "MPO" else {}
    photographs[0].save(buffer, form, **options)
    decoded = decode_image(buffer.getvalue(), max_pixels=10**6, min_size=427)
    difference = np.abs(np.asarray(decoded, float) - np.asarray(photographs[0].convert(decoded.mode), float))
    assert difference.mean() < (40 if form == "GIF" else 10)


# No code from files


def test_nothing_is_unpickled_anywhere():
    """torch.load and numpy.load read plain data only, and nothing else that could run code is called."""
    package = Path(__file__).parents[2] / "elfs_ray"
    # It reads only what it has written itself, for a process of its own, in a folder that nobody else can open.
    trusted = package / "stages" / "estimate.py"
    assert "tempfile.TemporaryDirectory()" in trusted.read_text()
    for path in set(package.rglob("*.py")) - {trusted}:
        source = path.read_text()
        for line in source.splitlines():
            if "torch.load(" in line:
                assert "weights_only=True" in line, (path, line)
            if "np.load(" in line or "np.savez" in line:
                assert "allow_pickle=False" in line, (path, line)
            for word in ("pickle.load", "cloudpickle", "joblib", "yaml.load", "eval(", "exec(", "shelve", "marshal"):
                assert word not in line or f"def {word}" in line or ".eval()" in line, (path, line)


def test_a_k_means_state_with_a_pickle_is_refused(tmp_path):
    from elfs_ray.stages.cluster.run import STATE_FILE, _load_state
    from elfs_ray.storage.run_dir import RunDir

    trap = tmp_path / "trap"

    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(trap),)

    (tmp_path / "cluster").mkdir()
    np.savez(tmp_path / "cluster" / STATE_FILE, attempt=np.array([Runs()], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        _load_state(RunDir(tmp_path))
    assert not trap.exists()

"""Tell what a listing passes over, and refuse what it cannot decide: no image is lost or added without a word."""

import io
import os
import sys
import tarfile
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from elfs_ray.pool import files, images
from elfs_ray.pool.files import describe_passed_over
from elfs_ray.pool.images import decode_image
from elfs_ray.pool.listing import PoolColumns, find_units
from elfs_ray.storage import filesystem
from tests.image_files import encode
from tests.pool.reading import listed, read, remarks_of

IMAGE = encode(Image.new("RGB", (4, 3), "red"))


@pytest.fixture(params=["with pillow-heif", "without"])
def has_heif(request, monkeypatch) -> bool:
    """Return whether the extra heif is installed; skip where it is not and the test needs it."""
    if request.param == "with pillow-heif":
        pytest.importorskip("pillow_heif")
    else:
        monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as Python does for a package that cannot be imported
        monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    for cached in (images.known_formats, files.image_extensions):
        cached.cache_clear()
        request.addfinalizer(cached.cache_clear)
    return request.param == "with pillow-heif"


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(IMAGE)


def write_parquet(path: Path, num_rows: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [IMAGE] * num_rows}), path)


def tar_of(*names: str, size: int = 700) -> bytes:
    """Return a tar with members of random bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = size
            archive.addfile(member, io.BytesIO(os.urandom(size)))
    return buffer.getvalue()


def names_of(uris: list[str]) -> list[str]:
    return [uri.partition("?")[0].rpartition("#" if "#" in uri else "/")[2] for uri in uris]


# Folders


@pytest.mark.parametrize("place", ["disk", "object store"])
@pytest.mark.parametrize("folder", ["", "photos/2024/", "a/", "b/c/"])
def test_a_folder_tells_what_it_passes_over_wherever_it_lies(tmp_path, place, folder, has_heif):
    write(tmp_path, "a/1.JPG", "b/2.png")
    write(tmp_path, *(f"{folder}{name}" for name in ("x.jxl", "y.JXL", "t.jpg_large", "0123abcd", "r.001", "r.002")))
    write(tmp_path, f"{folder}.DS_Store", f"{folder}_masks/1.png", f"{folder}_masks/2.png", f"{folder}e.heic")
    uri = str(tmp_path)
    if place == "object store":
        uri = f"fsspec+memory://{uuid.uuid4().hex}"
        for path in tmp_path.rglob("*"):
            if path.is_file():
                filesystem.write_bytes(f"{uri}/{path.relative_to(tmp_path)}", path.read_bytes())
    passed_over = dict(remarks_of(uri).passed_over)
    assert passed_over.pop(".heic", 0) == (0 if has_heif else 1)
    assert passed_over == {
        ".jxl": 2,
        ".jpg_large": 1,
        "no extension": 1,
        "other extensions": 2,
        "hidden files": 1,
        "hidden folders": 1,
    }
    assert len(listed(uri)[0]) == (3 if has_heif else 2)


def test_what_is_passed_over_is_described_the_most_frequent_first(has_heif):
    remarks = files.Remarks()
    for name in ("a.txt", "b.heic", "c.heic", *(f"x.e{number}" for number in range(14))):
        remarks.pass_over(name)
    text = describe_passed_over(remarks.passed_over)
    assert text.startswith("passed over 2 .heic, 1 .e0, 1 .e1, 1 .e10, ") and ", 4 others" in text
    assert ("install the extra heif: pip install pillow-heif" in text) == (not has_heif)
    assert describe_passed_over(files.Remarks().passed_over) == ""


def test_pipes_and_links_in_tars_are_told(tmp_path):
    write(tmp_path / "folder", "1.png")
    os.mkfifo(tmp_path / "folder" / "pipe.png")
    assert remarks_of(tmp_path / "folder").passed_over == {"pipes, sockets and devices": 1}
    with tarfile.open(tmp_path / "pool.tar", "w") as archive:
        archive.add(tmp_path / "folder" / "1.png", "1.png")
        os.link(tmp_path / "folder" / "1.png", tmp_path / "folder" / "2.png")
        for name in ("1.png", "2.png"):
            archive.add(tmp_path / "folder" / name, name)
    assert remarks_of(tmp_path / "pool.tar").passed_over["links and devices in tars"] >= 1


def test_every_format_that_pillow_reads_is_listed(tmp_path, has_heif):
    names = ["a.apng", "b.j2k", "c.mpo", "d.pfm", "e.jpx", "f.jfif"]
    write(tmp_path, *names, "g.heic", "h.HEIF", "i.hif", "j.tga", "k.pdf")
    assert names_of(listed(tmp_path)[0]) == [*names, *(("g.heic", "h.HEIF", "i.hif") if has_heif else ())]


def test_heic_is_decoded_with_the_extra_heif(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    images.known_formats.cache_clear()
    assert "HEIF" in images.known_formats() and pillow_heif.options.THUMBNAILS is False
    photo = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    exif = Image.Exif()
    exif[274] = 6
    decoded = decode_image(encode(photo, "HEIF", quality=95, exif=exif.tobytes()), max_pixels=64 * 48)
    assert decoded.size == (48, 64), "upright"
    difference = abs(decoded.getpixel((24, 60))[0] - photo.transpose(Image.Transpose.ROTATE_270).getpixel((24, 60))[0])
    assert difference < 8


def test_a_folder_of_other_formats_alone_is_refused_with_their_names(tmp_path, has_heif):
    write(tmp_path, "a/1.jxl", "a/2.jxl", "b/3")
    with pytest.raises(ValueError, match=r"holds no images.*passed over 2 \.jxl, 1 no extension"):
        find_units(str(tmp_path))
    with pytest.raises(ValueError, match=r"holds no images that are listed: passed over 2 \.jxl, 1 no extension"):
        remarks_of(tmp_path, form="folder")


# Several kinds


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["example0.png", "example1.png", "data/a.parquet"],
            "2 images and 1 .parquet file: give pool.format=folder or",
        ),
        (["data/a.parquet", "data/b.parquet", "data/z/1.png"], "1 image and 2 .parquet files"),
        (["a/1.jpg", "b/2.jpg", "b/c/d.tar"], "2 images and 1 .tar file: give pool.format=folder or pool.format=web"),
        (["a.parquet", "b.tar", "c/1.png"], "1 image and 1 .parquet file and 1 .tar file"),
        (["assets/1.png", "x.tar", "y.tar"], "1 image and 2 .tar files"),
    ],
)
def test_a_folder_of_several_kinds_is_refused_with_their_counts(tmp_path, names, message):
    for name in names:
        if name.endswith(".parquet"):
            write_parquet(tmp_path / name)
        else:
            write(tmp_path, name)
            if name.endswith(".tar"):
                (tmp_path / name).write_bytes(tar_of("1.png"))
    with pytest.raises(ValueError) as caught:
        remarks_of(tmp_path)
    assert f"holds {message}" in str(caught.value)
    for form in ("folder", "parquet", "webdataset"):
        extension = {"folder": (".png", ".jpg"), "parquet": ".parquet", "webdataset": ".tar"}[form]
        others = [name for name in names if not name.endswith(extension)]
        if len(others) < len(names):
            assert remarks_of(tmp_path, form=form).passed_over.total() == len(others)


@pytest.mark.parametrize(
    ("names", "held_out"),
    [
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-0.parquet"], 1),
        (["train.parquet", "validation.parquet", "test.parquet"], 2),
        (["train/0.parquet", "val/0.parquet"], 1),
        (["Training_1.parquet", "dev_1.parquet"], 1),
        (["test-0.parquet", "validation-0.parquet"], 0),
        (["train-0.parquet", "latest.parquet", "constraint.parquet", "value.parquet"], 0),
        (["train/1.png", "test/2.png", "val2017/3.png"], 2),
        (["photos/train/1.png", "photos/test/2.png"], 1),
        (["bus/1.png", "train/2.png"], 0),
        (["labels/train/1.png", "images/train/1.png", "images/val/2.png"], 1),
        (["a/train/x/1.png", "b/test/x/2.png", "b/test/y/3.png"], 1),
        (["cat/train/1.png", "cat/test/2.png"], 1),
    ],
)
def test_test_files_beside_training_files_are_told(tmp_path, names, held_out):
    for name in names:
        (write_parquet if name.endswith(".parquet") else lambda path: write(path.parent, path.name))(tmp_path / name)
    warnings = remarks_of(tmp_path).warnings
    assert len(warnings) == (held_out > 0)
    told = f"{held_out} of {len(names)} ", f"{tmp_path}/"  # at the first level, or below it
    assert not held_out or (warnings[0].startswith(told) and "pool.uri" in warnings[0])


# Patterns and lists


@pytest.mark.parametrize("place", ["disk", "object store"])
@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["data/train-*"], ["train-0.parquet", "train-1.parquet"]),
        (["data/train-0.parquet", "data/t*-1.parquet"], ["train-0.parquet", "train-1.parquet"]),
        (["**/t*st-?.parquet"], ["test-0.parquet"]),
        (["data", "data/train-*"], ["test-0.parquet", "train-0.parquet", "train-1.parquet"]),
        (["da[t]a/*[!0].parquet"], ["train-1.parquet"]),
        (["photos/**"], ["1.jpg", "2.jpg", "3.png"]),
        (["photos/*/*.jpg"], ["1.jpg", "2.jpg"]),
        (["photos/a/*.jpg", "photos/a/1.*", "photos/a [[]b]/*"], ["3.png", "1.jpg", "2.jpg"]),
        (["photos/a [b]", "photos/a"], ["3.png", "1.jpg", "2.jpg"]),
    ],
)
def test_a_pool_is_named_by_patterns_and_lists(tmp_path, place, patterns, expected):
    for name in ("train-0", "train-1", "test-0"):
        write_parquet(tmp_path / "data" / f"{name}.parquet", num_rows=1)
    write(tmp_path / "photos", "a/1.jpg", "a/2.jpg", "a [b]/3.png")
    root = str(tmp_path)
    if place == "object store":
        root = f"fsspec+memory://{uuid.uuid4().hex}"
        for path in tmp_path.rglob("*.*"):
            filesystem.write_bytes(f"{root}/{path.relative_to(tmp_path)}", path.read_bytes())
    uris, _ = listed([f"{root}/{pattern}" for pattern in patterns])
    assert sorted(Path(uri.partition("#")[0]).name for uri in uris) == sorted(expected)


def test_a_pattern_tells_only_of_files_that_it_matches(tmp_path):
    write(
        tmp_path, "2023/1.jpg", "2023/1.xmp", "2023/.hidden", "2024/2.jpg", "2024/2.txt", "2024/x/3.jpg", "notes/n.txt"
    )
    assert remarks_of(f"{tmp_path}/*/[0-9]*").passed_over == {".xmp": 1, ".txt": 1}
    assert remarks_of(f"{tmp_path}/*/*.jpg").passed_over == {}
    assert remarks_of(f"{tmp_path}/*/*.*").passed_over == {".xmp": 1, ".txt": 2}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["photos", "photos/a"], "names .*/photos/a/ twice"),
        (["link", "photos"], "twice"),
        (["photos", "photos/a/*.jpg"], "names .*/photos/a/ twice"),
        (["photos/a/*.gif"], "does not exist"),
        (["photos/a", "nowhere"], "nowhere' does not exist"),
        (["photos/a/1.jpg"], "is one file: give the folder"),
    ],
)
def test_a_list_that_names_images_twice_or_nothing_is_refused(tmp_path, names, message):
    write(tmp_path, "photos/a/1.jpg", "photos/b/2.jpg")
    (tmp_path / "link").symlink_to("photos")
    with pytest.raises(ValueError, match=message):
        find_units([f"{tmp_path}/{name}" for name in names])


# Tars


def damaged(whole: bytes, kind: str) -> bytes:
    """Return a tar of 40 members, 1,536 bytes each, damaged at the 26th."""
    at = 25 * 1536
    if kind == "checksum":
        return whole[: at + 150] + bytes([whole[at + 150] ^ 1]) + whole[at + 151 :]
    if kind == "name":
        return whole[:at] + b"\xff" + whole[at + 1 :]
    if kind == "header of zeros":
        return whole[:at] + bytes(512) + whole[at + 512 :]
    if kind == "a block lost":
        return whole[:at] + whole[at + 512 :]
    if kind == "a block too much":
        return whole[:at] + os.urandom(512) + whole[at:]
    assert kind == "other data at the end"
    return whole.rstrip(b"\0") + bytes(-len(whole.rstrip(b"\0")) % 512) + b"trailer" * 100


@pytest.mark.parametrize(
    "kind", ["checksum", "name", "header of zeros", "a block lost", "a block too much", "other data at the end"]
)
def test_a_damaged_header_in_a_tar_is_an_error_with_its_offset(tmp_path, kind):
    (tmp_path / "pool.tar").write_bytes(damaged(tar_of(*(f"{i:03d}.png" for i in range(40))), kind))
    with pytest.raises(ValueError, match=r"pool\.tar has a damaged header at offset [\d,]+, behind which .* Repair it"):
        remarks_of(tmp_path)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_header_damaged_behind_a_long_name_is_an_error(tmp_path, form):
    names = [f"{'n' * 120}{i}.png" for i in range(9)]
    with tarfile.open(tmp_path / "pool.tar", "w", format=form) as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    whole = bytearray((tmp_path / "pool.tar").read_bytes())
    second = whole.index(b"n" * 90, whole.index(names[4].encode()) + 200)
    whole[second + 150] ^= 1
    (tmp_path / "pool.tar").write_bytes(whole)
    with pytest.raises(ValueError, match="has a damaged header at offset"):
        remarks_of(tmp_path)


@pytest.mark.parametrize("num_zeros", [0, 512, 1024, 20 * 512, 3 << 20])
def test_archives_joined_one_after_another_are_read_on_and_told(tmp_path, num_zeros):
    first, second = tar_of("1.png", "2.png"), tar_of("1.png", "3.png")
    first = first.rstrip(b"\0") + bytes(-len(first.rstrip(b"\0")) % 512 + num_zeros)
    (tmp_path / "pool.tar").write_bytes(first + second + tar_of("4.png"))
    uris, _ = listed(tmp_path / "pool.tar")
    assert names_of(uris) == ["1.png", "2.png", "1.png", "3.png", "4.png"]
    assert len(set(read(uris))) == 5, "each has its bytes"
    warnings = remarks_of(tmp_path / "pool.tar").warnings
    assert len(warnings) == (2 if num_zeros else 1) and all("only zeros from offset" in line for line in warnings)


def test_a_hole_that_swallows_members_is_told(tmp_path):
    whole = bytearray(tar_of(*(f"{i}.png" for i in range(9))))
    whole[3 * 1536 : 5 * 1536] = bytes(2 * 1536)
    (tmp_path / "pool.tar").write_bytes(whole)
    assert len(listed(tmp_path)[0]) == 7
    assert "only zeros from offset 4,608 to 7,680" in remarks_of(tmp_path).warnings[0]


@pytest.mark.parametrize("length", [1536, 1536 + 100, 1536 + 512, 1536 + 600, 2 * 1536 - 10, 3 * 1536])
def test_a_tar_that_is_cut_short_is_told(tmp_path, length):
    (tmp_path / "pool.tar").write_bytes(tar_of("1.png", "2.png", "3.png")[:length])
    assert "is cut short" in remarks_of(tmp_path).warnings[0]


@pytest.mark.parametrize("num_zeros", [512, 1024, 10_240, 1024 + 10_240, 512 + 1024 + 10_240, 1 << 20])
def test_zeros_end_a_tar_unless_members_could_have_been_there(tmp_path, num_zeros):
    members = tar_of("1.png").rstrip(b"\0")
    members += bytes(-len(members) % 512)
    (tmp_path / "pool.tar").write_bytes(members + bytes(num_zeros))
    assert len(remarks_of(tmp_path).warnings) == (num_zeros > 1024 + 10_240)


def test_a_member_whose_name_is_not_utf_8_is_an_error_that_names_its_tar(tmp_path):
    (tmp_path / "pool.tar").write_bytes(tar_of("caf\udce9.png"))
    with pytest.raises(ValueError, match=r"name of a member is not UTF-8.*pool\.tar#caf"):
        remarks_of(tmp_path)


def test_test_files_that_a_pattern_of_folders_matches_are_told(tmp_path):
    for name in ("train/0.parquet", "test/0.parquet"):
        write_parquet(tmp_path / name)
    for pattern in ("*/*.parquet", "t*"):
        assert len(remarks_of(tmp_path / pattern).warnings) == 1, pattern


def test_a_sparse_member_of_a_tar_is_passed_over_and_told(tmp_path):
    header = tarfile.TarInfo("1.png")
    header.type, header.size = tarfile.GNUTYPE_SPARSE, 512
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[386:410] = b"%011o\0%011o\0" % (0, 512)
    block[483:495] = b"%011o\0" % 9000
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    (tmp_path / "pool.tar").write_bytes(bytes(block) + os.urandom(512) + tar_of("2.png"))
    assert names_of(listed(tmp_path)[0]) == ["2.png"]
    assert remarks_of(tmp_path).passed_over == {"sparse files in tars": 1}


MEMBERS = ("0.jpg", "0.seg.png", "1.seg.png", "1.jpg", "2.JPG", "2.json", "a/3.jpg", "b/3.seg.png")


@pytest.mark.parametrize(
    ("column", "expected", "passed_over"),
    [
        ("jpg", ["0.jpg", "1.jpg", "2.JPG", "a/3.jpg"], {".png members": 3, ".json members": 1}),
        ("seg.png", ["0.seg.png", "1.seg.png", "b/3.seg.png"], {".jpg members": 4, ".json members": 1}),
        ("*.png", ["0.seg.png", "1.seg.png", "b/3.seg.png"], {".jpg members": 4, ".json members": 1}),
        ("*", [name for name in MEMBERS if name != "2.json"], {".json members": 1}),
        ("json", ["2.json"], {".jpg members": 4, ".png members": 3}),
    ],
)
def test_image_column_names_the_suffix_in_a_tar(tmp_path, column, expected, passed_over):
    (tmp_path / "pool.tar").write_bytes(tar_of(*MEMBERS))
    assert names_of(listed(tmp_path, PoolColumns(image=column))[0]) == expected
    assert remarks_of(tmp_path, PoolColumns(image=column)).passed_over == passed_over


@pytest.mark.parametrize(
    "names", [MEMBERS, ("0.jpg", "1.jpg", "0.seg.png", "1.seg.png"), ("x/0.jpg", "y/0.jpg", "y/0.seg.png")]
)
def test_several_images_of_one_key_are_refused_with_their_suffixes(tmp_path, names):
    (tmp_path / "pool.tar").write_bytes(tar_of(*names))
    with pytest.raises(ValueError, match=r"has several images.* jpg, seg\.png\. .*pool\.image_column=jpg"):
        listed(tmp_path)


def test_keys_in_different_folders_or_of_one_image_each_are_no_conflict(tmp_path):
    (tmp_path / "pool.tar").write_bytes(tar_of("a/0.jpg", "b/0.png", "1.left.jpg", "2.right.jpg", "3.png", "3.json"))
    assert len(listed(tmp_path)[0]) == 5


def test_a_suffix_that_no_member_has_is_refused_with_what_is_there(tmp_path):
    (tmp_path / "pool.tar").write_bytes(tar_of("0.jpg", "1.jpg"))
    with pytest.raises(
        ValueError, match=r"holds no images that are listed: passed over 2 \.jpg members.*pool\.image_column"
    ):
        remarks_of(tmp_path, PoolColumns(image="png"))

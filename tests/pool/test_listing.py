"""List pools of every format, in order and with labels, and read each uri back."""

import io
import os
import re
import shutil
import tarfile
import tracemalloc
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elfs_ray.pool.images import decode_image
from elfs_ray.pool.listing import PoolColumns, Remarks, count_unit, find_units, list_unit, read_images
from elfs_ray.pool.tar import READ_AHEAD_BYTES
from elfs_ray.storage import filesystem
from tests.pool.reading import listed, read

LABEL = {"folder": "folder", "bytes": "label", "struct": "label", "uri": "label", "webdataset": "cls"}
HARD_NAMES = ["a b", "ünïcödé 猫", "a#b", "a?b=c&d", "100%25", "line\nbreak", "x.tar#y", "it's", "r#row=1"]


def write_files(folder: Path, *names: str) -> None:
    """Write files whose contents are their names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def write_tar(path: Path, members: dict[str, bytes], **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("kind", LABEL)
def test_every_format_lists_the_same_digits_in_order_with_their_labels(digit_pools, kind):
    uris, labels = listed(digit_pools.uris[kind], PoolColumns(label=LABEL[kind]))
    assert [int(label) for label in labels] == digit_pools.labels.tolist()
    for data, digit in zip(read(uris), digit_pools.images, strict=True):
        image = decode_image(data, max_pixels=28 * 28)
        np.testing.assert_array_equal(np.asarray(image), np.repeat(digit[..., None], 3, axis=2))


@pytest.mark.parametrize("kind", LABEL)
def test_labels_are_null_unless_asked_for(digit_pools, kind):
    uris, labels = listed(digit_pools.uris[kind])
    assert len(uris) == 120 and set(labels) == {None}


@pytest.mark.parametrize("kind", LABEL)
def test_a_pool_in_an_object_store_is_read_as_one_on_disk(digit_pools, kind):
    root = f"fsspec+memory://{uuid.uuid4().hex}"
    parent = digit_pools.uris[kind].parent
    for path in parent.rglob("*"):
        if path.is_file():
            filesystem.write_bytes(f"{root}/{path.relative_to(parent)}", path.read_bytes())
    uris, labels = listed(f"{root}/{kind}", PoolColumns(label=LABEL[kind]))
    assert all(uri.startswith(root) for uri in uris)
    local_uris, local_labels = listed(digit_pools.uris[kind], PoolColumns(label=LABEL[kind]))
    assert labels == local_labels and read(uris) == read(local_uris)


@pytest.mark.parametrize("kind", ["bytes", "struct", "webdataset"])
def test_images_are_read_in_any_order_and_more_than_once(digit_pools, kind):
    uris, _ = listed(digit_pools.uris[kind])
    expected = read(uris)
    order = np.random.default_rng(0).integers(0, len(uris), 300)
    assert read([uris[i] for i in order]) == [expected[i] for i in order]


def test_rows_of_a_large_row_group_are_read_in_any_order(tmp_path):
    pq.write_table(pa.table({"image": [b"%d" % row for row in range(3000)]}), tmp_path / "pool.parquet")
    uris, _ = listed(tmp_path / "pool.parquet")
    order = [2999, 3, 1024, 1023, 3, 0, 2048]
    assert read([uris[row] for row in order]) == [b"%d" % row for row in order]


def test_one_file_is_a_pool(digit_pools):
    for kind, name in (("bytes", "train-002.parquet"), ("webdataset", "train-002.tar")):
        uris, _ = listed(digit_pools.uris[kind] / name)
        assert len(uris) == 69


def test_a_benchmark_with_its_test_images_is_no_pool(digit_pools, tmp_path):
    shutil.copytree(digit_pools.uris["bytes"], tmp_path / "digits" / "train")
    shutil.copytree(digit_pools.uris["bytes"], tmp_path / "digits" / "test")
    (tmp_path / "digits" / "dataset.json").write_text("{}")
    with pytest.raises(ValueError, match="training and test images: give its subfolder train"):
        find_units(str(tmp_path / "digits"))
    assert find_units(str(tmp_path / "digits" / "train"))


def test_folders_are_walked_to_any_depth_without_what_is_hidden(tmp_path):
    seen = ["b/deep/er/2.PNG", "b/1.jpeg", "a/_DSC0001.JPG", "a/z.webp", "top.bmp"]
    hidden = [".git/1.png", "a/.thumbs/1.png", "a/_masks/1.png", "a/._z.webp", ".top.png", "a/notes.txt"]
    write_files(tmp_path, *seen, *hidden)
    uris, labels = listed(tmp_path, PoolColumns(label="folder"))
    assert uris == [f"{tmp_path}/{name}" for name in ("top.bmp", *sorted(seen[:-1]))]
    assert labels == [tmp_path.name, "a", "a", "b", "er"]


def test_units_are_the_folders_below_the_first_level_that_has_several(tmp_path):
    write_files(tmp_path, *(f"train/images/class{c}/{i}.png" for c in range(3) for i in range(2)))
    units = find_units(str(tmp_path))
    assert [unit.uri for unit in units] == [f"{tmp_path}/train/images/class{c}" for c in range(3)]


def test_the_order_is_that_of_names_whatever_the_order_of_making(tmp_path):
    names = [f"{folder}/{i}.png" for folder in ("b", "a", "a-b", "B") for i in (10, 9, 1)]
    for number, order in enumerate((names, names[::-1])):
        write_files(tmp_path / str(number), *order)
    first, second = ([os.path.relpath(uri, tmp_path / n) for uri in listed(tmp_path / n)[0]] for n in "01")
    assert first == second == [f"{folder}/{i}.png" for folder in ("B", "a", "a-b", "b") for i in (1, 10, 9)]


def test_an_image_of_any_name_in_any_format_is_found_again(tmp_path):
    members = {f"{name}/{name}.png": name.encode() for name in HARD_NAMES}
    write_files(tmp_path / "folder", *members)
    write_tar(tmp_path / "tars" / "the #1 tar?.tar", members)
    (tmp_path / "parquet").mkdir()
    for name in HARD_NAMES:
        pq.write_table(pa.table({"image": [name.encode()]}), tmp_path / "parquet" / f"{name}.parquet")
    pq.write_table(pa.table({"uri": [f"../folder/{name}" for name in members]}), tmp_path / "uris.parquet")
    for pool in ("folder", "tars", "parquet"):
        uris, _ = listed(tmp_path / pool)
        contents = {data.decode().rpartition("/")[2].removesuffix(".png") for data in read(uris)}
        assert contents == set(HARD_NAMES), pool
        assert len(set(uris)) == len(HARD_NAMES)
    assert len(read(listed(tmp_path / "uris.parquet")[0])) == len(HARD_NAMES)


def test_extensions_in_capitals_are_known(tmp_path):
    write_files(tmp_path / "folder", "A.JPG", "B.Png")
    write_tar(tmp_path / "tars" / "TRAIN.TAR", {"A.JPG": b"in a tar"})
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.table({"image": [b"in a table"]}), tmp_path / "parquet" / "TRAIN.PARQUET")
    assert read(listed(tmp_path / "folder")[0]) == [b"A.JPG", b"B.Png"]
    assert read(listed(tmp_path / "tars")[0]) == [b"in a tar"]
    assert read(listed(tmp_path / "parquet")[0]) == [b"in a table"]


@pytest.mark.parametrize(
    ("uri", "form", "message"),
    [
        ("nowhere", "auto", "does not exist"),
        ("empty", "auto", "extension"),
        ("empty", "folder", "holds no images"),
        ("folder", "parquet", "holds no .parquet files"),
        ("folder", "webdataset", "holds no .tar files"),
        ("folder/1.png", "folder", "give the folder that holds the images"),
        ("folder/notes.txt", "auto", "extension"),
    ],
)
def test_a_pool_with_nothing_to_list_is_refused(tmp_path, uri, form, message):
    (tmp_path / "empty").mkdir()
    write_files(tmp_path / "folder", "1.png", "notes.txt")
    with pytest.raises(ValueError, match=message) as caught:
        find_units(str(tmp_path / uri), form)
    assert str(tmp_path / uri) in str(caught.value)


# Parquet


def test_uris_may_be_relative_absolute_null_or_lead_nowhere(tmp_path):
    write_files(tmp_path, "images/a.png", "b.png")
    pool_uris = [
        "images/a.png",
        None,
        str(tmp_path / "b.png"),
        f"file://{tmp_path}/b.png",
        "gone.png",
        "",
        "ftp://h/x.png",
    ]
    pq.write_table(pa.table({"uri": pool_uris, "label": range(7)}), tmp_path / "pool.parquet")
    uris, labels = listed(tmp_path / "pool.parquet", PoolColumns(label="label"))
    assert labels == list(range(7))
    assert uris[1] == f"{tmp_path}/pool.parquet#row=1", "a null uri keeps its place"
    a, null, b, same_b, gone, nothing, unknown = read(uris)
    assert (a, b, same_b) == (b"images/a.png", b"b.png", b"b.png")
    assert null == "null: the row holds no image"
    assert gone.startswith("cannot be read: ") and "gone.png" in gone
    assert nothing.startswith("cannot be read: ") and unknown.startswith("cannot be read: ")


def test_the_uris_of_a_coreset_make_a_pool(digit_pools, tmp_path):
    for kind in ("bytes", "webdataset"):
        uris, _ = listed(digit_pools.uris[kind])
        chosen = [uris[i] for i in (70, 3, 119, 4, 55)]
        pq.write_table(pa.table({"uri": chosen}), tmp_path / f"{kind}.parquet")
        assert listed(tmp_path / f"{kind}.parquet")[0] == chosen
        assert read(chosen) == [read(uris)[i] for i in (70, 3, 119, 4, 55)]


def test_file_uris_are_read_as_python_spark_and_people_write_them(tmp_path):
    names = ["a b.png", "ü.png", "50%.png", "c%20d.png", "plain.png"]
    write_files(tmp_path, *names)
    paths = [tmp_path / name for name in names]
    for number, form in enumerate(("file:{}", "file://{}", "file://localhost{}")):
        written = [form.format(path) for path in paths]
        escaped = [form.format(path.as_uri().removeprefix("file://")) for path in paths]
        pq.write_table(pa.table({"uri": written + escaped}), tmp_path / f"{number}.parquet")
        uris, _ = listed(tmp_path / f"{number}.parquet")
        assert read(uris) == [name.encode() for name in names] * 2
        structs = [{"bytes": None, "path": uri} for uri in written + escaped]
        pq.write_table(pa.table({"image": structs}), tmp_path / f"structs{number}.parquet")
        assert read(listed(tmp_path / f"structs{number}.parquet")[0]) == [name.encode() for name in names] * 2


def test_a_file_uri_may_name_a_member_or_a_row(tmp_path):
    write_tar(tmp_path / "a%20b.tar", {"x%20y.png": b"in a tar"})
    pq.write_table(pa.table({"image": [b"in a table"]}), tmp_path / "c d.parquet")
    uris = [f"file://{uri}" for name in ("a%20b.tar", "c d.parquet") for uri in listed(tmp_path / name)[0]]
    pq.write_table(pa.table({"uri": uris}), tmp_path / "uris.parquet")
    assert read(listed(tmp_path / "uris.parquet")[0]) == [b"in a tar", b"in a table"]


TEXTS = [pa.string(), pa.large_string(), pa.string_view()]
BYTES = [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(5)]
DICTIONARIES = [pa.dictionary(pa.int8(), kind) for kind in (pa.string(), pa.large_string(), pa.binary())]


@pytest.mark.parametrize("kind", [*TEXTS, *BYTES, *DICTIONARIES], ids=str)
def test_every_type_of_texts_and_bytes_is_read(tmp_path, kind):
    write_files(tmp_path, "a.png", "b.png")
    is_uri = any(kind == text or kind == pa.dictionary(pa.int8(), text) for text in TEXTS)
    values = ["a.png", "b.png", None, "a.png"] if is_uri else [b"a.png", b"b.png", None, b"a.png"]
    plain = pa.array(values, kind.value_type if pa.types.is_dictionary(kind) else kind)
    column = plain.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else plain
    pq.write_table(pa.table({"image": column}), tmp_path / "pool.parquet")
    is_dictionary = pa.types.is_dictionary(pq.read_schema(tmp_path / "pool.parquet").field("image").type)
    assert is_dictionary == pa.types.is_dictionary(kind)
    expected = [b"a.png", b"b.png", "null: the row holds no image", b"a.png"]
    assert read(listed(tmp_path / "pool.parquet")[0]) == expected


def test_labels_may_be_categories_of_integers(tmp_path):
    labels = pa.array([3, None, 5, 3]).dictionary_encode()
    pq.write_table(pa.table({"image": [b"x"] * 4, "y": labels}), tmp_path / "pool.parquet")
    assert listed(tmp_path / "pool.parquet", PoolColumns(label="y"))[1] == [3, None, 5, 3]


@pytest.mark.parametrize("twice", ["image", "y", "z"])
def test_only_a_column_that_is_used_must_have_a_name_of_its_own(tmp_path, twice):
    names = ["image", "y", "z", twice]
    arrays = [pa.array([b"x"]), pa.array([1]), pa.array(["z"]), pa.array([b"twin"])]
    pq.write_table(pa.Table.from_arrays(arrays, names), tmp_path / "pool.parquet")
    if twice == "z":
        uris, labels = listed(tmp_path / "pool.parquet", PoolColumns(label="y"))
        assert read(uris) == [b"x"] and labels == [1]
        return
    with pytest.raises(ValueError, match=rf"pool\.parquet has 2 columns named '{twice}': rename them"):
        listed(tmp_path / "pool.parquet", PoolColumns(label="y"))


def test_a_dotted_name_beside_a_struct_is_not_mistaken_for_it(tmp_path):
    for order in (1, -1):
        columns = [("image.bytes", pa.array([b"flat"])), ("image", pa.array([{"bytes": b"of struct", "path": "p"}]))]
        names, arrays = zip(*columns[::order], strict=True)
        pq.write_table(pa.Table.from_arrays(list(arrays), list(names)), tmp_path / "pool.parquet")
        uris, _ = listed(tmp_path / "pool.parquet")
        for name, data in (("image", b"of struct"), ("image.bytes", b"flat")):
            assert list(read_images(uris, PoolColumns(image=name))) == [data]
        (tmp_path / "pool.parquet").rename(tmp_path / f"{order}.parquet")


ELSEWHERE = {"bytes": None, "path": "/home/else/1.png"}


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "uri",
            ["gone/0.png", "gone/1.png"],
            "none of the first 2 rows of column 'uri' leads to an image: .*gone/0.png does",
        ),
        ("uri", ["http://h/0.png"] * 20, "none of the first 8 rows .*'http://h/0.png' cannot be opened"),
        ("uri", ["x" * 5000], "none of the first 1 rows"),
        (
            "uri",
            pa.array([None, None], pa.string()),
            "none of the first 2 rows of column 'uri' leads to an image: it is null",
        ),
        ("image", pa.array([None, None], pa.binary()), "every row of column 'image' is null"),
        ("image", [ELSEWHERE, ELSEWHERE], "none of the first 2 rows .* /home/else/1.png does not exist"),
        ("uri", ["gone.png", "here.png"], None),
        ("image", [None, b"x"], None),
        ("image", [{"bytes": b"x", "path": "gone.png"}, {"bytes": None, "path": "gone.png"}], None),
        ("image", pa.array([], pa.binary()), None),
    ],
)
def test_a_file_whose_rows_all_fail_alike_is_told_once(tmp_path, name, values, message):
    write_files(tmp_path, "here.png")
    pq.write_table(pa.table({name: values}), tmp_path / "pool.parquet")
    units, remarks = find_units(str(tmp_path / "pool.parquet")), Remarks()
    list_unit(units[0], PoolColumns(), remarks)
    of_count = Remarks()
    count_unit(units[0], PoolColumns(), of_count)
    assert of_count == remarks and len(remarks.warnings) == (message is not None)
    assert message is None or re.search(rf"pool\.parquet: {message}", remarks.warnings[0])


def test_null_images_keep_their_rows(tmp_path):
    structs = pa.array([None, {"bytes": None, "path": None}, {"bytes": b"x", "path": None}])
    for name, values in (("bytes", pa.array([None, None, b"x"])), ("struct", structs)):
        pq.write_table(pa.table({"image": values}), tmp_path / f"{name}.parquet")
        null = "null: the row holds no image"
        assert read(listed(tmp_path / f"{name}.parquet")[0]) == [null, null, b"x"]


@pytest.mark.parametrize(
    ("table", "columns", "message"),
    [
        ({"picture": [b"x"]}, PoolColumns(), r"columns \['picture'\], none named image or uri: set pool.image_column"),
        ({"image": [b"x"]}, PoolColumns(image="img"), "none named img: set pool.image_column"),
        ({"image": [1.5]}, PoolColumns(), "column 'image' is double; it must hold image bytes"),
        ({"image": [{"bytes": [1, 2], "path": "a.png"}]}, PoolColumns(), "column 'image' is struct.*; it must hold"),
        ({"image": [{"path": "a.png"}]}, PoolColumns(), "column 'image' is struct.*; it must hold image bytes"),
        ({"image": [b"x"]}, PoolColumns(label="y"), "none named 'y': set pool.label"),
        ({"image": [b"x"], "y": ["cat"]}, PoolColumns(label="y"), "column 'y' is string; it must hold 32-bit integers"),
        ({"image": [b"x"], "y": [2**40]}, PoolColumns(label="y"), "column 'y' is int64; it must hold 32-bit integers"),
        ({"image": [b"x"], "y": [[1]]}, PoolColumns(label="y"), "column 'y' is list.*; it must hold 32-bit integers"),
    ],
)
def test_a_parquet_file_with_other_columns_is_refused_by_name(tmp_path, table, columns, message):
    path = tmp_path / "pool.parquet"
    pq.write_table(pa.table(table), path)
    with pytest.raises(ValueError, match=message) as caught:
        listed(path, columns)
    assert str(path) in str(caught.value)


def test_a_truncated_parquet_file_is_refused_by_name(digit_pools, tmp_path):
    path = tmp_path / "pool.parquet"
    path.write_bytes((digit_pools.uris["bytes"] / "train-000.parquet").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"pool\.parquet cannot be read as Parquet: .*\. Repair it or move it out"):
        listed(path)


def test_a_broken_page_rejects_only_images_of_its_row_group(tmp_path):
    path = tmp_path / "pool.parquet"
    images = [os.urandom(500) for _ in range(30)]
    pq.write_table(pa.table({"image": images}), path, row_group_size=10, compression="zstd", use_dictionary=False)
    uris, _ = listed(path)
    with open(path, "r+b") as file:
        chunk = pq.read_metadata(path).row_group(1).column(0)
        file.seek(chunk.data_page_offset)
        file.write(b"\xff" * 100)
    results = read(uris)
    assert results[:10] == images[:10] and results[20:] == images[20:]
    assert all("pool.parquet cannot be read in row group 1" in reason for reason in results[10:20])


def test_broken_pages_of_uris_or_labels_are_refused_by_name(tmp_path):
    path = tmp_path / "pool.parquet"
    table = pa.table({"uri": [f"{i}.png" for i in range(1000)], "label": range(1000)})
    for number, name in enumerate(table.column_names):
        pq.write_table(table, path, compression="zstd", use_dictionary=False)
        with open(path, "r+b") as file:
            file.seek(pq.read_metadata(path).row_group(0).column(number).data_page_offset)
            file.write(b"\xff" * 100)
        with pytest.raises(ValueError, match=rf"pool\.parquet: column '{name}' cannot be read"):
            listed(path, PoolColumns(label="label"))


def test_files_changed_after_the_listing_reject_their_images(digit_pools, tmp_path):
    for kind, suffix in (("bytes", "parquet"), ("webdataset", "tar")):
        path = tmp_path / f"pool.{suffix}"
        path.write_bytes((digit_pools.uris[kind] / f"train-002.{suffix}").read_bytes())
        uris, _ = listed(path)
        path.write_bytes((digit_pools.uris[kind] / f"train-001.{suffix}").read_bytes())
        shorter = read(uris)
        assert len(shorter) == 69 and all("has no row" in r or "cut short" in r for r in shorter[20:])
        path.unlink()
        assert all(reason.startswith("cannot be read: ") for reason in read(uris)) and len(read(uris)) == 69


# WebDataset


def test_members_of_a_tar_are_labelled_by_key_and_hidden_ones_skipped(tmp_path):
    write_tar(
        tmp_path / "pool.tar",
        {
            "cat/1.png": b"cat 1",
            "cat/1.cls": b"7",
            "dog/1.cls": b" 12\n",
            "dog/1.png": b"dog 1",
            "./2.left.jpg": b"left",
            "./2.cls": b"3",
            "./2.right.jpg": b"right",
            "3.png": b"no class",
            ".hidden/4.png": b"",
            "__MACOSX/5.png": b"",
            "cat/._1.png": b"",
            "cat/._1.cls": b"\0\5\x16\7",
            "cat/1.txt": b"a cat",
            "_MG_6.png": b"of a camera",
            "long/" + "n" * 300 + ".png": b"long",
        },
    )
    uris, labels = listed(tmp_path / "pool.tar", PoolColumns(image="*", label="cls"))
    assert read(uris) == [b"cat 1", b"dog 1", b"left", b"right", b"no class", b"of a camera", b"long"]
    assert labels == [7, 12, 3, 3, None, None, None]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar_is_read(tmp_path, form):
    members = {f"{'d' * 90}/{i}.png": os.urandom(i) for i in (0, 1, 511, 512, 513, 3000)}
    write_tar(tmp_path / "pool.tar", members, format=form)
    uris, _ = listed(tmp_path / "pool.tar")
    assert read(uris) == list(members.values())


@pytest.mark.parametrize("place", ["disk", "object store"])
def test_a_truncated_tar_rejects_only_its_last_member(tmp_path, place):
    images = [os.urandom(700) for _ in range(3)]
    members = {f"{i}.{kind}": data for i, image in enumerate(images) for kind, data in (("png", image), ("cls", b"11"))}
    write_tar(tmp_path / "whole.tar", members)
    whole = (tmp_path / "whole.tar").read_bytes()
    uri = f"{tmp_path}/cut.tar" if place == "disk" else f"fsspec+memory://{uuid.uuid4().hex}/cut.tar"
    seen = set()
    for length in [*range(512, 9 * 1024, 256), 512 + 700 + 512 + 513]:
        filesystem.write_bytes(uri, whole[:length])
        uris, labels = listed(uri, PoolColumns(label="cls"))
        *complete, last = read(uris)
        assert complete == images[: len(complete)]
        assert last == images[len(complete)] or "cut.tar is cut short: " in last
        assert set(labels) <= {11, None}, "an incomplete .cls member gives no class"
        seen.add((len(uris), isinstance(last, str)))
    assert {(1, True), (1, False), (2, True), (2, False), (3, True), (3, False)} <= seen


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "cannot be read as an uncompressed tar"), (b"PK" * 1000, "cannot be read as an uncompressed tar")],
)
def test_a_file_that_is_not_a_tar_is_refused_by_name(tmp_path, data, message):
    (tmp_path / "pool.tar").write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        listed(tmp_path / "pool.tar")
    assert "pool.tar" in str(caught.value) and "Repair it or move it" in str(caught.value)


def test_a_class_that_is_not_an_integer_is_refused(tmp_path):
    write_tar(tmp_path / "pool.tar", {"1.png": b"x", "1.cls": b"cat"})
    with pytest.raises(ValueError, match=r"pool\.tar: 1\.cls holds 'cat'; it must hold the class as an integer"):
        listed(tmp_path / "pool.tar", PoolColumns(label="cls"))


def test_listing_a_tar_keeps_only_uris_in_memory(tmp_path):
    write_tar(tmp_path / "pool.tar", {f"{number:05d}.png": b"x" for number in range(10_000)})
    (unit,) = find_units(str(tmp_path))
    list_unit(unit, PoolColumns())
    tracemalloc.start()
    assert list_unit(unit, PoolColumns()).num_rows == 10_000
    assert tracemalloc.get_traced_memory()[1] < 2 * READ_AHEAD_BYTES + 10_000 * 400
    tracemalloc.stop()

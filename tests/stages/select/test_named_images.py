"""select.labelled and select.exclude name images by uri or id, in the files that people have."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elfs_ray.stages.select.named_images import read_named_images
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir
from tests.tables import write_embedded

IDS = [5, 17, 400]
URIS = [f"/digits/{i}.png" for i in IDS]
TASKS = [{"id": i, "data": {"image": uri}, "annotations": [{"result": []}]} for i, uri in zip(IDS, URIS, strict=True)]


@pytest.fixture
def run_dir(tmp_path):
    run_dir = RunDir(tmp_path / "run")
    write_embedded(run_dir)
    return run_dir


def write_kind(folder, kind):
    path = folder / f"labelled.{kind.rpartition(' ')[2].rpartition('.')[2]}"
    match kind:
        case "txt":
            path.write_text("".join(f"{uri}\n" for uri in URIS))
        case "edited on Windows.txt":
            path.write_bytes("\ufeff".encode() + "".join(f"{uri}\r\n" for uri in URIS).encode())
        case "csv":
            path.write_text("uri,label\n" + "".join(f"{uri},cat\n" for uri in URIS))
        case "ids in csv":
            path.write_text("sample_id\n5\n17\n400\n400\n")
        case "parquet":
            pq.write_table(pa.table({"uri": URIS, "label": [0, 1, 2]}), path)
        case "ids in parquet":
            pq.write_table(pa.table({"sample_id": IDS[::-1]}), path)
        case "json":
            path.write_text(json.dumps([*TASKS, {"id": 9, "data": {"image": "/digits/9.png"}, "annotations": []}]))
        case "json-min in json":
            path.write_text(
                json.dumps([{"id": 1, "image": f"/data/local-files/?d={uri}", "label": "a"} for uri in URIS])
            )
    return str(path)


@pytest.mark.parametrize(
    "kind",
    ["txt", "edited on Windows.txt", "csv", "ids in csv", "parquet", "ids in parquet", "json", "json-min in json"],
)
def test_every_kind_of_file_names_the_same_images(run_dir, tmp_path, kind):
    np.testing.assert_array_equal(read_named_images("select.labelled", write_kind(tmp_path, kind), run_dir), IDS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "/digits/5.png\n/other/1.png\n", r"/other/1.png. Give uris .*, such as /digits/0.png"),
        ("a.csv", "sample_id\n2000\n", "names sample_id 2000, which is not in the pool: its 1003 samples"),
        ("a.csv", "name\nx\n", r"has columns \['name'\]: it must have sample_id or uri"),
        ("a.csv", "sample_id\nx\n", "cannot be read: .*invalid value 'x'"),
        ("a.json", "{}", "must be a list of tasks"),
        ("a.json", "[", "cannot be read"),
        ("a.json", '[{"id": 3, "data": {"text": "x"}}]', r"the task 3 has no data.image"),
        ("a.parquet", "no", "cannot be read"),
    ],
)
def test_what_names_no_images_of_the_pool_is_refused(run_dir, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_named_images("select.exclude", str(path), run_dir)


@pytest.mark.parametrize("header", ["sample_id", "uri"])
def test_a_csv_with_only_a_header_names_nothing(run_dir, tmp_path, header):
    (tmp_path / "a.csv").write_text(f"{header}\n")
    assert not len(read_named_images("select.labelled", str(tmp_path / "a.csv"), run_dir))


def test_uris_in_a_csv_stay_text(run_dir, tmp_path):
    (tmp_path / "a.csv").write_text("uri\n00012\n")
    with pytest.raises(ValueError, match="not in the pool: 00012"):
        read_named_images("select.labelled", str(tmp_path / "a.csv"), run_dir)


def test_a_line_break_of_unicode_is_part_of_a_uri(tmp_path):
    """Only \n and \\r end a line of coreset.txt; others may be in the name of a file."""
    uri = "/digits/a\u2028b.png"
    index = pa.table([[0], [uri], pa.nulls(1, pa.int32())], schema=schema.INDEX_SCHEMA)
    filesystem.write_table(str(tmp_path / "run" / "index" / schema.range_file(0, 0)), index)
    (tmp_path / "a.txt").write_text(f"{uri}\n")
    assert read_named_images("select.labelled", str(tmp_path / "a.txt"), RunDir(tmp_path / "run")).tolist() == [0]


def test_reading_the_files_of_a_plan_imports_neither_torch_nor_ray():
    code = (
        "import sys, elfs_ray.stages.select.named_images, elfs_ray.stages.cluster.external_labels\n"
        "assert not {'torch', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

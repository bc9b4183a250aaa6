"""Exports hold the images of the coreset in its order, in the format that each tool documents."""

import csv
import io
import json
import math
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from elfs_ray.config import ConfigError
from elfs_ray.handover.export import export
from elfs_ray.handover.formats import FORMATS
from elfs_ray.pool.images import encode_png
from elfs_ray.pool.listing import PoolColumns, read_images
from elfs_ray.stages.select.named_images import read_named_images
from elfs_ray.storage.run_dir import RunDir
from tests.handover.runs import IDS, list_pool, write_coreset, write_run

BY_UPRIGHT_SIZE = {"IMG 1 # a.jpg": (60, 40), "b=2.jpg": (40, 60), "ü.png": (20, 30)}


@pytest.fixture
def photos(tmp_path):
    """Return a folder of three images with odd names; the second one is stored on its side."""
    folder = tmp_path / "my photos"
    folder.mkdir()
    for name in BY_UPRIGHT_SIZE:
        exif = Image.Exif()
        exif[0x0112] = 6 if name == "b=2.jpg" else 1
        Image.new("RGB", (20, 30) if name == "ü.png" else (60, 40), "green").save(folder / name, exif=exif)
    return folder


@pytest.fixture
def run(tmp_path, photos):
    """Return the run directory of a coreset of the photos, the last one first."""
    run_dir = RunDir(tmp_path / "run")
    write_run(run_dir, list_pool(photos), ids=[2, 0, 1])
    return run_dir


@pytest.fixture(params=["folder", "bytes", "struct", "uri", "webdataset"])
def digits(request, digit_pools, tmp_path):
    """Return a run directory on each kind of pool, and the bytes of the coreset's images in order."""
    run_dir = RunDir(tmp_path / "run")
    write_run(run_dir, list_pool(digit_pools.uris[request.param]))
    return run_dir, [encode_png(Image.fromarray(digit_pools.images[i])) for i in IDS]


def ordered_paths(photos):
    return [str(photos / name) for name in ("ü.png", "IMG 1 # a.jpg", "b=2.jpg")]


def read_csv(path):
    return list(csv.DictReader(io.StringIO(Path(path).read_text())))


def members_of(path):
    with tarfile.open(path) as archive:
        return archive.getnames()


def test_label_studio_gets_its_local_files_and_the_metadata(run, photos):
    tasks = json.loads(Path(export(run, "label-studio", root=str(photos.parent))).read_text())
    assert [task["data"]["image"] for task in tasks] == [
        "/data/local-files/?d=my%20photos/%C3%BC.png",
        "/data/local-files/?d=my%20photos/IMG%201%20%23%20a.jpg",
        "/data/local-files/?d=my%20photos/b%3D2.jpg",
    ]
    assert [task["data"]["uri"] for task in tasks] == ordered_paths(photos)
    assert {name: tasks[0]["data"][name] for name in ("sample_id", "rank", "pseudo_label", "score")} == {
        "sample_id": 2,
        "rank": 0,
        "pseudo_label": 2,
        "score": 0.3333,
    }
    similarity = [task["data"].get("similarity") for task in tasks]
    assert similarity[0] is None
    assert similarity[1:] == pytest.approx([math.cos(2 / 3), math.cos(1 / 3)], abs=1e-3)


def test_label_studio_keeps_buckets_and_web_addresses(tmp_path):
    run_dir = RunDir(tmp_path / "run")
    write_run(run_dir, ["s3://bucket/a b.jpg", "/local/c d.jpg", "gs://other/e.jpg"], ids=[1, 2, 0])
    path = export(run_dir, "label-studio", map={"/local": "https://images.example/x"})
    assert [task["data"]["image"] for task in json.loads(Path(path).read_text())] == [
        "https://images.example/x/c%20d.jpg",
        "gs://other/e.jpg",
        "s3://bucket/a b.jpg",
    ]


@pytest.mark.parametrize("kind", ["JSON", "JSON-MIN"])
def test_what_label_studio_exports_names_the_labelled_images(run, tmp_path, photos, kind):
    """It hands back the data of each task, whatever its image is called there."""
    tasks = json.loads(Path(export(run, "label-studio", root=str(photos.parent))).read_text())[:2]
    if kind == "JSON":
        annotated = [{"id": 7 + i, "annotations": [{"result": []}], **task} for i, task in enumerate(tasks)]
    else:
        annotated = [{"id": 7 + i, "choice": "cat", **task["data"]} for i, task in enumerate(tasks)]
    (tmp_path / "labels.json").write_text(json.dumps(annotated))
    assert sorted(read_named_images("select.labelled", str(tmp_path / "labels.json"), run)) == [0, 2]


def test_cvat_gets_names_below_its_share_and_upright_sizes(run, photos):
    lines = [json.loads(line) for line in Path(export(run, "cvat")).read_text().splitlines()]
    assert lines[:2] == [{"version": "1.1"}, {"type": "images"}]
    assert [line["name"] + line["extension"] for line in lines[2:]] == [
        Path(path).name for path in ordered_paths(photos)
    ]
    for line in lines[2:]:
        assert (line["width"], line["height"]) == BY_UPRIGHT_SIZE[line["name"] + line["extension"]]
    assert [line["meta"]["rank"] for line in lines[2:]] == [0, 1, 2]


def test_cvat_names_are_relative_to_root(run, photos, tmp_path):
    path = export(run, "cvat", root=str(tmp_path))
    assert json.loads(Path(path).read_text().splitlines()[2])["name"] == "my photos/ü"


def test_fiftyone_gets_samples_in_order(run, photos):
    folder = Path(export(run, "fiftyone"))
    samples = json.loads((folder / "samples.json").read_text())["samples"]
    assert [sample["filepath"] for sample in samples] == ordered_paths(photos)
    assert samples[1]["pseudo_label"] == {"_cls": "Classification", "label": "0"}
    assert json.loads((folder / "metadata.json").read_text()) == {"name": "run-coreset", "media_type": "image"}


def test_csv_has_the_coreset_and_mapped_images(run, photos):
    assert [row["uri"] for row in read_csv(export(run, "csv"))] == ordered_paths(photos)
    rows = read_csv(export(run, "csv", photos.parent / "mapped.csv", map={str(photos): "s3://bucket/p"}))
    assert [row["image"] for row in rows] == [
        "s3://bucket/p/ü.png",
        "s3://bucket/p/IMG 1 # a.jpg",
        "s3://bucket/p/b=2.jpg",
    ]


def test_copies_have_the_original_bytes_and_sort_in_order(digits):
    run_dir, images = digits
    folder = Path(export(run_dir, "copy"))
    files = sorted(folder.glob("*.png"))
    assert [path.read_bytes() for path in files] == images
    assert [row["file"] for row in read_csv(folder / "coreset.csv")] == [path.name for path in files]
    assert len(list(folder.iterdir())) == len(IDS) + 1


def test_webdataset_has_the_original_bytes_in_order(digits):
    run_dir, images = digits
    with tarfile.open(Path(export(run_dir, "webdataset")) / "coreset-000000.tar") as archive:
        members = [(member.name, archive.extractfile(member).read()) for member in archive]
    assert [name for name, _ in members] == [
        f"{rank:09d}.{suffix}" for rank in range(len(IDS)) for suffix in ("png", "json")
    ]
    assert [data for name, data in members if name.endswith("png")] == images
    assert [json.loads(data)["sample_id"] for name, data in members if name.endswith("json")] == IDS


def test_huggingface_has_the_original_bytes_in_order(digits):
    run_dir, images = digits
    table = pq.read_table(Path(export(run_dir, "huggingface")) / "data" / "train-00000-of-00001.parquet")
    assert [image["bytes"] for image in table["image"].to_pylist()] == images
    assert table["sample_id"].to_pylist() == IDS
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == table.column_names and features["image"] == {"_type": "Image"}
    assert features["score"] == {"dtype": "float32", "_type": "Value"}


def test_more_images_than_a_file_holds_go_into_several(tmp_path, photos, monkeypatch):
    monkeypatch.setattr("elfs_ray.handover.webdataset.IMAGES_PER_SHARD", 2)
    monkeypatch.setattr("elfs_ray.handover.huggingface.IMAGES_PER_FILE", 2)
    monkeypatch.setattr("elfs_ray.handover.huggingface.ROWS_PER_GROUP", 1)
    run_dir = RunDir(tmp_path / "run")
    write_run(run_dir, list_pool(photos), ids=[2, 0, 1])
    tars = sorted(Path(export(run_dir, "webdataset")).iterdir())
    assert [members_of(path)[::2] for path in tars] == [["000000000.png", "000000001.jpg"], ["000000002.jpg"]]
    files = sorted((Path(export(run_dir, "huggingface")) / "data").iterdir())
    assert [path.name for path in files] == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert [pq.read_table(path)["rank"].to_pylist() for path in files] == [[0, 1], [2]]


@pytest.mark.parametrize("to", ["label-studio", "cvat", "fiftyone"])
def test_tools_open_images_inside_tars_by_their_copies(digit_pools, tmp_path, to):
    run_dir = RunDir(tmp_path / "run")
    write_run(run_dir, list_pool(digit_pools.uris["webdataset"]))
    with pytest.raises(ConfigError, match=r"cannot open images inside .*--to copy --out FOLDER first"):
        export(run_dir, to)
    copies = export(run_dir, "copy", tmp_path / "copies")
    path = Path(export(run_dir, to, copies=copies))
    text = (path / "samples.json" if to == "fiftyone" else path).read_text()
    positions = [text.index(file.stem) for file in sorted(Path(copies).glob("*.png"))]
    assert len(positions) == len(IDS) and positions == sorted(positions)


def test_images_of_parquet_files_are_read_by_the_column_of_the_run(tmp_path, digit_pools):
    """Not by the default one, where the file has another column of images."""
    uris = list_pool(digit_pools.uris["bytes"])
    assert next(read_images(uris[:1], PoolColumns("image"))) == encode_png(Image.fromarray(digit_pools.images[0]))
    run_dir = RunDir(tmp_path / "run")
    write_run(run_dir, uris, pool={"pool.image_column": "label"})
    with pytest.raises(ValueError, match="label"):
        export(run_dir, "copy")


def test_coresets_of_later_selections_are_named_as_in_the_run_directory(run, photos):
    write_coreset(RunDir(run.path("coresets", "round2")), list_pool(photos), ids=[1, 0, 2])
    paths = [
        export(run, "csv", photos.parent / f"{i}.csv", coreset=name)
        for i, name in enumerate(["round2", "coresets/round2/"])
    ]
    assert [[row["sample_id"] for row in read_csv(path)] for path in paths] == [["1", "0", "2"]] * 2
    assert export(run, "csv", coreset="round2") == run.path("coresets", "round2", "export", "coreset", "coreset.csv")
    with pytest.raises(ConfigError, match=r"coreset='round3' is not in .*: give one of coreset, coresets/round2$"):
        export(run, "csv", coreset="round3")


def test_a_run_without_clusters_has_no_pseudo_labels(tmp_path, photos):
    run_dir = RunDir(tmp_path / "run")
    write_run(run_dir, list_pool(photos), ids=[2, 0, 1], clusters=False)
    assert "pseudo_label" not in Path(export(run_dir, "label-studio")).read_text()
    assert "pseudo_label" not in (Path(export(run_dir, "fiftyone")) / "samples.json").read_text()


@pytest.mark.parametrize("to", [known.name for known in FORMATS])
def test_an_image_that_is_gone_leaves_nothing_half_written(run, photos, to, tmp_path):
    reads_images = to in ("cvat", "huggingface", "copy", "webdataset")
    (photos / "b=2.jpg").unlink()
    out = tmp_path / "out"
    if reads_images:
        with pytest.raises(ValueError, match=r"b=2.jpg could be read when it was embedded, and cannot be now"):
            export(run, to, out)
    else:
        export(run, to, out)
    assert out.exists() != reads_images


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "labelstudio"}, "to='labelstudio' is no format: give one of label-studio, cvat, "),
        ({"to": "csv", "root": "/x"}, "root='/x' means nothing to csv"),
        ({"to": "copy", "map": {"/a": "/b"}}, "map and copies mean nothing to copy"),
        ({"to": "csv", "map": {"/a": "/b"}}, "no image lies below /a/"),
        ({"to": "cvat", "root": "/a"}, "root='/a' does not hold .*give the folder or bucket"),
        ({"to": "csv", "copies": "/none"}, "copies='/none' is no folder that --to copy has written"),
        ({"to": "fiftyone", "map": {"{photos}": "s3://b"}}, "FiftyOne opens local files, and s3://b/ü.png is none"),
    ],
)
def test_what_cannot_be_exported_is_refused(run, photos, arguments, message):
    if "{photos}" in arguments.get("map", {}):
        arguments = arguments | {"map": {str(photos): "s3://b"}}
    with pytest.raises(ConfigError, match=message):
        export(run, **arguments)


def test_copies_of_another_coreset_are_refused(run, photos, tmp_path):
    write_coreset(RunDir(run.path("coresets", "small")), list_pool(photos), ids=[1, 0])
    copies = export(run, "copy", coreset="small")
    with pytest.raises(ConfigError, match=r"no copies of 1 images, such as .*ü.png"):
        export(run, "label-studio", copies=copies)


def test_a_file_that_exists_is_kept(run):
    path = export(run, "csv")
    before = Path(path).read_bytes()
    with pytest.raises(ConfigError, match=r"coreset.csv exists: delete it, or give another out"):
        export(run, "csv")
    assert Path(path).read_bytes() == before


def test_a_run_that_has_not_selected_yet_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="stage 'select' is not complete"):
        export(tmp_path / "none", "csv")

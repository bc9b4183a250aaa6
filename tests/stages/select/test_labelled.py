"""select.labelled: images that are labelled already cover others and are never chosen again."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elfs_ray.config import ConfigError
from elfs_ray.evaluation.methods import METHODS
from elfs_ray.methods.selection import greedi
from elfs_ray.methods.selection.coverage import facility_location
from elfs_ray.stages.select import STAGE
from elfs_ray.stages.select import run as select
from elfs_ray.stages.select.labelled import read_labelled
from elfs_ray.storage.run_dir import RunDir
from tests.tables import digits_config, embeddings_of, write_embedded

IDS = [5, 17, 400]
URIS = [f"/digits/{i}.png" for i in IDS]
TASKS = [{"id": i, "data": {"image": uri}, "annotations": [{"result": []}]} for i, uri in zip(IDS, URIS, strict=True)]


def write_text(path, uris):
    path.write_text("".join(f"{uri}\n" for uri in uris))
    return f"select.labelled={path}"


def chosen(run_dir, *overrides):
    shutil.rmtree(run_dir.path("coreset"), ignore_errors=True)  # as the pipeline does before it selects again
    select.run_select(digits_config(Path(run_dir.uri), "select.method=coverage", *overrides), run_dir)
    lines = Path(run_dir.path("coreset.txt")).read_text().splitlines()
    return [int(Path(line).stem) for line in lines]


@pytest.fixture
def run_dir(tmp_path):
    run_dir = RunDir(tmp_path / "run")
    write_embedded(run_dir)
    return run_dir


@pytest.mark.parametrize("rows", [130, 20_000])
def test_two_rounds_choose_what_one_would_and_nothing_twice(ray_cluster, run_dir, tmp_path, monkeypatch, rows):
    monkeypatch.setattr(greedi, "PARTITION_ROWS", rows)
    at_once = chosen(run_dir, "budget=40")
    first = at_once[:20]
    second = chosen(run_dir, "budget=20", write_text(tmp_path / "first.txt", [f"/digits/{i}.png" for i in first]))
    assert not set(first) & set(second) and len(set(second)) == 20
    if rows == 20_000:  # the greedy choice goes on where it stopped
        assert second == at_once[20:]


def test_any_labelled_images_cover_and_the_coverage_counts_them(ray_cluster, run_dir, tmp_path):
    ids = run_dir.read_column("embeddings", column="sample_id")
    embeddings = embeddings_of(run_dir)
    labelled = ids[::4]
    config = digits_config(
        tmp_path / "run",
        *("select.method=coverage", "budget=10"),
        write_text(tmp_path / "some.txt", [f"/digits/{i}.png" for i in labelled]),
    )
    coverage = select.run_select(config, run_dir).coresets["coreset"].coverage
    expected = facility_location(embeddings, 10, covered_by=embeddings[::4]).order
    assert run_dir.read_column("coreset", column="sample_id").tolist() == ids[expected].tolist()
    assert coverage["coreset"] > coverage["random"] > 0.9 * coverage["coreset"]


def test_a_budget_above_what_is_left_is_refused(ray_cluster, run_dir, tmp_path):
    ids = run_dir.read_column("embeddings", column="sample_id")
    labelled = write_text(tmp_path / "most.txt", [f"/digits/{i}.png" for i in ids[:-3]])
    assert sorted(chosen(run_dir, "budget=3", labelled)) == ids[-3:].tolist()
    with pytest.raises(ValueError, match=r"budget is 4, but only 3 images are not in select\.labelled"):
        chosen(run_dir, "budget=4", labelled)


def write_kind(folder, kind):
    path = folder / f"labelled.{kind.rpartition(' ')[2]}"
    match kind:
        case "txt":
            write_text(path, URIS)
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


@pytest.mark.parametrize("kind", ["txt", "csv", "ids in csv", "parquet", "ids in parquet", "json", "json-min in json"])
def test_every_kind_of_file_names_the_same_images(run_dir, tmp_path, kind):
    np.testing.assert_array_equal(read_labelled(write_kind(tmp_path, kind), run_dir), IDS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "/digits/5.png\n/other/1.png\n", r"names 1 images that are not in the pool: /other/1.png"),
        ("a.csv", "sample_id\n2000\n", "names sample_id 2000, which is not in the pool: its 1003 samples"),
        ("a.csv", "name\nx\n", r"has columns \['name'\]: it must have sample_id or uri"),
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
        read_labelled(str(path), run_dir)


def test_other_methods_refuse_it(tmp_path):
    with pytest.raises(ConfigError, match=r"select\.labelled with select\.method=double_end"):
        digits_config(tmp_path, "select.labelled=/x")


def test_baselines_of_a_run_with_labelled_images_do_not_know_them(tmp_path):
    run = ("select.method=auto", "select.labelled=/x")
    for name in ("random", "d2", "aum_hardest"):
        keys = METHODS[name].select_keys
        assert digits_config(tmp_path, *run, *keys, "cluster.num_neighbors=10").select.labelled is None


def test_a_budget_above_what_is_left_is_refused_before_images_are_read(run_dir, tmp_path):
    labelled = write_text(tmp_path / "most.txt", [f"/digits/{i}.png" for i in range(1000)])
    for budget in ("3", "0.002"):
        STAGE.check_listed(digits_config(tmp_path, "select.method=auto", labelled, f"budget={budget}"), run_dir)
    for budget in ("4", "[1,0.004]", "1.0"):
        with pytest.raises(
            ConfigError, match=r"but only 3 are not in select\.labelled='.*/most\.txt' yet: give a smal"
        ):
            STAGE.check_listed(digits_config(tmp_path, "select.method=auto", labelled, f"budget={budget}"), run_dir)

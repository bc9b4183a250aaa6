"""Near-duplicates of a pool are listed with the image that stands for each, and are never chosen."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from elfs_ray.cli import closing_lines
from elfs_ray.config import Config, ConfigError, load_config
from elfs_ray.pipeline import reselect, rewrite_report
from elfs_ray.pipeline.runner import run
from elfs_ray.pipeline.stages import stages_of
from elfs_ray.stages import cluster
from elfs_ray.stages.duplicates import STAGE
from elfs_ray.stages.duplicates.run import run_duplicates
from elfs_ray.stages.neighbors.run import run_neighbors
from elfs_ray.stages.select.left_out import find_left_out
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir
from tests.methods.test_near_duplicates import one_by_one
from tests.tables import digit_images, digits_config, embeddings_of, mark, png, write_embedded

PAIRS = {3: 20, 8: 21, 15: 22}  # the digits that are in the pool twice: the first number is the lower id


def config_of(folder: Path, *more: str) -> Config:
    return load_config(
        None,
        [
            *(f"pool.uri={folder / 'pool'}", f"run_dir={folder / 'run'}", "budget=5", "ray_address=local"),
            *("embed.encoder=pixels", "embed.image_size=8", "embed.num_workers=1", "embed.proxy_image_size=8"),
            *("select.method=coverage", "cluster.num_clusters=auto", "duplicates.threshold=0.999"),
            *(f"select.exclude={folder / 'bad.txt'}", *more),
        ],
    )


@pytest.fixture(scope="module")
def finished(ray_cluster, tmp_path_factory):
    """Return a folder with a pool of 23 digits, of which three are copies, and a complete run of it."""
    folder = tmp_path_factory.mktemp("twice")
    (folder / "pool").mkdir()
    images, _ = digit_images(20)
    for number in range(20):
        (folder / "pool" / f"{number:03d}.png").write_bytes(png(images[number]))
    for original, copy in PAIRS.items():
        shutil.copy(folder / "pool" / f"{original:03d}.png", folder / "pool" / f"{copy:03d}.png")
    (folder / "bad.txt").write_text(f"{folder}/pool/001.png\n")
    run(config_of(folder))
    return folder


def test_copies_are_listed_shown_and_not_chosen(finished):
    run_dir = RunDir(finished / "run")
    rows = pa.concat_tables(run_dir.read_table(schema.DUPLICATES)).to_pydict()
    assert rows == {
        "sample_id": [20, 21, 22],
        "representative": [3, 8, 15],
        "similarity": [pytest.approx(1, abs=1e-3)] * 3,
    }
    assert not set(run_dir.read_column(schema.CORESET, column="sample_id").tolist()) & {1, 20, 21, 22}
    lines = closing_lines(config_of(finished), run_dir)
    assert f"left out 3 near-duplicates of 3 images, listed in {run_dir.path('duplicates')}" in lines
    counts = json.loads((finished / "run" / "metrics.json").read_text())["counts"]
    assert [counts[kind] for kind in ("excluded", "near_duplicates", "coreset", "not_sampled")] == [1, 3, 5, 14]
    page = (finished / "run" / "report.html").read_text()
    assert "3 images are almost copies of 3 others" in page and page.count("<figure>\n<img") == 3


def test_a_later_round_knows_the_copies_of_labelled_images(finished):
    """Image 3 is labelled through its copy."""
    (finished / "labelled.txt").write_text(f"{finished}/pool/020.png\n")
    keys = (f"run_dir={finished / 'run'}", "name=rest", "budget=18", f"select.labelled={finished / 'labelled.txt'}")
    reselect.run(*reselect.load(keys))
    chosen = RunDir(finished / "run" / "coresets" / "rest").read_column("coreset", column="sample_id")
    assert sorted(chosen) == [i for i in range(20) if i not in (1, 3)]


def test_the_report_can_be_written_again(finished):
    config = rewrite_report.load([f"run_dir={finished / 'run'}"])
    assert (config.duplicates.threshold, config.select.exclude) == (0.999, str(finished / "bad.txt"))


def test_a_budget_that_only_copies_could_fill_is_refused(finished):
    run_dir = RunDir(finished / "run")
    STAGE.check_result(config_of(finished, "budget=20"), run_dir)
    with pytest.raises(ConfigError, match="budget=21 of 23 samples, of which 3 are near-duplicates of others"):
        STAGE.check_result(config_of(finished, "budget=21"), run_dir)


@pytest.mark.parametrize(("samples_per_task", "max_tasks"), [(30, 256), (30, 2), (65_536, 256)])
def test_groups_are_those_of_comparing_all_images(ray_cluster, tmp_path, monkeypatch, samples_per_task, max_tasks):
    monkeypatch.setattr("elfs_ray.stages.duplicates.run.SAMPLES_PER_TASK", samples_per_task)
    monkeypatch.setattr("elfs_ray.stages.duplicates.run.MAX_TASKS", max_tasks)
    run_dir = RunDir(tmp_path)
    ids = write_embedded(run_dir)
    config = digits_config(tmp_path, "duplicates.threshold=0.97")
    mark(run_dir, run_neighbors(config, run_dir))
    result = run_duplicates(config, run_dir)
    chosen, similarity = map(np.array, one_by_one(embeddings_of(run_dir), 0.97))
    copies = np.flatnonzero(chosen != np.arange(len(ids)))
    rows = pa.concat_tables(run_dir.read_table(schema.DUPLICATES))
    assert rows["sample_id"].to_pylist() == ids[copies].tolist()
    assert rows["representative"].to_pylist() == ids[chosen[copies]].tolist()
    np.testing.assert_allclose(rows["similarity"], similarity[copies], atol=1e-6)
    assert (result.rows, result.representatives) == (len(copies), len(np.unique(chosen[copies]))) and result.rows > 30
    assert result.examples[0][2] == pytest.approx(similarity[copies].min(), abs=1e-6)


def test_near_duplicates_of_labelled_and_excluded_images_are_left_out(ray_cluster, tmp_path):
    run_dir = RunDir(tmp_path / "run")
    write_embedded(run_dir, 100)
    groups = pa.table([[11, 12, 30, 51], [10, 10, 5, 50], [0.97] * 4], schema=schema.DUPLICATES_SCHEMA)
    filesystem.write_table(run_dir.path(schema.DUPLICATES, schema.range_file(0, 99)), groups)
    near = np.full((100, 1), 99)  # 70 is a neighbour of 12 and 60 of 80, in other groups; 81 is too far from 60
    near[[12, 80, 81], 0] = 70, 60, 60
    cosines = np.where(np.isin(np.arange(100), [12, 80]), 0.965, 0.9).astype(np.float32)[:, None]
    table = [np.arange(100), schema.matrix_column(near), schema.matrix_column(cosines)]
    path = run_dir.path(schema.NEIGHBORS, schema.range_file(0, 99))
    filesystem.write_table(path, pa.table(table, schema=schema.neighbors_schema(1)))
    (tmp_path / "labelled.csv").write_text("sample_id\n12\n60\n3\n")  # 3 could not be embedded
    (tmp_path / "bad.csv").write_text("sample_id\n5\n60\n")
    files = (f"select.labelled={tmp_path / 'labelled.csv'}", f"select.exclude={tmp_path / 'bad.csv'}")
    left_out = find_left_out(digits_config(tmp_path / "run", "duplicates.threshold=0.96", *files), run_dir)
    expected = {"labelled": [12, 60], "excluded": [5], "gone": [], "near_duplicates": [10, 11, 30, 51, 70, 80]}
    assert {name: ids.tolist() for name, ids in left_out._asdict().items()} == expected
    assert left_out.describe() == "2 labelled, 1 excluded, 6 near-duplicates of others"


def test_another_encoder_is_told_that_the_threshold_was_not_measured_for_it(tmp_path):
    config = digits_config(tmp_path, "duplicates.threshold=0.93")
    assert "duplicates.threshold=0.93 with pixels: similarities differ" in STAGE.advice(config, None)[0]


def test_duplicates_need_neighbours_but_clusters_do_not_depend_on_them(tmp_path):
    on, off = digits_config(tmp_path, "duplicates.threshold=0.93"), digits_config(tmp_path)
    assert {stage.name for stage in stages_of(on)} - {stage.name for stage in stages_of(off)} == {
        "neighbors",
        "duplicates",
    }
    assert cluster.STAGE.inputs(on) == cluster.STAGE.inputs(off)

"""Coverage over files, of the whole pool and inside pseudo-classes: the same for any number of workers."""

import dataclasses
import os
import signal
from itertools import pairwise

import numpy as np
import pytest

import elfs_ray
from elfs_ray.methods.selection import greedi, pruning
from elfs_ray.methods.selection.coverage import SIMILARITY_ONE, facility_location, highest_similarity
from elfs_ray.runtime import tasks
from elfs_ray.stages.cluster import ClusterResult
from elfs_ray.stages.select import coverage
from elfs_ray.stages.select import run as select
from elfs_ray.stages.select.parts import slices_of
from elfs_ray.storage import filesystem
from elfs_ray.storage.run_dir import RunDir
from tests.tables import (
    around_mean,
    contents,
    digit_images,
    digits_config,
    embeddings_of,
    mark,
    write_clustered,
    write_embedded,
)

COVERAGE = ("select.method=coverage",)


def read(run_dir, table):
    rows = [filesystem.read_table(path) for path in run_dir.table_files(table)]
    return {name: np.concatenate([part[name].to_numpy() for part in rows]) for name in rows[0].column_names}


def test_parts_are_cut_from_the_files_that_hold_them():
    sizes = [3, 0, 5, 1, 4]
    files, labels = [(f"{number}", size) for number, size in enumerate(sizes)], list("abcde")
    rows = [(path, row, label) for (path, size), label in zip(files, labels, strict=True) for row in range(size)]
    for ends in ([0, 13], [0, 2, 3, 9, 13], [0, 8, 12, 13]):
        parts = [range(first, end) for first, end in pairwise(ends)]
        for part, slices in zip(parts, slices_of(files, labels, parts), strict=True):
            cut = [(piece.path, row, piece.labels) for piece in slices for row in range(piece.first, piece.end)]
            assert cut == rows[part.start : part.stop]


def test_the_coreset_is_the_greedy_selection_in_its_order(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(select, "IDS_PER_FILE", 300)
    run_dir = RunDir(tmp_path)
    ids = write_embedded(run_dir)
    result = select.run_select(digits_config(tmp_path, *COVERAGE, "budget=[50,7]"), run_dir)
    embeddings = embeddings_of(run_dir)
    centred = around_mean(embeddings)
    expected = facility_location(centred, 50)
    for table, budget in (("coreset", 50), ("coreset-7", 7)):
        rows = read(run_dir, table)
        np.testing.assert_array_equal(rows["sample_id"], ids[expected.order[:budget]])
        np.testing.assert_array_equal(rows["rank"], np.arange(budget))
        np.testing.assert_allclose(rows["score"], expected.gains[:budget] / SIMILARITY_ONE, rtol=1e-6)
        assert np.isnan(rows["pseudo_label"]).all()
        lines = (tmp_path / f"{table}.txt").read_text().splitlines()
        assert lines == [f"/digits/{i}.png" for i in rows["sample_id"]]
        random = centred[pruning.random_selection(ids, budget, seed=0)]
        coverage = result.coresets[table].coverage
        for name, chosen in (("coreset", centred[expected.order[:budget]]), ("random", random)):
            assert coverage[name] == pytest.approx(highest_similarity(centred, chosen).mean() / SIMILARITY_ONE)
        assert_equal_in_memory(elfs_ray.select(embeddings, budget, ids=ids), rows, coverage)
    assert not (tmp_path / "scores").exists()


def test_a_pool_that_has_clusters_passes_their_labels_on(ray_cluster, tmp_path):
    run_dir = RunDir(tmp_path)
    write_clustered(run_dir)
    select.run_select(digits_config(tmp_path, *COVERAGE, "budget=30"), run_dir)
    rows = read(run_dir, "coreset")
    np.testing.assert_array_equal(rows["pseudo_label"], digit_images(1003)[1][rows["sample_id"]])


def assert_equal_in_memory(selection, rows, coverage):
    """Check that `elfs_ray.select` chose what the stage did: the same samples, in the same order."""
    np.testing.assert_array_equal(selection.ids, rows["sample_id"])
    np.testing.assert_array_equal(selection.scores, rows["score"])
    assert (selection.coverage, selection.random_coverage) == (coverage["coreset"], coverage["random"])


def write_clusters(run_dir, right):
    ids = write_clustered(run_dir)
    trust = {"neighbor_purity": 1.0, "agreement": right, "right": right}
    mark(run_dir, dataclasses.replace(ClusterResult.read(run_dir), trust=trust))
    return ids


@pytest.mark.parametrize(
    ("right", "place"), [(0.9, "each pseudo-class, then the whole pool"), (0.3, "the whole pool:")]
)
def test_auto_covers_classes_first_if_labels_look_right(ray_cluster, tmp_path, capsys, right, place):
    run_dir = RunDir(tmp_path)
    ids = write_clusters(run_dir, right)
    result = select.run_select(digits_config(tmp_path, "select.method=auto", "budget=40"), run_dir)
    embeddings, groups = embeddings_of(run_dir), digit_images(1003)[1][ids] if right > 0.5 else None
    first = [] if groups is None else facility_location(embeddings, 10, groups=groups).order
    whole = around_mean(embeddings)
    rest = facility_location(whole, 40, covered_by=whole[first] if len(first) else None).order
    expected = [*first, *rest[~np.isin(rest, first)]][:40]
    np.testing.assert_array_equal(read(run_dir, "coreset")["sample_id"], ids[expected])
    coverage = result.coresets["coreset"].coverage
    assert coverage["random"] < coverage["coreset"]
    assert f"covering {place}" in "".join(capsys.readouterr())
    selection = elfs_ray.select(embeddings_of(run_dir), 40, ids=ids, pseudo_labels=groups)
    assert_equal_in_memory(selection, read(run_dir, "coreset"), coverage)
    assert selection.classes_first == (right > 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["coverage", "auto"])
def test_the_number_of_workers_and_a_killed_one_change_nothing(ray_cluster, tmp_path, monkeypatch, method):
    monkeypatch.setattr(greedi, "PARTITION_ROWS", 130)
    monkeypatch.setattr(greedi, "SAMPLE_ROWS", 600)
    run_dir = RunDir(tmp_path / "run")
    write_clusters(run_dir, right=0.9)
    config = digits_config(tmp_path / "run", f"select.method={method}", "budget=200")
    nominate, killed = coverage._nominate, tmp_path / "killed"

    def die_once(part, *arguments):
        if part.slices[0].path.endswith("000000000300-000000000449.parquet") and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return nominate(part, *arguments)

    outcomes = set()
    for num_workers in (1, 2, 3, 7, "killed"):
        if num_workers == "killed":
            monkeypatch.setattr(coverage, "_nominate", die_once)
        else:
            monkeypatch.setattr(tasks, "num_cpus", lambda count=num_workers: count)
        select.run_select(config, run_dir)
        files = contents(tmp_path / "run", "coreset", "select") | {"text": (tmp_path / "run/coreset.txt").read_bytes()}
        outcomes.add(tuple(sorted(files.items())))
    assert killed.exists()
    assert len(outcomes) == 1


@pytest.mark.parametrize("rows", [130, 20_000])
def test_a_budget_of_the_whole_pool_selects_everything(ray_cluster, tmp_path, monkeypatch, rows):
    monkeypatch.setattr(greedi, "PARTITION_ROWS", rows)
    monkeypatch.setattr(greedi, "SAMPLE_ROWS", 600)
    run_dir = RunDir(tmp_path)
    ids = write_embedded(run_dir)
    result = select.run_select(digits_config(tmp_path, *COVERAGE, "budget=1.0"), run_dir)
    rows = read(run_dir, "coreset")
    np.testing.assert_array_equal(np.sort(rows["sample_id"]), ids)
    coverage = result.coresets["coreset"].coverage
    assert_equal_in_memory(elfs_ray.select(embeddings_of(run_dir), 1.0, ids=ids), rows, coverage)


def test_a_pool_of_one_image_is_its_own_coreset(ray_cluster, tmp_path):
    run_dir = RunDir(tmp_path)
    write_embedded(run_dir, 1)
    result = select.run_select(digits_config(tmp_path, *COVERAGE, "budget=1"), run_dir)
    assert read(run_dir, "coreset")["sample_id"].tolist() == [0]
    assert result.coresets["coreset"].coverage["coreset"] == pytest.approx(1, abs=1e-3)


def test_random_needs_embeddings_alone_and_every_prefix_is_a_random_sample(ray_cluster, tmp_path):
    run_dir = RunDir(tmp_path)
    ids = write_embedded(run_dir)
    select.run_select(digits_config(tmp_path, "select.method=random", "budget=60", "seed=5"), run_dir)
    rows = read(run_dir, "coreset")
    np.testing.assert_array_equal(rows["sample_id"], ids[pruning.random_selection(ids, 60, seed=5)])
    assert (np.diff(rows["score"]) >= 0).all()

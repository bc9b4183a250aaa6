"""Labelled images cover others and are never chosen again; excluded ones are neither chosen nor covered."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from elfs_ray.config import ConfigError
from elfs_ray.evaluation.methods import METHODS
from elfs_ray.methods.selection import greedi
from elfs_ray.methods.selection.coverage import facility_location
from elfs_ray.stages.select import STAGE, hard_fraction
from elfs_ray.stages.select import run as select
from elfs_ray.stages.select.left_out import heirs_of
from elfs_ray.storage.run_dir import RunDir
from tests.tables import around_mean, digits_config, embeddings_of, write_embedded, write_trained


def names(path: Path, ids) -> Path:
    path.write_text("".join(f"/digits/{i}.png\n" for i in ids))
    return path


def chosen(run_dir: RunDir, *overrides: str) -> list[int]:
    shutil.rmtree(run_dir.path("coreset"), ignore_errors=True)  # as the pipeline does before it selects again
    select.run_select(digits_config(Path(run_dir.uri), *overrides), run_dir)
    lines = Path(run_dir.path("coreset.txt")).read_text().splitlines()
    return [int(Path(line).stem) for line in lines]


@pytest.fixture
def run_dir(tmp_path):
    run_dir = RunDir(tmp_path / "run")
    write_embedded(run_dir)
    return run_dir


@pytest.mark.parametrize("rows", [130, 20_000])
def test_two_rounds_choose_what_one_would_and_nothing_twice(run_dir, tmp_path, monkeypatch, rows):
    monkeypatch.setattr(greedi, "PARTITION_ROWS", rows)
    at_once = chosen(run_dir, "select.method=coverage", "budget=40")
    labelled = names(tmp_path / "first.txt", at_once[:20])
    second = chosen(run_dir, "select.method=coverage", "budget=20", f"select.labelled={labelled}")
    assert not set(at_once[:20]) & set(second) and len(set(second)) == 20
    if rows == 20_000:  # the greedy choice goes on where it stopped
        assert second == at_once[20:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run_dir = RunDir(tmp_path_factory.mktemp("trained"))
    write_trained(run_dir)
    return run_dir


GOES_ON = ("random", "double_end", "double_end select.balance=true", "hardest")
SLOW = ("easiest", "double_end select.hard_fraction=auto", "prototypicality", "zcore select.zcore_draws=1000")
RESAMPLE = ("stratified", "dual_beta", "auto select.exclude={excluded}")


@pytest.mark.parametrize(
    "method", [*GOES_ON[:2], *(pytest.param(each, marks=pytest.mark.slow) for each in GOES_ON[2:] + SLOW + RESAMPLE)]
)
def test_no_method_chooses_what_is_labelled_or_excluded(trained, tmp_path, method):
    excluded = names(tmp_path / "excluded.txt", [0, 1])
    keys = f"select.method={method}".format(excluded=excluded).split()
    at_once, first = (chosen(trained, *keys, f"budget={budget}") for budget in (100, 50))
    labelled = names(tmp_path / "first.txt", first)
    second = chosen(trained, *keys, "budget=50", f"select.labelled={labelled}")
    assert not set(first) & set(second) and len(set(second)) == 50
    if method in GOES_ON:
        assert set(first) | set(second) == set(at_once)


def test_the_hard_fraction_is_one_of_the_whole_pool(trained, tmp_path):
    scores = pa.concat_tables(trained.read_table("scores")).sort_by([("aum", "ascending"), ("sample_id", "ascending")])
    by_hardness = scores["sample_id"].to_numpy()
    excluded = names(tmp_path / "hard.txt", by_hardness[:200:2])
    kept = chosen(trained, "select.hard_fraction=0.15", "budget=30", f"select.exclude={excluded}")
    left = by_hardness[150:][~np.isin(by_hardness[150:], by_hardness[:200:2])]
    assert kept == left[:30].tolist()


def test_any_labelled_images_cover_and_the_coverage_counts_them(run_dir, tmp_path):
    ids, embeddings = run_dir.read_column("embeddings", column="sample_id"), embeddings_of(run_dir)
    labelled = names(tmp_path / "some.txt", ids[::4])
    config = digits_config(tmp_path / "run", "select.method=coverage", "budget=10", f"select.labelled={labelled}")
    coverage = select.run_select(config, run_dir).coresets["coreset"].coverage
    expected = facility_location(around_mean(embeddings), 10, covered_by=around_mean(embeddings)[::4]).order
    assert run_dir.read_column("coreset", column="sample_id").tolist() == ids[expected].tolist()
    assert coverage["coreset"] > coverage["random"] > 0.9 * coverage["coreset"]


@pytest.mark.parametrize("rows", [130, 20_000])
def test_excluded_images_need_not_be_covered(run_dir, tmp_path, monkeypatch, rows):
    """The first of them are a whole partition."""
    monkeypatch.setattr(greedi, "PARTITION_ROWS", rows)
    ids, embeddings = run_dir.read_column("embeddings", column="sample_id"), embeddings_of(run_dir)
    keys = f"select.exclude={names(tmp_path / 'bad.txt', ids[:300])}"
    config = digits_config(tmp_path / "run", "select.method=coverage", "budget=10", keys)
    result = select.run_select(config, run_dir)
    kept = run_dir.read_column("coreset", column="sample_id")
    assert result.left_out == {"excluded": 300} and result.samples == len(ids) - 300
    assert kept.min() >= ids[300]
    if rows == 20_000:
        assert kept.tolist() == ids[300:][facility_location(around_mean(embeddings[300:]), 10).order].tolist()


def test_a_budget_above_what_is_left_is_refused(run_dir, tmp_path):
    ids = run_dir.read_column("embeddings", column="sample_id")
    keys = (f"select.labelled={names(tmp_path / 'most.txt', ids[:-5])}",)
    keys += (f"select.exclude={names(tmp_path / 'bad.txt', ids[-5:-3])}",)
    assert sorted(chosen(run_dir, "select.method=random", "budget=3", *keys)) == ids[-3:].tolist()
    with pytest.raises(ValueError, match=r"budget is 4 images, but only 3 of 1,000 may be chosen \(995 labelled, 2"):
        chosen(run_dir, "select.method=random", "budget=4", *keys)


def test_baselines_of_a_run_with_labelled_images_do_not_know_them(tmp_path):
    run = ("select.method=auto", "select.labelled=/x", "select.exclude=/y")
    for name in ("random", "d2", "aum_hardest"):
        keys = METHODS[name].select_keys
        select_keys = digits_config(tmp_path, *run, *keys, "cluster.num_neighbors=10").select
        assert (select_keys.labelled, select_keys.exclude) == (None, None)


def test_a_budget_above_what_is_left_is_refused_before_images_are_read(run_dir, tmp_path):
    keys = ("select.method=auto", f"select.labelled={names(tmp_path / 'most.txt', range(998))}")
    keys += (f"select.exclude={names(tmp_path / 'bad.txt', range(990, 1000))}",)
    for budget in ("3", "0.002"):
        STAGE.check_listed(digits_config(tmp_path, *keys, f"budget={budget}"), run_dir)
    for budget in ("4", "[1,0.004]", "1.0"):
        with pytest.raises(ConfigError, match=r"but only 3 are not in select\.labelled='.*/most\.txt' or select\.excl"):
            STAGE.check_listed(digits_config(tmp_path, *keys, f"budget={budget}"), run_dir)


def test_a_file_that_changes_under_its_path_makes_another_selection(tmp_path):
    labelled = names(tmp_path / "labelled.txt", [1])
    config = digits_config(tmp_path, "select.method=auto", f"select.labelled={labelled}")
    before = STAGE.deciding_config(config)
    assert STAGE.deciding_config(config) == before
    names(labelled, [2])
    after = STAGE.deciding_config(config)
    assert [key for key in after if after[key] != before[key]] == ["select.labelled.sha256"]
    labelled.unlink()
    with pytest.raises(ConfigError, match=r"select\.labelled='.*labelled\.txt' does not exist"):
        STAGE.deciding_config(config)


def test_without_an_exclude_list_an_older_selection_stays_the_same(tmp_path):
    assert not [key for key in STAGE.deciding_config(digits_config(tmp_path)) if "exclude" in key]


def test_the_first_of_a_group_that_is_left_takes_the_place_of_one_that_is_gone():
    ids, representatives = np.array([9, 4, 5, 7]), np.array([1, 1, 1, 6])
    assert heirs_of(ids, representatives, np.array([1, 4])).tolist() == [5]
    assert heirs_of(ids, representatives, np.array([4, 5])).tolist() == []
    assert heirs_of(ids, representatives, np.array([1, 6])).tolist() == [4, 7]


def test_a_file_whose_images_are_all_gone_does_not_end_the_search_for_beta():
    files = {"some": np.array([3.0, -1.0]), "none": np.empty(0)}
    pool = SimpleNamespace(read=lambda path: SimpleNamespace(scores=files[path]))
    assert hard_fraction._score_range(pool, ["some", "none"]) == (-1.0, 3.0)

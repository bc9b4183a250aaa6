"""The search for the hard fraction, on real images with wrong pseudo-labels for the hardest."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from elfs_ray.stages.select import SelectResult
from elfs_ray.stages.select.run import run_select
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir
from tests.tables import contents, digits_config, write_trained

SETTINGS = ("select.search_step=0.3", "select.search_iterations=60", "select.search_holdout=0.2", "train.batch_size=32")
WRONG = 0.45  # share of the pool, from the hard end, whose pseudo-labels are made wrong


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory) -> RunDir:
    run_dir = RunDir(tmp_path_factory.mktemp("spoiled"))
    records = write_trained(run_dir)
    aum = (records["target_prob"] - records["max_other_prob"]).sum(0)
    wrong = records["sample_id"][np.argsort(aum)[: int(WRONG * aum.size)]]
    for path in run_dir.table_files(schema.CLUSTERS, schema.PSEUDO_LABELS_DIR):
        rows = filesystem.read_table(path)
        ids, labels = rows["sample_id"].to_numpy(), rows["pseudo_label"].to_numpy()
        labels = np.where(np.isin(ids, wrong), (labels + 1 + ids % 9) % 10, labels).astype(np.int32)
        filesystem.write_table(path, rows.set_column(1, rows.schema.field(1), pa.array(labels)))
    return run_dir


@pytest.fixture(scope="module")
def searched(spoiled) -> SelectResult:
    """Return the result of a search for two budgets."""
    config = digits_config(spoiled.uri, "budget=[0.2,0.4]", "select.hard_fraction=search", *SETTINGS)
    return run_select(config, spoiled)


@pytest.mark.slow
def test_the_hard_fraction_that_drops_the_wrong_pseudo_labels_is_found(searched):
    first, second = searched.coresets.values()
    assert [trial["hard_fraction"] for trial in first.hard_fraction_evidence["trials"]] == [0.0, 0.3, 0.6]
    assert [trial["hard_fraction"] for trial in second.hard_fraction_evidence["trials"]] == [0.0, 0.3, 0.6]
    for coreset in (first, second):
        evidence = coreset.hard_fraction_evidence
        accuracies = {trial["hard_fraction"]: trial["accuracy"] for trial in evidence["trials"]}
        assert evidence["found_by"] == "search" and 150 < evidence["held_out"] < 250
        assert coreset.hard_fraction == max(accuracies, key=accuracies.__getitem__) == 0.6
        assert accuracies[0.6] > accuracies[0.0] + 0.2


@pytest.mark.slow
def test_the_coreset_is_that_of_the_hard_fraction_as_a_number(spoiled, searched):
    folder = Path(spoiled.uri)
    searched_for = contents(folder, "coreset", "coreset-0.4")
    fixed = digits_config(spoiled.uri, "budget=[0.2,0.4]", "select.hard_fraction=0.6")
    run_select(fixed, spoiled)
    assert contents(folder, "coreset", "coreset-0.4") == searched_for


@pytest.mark.slow
def test_no_training_is_repeated_and_another_search_uses_none_of_them(spoiled, searched):
    folder = spoiled.path("select", "search")
    (identity,) = filesystem.list_dirs(folder)
    trials = filesystem.list_files(f"{folder}/{identity.base_name}")
    assert len(trials) == 6
    for trial in trials:
        kept = 200 if trial.base_name.startswith("200-") else 400
        accuracy = 0.99 if trial.base_name == f"{kept}-0.3.json" else 0.5
        filesystem.write_bytes(trial.path, json.dumps({"accuracy": accuracy}).encode())
    keys = ("budget=[0.2,0.4]", "select.hard_fraction=search", *SETTINGS)
    again = run_select(digits_config(spoiled.uri, *keys), spoiled).coresets
    assert [coreset.hard_fraction for coreset in again.values()] == [0.3, 0.3]
    other = run_select(digits_config(spoiled.uri, *keys, "budget=0.4", "select.search_iterations=61"), spoiled)
    assert other.coresets["coreset"].hard_fraction == 0.6


def test_numbers_and_auto_may_be_mixed_and_need_no_training(spoiled):
    config = digits_config(spoiled.uri, "budget=[0.2,0.4,50]", "select.hard_fraction=[0.1,auto,auto]")
    fixed, *estimated = run_select(config, spoiled).coresets.values()
    assert fixed.hard_fraction == 0.1 and fixed.hard_fraction_evidence is None
    for coreset in estimated:
        assert coreset.hard_fraction_evidence["found_by"] == "auto"
        assert 0 <= coreset.hard_fraction <= 1 - coreset.rows / 1000


def test_a_pool_too_small_to_search_is_refused(tmp_path):
    run_dir = RunDir(tmp_path)
    write_trained(run_dir, num_samples=20)
    config = digits_config(tmp_path, "select.hard_fraction=search", "budget=1")
    with pytest.raises(ValueError, match=r"a number or auto, or give another select\.search_holdout"):
        run_select(config, run_dir)

"""evaluate: true labels beside the pseudo-labels, and trainings on every coreset and on random samples."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from elfs_ray.stages.evaluate import format_results, run_evaluate
from elfs_ray.stages.select import run_select
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir
from tests.tables import digit_images, digits_config, mark, png, write_trained

NUM_TEST = 200
WRONG = 0.2  # share of the pseudo-labels that are made wrong


@pytest.fixture(scope="module")
def judged(ray_cluster, tmp_path_factory):
    """A run directory of two budgets, its config, and what evaluate says of it."""
    folder = tmp_path_factory.mktemp("judged")
    run_dir = RunDir(folder)
    write_trained(run_dir)
    images, labels = digit_images(1003 + NUM_TEST)
    _write_index(run_dir, labels[:1003])
    _spoil_pseudo_labels(run_dir)
    test = {"image": [png(image) for image in images[1003:]], "label": labels[1003:].astype(np.int32)}
    pq.write_table(pa.table(test), folder / "test.parquet")
    config = digits_config(
        folder,
        "budget=[0.2,0.4]",
        "pool.label=label",
        f"evaluate.test_uri={folder / 'test.parquet'}",
        "evaluate.network=small_cnn",
        "evaluate.iterations=60",
        "evaluate.batch_size=32",
        "evaluate.num_seeds=2",
    )
    mark(run_dir, "select", **run_select(config, run_dir))
    return run_dir, config, run_evaluate(config, run_dir)


def _write_index(run_dir: RunDir, labels: np.ndarray) -> None:
    (path,) = run_dir.table_files(schema.INDEX)
    rows = filesystem.read_table(path)
    filesystem.write_table(path, rows.set_column(2, rows.schema.field(2), pa.array(labels, pa.int32())))


def _spoil_pseudo_labels(run_dir: RunDir) -> None:
    for path in run_dir.table_files(schema.CLUSTERS, schema.PSEUDO_LABELS_DIR):
        rows = filesystem.read_table(path)
        ids, labels = rows["sample_id"].to_numpy(), rows["pseudo_label"].to_numpy()
        wrong = np.where(ids % round(1 / WRONG) == 0, (labels + 1 + ids % 9) % 10, labels).astype(np.int32)
        filesystem.write_table(path, rows.set_column(1, rows.schema.field(1), pa.array(wrong)))


def test_pseudo_labels_are_measured_as_scikit_learn_does(judged):
    run_dir, _, figures = judged
    ids = run_dir.read_column("clusters", "pseudo_labels", column="sample_id")
    clusters = run_dir.read_column("clusters", "pseudo_labels", column="pseudo_label")
    truth = digit_images(1003)[1][ids]
    found = figures["clustering"]
    assert (found["num_clusters"], found["num_classes"]) == (10, 10)
    assert found["accuracy"] == found["purity"] == pytest.approx((clusters == truth).mean())
    assert found["nmi"] == pytest.approx(normalized_mutual_info_score(truth, clusters))
    assert found["ari"] == pytest.approx(adjusted_rand_score(truth, clusters))


def test_every_budget_is_trained_on_beside_random_samples_of_its_number(judged):
    run_dir, _, figures = judged
    assert {name: found["num_samples"] for name, found in figures["selections"].items()} == {
        "elfs": 200,
        "random": 200,
        "elfs-0.4": 400,
        "random-0.4": 400,
    }
    rows = pq.read_table(f"{run_dir.uri}/evaluate/results.parquet").to_pylist()
    assert len(rows) == figures["rows"] == 8
    for name, found in figures["selections"].items():
        own = [row["last_accuracy"] for row in rows if row["selection"] == name]
        assert found["mean"] == pytest.approx(np.mean(own)) and found["spread"] == pytest.approx(np.std(own, ddof=1))
        assert found["mean"] > 0.5  # ten classes, real digits: it has learned


def test_a_second_evaluation_repeats_no_training_and_says_the_same(judged):
    run_dir, config, figures = judged
    folder = f"{run_dir.uri}/evaluate/trials"
    (kept, *_) = filesystem.list_files(folder)
    trial = json.loads(filesystem.read_bytes(kept.path))
    filesystem.write_bytes(kept.path, json.dumps(trial | {"last_accuracy": 0.0}).encode())
    again = run_evaluate(config, run_dir)
    assert again["selections"][trial["selection"]]["mean"] < figures["selections"][trial["selection"]]["mean"]
    filesystem.delete(f"{folder}/{kept.base_name}")
    assert run_evaluate(config, run_dir) == figures


def test_the_table_for_people_has_a_line_each_and_the_pseudo_labels(judged):
    _, _, figures = judged
    lines = format_results(figures).splitlines()
    assert [line.split()[0] for line in lines] == ["selection", *figures["selections"], "pseudo-labels:"]
    assert all("±" in line for line in lines[1:-1])
    single = {name: found | {"seeds": 1} for name, found in figures["selections"].items()}
    assert "±" not in format_results(figures | {"selections": single})

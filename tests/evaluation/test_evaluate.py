"""evaluate: true labels beside the pseudo-labels, and trainings on every coreset and on random samples."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from elfs_ray.evaluation import quality as evaluate_quality
from elfs_ray.evaluation import trials as evaluate_trials
from elfs_ray.evaluation.data import read_labels
from elfs_ray.evaluation.quality import neighbor_accuracy
from elfs_ray.runtime import progress
from elfs_ray.stages.evaluate.run import format_results, run_evaluate
from elfs_ray.stages.select.run import run_select
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
    mark(run_dir, run_select(config, run_dir))
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
    run_dir, _, results = judged
    ids = run_dir.read_column("clusters", "pseudo_labels", column="sample_id")
    clusters = run_dir.read_column("clusters", "pseudo_labels", column="pseudo_label")
    truth = digit_images(1003)[1][ids]
    found = results.clustering
    assert (found["num_clusters"], found["num_classes"]) == (10, 10)
    assert found["accuracy"] == found["purity"] == pytest.approx((clusters == truth).mean())
    assert found["nmi"] == pytest.approx(normalized_mutual_info_score(truth, clusters))
    assert found["ari"] == pytest.approx(adjusted_rand_score(truth, clusters))


def embeddings(run_dir: RunDir) -> tuple[np.ndarray, np.ndarray]:
    """(sample_ids, vectors) of a run."""
    rows = pa.concat_tables(run_dir.read_table("embeddings"))
    return rows["sample_id"].to_numpy(), np.stack(rows["embedding"].to_numpy()).astype(np.float64)


def test_the_vote_of_the_neighbours_is_that_of_scikit_learn_without_the_sample_itself(judged):
    run_dir, _, results = judged
    ids, vectors = embeddings(run_dir)
    truth = digit_images(1003)[1][ids]
    found = NearestNeighbors(n_neighbors=11, metric="cosine", algorithm="brute").fit(vectors).kneighbors(vectors)[1]
    neighbors = np.array([[k for k in row if k != i][:10] for i, row in enumerate(found.tolist())])
    votes = np.array([np.bincount(truth[row], minlength=10).argmax() for row in neighbors])
    assert results.knn["queries"] == len(ids) and results.knn["num_neighbors"] == 10
    assert results.knn["accuracy"] == pytest.approx((votes == truth).mean(), abs=1.5 / len(ids))
    assert results.knn["accuracy"] > 0.9  # real digits


def test_samples_without_a_label_neither_ask_nor_vote_and_a_large_pool_asks_some(judged, tmp_path, monkeypatch):
    run_dir, config, _ = judged
    shutil.copytree(run_dir.uri, tmp_path / "run")
    copy = RunDir(tmp_path / "run")
    (path,) = copy.table_files(schema.INDEX)
    rows = filesystem.read_table(path)
    labels = [label if i % 3 == 0 else None for i, label in enumerate(rows["label"].to_pylist())]
    filesystem.write_table(path, rows.set_column(2, rows.schema.field(2), pa.array(labels, pa.int32())))
    ids, vectors = embeddings(copy)
    own = ids % 3 == 0
    truth = digit_images(1003)[1][ids[own]]
    expected = [
        KNeighborsClassifier(10, metric="cosine")
        .fit(np.delete(vectors[own], i, axis=0), np.delete(truth, i))
        .predict(vectors[own][i : i + 1])[0]
        for i in range(own.sum())
    ]
    found = neighbor_accuracy(copy, read_labels(copy), config.seed, "cpu")
    assert found["queries"] == own.sum()
    assert found["accuracy"] == pytest.approx((np.array(expected) == truth).mean(), abs=1.5 / own.sum())
    monkeypatch.setattr(evaluate_quality, "MAX_QUERIES", 100)
    monkeypatch.setattr(evaluate_quality, "QUERIES_PER_TASK", 30)
    some = neighbor_accuracy(copy, read_labels(copy), config.seed, "cpu")
    assert some["queries"] == 100 and some["accuracy"] == pytest.approx(found["accuracy"], abs=0.1)


def test_every_budget_is_trained_on_beside_random_samples_of_its_number(judged):
    run_dir, _, results = judged
    assert {name: found["num_samples"] for name, found in results.selections.items()} == {
        "elfs": 200,
        "random": 200,
        "elfs-0.4": 400,
        "random-0.4": 400,
    }
    rows = pq.read_table(f"{run_dir.uri}/evaluate/results.parquet").to_pylist()
    assert len(rows) == results.rows == 8
    for name, found in results.selections.items():
        own = [row["last_accuracy"] for row in rows if row["selection"] == name]
        assert found["mean"] == pytest.approx(np.mean(own)) and found["spread"] == pytest.approx(np.std(own, ddof=1))
        assert found["mean"] > 0.5  # ten classes, real digits: it has learned


def test_a_second_evaluation_repeats_no_training_and_says_the_same(judged):
    run_dir, config, results = judged
    folder = f"{run_dir.uri}/evaluate/trials"
    (kept, *_) = filesystem.list_files(folder)
    trial = json.loads(filesystem.read_bytes(kept.path))
    filesystem.write_bytes(kept.path, json.dumps(trial | {"last_accuracy": 0.0}).encode())
    again = run_evaluate(config, run_dir)
    (changed,) = [name for name, own in results.selections.items() if again.selections[name] != own]
    assert again.selections[changed]["mean"] < results.selections[changed]["mean"]
    filesystem.delete(f"{folder}/{kept.base_name}")
    assert run_evaluate(config, run_dir) == results


def test_trainings_that_are_there_count_as_done_from_the_start_and_a_state_beside_a_result_is_dropped(
    judged, monkeypatch
):
    run_dir, config, results = judged
    folder = f"{run_dir.uri}/evaluate/trials"
    gone, kept, *_ = filesystem.list_files(folder)
    filesystem.delete(gone.path)
    unfinished = kept.path.removesuffix(".json") + evaluate_trials.UNFINISHED
    filesystem.write_bytes(unfinished, b"of a run that was killed after the result")
    told: list[tuple[str, int, int]] = []
    listener = lambda name, unit, done, total, rate, running: told.append((unit, done, total))  # noqa: E731
    monkeypatch.setattr(progress, "_listeners", [listener])
    assert run_evaluate(config, run_dir) == results
    assert next(line for line in told if line[0] == "trainings") == ("trainings", 7, 8)
    assert not filesystem.exists(unfinished)


def test_the_table_for_people_has_a_line_each_and_the_pseudo_labels(judged):
    _, _, results = judged
    lines = format_results(results).splitlines()
    assert [line.split()[0] for line in lines] == ["selection", *results.selections, "pseudo-labels:", "embeddings:"]
    assert all("±" in line for line in lines[1:-2])
    single = {name: found | {"seeds": 1} for name, found in results.selections.items()}
    assert "±" not in format_results(replace(results, selections=single))

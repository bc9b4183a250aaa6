"""Metrics of pseudo-labels and embeddings agree with those of scikit-learn."""

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from elfs_ray.evaluation import quality
from elfs_ray.evaluation.quality import judge_clustering, judge_embeddings, neighbor_accuracy
from elfs_ray.evaluation.true_labels import NO_LABEL, TrueLabels
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir
from tests.tables import digit_images, write_clustered

NUM_POOL = 1003
WRONG = 0.2  # share of the pseudo-labels that are made wrong


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> RunDir:
    """Return a run directory of digits, four fifths of whose pseudo-labels are right."""
    run_dir = RunDir(tmp_path_factory.mktemp("run"))
    write_clustered(run_dir, NUM_POOL)
    for path in run_dir.table_files(schema.CLUSTERS, schema.PSEUDO_LABELS_DIR):
        rows = filesystem.read_table(path)
        ids, labels = rows["sample_id"].to_numpy(), rows["pseudo_label"].to_numpy()
        wrong = np.where(ids % round(1 / WRONG) == 0, (labels + 1 + ids % 9) % 10, labels).astype(np.int32)
        filesystem.write_table(path, rows.set_column(1, rows.schema.field(1), pa.array(wrong)))
    return run_dir


@pytest.fixture(scope="module")
def labels() -> TrueLabels:
    return TrueLabels(digit_images(NUM_POOL)[1].astype(np.int32), ())


def embeddings(run_dir: RunDir) -> tuple[np.ndarray, np.ndarray]:
    """Return (sample_ids, vectors) of a run."""
    rows = pa.concat_tables(run_dir.read_table("embeddings"))
    return rows["sample_id"].to_numpy(), np.stack(rows["embedding"].to_numpy()).astype(np.float64)


def test_metrics_of_pseudo_labels_equal_those_of_scikit_learn(run_dir, labels):
    ids = run_dir.read_column("clusters", "pseudo_labels", column="sample_id")
    clusters = run_dir.read_column("clusters", "pseudo_labels", column="pseudo_label")
    truth = labels.of(ids)
    measured = judge_clustering(run_dir, labels)
    assert (measured.num_clusters, measured.num_classes) == (10, 10)
    assert measured.accuracy == measured.purity == pytest.approx((clusters == truth).mean())
    assert measured.nmi == pytest.approx(normalized_mutual_info_score(truth, clusters))
    assert measured.ari == pytest.approx(adjusted_rand_score(truth, clusters))


def test_the_vote_of_neighbours_equals_that_of_scikit_learn(run_dir, labels, tmp_path):
    """A sample is not its own neighbour. The result is read from its file the next time."""
    ids, vectors = embeddings(run_dir)
    truth = labels.of(ids)
    nearest = NearestNeighbors(n_neighbors=11, metric="cosine", algorithm="brute").fit(vectors).kneighbors(vectors)[1]
    neighbors = np.array([[k for k in row if k != i][:10] for i, row in enumerate(nearest.tolist())])
    votes = np.array([np.bincount(truth[row], minlength=10).argmax() for row in neighbors])
    vote = judge_embeddings(run_dir, labels, 0, "cpu", str(tmp_path))
    assert (vote.num_queries, vote.num_neighbors) == (len(ids), 10)
    assert vote.accuracy == pytest.approx((votes == truth).mean(), abs=1.5 / len(ids))
    assert vote.accuracy > 0.9  # real digits
    (kept,) = tmp_path.iterdir()
    kept.write_text(kept.read_text().replace('"num_neighbors": 10', '"num_neighbors": 7'))
    assert judge_embeddings(run_dir, labels, 0, "cpu", str(tmp_path)).num_neighbors == 7


def test_samples_without_a_label_take_no_part_in_the_vote(run_dir, labels, monkeypatch):
    """Of a large pool a random part are queries."""
    some = TrueLabels(np.where(np.arange(NUM_POOL) % 3 == 0, labels.of_id, NO_LABEL), ())
    ids, vectors = embeddings(run_dir)
    is_labelled = ids % 3 == 0
    vectors, truth = vectors[is_labelled], labels.of(ids[is_labelled])
    expected = [
        KNeighborsClassifier(10, metric="cosine")
        .fit(np.delete(vectors, i, axis=0), np.delete(truth, i))
        .predict(vectors[i : i + 1])[0]
        for i in range(len(truth))
    ]
    vote = neighbor_accuracy(run_dir, some, 0, "cpu")
    assert vote.num_queries == len(truth)
    assert vote.accuracy == pytest.approx((np.array(expected) == truth).mean(), abs=1.5 / len(truth))
    monkeypatch.setattr(quality, "MAX_QUERIES", 100)
    monkeypatch.setattr(quality, "QUERIES_PER_TASK", 30)
    sampled = neighbor_accuracy(run_dir, some, 0, "cpu")
    assert sampled.num_queries == 100 and sampled.accuracy == pytest.approx(vote.accuracy, abs=0.1)

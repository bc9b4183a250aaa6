"""D2 and ZCore over files are those in memory, over the images that are left."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from elfs_ray.methods.selection import d2, zcore
from elfs_ray.stages.select import run as select
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir
from tests.tables import digits_config, embeddings_of, write_embedded

D2 = ("select.method=d2", "select.d2_neighbors=5", "cluster.num_neighbors=12", "budget=200")
ZCORE = ("select.method=zcore", "select.zcore_draws=100", "budget=200")
NUM_NEIGHBORS = 12


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(select, "IDS_PER_FILE", 300)
    return RunDir(tmp_path / "run")


def exclude(path: Path, ids: np.ndarray) -> str:
    """Write ids into a file; return the key that excludes them."""
    path.write_text("sample_id\n" + "".join(f"{i}\n" for i in ids))
    return f"select.exclude={path}"


def choose(run_dir: RunDir, *overrides: str) -> list[int]:
    select.run_select(digits_config(Path(run_dir.uri), *overrides), run_dir)
    return run_dir.read_column(schema.CORESET, column=schema.SAMPLE_ID).tolist()


def scores_of(run_dir: RunDir, method: str) -> np.ndarray:
    tables = [filesystem.read_table(path) for path in run_dir.table_files("select", method)]
    return pa.concat_tables(tables)[schema.SCORE].to_numpy()


def write_neighbors(run_dir: RunDir, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Write neighbors/ by brute force. Returns the positions of neighbours and their similarity, (n, k) each."""
    vectors = embeddings_of(run_dir).astype(np.float32)
    cosine = vectors @ vectors.T
    np.fill_diagonal(cosine, -2)
    nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :NUM_NEIGHBORS]
    similarity = np.take_along_axis(cosine, nearest, axis=1)
    columns = [ids, schema.matrix_column(ids[nearest]), schema.matrix_column(similarity)]
    table = pa.table(columns, schema=schema.neighbors_schema(NUM_NEIGHBORS))
    filesystem.write_table(run_dir.path(schema.NEIGHBORS, schema.range_file(0, int(ids[-1]))), table)
    return nearest, similarity


def graph_without(left: np.ndarray, nearest: np.ndarray, similarity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first five neighbours of the samples that are left, among these; the weight of others is 0."""
    positions = np.zeros((left.sum(), 5), np.int64)
    cosines = np.full(positions.shape, -np.inf, np.float32)
    renumbered = np.cumsum(left) - 1
    for row, sample in enumerate(np.flatnonzero(left)):
        kept = [place for place in range(NUM_NEIGHBORS) if left[nearest[sample, place]]][:5]
        positions[row, : len(kept)] = renumbered[nearest[sample, kept]]
        cosines[row, : len(kept)] = similarity[sample, kept]
    return positions, cosines


def test_d2_is_d2_in_memory_and_a_missing_graph_is_named(run_dir):
    ids = write_embedded(run_dir)
    with pytest.raises(ValueError, match=r"run stage neighbors with cluster\.num_neighbors=5"):
        choose(run_dir, *D2)
    nearest, similarity = write_neighbors(run_dir, ids)
    assert choose(run_dir, *D2) == ids[d2.d2_selection(nearest[:, :5], similarity[:, :5], 200)].tolist()


def test_d2_knows_nothing_of_excluded_images(run_dir, tmp_path):
    """The next neighbours take their places, as far as the table has any: half of the images are left."""
    ids = write_embedded(run_dir)
    graph = write_neighbors(run_dir, ids)
    left = np.arange(len(ids)) // 3 % 2 > 0
    chosen = choose(run_dir, *D2, exclude(tmp_path / "bad.csv", ids[~left]))
    assert chosen == ids[left][d2.d2_selection(*graph_without(left, *graph), 200)].tolist()
    assert (scores_of(run_dir, "d2")[~left] == len(ids)).all()


@pytest.mark.parametrize("are_excluded", [False, True])
def test_zcore_is_zcore_in_memory_of_the_images_that_are_left(run_dir, tmp_path, monkeypatch, are_excluded):
    monkeypatch.setattr(zcore, "_DRAWS_PER_RANGE", 40)
    ids = write_embedded(run_dir)
    left = np.arange(len(ids)) % 3 > 0 if are_excluded else np.full(len(ids), True)
    keys = (*ZCORE, exclude(tmp_path / "bad.csv", ids[~left])) if are_excluded else ZCORE
    chosen = choose(run_dir, *keys)
    ranges = (range(40), range(40, 80), range(80, 100))
    votes = [zcore.zcore_votes(embeddings_of(run_dir)[left], draws, 0) for draws in ranges]
    scores = zcore.zcore_sum(ids[left], votes, seed=0)
    assert chosen == ids[left][np.lexsort((ids[left], -scores))][:200].tolist()
    assert not scores_of(run_dir, "zcore")[~left].any()

"""Score a pool by D2 or ZCore, label-free baselines that need the whole pool (methods/selection/d2.py, zcore.py).

Reads   scores/ (ids and pseudo-labels), embeddings/ for zcore, neighbors/ for d2
Writes  select/<method>/ (sample_id, pseudo_label, score), a file for each of scores/

For pools of up to about a million samples: a worker holds all embeddings (2 bytes a number, 4 while it votes) or the
whole graph (24 bytes an edge), and the driver 28 bytes a sample.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from elfs_ray.config import Config
from elfs_ray.methods.selection.d2 import d2_selection
from elfs_ray.methods.selection.quantiles import Direction
from elfs_ray.methods.selection.zcore import zcore_draws, zcore_sum, zcore_votes
from elfs_ray.runtime.progress import Progress
from elfs_ray.runtime.tasks import run_tasks, start_task
from elfs_ray.stages.select.scored_pool import ScoredPool
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

WHOLE_POOL_METHODS: dict[str, Direction] = {"d2": "low", "zcore": "high"}
"""The methods of this module, with the end of their scores that is kept."""


def score_whole_pool(
    config: Config, run_dir: RunDir, pool: ScoredPool, max_count: int, ignored_ids: np.ndarray
) -> ScoredPool:
    """Write the scores of config.select.method. Returns the pool with these scores, whose "hardest" samples are best.

    The score of d2 is the sample's rank in D2's order, which is the same for all budgets; samples beyond the largest
    budget, `max_count`, come last. ignored_ids: samples (i,), ascending, that cannot be chosen and affect no score;
    theirs are the worst. Raises ValueError if stage neighbors has not written enough neighbours.
    """
    pool_ids = pool.sample_ids()
    counts = ~np.isin(pool_ids, ignored_ids, assume_unique=True)
    sample_ids = pool_ids[counts]
    method = config.select.method
    if method == "zcore":
        scores = np.zeros(pool_ids.size, np.float32)
        scores[counts] = _zcore(config, run_dir, sample_ids)
    else:
        scores = np.full(pool_ids.size, pool_ids.size, np.int32)
        scores[counts] = _d2(config, run_dir, sample_ids, max_count)
    files, start = [], 0
    for path in pool.files:
        rows = filesystem.read_table(path, [schema.SAMPLE_ID, schema.PSEUDO_LABEL])
        column = pa.array(scores[start : start + rows.num_rows])
        start += rows.num_rows
        files.append(run_dir.path("select", method, filesystem.basename(path)))
        filesystem.write_table(files[-1], rows.append_column(schema.SCORE, column))
    return replace(pool, files=tuple(files), score=schema.SCORE, direction=WHOLE_POOL_METHODS[method])


def _zcore(config: Config, run_dir: RunDir, sample_ids: np.ndarray) -> np.ndarray:
    files = run_dir.table_files(schema.EMBEDDINGS)
    embeddings = start_task(_load_embeddings, files, sample_ids)
    ranges = zcore_draws(config.select.zcore_draws)
    tasks = [(embeddings, draws, config.seed) for draws in ranges]

    def votes() -> Iterator[np.ndarray]:
        """Yield the votes in the order of the draws."""
        # Tasks end in any order, and sums in another order round differently.
        waiting: dict[int, np.ndarray] = {}
        due = 0
        with Progress("select", config.select.zcore_draws, "draws") as progress:
            for position, range_votes in run_tasks(zcore_votes, tasks):
                waiting[position] = range_votes
                progress.advance(len(ranges[position]))
                while due in waiting:
                    yield waiting.pop(due)
                    due += 1

    return zcore_sum(sample_ids, votes(), config.seed)


def _d2(config: Config, run_dir: RunDir, sample_ids: np.ndarray, max_count: int) -> np.ndarray:
    files = run_dir.table_files(schema.NEIGHBORS)
    required = config.select.d2_neighbors
    existing = filesystem.read_schema(files[0]).field(schema.NEIGHBOR_IDS).type.list_size if files else 0
    if existing < required:
        raise ValueError(
            f"{run_dir.path(schema.NEIGHBORS)} has {existing} neighbours of each sample; select.method=d2 needs "
            f"select.d2_neighbors={required}: run stage neighbors with cluster.num_neighbors={required} or more"
        )
    ((_, taken),) = run_tasks(_d2_order, [(files, sample_ids, required, min(max_count, sample_ids.size))])
    places = np.full(sample_ids.size, sample_ids.size, np.int32)
    places[taken] = np.arange(taken.size)
    return places


def _d2_order(files: Sequence[str], sample_ids: np.ndarray, num_neighbors: int, max_count: int) -> np.ndarray:
    """Return the first samples in D2's order over the graph of nearest neighbours, as positions (max_count,) int64.

    sample_ids: (n,) int64, ascending; others in the files are no part of the graph.
    """
    neighbors = np.empty((sample_ids.size, num_neighbors), np.int64)
    similarity = np.empty((sample_ids.size, num_neighbors), np.float32)
    for path in files:
        rows = filesystem.read_table(path)
        ids, has_row = _positions(sample_ids, rows[schema.SAMPLE_ID].to_numpy())
        nearest, is_node = _positions(sample_ids, schema.matrix_of(rows, schema.NEIGHBOR_IDS)[has_row])
        cosine = schema.matrix_of(rows, schema.SIMILARITY)[has_row]
        # The next neighbours of the table take the places of those that are no part of the graph. Where the table has
        # too few, edges to anything of similarity -inf fill up: their weight is 0.
        first = np.argsort(~is_node, axis=1, kind="stable")[:, :num_neighbors]
        neighbors[ids[has_row]] = np.take_along_axis(nearest, first, axis=1)
        similarity[ids[has_row]] = np.take_along_axis(np.where(is_node, cosine, -np.inf), first, axis=1)
    return d2_selection(neighbors, similarity, max_count)


def _positions(sample_ids: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the position of each id among sample_ids (n,), ascending, and whether it is there; else any position."""
    positions = np.minimum(np.searchsorted(sample_ids, ids), sample_ids.size - 1)
    return positions, sample_ids[positions] == ids


def _load_embeddings(files: Sequence[str], sample_ids: np.ndarray) -> np.ndarray:
    """Return the embeddings of some samples in the order of their ids, (n, d) float16."""
    parts, ids = [], []
    for path in files:
        rows = filesystem.read_table(path)
        file_ids = rows[schema.SAMPLE_ID].to_numpy()
        _, counts = _positions(sample_ids, file_ids)
        ids.append(file_ids[counts])
        parts.append(schema.matrix_of(rows, schema.EMBEDDING)[counts])
    assert np.array_equal(np.concatenate(ids), sample_ids), "embeddings/ and scores/ hold different samples"
    return np.concatenate(parts)

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
import ray

from elfs_ray.config import Config
from elfs_ray.methods.selection.d2 import d2_selection
from elfs_ray.methods.selection.quantiles import Direction
from elfs_ray.methods.selection.zcore import zcore_draws, zcore_sum, zcore_votes
from elfs_ray.runtime.cluster import run_tasks
from elfs_ray.runtime.placement import placement
from elfs_ray.runtime.progress import Progress
from elfs_ray.stages.select.scored_pool import ScoredPool
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

WHOLE_POOL_METHODS: dict[str, Direction] = {"d2": "low", "zcore": "high"}
"""The methods of this module, with the end of their scores that is kept."""


def score_whole_pool(config: Config, run_dir: RunDir, pool: ScoredPool, max_count: int) -> ScoredPool:
    """Write the scores of config.select.method. Returns the pool with these scores, whose "hardest" samples are best.

    The score of d2 is the sample's rank in D2's order, which is the same for all budgets; samples beyond the largest
    budget, `max_count`, come last. Raises ValueError if stage neighbors has not written enough neighbours.
    """
    sample_ids = np.concatenate([_column(path, schema.SAMPLE_ID) for path in pool.files])
    method = config.select.method
    scores = _zcore(config, run_dir, sample_ids) if method == "zcore" else _d2(config, run_dir, sample_ids, max_count)
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
    embeddings = ray.remote(num_cpus=1, **placement())(_load_embeddings).remote(files, sample_ids)
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
    ((_, taken),) = run_tasks(_d2_order, [(files, sample_ids, required, max_count)])
    places = np.full(sample_ids.size, sample_ids.size, np.int32)
    places[taken] = np.arange(taken.size)
    return places


def _d2_order(files: Sequence[str], sample_ids: np.ndarray, num_neighbors: int, max_count: int) -> np.ndarray:
    """Return the first samples in D2's order over the graph of nearest neighbours, as positions (max_count,) int64."""
    neighbors = np.empty((sample_ids.size, num_neighbors), np.int64)
    similarity = np.empty((sample_ids.size, num_neighbors), np.float32)
    for path in files:
        rows = filesystem.read_table(path)
        places = np.searchsorted(sample_ids, rows[schema.SAMPLE_ID].to_numpy())
        ids = schema.matrix_of(rows, schema.NEIGHBOR_IDS)[:, :num_neighbors]
        neighbors[places] = np.searchsorted(sample_ids, ids)
        similarity[places] = schema.matrix_of(rows, schema.SIMILARITY)[:, :num_neighbors]
    return d2_selection(neighbors, similarity, max_count)


def _load_embeddings(files: Sequence[str], sample_ids: np.ndarray) -> np.ndarray:
    """Return all embeddings in the order of their ids, (n, d) float16."""
    tables = [filesystem.read_table(path) for path in files]
    ids = np.concatenate([table[schema.SAMPLE_ID].to_numpy() for table in tables])
    assert np.array_equal(ids, sample_ids), "embeddings/ and scores/ hold different samples"
    return np.concatenate([schema.matrix_of(table, schema.EMBEDDING) for table in tables])


def _column(path: str, name: str) -> np.ndarray:
    return filesystem.read_table(path, [name])[name].to_numpy()

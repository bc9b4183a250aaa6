"""Collect the images that the report shows on its map and in its gallery.

They are images of the coreset, spread over the list; a sample of the pool; the images nearest to the centre of their
group; the hardest and the easiest that were left out; near-duplicates; and images that are labelled already.

Driver memory: 8 bytes a sample for the ids of a million samples at a time, one file of a table at a time, and for each
of at most 8,000 images its uri and its embedding.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from scipy.sparse.linalg import svds

from elfs_ray.config import Config
from elfs_ray.methods.numeric.hashing import hash_uniform
from elfs_ray.stages.duplicates import DuplicatesResult
from elfs_ray.stages.index import IndexResult
from elfs_ray.stages.index.records import gone_ids
from elfs_ray.stages.select import CoresetResult, SelectResult
from elfs_ray.stages.select.left_out import LEFT_OUT
from elfs_ray.stages.select.named_images import read_named_images
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

MAX_LISTED = 5_000  # images of the coreset
POOL_SAMPLE = 2_000
MAX_LABELLED = MAX_DUPLICATES = 200
NEAR_CENTRES, MAX_NEAR_A_CENTRE = 300, 8
MAX_CHOSEN_PICTURES = 1_000
CHOSEN_URI_BYTES, OTHER_URI_BYTES = 700_000, 300_000  # on the page; longer uris leave room for fewer images
IDS_AT_ONCE = 1 << 20
# What an image is shown as, besides being chosen.
NEAR, HARD, EASY, LABELLED, SAMPLED = "near", "hard", "easy", "labelled", "pool"
DUPLICATE, REPRESENTATIVE = "duplicate", "representative"


@dataclass
class ShownImages:
    """The images that the report shows: first those of the coreset, by rank, then others by ascending sample_id.

    ids, uris, ranks, groups: of each image; a rank of -1 is for images that were not chosen, a group of -1 for runs
    without pseudo-labels. points: (n, 2) float32 in 0..1. kinds: the ids that are shown as NEAR, HARD and so
    on, of HARD and EASY the most extreme first.
    """

    ids: np.ndarray
    uris: list[str]
    ranks: np.ndarray
    groups: np.ndarray
    points: np.ndarray
    kinds: dict[str, np.ndarray] = field(default_factory=dict)

    def by_importance(self, first: Mapping[str, Sequence[int]]) -> tuple[list[int], list[int]]:
        """Return the ids that should get thumbnails first, which begin with `first`, and those that may get one."""
        chosen = self.ids[self.ranks >= 0]
        spread = chosen[:: -(-len(chosen) // MAX_CHOSEN_PICTURES)]
        others = [self.kinds.get(kind, chosen[:0]) for kind in (NEAR, LABELLED, DUPLICATE)]
        important = dict.fromkeys(np.concatenate([*map(_ids, first.values()), spread, *others]).tolist())
        sample = _first_by_hash(self.kinds[SAMPLED], len(self.kinds[SAMPLED])).tolist()
        return list(important), [i for i in sample if i not in important]


def _ids(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, np.int64)


def collect_images(config: Config, run_dir: RunDir) -> ShownImages:
    """Return the images to show, the same for every report of a run."""
    chosen = _chosen(run_dir)
    chosen_ids = chosen[schema.SAMPLE_ID].to_numpy()
    kinds = {SAMPLED: _sample(run_dir, POOL_SAMPLE)}
    first, count = SelectResult.read(run_dir).coresets[schema.CORESET], config.report.images_per_grid
    kinds[HARD], kinds[EASY] = _ids(first.hardest_examples[:count]), _ids(first.easiest_examples[:count])
    if config.select.method == "double_end" and not config.select.balance:
        hard, easy = _beyond_the_cuts(run_dir, first, kinds[SAMPLED])
        kinds[HARD] = np.concatenate([kinds[HARD], np.setdiff1d(hard, kinds[HARD])])
        kinds[EASY] = np.concatenate([kinds[EASY], np.setdiff1d(easy, kinds[EASY])])
    kinds[LABELLED] = _labelled(config, run_dir)
    if config.duplicates.threshold is not None:
        duplicates = run_dir.read_column(schema.DUPLICATES, column=schema.SAMPLE_ID)
        pairs = DuplicatesResult.read(run_dir).examples[: count // 2]
        kinds[DUPLICATE] = np.union1d(_first_by_hash(duplicates, MAX_DUPLICATES), _ids([pair[0] for pair in pairs]))
        kinds[REPRESENTATIVE] = np.unique(_ids([pair[1] for pair in pairs]))
    if config.needs_clusters:
        kinds[NEAR] = _near_centres(run_dir)
    gone = gone_ids(run_dir)
    kinds = {kind: members[~np.isin(members, gone)] for kind, members in kinds.items()}
    others = np.setdiff1d(np.concatenate(list(kinds.values())), chosen_ids)
    uris = run_dir.read_rows(schema.INDEX, others, [schema.URI])[schema.URI].to_pylist()
    step = _step(uris, OTHER_URI_BYTES)
    others, uris = others[::step], uris[::step]
    ids = np.concatenate([chosen_ids, others])
    kinds = {kind: members[np.isin(members, ids)] for kind, members in kinds.items()}
    ranks = np.concatenate([chosen[schema.RANK].to_numpy(), np.full(len(others), -1)])
    return ShownImages(
        ids,
        chosen[schema.URI].to_pylist() + uris,
        ranks,
        _groups(run_dir, ids) if config.needs_clusters else np.full(len(ids), -1),
        _points(run_dir, ids, np.isin(ids, kinds[SAMPLED])),
        kinds,
    )


def _chosen(run_dir: RunDir) -> pa.Table:
    """Return sample_id, uri and rank of images of the coreset: of all, or of some that are spread evenly."""
    total = SelectResult.read(run_dir).rows
    ranks = np.unique(np.linspace(0, total - 1, min(total, MAX_LISTED)).round().astype(np.int64))
    chosen = _at_ranks(run_dir, ranks)
    return chosen.take(np.arange(0, len(chosen), _step(chosen[schema.URI].to_pylist(), CHOSEN_URI_BYTES)))


def _step(uris: list[str], max_bytes: int) -> int:
    """Return 1 if the uris fit on the page, 2 if every second does, and so on."""
    # Their common beginning is there once; <, > and & take six bytes in JSON that is safe inside HTML.
    length = len(os.path.commonprefix(uris))  # noqa: RUF071  # of texts: it may end inside a name
    num_bytes = sum(len(uri[length:].encode()) + 5 * sum(map(uri.count, '<>&"')) for uri in uris)
    return max(1, -(-num_bytes // max_bytes))


def _at_ranks(run_dir: RunDir, ranks: np.ndarray) -> pa.Table:
    columns = [schema.SAMPLE_ID, schema.URI, schema.RANK]
    tables = run_dir.read_table(schema.CORESET, columns=columns)
    return pa.concat_tables([rows.filter(np.isin(rows[schema.RANK].to_numpy(), ranks)) for rows in tables])


def _sample(run_dir: RunDir, count: int) -> np.ndarray:
    """Return about `count` of the ids that are embedded and still in the pool, ascending."""
    num_samples = IndexResult.read(run_dir).rows
    absent = np.union1d(run_dir.read_column(schema.REJECTED, column=schema.SAMPLE_ID), gone_ids(run_dir))
    sampled = []
    for first in range(0, num_samples, IDS_AT_ONCE):
        ids = np.arange(first, min(first + IDS_AT_ONCE, num_samples))
        sampled.append(ids[hash_uniform(0, ids) < count / num_samples])
    return np.setdiff1d(np.concatenate(sampled), absent)


def _labelled(config: Config, run_dir: RunDir) -> np.ndarray:
    """Return some of the ids that were labelled when the coreset was chosen."""
    left_out = run_dir.read_column(SelectResult.stage, LEFT_OUT, column=schema.SAMPLE_ID)
    path = config.select.labelled
    # A page that is written again much later can do without the list, or without one that names another pool by now.
    if path is None or not len(left_out) or not filesystem.exists(path):
        return left_out[:0]
    try:
        labelled = read_named_images("select.labelled", path, run_dir)
    except ValueError:
        return left_out[:0]
    return _first_by_hash(np.intersect1d(labelled, left_out), MAX_LABELLED)


def _beyond_the_cuts(run_dir: RunDir, coreset: CoresetResult, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return those of some ids that were left out as too hard, and those left out as too easy."""
    scores = run_dir.read_rows(coreset.score_table, ids, [coreset.score])[coreset.score].to_numpy()
    sign = 1 if coreset.hard_side == "low" else -1
    easiness = sign * scores
    return ids[easiness < sign * coreset.hardest_kept], ids[easiness > sign * coreset.easiest_kept]


def _first_by_hash(ids: np.ndarray, count: int) -> np.ndarray:
    return ids[np.argsort(hash_uniform(0, ids), kind="stable")[:count]]


def _near_centres(run_dir: RunDir) -> np.ndarray:
    """Return the ids nearest to the centre of each group, in the groups that come first if there are many groups."""
    best = pa.Table.from_pylist([], schema=schema.PSEUDO_LABELS_SCHEMA)
    order = [(name, "ascending") for name in (schema.PSEUDO_LABEL, schema.DISTANCE, schema.SAMPLE_ID)]
    for rows in run_dir.read_table(schema.CLUSTERS, schema.PSEUDO_LABELS_DIR):
        ranked = pa.concat_tables([best, rows.select(best.column_names)]).sort_by(order)
        labels = ranked[schema.PSEUDO_LABEL].to_numpy()
        place = np.arange(len(labels)) - np.searchsorted(labels, labels)
        best = ranked.filter(place < MAX_NEAR_A_CENTRE)
    labels = best[schema.PSEUDO_LABEL].to_numpy()
    place = np.arange(len(labels)) - np.searchsorted(labels, labels)
    order_of_ids = np.lexsort((labels, place))  # first one of each group, then a second of each
    return best[schema.SAMPLE_ID].to_numpy()[order_of_ids[:NEAR_CENTRES]]


def _groups(run_dir: RunDir, ids: np.ndarray) -> np.ndarray:
    """Return the pseudo-label of each id."""
    order = np.argsort(ids)
    groups = np.full(len(ids), -1)
    for rows in run_dir.read_table(
        schema.CLUSTERS, schema.PSEUDO_LABELS_DIR, columns=[schema.SAMPLE_ID, schema.PSEUDO_LABEL]
    ):
        row_ids = rows[schema.SAMPLE_ID].to_numpy()
        is_wanted = np.isin(row_ids, ids)
        places = order[np.searchsorted(ids[order], row_ids[is_wanted])]
        groups[places] = rows[schema.PSEUDO_LABEL].to_numpy()[is_wanted]
    return groups


def _points(run_dir: RunDir, ids: np.ndarray, is_sampled: np.ndarray) -> np.ndarray:
    """Return where each image lies on the map: the first two principal components of a sample of the pool."""
    table = run_dir.read_rows(schema.EMBEDDINGS, ids, [schema.EMBEDDING])
    embeddings = schema.matrix_of(table, schema.EMBEDDING).astype(np.float32)
    sample = embeddings[is_sampled]
    if min(sample.shape) <= 2 or (sample == sample[0]).all():
        return np.full((len(ids), 2), 0.5, np.float32)
    mean = sample.mean(axis=0)
    # Two axes of a thousand: Lanczos iterations take a fraction of the time of all (fit_pca). They begin with a fixed
    # vector, so that the map of a run is always the same.
    _, _, axes = svds(sample - mean, k=2, v0=hash_uniform(0, np.arange(min(sample.shape))))
    axes = axes[::-1] * np.where(axes[::-1].sum(axis=1, keepdims=True) < 0, -1, 1)
    points = (embeddings - mean) @ axes.T
    low, high = points.min(axis=0), points.max(axis=0)
    return (points - low) / np.maximum(high - low, np.finfo(np.float32).tiny)

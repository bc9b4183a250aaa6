"""Collect the images that the report shows on its map and in its gallery.

They are images of the coreset and of later ones, spread over each list; a sample of the pool; the images nearest to the
centre of their group; the hardest and the easiest that were left out; near-duplicates; and images that are labelled
already.

Driver memory: 8 bytes a sample for the ids of a million samples at a time, one file of a table at a time, and for each
of at most 8,000 images its uri and its embedding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from elfs_ray.config import Config
from elfs_ray.methods.numeric.hashing import hash_uniform
from elfs_ray.methods.numeric.layout import lay_out
from elfs_ray.stages.duplicates import DuplicatesResult
from elfs_ray.stages.index import IndexResult
from elfs_ray.stages.index.records import gone_ids
from elfs_ray.stages.report.lists import LABELLED, ShownList, first_by_hash, read_lists, step_to_fit
from elfs_ray.storage import schema
from elfs_ray.storage.run_dir import RunDir

POOL_SAMPLE = 2_000
MAX_DUPLICATES = 200
NEAR_CENTRES, MAX_NEAR_A_CENTRE = 300, 8
MAX_CHOSEN_PICTURES = 1_000
OTHER_URI_BYTES = 300_000  # of images that no list has; longer uris leave room for fewer of them
IDS_AT_ONCE = 1 << 20
# What an image is shown as in every list.
NEAR, SAMPLED, DUPLICATE, REPRESENTATIVE = "near", "pool", "duplicate", "representative"


@dataclass
class ShownImages:
    """The images that the report shows: those of the first list by rank, of further lists, others by ascending id.

    lists: the run's coreset and others. ids, uris, groups: of each image; a group of -1 is for runs without
    pseudo-labels. points: (n, 2) float32 in 0..1. kinds: the ids that are shown as NEAR, SAMPLED and so on.
    """

    lists: list[ShownList]
    ids: np.ndarray
    uris: list[str]
    groups: np.ndarray
    points: np.ndarray
    kinds: dict[str, np.ndarray] = field(default_factory=dict)

    def by_importance(self, first: Mapping[str, Sequence[int]]) -> tuple[list[int], list[int]]:
        """Return the ids that should get thumbnails first, which begin with `first`, and those that may get one."""
        room = MAX_CHOSEN_PICTURES // len(self.lists)
        spread = [shown.ids[:: -(-len(shown.ids) // room)] for shown in self.lists]
        others = [self.kinds.get(kind, self.ids[:0]) for kind in (NEAR, DUPLICATE)]
        others += [shown.kinds[LABELLED] for shown in self.lists]
        important = dict.fromkeys(np.concatenate([*map(_ids, first.values()), *spread, *others]).tolist())
        sample = first_by_hash(self.kinds[SAMPLED], len(self.kinds[SAMPLED])).tolist()
        return list(important), [i for i in sample if i not in important]


def _ids(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, np.int64)


def collect_images(config: Config, run_dir: RunDir) -> ShownImages:
    """Return the images to show, the same for every report of a run."""
    kinds = {SAMPLED: _sample(run_dir, POOL_SAMPLE)}
    lists = read_lists(config, run_dir, kinds[SAMPLED])
    if config.duplicates.threshold is not None:
        duplicates = run_dir.read_column(schema.DUPLICATES, column=schema.SAMPLE_ID)
        pairs = DuplicatesResult.read(run_dir).examples[: config.report.images_per_grid // 2]
        kinds[DUPLICATE] = np.union1d(first_by_hash(duplicates, MAX_DUPLICATES), _ids([pair[0] for pair in pairs]))
        kinds[REPRESENTATIVE] = np.unique(_ids([pair[1] for pair in pairs]))
    if config.needs_clusters:
        kinds[NEAR] = _near_centres(run_dir)
    uri_of = {i: uri for shown in lists for i, uri in zip(shown.ids.tolist(), shown.uris, strict=True)}
    listed = _ids(list(uri_of))
    gone = gone_ids(run_dir)
    every_kind = [kinds, *(shown.kinds for shown in lists)]
    members = np.concatenate([ids for of_kind in every_kind for ids in of_kind.values()])
    others = np.setdiff1d(members, np.union1d(listed, gone))
    uris = run_dir.read_rows(schema.INDEX, others, [schema.URI])[schema.URI].to_pylist()
    step = step_to_fit(uris, OTHER_URI_BYTES)
    ids = np.concatenate([listed, others[::step]])
    for of_kind in every_kind:
        of_kind.update({kind: members[np.isin(members, ids)] for kind, members in of_kind.items()})
    return ShownImages(
        lists,
        ids,
        list(uri_of.values()) + uris[::step],
        _groups(run_dir, ids) if config.needs_clusters else np.full(len(ids), -1),
        _points(run_dir, ids, np.isin(ids, kinds[SAMPLED])),
        kinds,
    )


def _sample(run_dir: RunDir, count: int) -> np.ndarray:
    """Return about `count` of the ids that are embedded and still in the pool, ascending."""
    num_samples = IndexResult.read(run_dir).rows
    absent = np.union1d(run_dir.read_column(schema.REJECTED, column=schema.SAMPLE_ID), gone_ids(run_dir))
    sampled = []
    for first in range(0, num_samples, IDS_AT_ONCE):
        ids = np.arange(first, min(first + IDS_AT_ONCE, num_samples))
        sampled.append(ids[hash_uniform(0, ids) < count / num_samples])
    return np.setdiff1d(np.concatenate(sampled), absent)


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
    """Return where each image lies on the map, 0 to 1 in either direction."""
    table = run_dir.read_rows(schema.EMBEDDINGS, ids, [schema.EMBEDDING])
    points = lay_out(schema.matrix_of(table, schema.EMBEDDING).astype(np.float32), is_sampled)
    low, width = points.min(axis=0), np.ptp(points, axis=0)
    return np.divide(points - low, width, out=np.full_like(points, 0.5), where=width > 0)

"""Read the lists that the report shows: the run's coreset, those of further budgets, and later selections.

Driver memory: one file of a coreset at a time, and the uris of at most 5,000 images.
"""

import os
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from elfs_ray.config import Config
from elfs_ray.methods.numeric.hashing import hash_uniform
from elfs_ray.stages.index import IndexResult
from elfs_ray.stages.index.records import gone_ids
from elfs_ray.stages.select import CoresetResult, SelectResult
from elfs_ray.stages.select.kept_coresets import KeptCoreset, list_coresets
from elfs_ray.stages.select.left_out import LEFT_OUT
from elfs_ray.stages.select.named_images import read_named_images
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

MAX_LISTED = 5_000  # images of all lists together
MAX_LATER_LISTS = 10  # on the map and in the gallery: the last ones
MAX_LABELLED = 200
URI_BYTES = 700_000  # of all lists; longer uris leave room for fewer images
# What an image is in one list and not in another, besides being chosen.
HARD, EASY, LABELLED = "hard", "easy", "labelled"


@dataclass(frozen=True)
class ShownList:
    """A coreset as the page shows it.

    total: how many images it has. ids, uris, ranks: of those that the page shows, by rank: of all that are still in the
    pool, or of some that are spread evenly. group_sizes: how many of its images have each pseudo-label, (k,).
    kinds: the ids that were left out as HARD or EASY, the most extreme first, and of some that were LABELLED.
    """

    name: str
    total: int
    ids: np.ndarray
    uris: list[str]
    ranks: np.ndarray
    group_sizes: np.ndarray
    kinds: dict[str, np.ndarray] = field(default_factory=dict)


def read_lists(config: Config, run_dir: RunDir, sample: np.ndarray) -> list[ShownList]:
    """Return the lists to show, the run's own coreset first.

    sample: ids of the pool, of which those left out as too hard or too easy are told.
    """
    kept = list_coresets(run_dir)
    of_run = [coreset for coreset in kept if not coreset.is_later]
    # Someone may have deleted the files of a later one: that must not cost the run its report.
    later = [coreset for coreset in kept if coreset.is_later and coreset.folder.table_files(coreset.table)]
    coresets = of_run + later[-MAX_LATER_LISTS:]
    lists = [_read(config, run_dir, coreset, sample, len(coresets)) for coreset in coresets]
    # Of a list from before the images were numbered anew, none may be left.
    return [shown for position, shown in enumerate(lists) if position == 0 or len(shown.ids)]


def _read(config: Config, run_dir: RunDir, coreset: KeptCoreset, sample: np.ndarray, num_lists: int) -> ShownList:
    rows, group_sizes = _rows(run_dir, coreset, num_lists)
    labelled = coreset.marker.config.get("select.labelled") if coreset.is_later else config.select.labelled
    count = config.report.images_per_grid
    examples = {HARD: coreset.result.hardest_examples[:count], EASY: coreset.result.easiest_examples[:count]}
    kinds = {kind: np.array(ids, np.int64) for kind, ids in examples.items()}
    if not coreset.is_later and config.select.method == "double_end" and not config.select.balance:
        for kind, ids in zip(kinds, _beyond_the_cuts(run_dir, coreset.result, sample), strict=True):
            kinds[kind] = np.concatenate([kinds[kind], np.setdiff1d(ids, kinds[kind])])
    kinds[LABELLED] = _labelled(labelled, coreset.folder, run_dir)
    return ShownList(
        coreset.name,
        coreset.result.rows,
        rows[schema.SAMPLE_ID].to_numpy(),
        rows[schema.URI].to_pylist(),
        rows[schema.RANK].to_numpy(),
        group_sizes,
        kinds,
    )


def _rows(run_dir: RunDir, coreset: KeptCoreset, num_lists: int) -> tuple[pa.Table, np.ndarray]:
    """Return sample_id, uri and rank of images of a coreset, and how many of all its images have each pseudo-label."""
    num_shown = min(coreset.result.rows, MAX_LISTED // num_lists)
    ranks = np.unique(np.linspace(0, coreset.result.rows - 1, num_shown).round().astype(np.int64))
    parts, group_sizes = [], np.zeros(0, np.int64)
    for rows in coreset.folder.read_table(coreset.table):
        labels = rows[schema.PSEUDO_LABEL].drop_null().to_numpy()
        sizes = np.bincount(labels, minlength=len(group_sizes))
        sizes[: len(group_sizes)] += group_sizes
        group_sizes = sizes
        parts.append(rows.filter(np.isin(rows[schema.RANK].to_numpy(), ranks)))
    shown = pa.concat_tables(parts).select([schema.SAMPLE_ID, schema.URI, schema.RANK]).sort_by(schema.RANK)
    if coreset.is_later:
        shown = shown.filter(_is_in_pool(run_dir, shown))
    step = step_to_fit(shown[schema.URI].to_pylist(), URI_BYTES // num_lists)
    return shown.take(np.arange(0, len(shown), step)), group_sizes


def _is_in_pool(run_dir: RunDir, rows: pa.Table) -> np.ndarray:
    """Return which rows name an image that the run still has: its images may have left, or been numbered anew."""
    ids = rows[schema.SAMPLE_ID].to_numpy()
    absent = np.union1d(gone_ids(run_dir), run_dir.read_column(schema.REJECTED, column=schema.SAMPLE_ID))
    is_there = (ids < IndexResult.read(run_dir).rows) & ~np.isin(ids, absent)
    uris = run_dir.read_rows(schema.INDEX, ids[is_there], [schema.URI])[schema.URI].to_numpy()
    is_there[is_there] = uris == rows[schema.URI].to_numpy()[is_there]
    return is_there


def step_to_fit(uris: list[str], max_bytes: int) -> int:
    """Return 1 if the uris fit into these bytes of the page, 2 if every second does, and so on."""
    # Their common beginning is there once; <, > and & take six bytes in JSON that is safe inside HTML.
    length = len(os.path.commonprefix(uris))  # noqa: RUF071  # of texts: it may end inside a name
    num_bytes = sum(len(uri[length:].encode()) + 5 * sum(map(uri.count, '<>&"')) for uri in uris)
    return max(1, -(-num_bytes // max_bytes))


def _beyond_the_cuts(run_dir: RunDir, coreset: CoresetResult, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return those of some ids that were left out as too hard, and those left out as too easy."""
    scores = run_dir.read_rows(coreset.score_table, ids, [coreset.score])[coreset.score].to_numpy()
    sign = 1 if coreset.hard_side == "low" else -1
    easiness = sign * scores
    return ids[easiness < sign * coreset.hardest_kept], ids[easiness > sign * coreset.easiest_kept]


def _labelled(path: str | None, folder: RunDir, run_dir: RunDir) -> np.ndarray:
    """Return some of the ids that were labelled when a coreset was chosen into a folder."""
    left_out = folder.read_column(SelectResult.stage, LEFT_OUT, column=schema.SAMPLE_ID)
    # A page that is written again much later can do without the list, or without one that names another pool by now.
    if path is None or not len(left_out) or not filesystem.exists(path):
        return left_out[:0]
    try:
        labelled = read_named_images("select.labelled", path, run_dir)
    except ValueError:
        return left_out[:0]
    return first_by_hash(np.intersect1d(labelled, left_out), MAX_LABELLED)


def first_by_hash(ids: np.ndarray, count: int) -> np.ndarray:
    """Return a random sample of ids, always the same one."""
    return ids[np.argsort(hash_uniform(0, ids), kind="stable")[:count]]

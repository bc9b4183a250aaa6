"""select: compute scores from training dynamics and coresets from scores.

Reads   index/, and what the method needs: clusters/pseudo_labels and dynamics/, or embeddings/ or neighbors/ alone;
        proxy_images/ for search
Writes  scores/ (a file for each 262,144 ids; the score prototypicality is the distance to the centroid), or
        select/pool/ for a method without training dynamics; select/<method>/ (the scores of coverage, random, d2 or
        zcore), select/search/ (the trainings of a search for the hard fraction), and the coreset of each budget, the
        hardest or the first chosen first, with a file for each 1,048,576 ranks, and its uris as text: coreset/ and
        coreset.txt for the first budget, coreset-<budget> for every other

The whole pool is never sorted. One task scores each range of ids from all epochs. Hard fractions that are not numbers
in the config are chosen (hard_fraction.py). The cuts around the kept samples are found exactly from histograms
(selection.py), and one pass over the scores collects all coresets (coreset_files.py).

Memory: the driver holds histograms; a task holds about 200 bytes for each sample of a file, and the samples that it
keeps of its share of the files.
"""

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from elfs_ray.config import BY_COVERAGE, Config
from elfs_ray.methods.selection.scores import ScoreAccumulator
from elfs_ray.runtime.progress import Progress
from elfs_ray.runtime.tasks import run_tasks
from elfs_ray.stages.cluster import ClusterResult
from elfs_ray.stages.index import IndexResult
from elfs_ray.stages.select import CoresetResult, SelectResult
from elfs_ray.stages.select.coreset_files import write_coresets
from elfs_ray.stages.select.coverage import score_by_coverage, trusted_classes
from elfs_ray.stages.select.d2_zcore import WHOLE_POOL_METHODS, score_whole_pool
from elfs_ray.stages.select.hard_fraction import choose_hard_fractions
from elfs_ray.stages.select.left_out import LeftOut, find_left_out, leave_out
from elfs_ray.stages.select.scored_pool import DIRECTIONS, ScoredPool
from elfs_ray.stages.select.selection import choose
from elfs_ray.stages.select.unscored_pool import score_at_random, write_pool
from elfs_ray.stages.train import TrainResult
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

IDS_PER_FILE = 1 << 18  # a task holds all of a file's samples while it reads the epochs


def run_select(config: Config, run_dir: RunDir) -> SelectResult:
    """Write scores/ and the coreset of each budget.

    Raises ValueError if a budget or a hard fraction does not fit the number of samples with a pseudo-label.
    """
    pool, left_out = _pool(config, run_dir), find_left_out(config, run_dir)
    # Budgets are shares of the images that are in the pool.
    choices = choose_hard_fractions(config, run_dir, leave_out(run_dir, pool, left_out.gone))
    budgets = [choice.budget for choice in choices]
    counts = [budget.num_kept for budget in budgets]
    eligible = leave_out(run_dir, pool, left_out.never_chosen)
    _check_room(max(counts), eligible, left_out)
    pool, coverages = _score(config, run_dir, pool, counts, left_out)
    pool = replace(pool, left_out=eligible.left_out)
    selections = choose(pool, config.select, config.seed, budgets)
    tables = schema.coreset_tables(config.budgets)
    written = write_coresets(run_dir, pool, dict(zip(tables, selections, strict=True)))
    coresets = {
        table: CoresetResult(
            **metrics,
            hard_fraction=choice.budget.hard_fraction,
            score=pool.score,
            hard_side=pool.direction,
            score_table=posixpath.relpath(posixpath.dirname(pool.files[0]), run_dir.uri),
            hard_fraction_evidence=choice.evidence,
            coverage=coverage,
        )
        for (table, metrics), choice, coverage in zip(written.items(), choices, coverages, strict=True)
    }
    # Without a search these keys do not decide the stage's result, so the marker does not hold them. A later
    # reselection that searches needs them.
    search = {key: value for key, value in vars(config.select).items() if key.startswith("search_")}
    num_left_out = {kind: len(ids) for kind, ids in left_out._asdict().items() if len(ids)}
    return SelectResult(coresets[tables[0]].rows, pool.num_samples, coresets, search, num_left_out or None)


def _check_room(count: int, pool: ScoredPool, left_out: LeftOut) -> None:
    """Raise ValueError if fewer than `count` samples may be chosen."""
    if count > pool.num_samples:
        raise ValueError(
            f"budget is {count:,} images, but only {pool.num_samples:,} of {pool.whole.num_samples:,} may be chosen "
            f"({left_out.describe()}): give a smaller budget"
        )


def _pool(config: Config, run_dir: RunDir) -> ScoredPool:
    """Return the samples to choose from: with scores from the training dynamics, or without for other methods."""
    select = config.select
    num_ids = IndexResult.read(run_dir).rows
    ranges = [(first, min(first + IDS_PER_FILE, num_ids) - 1) for first in range(0, num_ids, IDS_PER_FILE)]
    if select.uses_dynamics:
        _write_scores(run_dir, ranges, num_epochs=TrainResult.read(run_dir).epochs)
        files = tuple(run_dir.table_files(schema.SCORES))
        score = "dual" if select.method == "dual_beta" else select.score
    else:
        files, score = write_pool(run_dir, ranges), schema.PROTOTYPICALITY
    num_groups = ClusterResult.read(run_dir).num_clusters if select.balance else 1
    return ScoredPool(files, score, DIRECTIONS[score], num_ids, num_groups)


def _score(
    config: Config, run_dir: RunDir, pool: ScoredPool, counts: Sequence[int], left_out: LeftOut
) -> tuple[ScoredPool, Sequence[Mapping[str, float] | None]]:
    """Return the pool with the scores of a method that has its own, and how coresets of `counts` cover it, if known."""
    coverages: Sequence[Mapping[str, float] | None] = [None] * len(counts)
    if config.select.method in WHOLE_POOL_METHODS:
        # As many more as could be among the first of D2's order and have a label already.
        depth = max(counts) + len(left_out.labelled)
        pool = score_whole_pool(config, run_dir, pool, depth, left_out.ignored)
    elif config.select.method == "random":
        pool = score_at_random(run_dir, pool, config.seed)
    elif config.select.method in BY_COVERAGE:
        num_classes = 0
        if config.select.method == "auto":
            num_classes = trusted_classes(ClusterResult.read(run_dir))
        pool, measured = score_by_coverage(
            *(run_dir, pool, config.seed, counts),
            num_classes=num_classes,
            labelled_ids=left_out.labelled,
            ignored_ids=left_out.ignored,
        )
        coverages = [coverage._asdict() for coverage in measured]
    return pool, coverages


def _write_scores(run_dir: RunDir, ranges: Sequence[tuple[int, int]], num_epochs: int) -> None:
    """Write a file of scores/ for every range of ids that has none yet."""
    done = {filesystem.basename(path) for path in run_dir.table_files(schema.SCORES)}
    tasks = [(run_dir, first, last, num_epochs) for first, last in ranges if schema.range_file(first, last) not in done]
    with Progress("select", len(ranges), "ranges scored", done=len(ranges) - len(tasks)) as progress:
        for _ in run_tasks(_score_range, tasks):
            progress.advance(1)


def _score_range(run_dir: RunDir, first: int, last: int, num_epochs: int) -> None:
    """Write the scores of the samples first..last, from their records of all epochs."""
    labelled = run_dir.read_range(schema.CLUSTERS, schema.PSEUDO_LABELS_DIR, first=first, last=last)
    # The empty table gives the columns their types for a range in which all images were rejected.
    clusters = pa.concat_tables([schema.PSEUDO_LABELS_SCHEMA.empty_table(), *labelled], promote_options="default")
    if not clusters.num_rows:
        return
    accumulator = ScoreAccumulator(clusters[schema.SAMPLE_ID].to_numpy())
    for epoch in range(num_epochs):
        files = run_dir.table_files(schema.DYNAMICS, schema.epoch_dir(epoch))
        rows = [filesystem.read_range(path, schema.SAMPLE_ID, first, last) for path in files]
        records = pa.concat_tables([schema.DYNAMICS_SCHEMA.empty_table(), *rows])
        if records.num_rows != clusters.num_rows:
            raise RuntimeError(
                f"{run_dir.path(schema.DYNAMICS, schema.epoch_dir(epoch))} has {records.num_rows} records of the "
                f"{clusters.num_rows} samples from sample_id {first} to {last}, and must have one for each: delete "
                f"{run_dir.path('train')} and {run_dir.path(schema.DYNAMICS)}, then run again"
            )
        accumulator.add_epoch(*(records[name].to_numpy() for name in schema.DYNAMICS_SCHEMA.names))
    scores: Mapping[str, Any] = accumulator.finish()
    labels = {name: clusters[name].combine_chunks() for name in (schema.SAMPLE_ID, schema.PSEUDO_LABEL)}
    table = pa.table({**labels, **scores, schema.PROTOTYPICALITY: clusters[schema.DISTANCE].combine_chunks()})
    write_scores(run_dir.path(schema.SCORES, schema.range_file(first, last)), table)


def write_scores(path: str, table: pa.Table) -> None:
    """Write a file of scores/, in encodings that are small and quick to read."""
    # Not in dictionaries, Parquet's default: hardly two scores are equal, so a dictionary would hold all of them.
    encodings = {schema.SAMPLE_ID: "DELTA_BINARY_PACKED"} | {
        field.name: "BYTE_STREAM_SPLIT" for field in table.schema if pa.types.is_float32(field.type)
    }
    filesystem.write_table(path, table, encodings=encodings)

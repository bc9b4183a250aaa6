"""Select by coverage: greedy facility location on the embeddings (methods/selection/coverage.py, greedi.py).

Reads   select/pool/ (ids and pseudo-labels), embeddings/; clusters/ to cover each pseudo-class first
Writes  select/coverage/ (sample_id, pseudo_label, score, rank), a file for each of select/pool/

To cover the whole pool, embeddings are taken relative to the mean of the samples to be covered. A pool of up to
20,000 samples is one task. A larger one is divided into partitions, a task each, and one more task selects among what
these nominate. If the pseudo-labels can be trusted, this is done twice: the first samples, as many as there are
pseudo-classes, each cover members of their own class alone, and the others, given these, the whole pool. The result
depends on embeddings, pseudo-labels, labelled samples and seed alone.

Memory: a task holds 0.8 GB of similarities, the last one 1.6 GB, and its embeddings. The driver holds some 40 bytes a
sample, and the embeddings of 20,000 nominees and of a sample of 44,000.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from elfs_ray.methods.clustering_trust import LEAST_TRUST
from elfs_ray.methods.selection import greedi
from elfs_ray.methods.selection.coverage import SIMILARITY_ONE, highest_similarity, sum_of
from elfs_ray.methods.selection.pruning import random_selection
from elfs_ray.runtime.progress import Progress, say
from elfs_ray.runtime.tasks import put, run_tasks
from elfs_ray.stages.cluster import ClusterResult
from elfs_ray.stages.select.parts import Part, Slice, read, read_centred, slices_of
from elfs_ray.stages.select.scored_pool import ScoredPool
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

COVERAGE = "coverage"
UNRANKED = 2**31 - 1
_NONE = np.empty(0, np.int64)


class CoverageOfPool(NamedTuple):
    """The mean similarity, 0 to 1, of a sample of the pool to its nearest sample in a coreset, and in a random one.

    classes_first: whether the first samples were chosen to cover their pseudo-classes alone.
    """

    coreset: float
    random: float
    classes_first: bool


class Samples(NamedTuple):
    """Ids of samples, ascending: all that are embedded, those to be covered, those to leave out, and a sample to cover.

    A large pool is covered by covering the sample.
    """

    embedded: np.ndarray
    wanted: np.ndarray
    ignored: np.ndarray
    points: np.ndarray


def trusted_classes(clusters: ClusterResult) -> int:
    """Return the number of pseudo-classes that `select.method=auto` covers first, 0 if too few labels look right.

    On the three sets where at least 60% looked right accuracy was 1.6 points higher than by coverage of the whole pool
    from the start, on average over 1 to 50 labels a class (BENCHMARKS.md, "Few labels").
    """
    if clusters.trust is None:
        say("select    covering the whole pool: the clusters are too small to tell how many pseudo-labels are right")
        return 0
    if clusters.trust["right"] < LEAST_TRUST:
        say("select    covering the whole pool: too few pseudo-labels look right")
        return 0
    return int(np.count_nonzero(clusters.sizes))


def score_by_coverage(
    run_dir: RunDir,
    pool: ScoredPool,
    seed: int,
    counts: Sequence[int],
    *,
    num_classes: int = 0,
    labelled_ids: np.ndarray = _NONE,
    ignored_ids: np.ndarray = _NONE,
) -> tuple[ScoredPool, list[CoverageOfPool]]:
    """Write the ranks and gains of the samples. Returns the pool with these, and how coresets of `counts` cover it.

    num_classes: the first so many samples, with the labelled ones, cover their pseudo-classes alone; the others cover
    the whole pool. labelled_ids: samples (l,) that cover others already and are not chosen; ignored_ids: samples (i,)
    that are neither chosen nor covered; both ascending. As many others must be left as the largest count.
    A score is a gain: by how much the sample raised the sum of similarities that counted when it was chosen.
    """
    files = run_dir.counted_files(schema.EMBEDDINGS)
    embedded_ids = pool.sample_ids()
    sample_ids = np.setdiff1d(embedded_ids, ignored_ids, assume_unique=True)
    labelled_ids = np.intersect1d(labelled_ids, embedded_ids, assume_unique=True)
    point_ids, measured_ids = greedi.samples_of(sample_ids, seed)
    samples = Samples(embedded_ids, sample_ids, ignored_ids, point_ids)
    ranges = greedi.partitions(len(embedded_ids))
    slices = slices_of(files, [None] * len(files), ranges)
    centre = _centre(slices, ignored_ids, len(sample_ids))
    whole = [Part(each, centre) for each in slices]
    num_first = min(max(counts), max(0, num_classes - len(labelled_ids)))
    steps = [(whole, max(counts) - num_first)] if max(counts) > num_first else []
    if num_classes:
        place = "each pseudo-class, then the whole pool" if num_first else "the whole pool: enough are labelled"
        say(f"select    covering {place}")
    if num_first:
        labels = (schema.CLUSTERS, schema.PSEUDO_LABELS_DIR)  # in files as those of the embeddings
        label_files = [run_dir.path(*labels, filesystem.basename(path)) for path, _ in files]
        steps.insert(0, ([Part(each, None) for each in slices_of(files, label_files, ranges)], num_first))
    ids, scores = _NONE, np.empty(0, np.float32)
    with Progress("select", len(steps) * (len(whole) + 1), "parts selected") as progress:
        for parts, count in steps:
            chosen, gains = _choose(parts, count, np.union1d(labelled_ids, ids), samples, progress)
            ids, scores = np.concatenate([ids, chosen]), np.concatenate([scores, gains])
    others = np.setdiff1d(sample_ids, labelled_ids, assume_unique=True)
    random_ids = others[random_selection(others, max(counts), seed)]
    measured = _rows_of(whole, measured_ids).embeddings
    means = _measure(whole, measured, ids, random_ids, labelled_ids, counts)
    coverages = [CoverageOfPool(*each, classes_first=num_first > 0) for each in means]
    return _write(run_dir, pool, ids, scores), coverages


def _choose(
    parts: Sequence[Part], count: int, covering_ids: np.ndarray, samples: Samples, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids (b,) of the next `count` samples in their order, and the scores (b,) float32.

    covering_ids: those that cover others already.
    """
    covering = _rows_of(parts, covering_ids) if len(covering_ids) else None
    if len(parts) == 1:
        ((_, (ids, gains)),) = run_tasks(_select_at_once, [(parts[0], covering, samples.ignored, count)])
        num_points = len(samples.wanted)
        progress.advance(1)
    else:
        others = np.setdiff1d(samples.wanted, covering_ids, assume_unique=True)
        share = greedi.share_of(samples.embedded, others, count)
        ids, gains, num_points = _select_in_parts(parts, covering, samples, count, share, progress)
    progress.advance(1)
    return ids, greedi.scores_of(gains, num_points, len(samples.wanted))


def _centre(parts: Sequence[Sequence[Slice]], ignored_ids: np.ndarray, num_samples: int) -> np.ndarray:
    """Return the mean (d,) float64 of the samples to be covered. Their sums are exact, so that no order matters."""
    shared = put(ignored_ids)
    totals = [total for _, total in run_tasks(_sum, [(slices, shared) for slices in parts])]
    return np.sum(totals, axis=0) / num_samples


def _sum(slices: Sequence[Slice], ignored_ids: np.ndarray) -> np.ndarray:
    return sum_of(read(slices).without(ignored_ids).embeddings)


def _select_at_once(
    part: Part, covering: greedi.Rows | None, ignored_ids: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids in the order of selection and their gains, from a pool of one partition."""
    torch.set_num_threads(1)
    rows = read_centred(part).without(ignored_ids)
    order, gains = greedi.select(rows, count, covering)
    return rows.sample_ids[order], gains


def _select_in_parts(
    parts: Sequence[Part],
    covering: greedi.Rows | None,
    samples: Samples,
    count: int,
    share: int,
    progress: Progress,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return what `_select_at_once` does, and the number of points that the choice was made to cover."""
    nominees: dict[int, greedi.Nominees] = {}
    points: dict[int, greedi.Rows] = {}
    num_candidates = greedi.num_candidates(len(parts))
    # Stored once, not once for each task.
    shared = tuple(map(put, (samples.ignored, samples.points, covering)))
    tasks = [(part, *shared, num_candidates, share) for part in parts]
    for position, (nominated, covered) in run_tasks(_nominate, tasks):
        nominees[position], points[position] = nominated, covered
        progress.advance(1)
    # In the order of the partitions, whichever ended first.
    in_order = range(len(parts))
    all_points = greedi.Rows.concatenate([points[part] for part in in_order])
    ((_, merged),) = run_tasks(_merge, [([nominees[part] for part in in_order], all_points, count, covering)])
    return merged.sample_ids, merged.gains, len(all_points.sample_ids)


def _nominate(
    part: Part,
    ignored_ids: np.ndarray,
    point_ids: np.ndarray,
    covering: greedi.Rows | None,
    num_candidates: int,
    share: int,
) -> tuple[greedi.Nominees, greedi.Rows]:
    torch.set_num_threads(1)
    rows = read_centred(part).without(ignored_ids)
    return greedi.nominate(rows, num_candidates, share, covering), rows.among(point_ids)


def _merge(
    nominees: Sequence[greedi.Nominees], points: greedi.Rows, count: int, covering: greedi.Rows | None
) -> greedi.Merged:
    torch.set_num_threads(1)
    return greedi.merge(nominees, points, count, covering)


def _rows_of(parts: Sequence[Part], sample_ids: np.ndarray) -> greedi.Rows:
    """Return those samples of the pool, in the order of their ids."""
    wanted = put(sample_ids)
    rows = dict(run_tasks(_read_among, [(part, wanted) for part in parts]))
    return greedi.Rows.concatenate([rows[position] for position in range(len(parts))])


def _read_among(part: Part, sample_ids: np.ndarray) -> greedi.Rows:
    return read_centred(part).among(sample_ids)


def _measure(
    parts: Sequence[Part],
    points: np.ndarray,
    chosen_ids: np.ndarray,
    random_ids: np.ndarray,
    labelled_ids: np.ndarray,
    counts: Sequence[int],
) -> list[tuple[float, float]]:
    """Return how the first `counts` of the chosen and of the random samples, with the labelled, cover some points."""
    ends = sorted(set(counts))
    shared = put((points, *(_with_steps(ids, labelled_ids, ends) for ids in (chosen_ids, random_ids))))
    covered = np.zeros((2, len(ends), len(points)), np.uint16)
    for _, of_part in run_tasks(_cover, [(part, shared, len(ends)) for part in parts]):
        np.maximum(covered, of_part, out=covered)
    # Each step covers with the samples that it adds, so a coreset covers with all steps up to its own.
    means = np.maximum.accumulate(covered, axis=1).mean(axis=2, dtype=np.float64) / SIMILARITY_ONE
    return [(float(coreset), float(random)) for coreset, random in (means[:, ends.index(count)] for count in counts)]


def _with_steps(ids: np.ndarray, first_ids: np.ndarray, ends: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return `first_ids` and the first ids up to the last of `ends`, ascending, and the step that adds each.

    Step 0 adds first_ids and the ids before ends[0].
    """
    ids = ids[: ends[-1]]
    steps = np.concatenate([np.zeros(len(first_ids), np.int64), np.searchsorted(ends, np.arange(len(ids)), "right")])
    ids = np.concatenate([first_ids, ids])
    order = np.argsort(ids)
    return ids[order], steps[order]


def _cover(
    part: Part, shared: tuple[np.ndarray, tuple[np.ndarray, ...], tuple[np.ndarray, ...]], num_steps: int
) -> np.ndarray:
    """Return the similarity (2, steps, points) of each point to the nearest chosen and random sample in these rows."""
    torch.set_num_threads(1)
    points, *selections = shared
    embeddings, sample_ids, _ = read_centred(part)
    covered = np.zeros((2, num_steps, len(points)), np.uint16)
    for kind, (ids, steps) in enumerate(selections):
        here = (ids >= sample_ids[0]) & (ids <= sample_ids[-1])
        rows = np.searchsorted(sample_ids, ids[here])
        for step in np.unique(steps[here]):
            covered[kind, step] = highest_similarity(points, embeddings[rows[steps[here] == step]])
    return covered


def _write(run_dir: RunDir, pool: ScoredPool, ids: np.ndarray, scores: np.ndarray) -> ScoredPool:
    by_id = np.argsort(ids)
    shared = put((ids[by_id], by_id.astype(np.int32), scores[by_id]))
    targets = [run_dir.path("select", COVERAGE, filesystem.basename(path)) for path in pool.files]
    tasks = [(source, target, shared) for source, target in zip(pool.files, targets, strict=True)]
    for _ in run_tasks(_write_file, tasks):
        pass
    return replace(pool, files=tuple(targets), score=schema.SCORE, direction="high", rank=schema.RANK)


def _write_file(source: str, target: str, selected: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    rows = filesystem.read_table(source, [schema.SAMPLE_ID, schema.PSEUDO_LABEL])
    sample_ids = rows[schema.SAMPLE_ID].to_numpy()
    ranks, scores = np.full(len(sample_ids), UNRANKED, np.int32), np.zeros(len(sample_ids), np.float32)
    ids, ranks_of_ids, scores_of_ids = selected
    here = slice(*np.searchsorted(ids, [sample_ids[0], sample_ids[-1] + 1]))
    places = np.searchsorted(sample_ids, ids[here])
    ranks[places], scores[places] = ranks_of_ids[here], scores_of_ids[here]
    rows = rows.append_column(schema.SCORE, pa.array(scores)).append_column(schema.RANK, pa.array(ranks))
    filesystem.write_table(target, rows)
